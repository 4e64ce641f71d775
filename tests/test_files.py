"""Files are written whole or not at all; reading a file never runs code in it."""

import os
import pickle
import re
import stat
import subprocess
import sys
import tempfile
import threading
import zipfile

import pytest
import torch
from helpers import full_disk

from utils import files
from utils.errors import UserError


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


# --- writing -------------------------------------------------------------------------------------------------


def test_a_write_makes_folders_and_leaves_one_file(tmp_path):
    path = tmp_path / "new" / "deep" / "x.pt"
    with files.atomic_write(path) as aside:
        assert aside.parent == path.parent and aside.suffix == ".pt" and not path.exists()
        aside.write_text("whole")
    assert path.read_text() == "whole" and listing(path.parent) == ["x.pt"]


@pytest.mark.parametrize("failure", [RuntimeError("a mistake"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, failure):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(type(failure)) as caught, files.atomic_write(path) as aside:
        aside.write_text("half")
        raise failure
    assert caught.value is failure
    assert path.read_text() == "old" and listing(tmp_path) == ["x.txt"]


def test_a_reader_sees_the_old_file_until_the_new_is_whole(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with files.atomic_write(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_bytes_are_on_disk_before_the_name(tmp_path, monkeypatch):
    """Otherwise a power cut could leave an empty file under the new name."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args)))
    files.save(torch.zeros(3), tmp_path / "x.pt")
    assert calls == ["fsync", "replace", "fsync"] and torch.equal(files.load(tmp_path / "x.pt"), torch.zeros(3))


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    script = ("import os, sys; sys.modules['torch'] = None.__class__\n"  # slow to import, and not needed here
              "from utils.files import atomic_write\n"
              f"with atomic_write({str(path)!r}) as aside:\n    aside.write_text('half'); os._exit(9)\n")
    assert subprocess.run([sys.executable, "-c", script], cwd=files.REPOSITORY, check=False).returncode == 9
    assert path.read_text() == "old"


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    path = tmp_path / "x.pt"
    left = tmp_path / ".x.pt.datm-abcd_123.pt"
    foreign = [".x.pt.abcd_123.pt", ".x.pt.original.pt", ".y.pt.datm-abcd_123.pt"]
    for name in (left, *foreign):
        (tmp_path / name).write_text("half")
    os.mkfifo(tmp_path / ".x.pt.datm-pipe_123.pt")  # a pipe that nobody reads: opening it would block
    with files.atomic_write(path) as aside:
        aside.write_text("first")
        assert not left.exists()
        with files.atomic_write(path) as other:  # like another process at the same time
            assert aside.exists() and other.name.startswith(".x.pt.datm-")
            other.write_text("second")
    assert path.read_text() == "first" and listing(tmp_path) == sorted([*foreign, ".x.pt.datm-pipe_123.pt", "x.pt"])


def test_a_file_that_is_taken_for_abandoned_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    real, made = tempfile.mkstemp, []

    def mkstemp(**options):
        handle, name = real(**options)
        made.append(name)
        if len(made) == 1:
            os.unlink(name)
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", mkstemp)
    files.save(torch.ones(2), tmp_path / "x.pt")
    assert len(made) == 2 and files.load(tmp_path / "x.pt").tolist() == [1, 1] and listing(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_file_is_as_readable_as_the_user_makes_files(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.save(torch.zeros(1), tmp_path / "x.pt")
        assert os.umask(umask) == umask  # the umask is restored
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.pt").stat().st_mode) == mode


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*/file/below/x\.pt: .*; give a folder"):
        files.save(1, tmp_path / "file" / "below" / "x.pt")
    with pytest.raises(UserError, match="cannot write"):
        files.save(1, tmp_path / ("long" * 100 + ".pt"))
    assert listing(tmp_path) == ["file"]


@pytest.mark.parametrize("text", [
    True, False])
def test_a_full_disk_is_refused_and_leaves_the_old_file(tmp_path, text):
    path = tmp_path / "x.pt"
    files.save(torch.arange(3), path)
    with full_disk(20_000), pytest.raises(UserError, match="cannot write .*free space or give another folder"):
        if text:
            with files.atomic_write(path) as aside:
                aside.write_text("x" * 1_000_000)
        else:
            files.save(torch.zeros(1_000_000), path)
    assert torch.equal(files.load(path), torch.arange(3)) and listing(tmp_path) == ["x.pt"]


# --- reading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_what_was_saved_is_loaded(tmp_path, mmap, zipped):
    value = [[torch.arange(6.0).view(2, 3), torch.tensor(3)], {"a": 1.5, "b": "text", "c": None}]
    path = tmp_path / "x.pt"
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    loaded = files.load(path, mmap=mmap)
    assert loaded[1] == value[1] and all(torch.equal(a, b) for a, b in zip(loaded[0], value[0]))


def is_mapped(path):
    with open("/proc/self/maps") as maps:
        return any(line.rstrip().endswith(str(path)) for line in maps)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux lists a process's mapped files")
def test_mmap_leaves_the_bytes_on_disk(tmp_path):
    path = tmp_path / "x.pt"
    files.save([torch.arange(100_000), torch.arange(5)], path)
    copied = files.load(path)
    assert not is_mapped(path)
    mapped = files.load(path, mmap=True)
    assert is_mapped(path) and torch.equal(mapped[0], copied[0])
    mapped[1].add_(1)  # a private mapping: writing to it does not write to the file
    assert torch.equal(files.load(path)[1], torch.arange(5))
    del mapped
    assert not is_mapped(path)


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: [[torch.zeros(2), bomb]]])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_refused_and_not_run(tmp_path, bomb, form, wrap, mmap):
    path = tmp_path / "x.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(wrap(bomb)))
    else:
        torch.save(wrap(bomb), path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"x\.pt .*refused|x\.pt is damaged or not a torch file"):
        files.load(path, mmap=mmap)
    assert not bomb.went_off
    if form != "pickle":  # the bomb is live: it goes off if torch is told to trust the file
        torch.load(path, weights_only=False)
        assert bomb.went_off


def test_the_refusal_of_code_says_so(tmp_path, bomb):
    torch.save(bomb, tmp_path / "x.pt")
    with pytest.raises(UserError, match="image file .* holds more than tensors .* was refused; save plain tensors"):
        files.load(tmp_path / "x.pt", "image file")


def test_a_missing_file_is_refused_by_what_it_should_be(tmp_path):
    with pytest.raises(UserError, match="image file .*/x.pt does not exist; give"):
        files.load(tmp_path / "x.pt", "image file")
    with pytest.raises(UserError, match="expert file"):
        files.load(tmp_path, "expert file")


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("zipped", [
    True, False])
def test_a_file_cut_anywhere_is_refused(tmp_path, zipped, mmap):
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save([[torch.arange(2000.0), torch.zeros(3)]], whole, _use_new_zipfile_serialization=zipped)
    content = whole.read_bytes()
    for length in {*range(0, 600, 7), *range(600, len(content), 397), len(content) - 1, len(content) - 30}:
        cut.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"expert file .*cut\.pt") as refusal:
            files.load(cut, "expert file", mmap=mmap)
        assert "\n" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("content", [
    b"", b"\n", b"hello, this is text\n", b"PK\x03\x04 and no zip", b"\x80\x04K\x05.",
    b"\x80\x02.", b"text\n",
    b"}q\x00.",
    bytes(range(256)) * 4, b"\x89PNG\r\n\x1a\n" + bytes(50), b"K" * 500, b"(" * 5000, b"\x80\x02]q\x00(e."])
def test_a_file_of_something_else_is_refused(tmp_path, content, mmap):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt") as refusal:
        files.load(path, mmap=mmap)
    assert "\n" not in str(refusal.value)


def test_a_zip_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "not torch")
    for mmap in (False, True):
        with pytest.raises(UserError, match=r"x\.pt"):
            files.load(path, mmap=mmap)


def test_a_pipe_or_folder_in_the_place_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in (("pipe", "not a regular file"), ("folder", "a folder")):
        with pytest.raises(UserError, match=kind):
            files.check_writable(tmp_path / name)
        with pytest.raises(UserError, match=kind):
            files.save(torch.zeros(1), tmp_path / name)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and (tmp_path / "folder").is_dir()
    assert listing(tmp_path) == ["folder", "pipe"]


def test_a_link_is_written_through_only_where_the_user_gave_it(tmp_path):
    """Others who can write to a run's folder or to the cache may have put links to any file there."""
    (tmp_path / "target").write_text("anybody's")
    link = tmp_path / "link"
    for write in (lambda: files.append_json(link, 1), lambda: files.cut_lines(link, 0)):
        link.symlink_to(tmp_path / "target")
        with pytest.raises(UserError, match="cannot write .*/link: link is a link or no file; move it away"):
            write()
        link.unlink()
    link.symlink_to(tmp_path / "target")
    files.write_text(link, "ours")
    assert (tmp_path / "target").read_text() == "anybody's" and link.read_text() == "ours" and not link.is_symlink()
    link.unlink()
    link.symlink_to(tmp_path / "target")
    files.write_text(files.resolved(link), "the user's")
    assert link.is_symlink() and (tmp_path / "target").read_text() == "the user's"


def test_of_a_link_to_a_folder_only_the_link_is_removed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "kept").touch()
    (tmp_path / "Normal").symlink_to("disk")
    for name in ("Normal", "disk", "absent"):
        files.remove(tmp_path / name)
        assert listing(tmp_path) == (["disk"] if name == "Normal" else [])


ODD = {"a sparse tensor": torch.eye(2).to_sparse(), "a tensor without values": torch.zeros(2, device="meta"),
       "complex numbers": torch.tensor(0.01j)}


@pytest.mark.parametrize("kind", ODD)
def test_a_tensor_that_arithmetic_does_not_take_is_refused(tmp_path, kind):
    torch.save([{"a": torch.zeros(2)}, [ODD[kind]]], tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"x.pt holds {kind}; save plain tensors"):
        files.load(tmp_path / "x.pt")


@pytest.mark.parametrize("text, problem", [
    ("a: &a [1, 1]\nb: [*a, *a]\n", "holds the alias .a in line 2; write its value there"),
    ("a: 1\na: 2\n", "gives 'a' 2 times; keep one"), ("[" * 5000, "is not YAML"), ("- 1\n", "is not a list of options"),
    ("a: " + "1" * 5000, "is not YAML"), (b"a: \xff\n", "is not YAML"), ("pipe", "is not a list of options"),
    ("folder", "it is a folder or a device")])
def test_a_yaml_of_others_is_refused_in_one_line_and_soon(tmp_path, text, problem):
    path = tmp_path / "config.yaml"
    if text == "pipe":  # nobody writes to it
        os.mkfifo(path)
    elif text == "folder":
        path.mkdir()
    else:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=problem):
        files.read_config(path)


def test_a_text_comes_from_a_pipe_too():
    """As given by the shell's <(…)."""
    reader, writer = os.pipe()
    threading.Timer(0.2, lambda: (os.write(writer, "α: 1\n".encode()), os.close(writer))).start()
    assert files.read_text(f"/dev/fd/{reader}") == "α: 1\n"
    os.close(reader)


# --- other people's files beside ours ------------------------------------------------------------------------


def test_an_evaluation_leaves_the_files_of_others(call, toy, tmp_path):
    foreign = [".r.original", "r.unfinished_notes.txt", "r.unfinished.old", ".r.json.12345678"]
    for name in foreign:
        (tmp_path / name).write_text("mine")
    call("distill/baseline.py", *toy.evaluate, f"--json={tmp_path / 'r'}")
    assert listing(tmp_path) == sorted([*foreign, "r"])


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "Normal"])
def test_a_link_in_a_runs_folder_leads_to_no_file_and_to_another_disk(call, toy, toy_experts, tmp_path, name):
    """Links to files are refused, as others may have put them there; `Normal` may link to a folder on another disk."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    run = tmp_path / "ImageFolder/2/ConvNetD1W4/run"
    run.mkdir(parents=True)
    (run / name).symlink_to(tmp_path / "mine" / ("" if name == "Normal" else "file"))
    done = call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}",
                "--Iteration=0", "--run_name=run", "--wandb=disabled", expect=0 if name == "Normal" else 2)
    assert (tmp_path / "mine" / "file").read_text() == "mine" and (run / name).is_symlink()
    if name == "Normal":
        assert "distilled.safetensors" in listing(tmp_path / "mine")
    else:
        assert re.search(rf"cannot write .*/run.*: {name} is a link or no file", done.stderr)
