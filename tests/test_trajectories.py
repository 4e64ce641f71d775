"""Expert files: snapshots are read without loading whole files, experts are visited in the published order."""

import itertools
import subprocess
import sys

import pytest
import torch

from buffer.manifests import check_same_on_ranks, made_by, manifests_of, run_file, unfinished_run
from buffer.trajectories import Buffer, as_expert
from utils import files
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.networks import build_network
from utils.parameters import FlatModel
from utils.program import ranks


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return FlatModel(build_network("ConvNetD1W4", 1, 3, (8, 8)))


def write(folder, model, sizes, epochs=2):
    """Writes files of `sizes` experts; all parameters of a snapshot equal 100·expert + epoch."""
    number = 0
    for file, size in enumerate(sizes):
        experts = []
        for _ in range(size):
            values = 100 * number + torch.arange(epochs + 1.0)
            experts.append(as_expert(model, values[:, None].expand(-1, model.num_parameters).contiguous()))
            number += 1
        files.save(experts, folder / f"replay_buffer_{file}.pt")


def test_snapshots_are_found_through_the_files(model, tmp_path):
    write(tmp_path, model, [2, 1, 3])
    buffer = Buffer(tmp_path, model)
    assert (len(buffer), buffer.epochs) == (6, 2)
    for number in range(6):
        for epoch in (0, 1, 2, -1):
            theta = buffer.snapshot(number, epoch)
            assert theta.shape == (model.num_parameters,) and (theta == 100 * number + epoch % 3).all()
    assert len(Buffer(tmp_path, model, max_files=2)) == 3 and len(Buffer(tmp_path, model, max_experts=1)) == 3


def test_files_of_one_command_are_one_command_for_all_experts(model, tmp_path):
    """However often the command was run, and whatever its --num_experts was."""
    write(tmp_path, model, [2, 1, 1, 1])
    for file, (seed, asked, held) in enumerate([(0, 3, (0, 1)), (0, 3, (2,)), (0, 9, (3,)), (5, 1, (4,))]):
        save_manifest(tmp_path, file, seed, asked, held, f"moved/{file}")
    assert made_by(tmp_path) == [
        {"model": "ConvNetD1W4", "buffer_path": "moved/3", "seed": 0, "num_experts": 4},
        {"model": "ConvNetD1W4", "buffer_path": "moved/3", "seed": 5, "num_experts": 1}]


def test_experts_that_were_gathered_from_several_folders_keep_these(model, tmp_path):
    """In a folder that holds others, the same command trains experts of other numbers, which are other experts."""
    write(tmp_path, model, [1, 1, 1])
    for file, (seed, held) in enumerate([(0, (0,)), (0, (1,)), (1, (0,))]):
        save_manifest(tmp_path, file, seed, 1, held, f"parts/{seed}")
    assert made_by(tmp_path) == [
        {"model": "ConvNetD1W4", "buffer_path": "parts/0", "seed": 0, "num_experts": 2},
        {"model": "ConvNetD1W4", "buffer_path": "parts/1", "seed": 1, "num_experts": 1}]


def test_ranks_that_read_other_experts_are_refused(model, tmp_path, monkeypatch):
    write(tmp_path, model, [1, 1])
    save_manifest(tmp_path, 0, 0, 1, (0,), "x")
    of_first = []
    monkeypatch.setattr(ranks, "size", lambda: 2)
    monkeypatch.setattr(ranks, "rank", lambda: 0)
    monkeypatch.setattr(ranks, "gather", lambda own: of_first.append(own[0]) or {0: of_first[0], 1: own[0]})
    check_same_on_ranks(tmp_path)
    check_same_on_ranks(tmp_path)
    save_manifest(tmp_path, 0, 1, 1, (0,), "x", checksum=64 * "1")
    for refused in (lambda: check_same_on_ranks(tmp_path), lambda: check_same_on_ranks(tmp_path, max_files=1)):
        with pytest.raises(UserError, match="ranks 0 and 1 read different experts"):
            refused()


def save_manifest(folder, file, seed, asked, numbers, buffer_path, checksum=64 * "0"):
    files.save_config(folder / f"replay_buffer_{file}.yaml", {
        "model": "ConvNetD1W4", "buffer_path": buffer_path, "seed": seed, "num_experts": asked,
        "experts": [{"number": number} for number in numbers], "sha256": checksum})


def test_a_manifest_or_run_that_ends_too_early_is_refused(model, tmp_path):
    """As an interrupted copy leaves them; what was cut off would count as unknown, and not be checked."""
    write(tmp_path, model, [1])
    files.write_text(tmp_path / "replay_buffer_0.yaml", "model: ConvNetD1W4\nzca: true\nexperts: []\n")
    for read in (lambda: manifests_of(tmp_path), Buffer(tmp_path, model).verify):
        with pytest.raises(UserError, match="ends too early.*copy it again"):
            read()
    files.write_text(run_file(tmp_path), "num_experts: 1\nfirst_expert: 0\n")
    with pytest.raises(UserError, match="ends too early.*put it back"):
        unfinished_run(tmp_path)


def test_the_walk_takes_every_expert_once_file_by_file(model, tmp_path):
    write(tmp_path, model, [2, 1, 3])
    buffer = Buffer(tmp_path, model)
    orders = [buffer.walk_order(torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert all(sorted(order) == list(range(6)) for order in orders) and len({tuple(order) for order in orders}) > 5
    file_of = [0, 0, 1, 2, 2, 2]
    for order in orders:
        visited = [file_of[number] for number in order]
        changes = sum(one != other for one, other in itertools.pairwise(visited))
        assert changes == 2  # the experts of a file follow one another


def test_the_epochs_are_those_that_every_expert_has(model, tmp_path):
    write(tmp_path, model, [1], epochs=4)
    files.save([as_expert(model, torch.zeros(3, model.num_parameters))], tmp_path / "replay_buffer_1.pt")
    assert Buffer(tmp_path, model).epochs == 2


READ_TWO = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from buffer.trajectories import Buffer
from utils.memory import peak
from utils.networks import build_network
from utils.parameters import FlatModel, torch
model = FlatModel(build_network("ConvNetW128", 3, 10, (32, 32)))
before = peak(torch.device("cpu"))  # not of the process that began this one, as getrusage says
buffer = Buffer(Path(sys.argv[1]), model)
buffer.snapshot(1, 3), buffer.snapshot(1, 5)
print(int(peak(torch.device("cpu")) - before))
"""


def test_two_snapshots_are_read_not_the_file(tmp_path):
    """Reading two snapshots, 1.3 MB each, of a 100 MB file must take far less memory than the file."""
    big = FlatModel(build_network("ConvNetW128", 3, 10, (32, 32)))
    snapshots = torch.zeros(40, big.num_parameters)
    files.save([as_expert(big, snapshots), as_expert(big, snapshots + 1)], tmp_path / "replay_buffer_0.pt")
    size = (tmp_path / "replay_buffer_0.pt").stat().st_size
    assert size > 90e6
    done = subprocess.run([sys.executable, "-c", READ_TWO, str(tmp_path), str(REPOSITORY)], capture_output=True,
                          text=True, check=True)
    assert 0 < int(done.stdout) < size / 4
