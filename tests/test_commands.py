"""The real command lines at a tiny size, run from the repository's root and from inside the programs' folders."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from helpers import TOY_EXPERTS, check_refusal

from buffer.experts import SavedEpochs, train_expert
from buffer.manifests import buffer_folder, check_same_kind, made_by, run_file
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.evaluate.coreset import CORESETS, expert_features
from distill.initialize import expert_labels
from distill.result_files import Score
from utils.config import BaselineConfig, BufferConfig, DistillConfig, EvaluationConfig, TeslaConfig, make
from utils.data.datasets import load_dataset
from utils.files import REPOSITORY, read_config, save_config
from utils.networks import build_network
from utils.parameters import FlatModel, flatten
from utils.program.seeds import generator, seeded

ENTRIES = {"buffer/buffer_FTD.py": BufferConfig, "distill/DATM.py": DistillConfig,
           "distill/DATM_tesla.py": TeslaConfig, "distill/evaluation.py": EvaluationConfig,
           "distill/baseline.py": BaselineConfig}


def load(path, **options):
    return torch.load(path, weights_only=True, **options)


def thetas(folder):
    """The trajectories of all experts in a folder, in file order: a list of [E+1, P]."""
    return [torch.stack([flatten(snapshot) for snapshot in expert])
            for path in sorted(folder.glob("replay_buffer_*.pt")) for expert in load(path)]


def equal_experts(ones, others):
    return len(ones) == len(others) and all(torch.equal(one, other) for one, other in zip(ones, others))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def load_any(path):
    """The tensor in a .pt file, or the images in a safetensors file."""
    return DistilledSet.load(path).images if path.suffix == ".safetensors" else load(path)


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- experts -------------------------------------------------------------------------------------------------


def test_expert_files_have_the_published_names_and_form(experts):
    folder = experts / "MiniFashion" / "ConvNetD1W4"
    assert names(folder) == ["replay_buffer_0.jsonl", "replay_buffer_0.pt", "replay_buffer_0.yaml",
                             "replay_buffer_1.jsonl", "replay_buffer_1.pt", "replay_buffer_1.yaml"]
    shapes = [parameter.shape for parameter in build_network("ConvNetD1W4", 1, 10, (28, 28)).parameters()]
    for number, count in ((0, 2), (1, 1)):
        file = load(folder / f"replay_buffer_{number}.pt")
        assert type(file) is list and len(file) == count
        for expert in file:
            assert type(expert) is list and len(expert) == 3 + 1
            for snapshot in expert:
                assert type(snapshot) is list and [tensor.shape for tensor in snapshot] == shapes
                assert all(type(tensor) is torch.Tensor and tensor.device.type == "cpu"
                           and tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in snapshot)


def test_experts_differ_move_and_learn(experts):
    """Each snapshot is a copy (on a CPU the published code saves the same tensors each time), and accuracy rises."""
    trajectories = thetas(experts / "MiniFashion" / "ConvNetD1W4")
    starts = torch.stack([trajectory[0] for trajectory in trajectories])
    assert len(starts.unique(dim=0)) == 3
    data = load_dataset("MiniFashion", "", zca=True)
    model = FlatModel(build_network("ConvNetD1W4", 1, 10, (28, 28)))
    for trajectory in trajectories:
        assert trajectory.isfinite().all() and len(trajectory.unique(dim=0)) == 4
        with torch.no_grad():
            right = [(model(theta, data.test_images).argmax(1) == data.test_labels).float().mean()
                     for theta in trajectory[[0, -1]]]
        assert right[0] < 0.3 < right[1]


def test_buffer_from_inside_its_folder_with_relative_paths(run, toy, toy_experts, tmp_path):
    """The same seed trains bit-identical experts in another process and another working directory."""
    inside = REPOSITORY / "buffer"
    arguments = [argument for argument in toy.train if not argument.startswith("--data_path")]
    done = run("buffer_FTD.py", *arguments, "--data_path", os.path.relpath(toy.data, inside),
               "--buffer_path", os.path.relpath(tmp_path, inside), cwd=inside)
    folder = tmp_path / TOY_EXPERTS
    assert names(folder) == ["replay_buffer_0.jsonl", "replay_buffer_0.pt", "replay_buffer_0.yaml",
                             "replay_buffer_1.jsonl", "replay_buffer_1.pt", "replay_buffer_1.yaml"]
    assert equal_experts(thetas(folder), thetas(toy_experts / TOY_EXPERTS))
    assert "3 experts of 3 epochs: ConvNetD1W4 on ImageFolder" in done.stdout
    assert "expert 2 epoch 3/3 100 %" in done.stderr


def test_experts_of_another_length_are_added_with_a_note(call, toy, tmp_path):
    one = ["buffer/buffer_FTD.py", *toy.train, "--num_experts=1", f"--buffer_path={tmp_path}"]
    call(*one)
    done = call(*one, "--train_epochs=2")
    assert "holds 1 expert already" in done.stdout and "some of 3 epochs, and these have 2; a" in done.stderr
    for manifest in tmp_path.rglob("*.yaml"):
        manifest.unlink()  # as published
    assert "epochs, and" not in call(*one).stderr


def test_another_seed_trains_other_experts(call, toy, toy_experts, tmp_path):
    call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", "--seed=1")
    for one, other in zip(thetas(tmp_path / TOY_EXPERTS), thetas(toy_experts / TOY_EXPERTS)):
        assert not any(map(torch.equal, one, other))


def test_the_seed_decides_the_order_and_the_augmentation_too(toy_data, tmp_path):
    """From the same initialisation, another seed trains a different expert."""
    ends = []
    with mock.patch("buffer.experts.seeded", lambda *address: seeded("the same for all")):
        for number, seed in enumerate((0, 0, 1)):
            config = make(BufferConfig, model="ConvNetD1W4", train_epochs=1, seed=seed, rho_max=0.01, rho_min=0.01)
            saved = SavedEpochs(tmp_path / str(number))
            train_expert(config, toy_data, 0, saved)
            ends.append(saved.snapshots())
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0][0], ends[2][0])
    assert not torch.equal(ends[0][1], ends[2][1])


def test_a_second_buffer_run_goes_on_with_the_next_file_and_other_experts(call, toy, toy_experts, tmp_path):
    first = [*toy.train, f"--buffer_path={tmp_path}", "--num_experts=2"]
    folder = tmp_path / TOY_EXPERTS
    call("buffer/buffer_FTD.py", *first)
    before = contents(folder)
    call("buffer/buffer_FTD.py", *first, "--num_experts=1")
    assert names(folder) == ["replay_buffer_0.jsonl", "replay_buffer_0.pt", "replay_buffer_0.yaml",
                             "replay_buffer_1.jsonl", "replay_buffer_1.pt", "replay_buffer_1.yaml"]
    assert before.items() <= contents(folder).items()
    # A run of two experts and a run of one give the same experts as one run of three.
    assert equal_experts(thetas(folder), thetas(toy_experts / TOY_EXPERTS))


@pytest.mark.parametrize("options", [["--rho_max=0", "--rho_min=0"], ["--dsa=False"], ["--adaptive=False"],
                                     ["--mom=0.9"], ["--l2=0.1"], ["--alpha=0"], ["--lr_teacher=0.05"],
                                     ["--batch_train=5"], ["--zca=False"], ["--dsa_strategy=flip"]])
def test_every_option_of_the_training_changes_the_experts(call, toy, toy_experts, tmp_path, options):
    call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", "--num_experts=1", "--train_epochs=1",
         *options)
    usual = thetas(toy_experts / TOY_EXPERTS)[0]
    (other,) = thetas(tmp_path / TOY_EXPERTS)
    assert torch.equal(other[0], usual[0]) and not torch.equal(other[1], usual[1])  # the same initialisation


@pytest.mark.parametrize("config_type", [BufferConfig, DistillConfig, BaselineConfig])
@pytest.mark.parametrize("options, folder", [
    ({"dataset": "CIFAR10", "zca": True}, "CIFAR10/ConvNet"),
    ({"dataset": "CIFAR10", "zca": False}, "CIFAR10_NO_ZCA/ConvNet"),
    ({"dataset": "CIFAR100", "zca": True}, "CIFAR100/ConvNet"),
    ({"dataset": "CIFAR100", "zca": False, "model": "ConvNetD4"}, "CIFAR100_NO_ZCA/ConvNetD4"),
    ({"dataset": "Tiny", "zca": True, "model": "ConvNetD4"}, "Tiny/ConvNetD4"),
    ({"dataset": "Tiny", "zca": False}, "Tiny/ConvNet"),
    ({"dataset": "MiniFashion", "zca": False}, "MiniFashion/ConvNet"),
    ({"dataset": "ImageNet", "zca": False}, "ImageNet/imagenette/128/ConvNet"),
    ({"dataset": "ImageNet", "zca": True, "subset": "imagewoof", "res": 64}, "ImageNet/imagewoof/64/ConvNet")])
def test_buffer_folders_are_the_published(config_type, options, folder):
    config = make(config_type, buffer_path="/some/where", **options)
    assert str(buffer_folder(config)) == f"/some/where/{folder}"


# --- distillation of MiniFashion, with a config of the published form ----------------------------------------

TINY = ["--model=ConvNetD1W4", "--Iteration=4", "--eval_it=2", "--syn_steps=3", "--expert_epochs=1",
        "--max_start_epoch=2", "--epoch_eval_train=1", "--num_eval=2", "--skip_first_eva=False", "--device=cpu"]


@pytest.fixture(scope="module")
def distilled(run, experts, tmp_path_factory):
    """The folder of a finished run, its arguments, and the finished process."""
    logs = tmp_path_factory.mktemp("logs")
    arguments = ["--cfg", "configs/MiniFashion/ConvIN/IPC1.yaml", *TINY, f"--buffer_path={experts}",
                 f"--log_path={logs}", "--run_name=first"]
    done = run("distill/DATM.py", *arguments)
    return logs / "MiniFashion" / "1" / "ConvNetD1W4" / "first", arguments, done


def test_a_run_leaves_the_published_files(distilled):
    folder, _, done = distilled
    assert names(folder) == ["Normal", "checkpoint.pt", "config.yaml", "curves.png", "evolution.webp", "images.png",
                             "metrics.jsonl", "report.html", "report.safetensors", "result.json"]
    kinds = {"images": (10, 1, 28, 28), "labels": (10, 10), "lr": (), "images_zca": (10, 1, 28, 28)}
    tags = {path.name.removeprefix("lr_").removesuffix(".pt") for path in (folder / "Normal").glob("lr_*.pt")}
    assert {"best", "4"} <= tags <= {"best", "0", "2", "4"}
    assert names(folder / "Normal") == ["distilled.safetensors", *sorted(f"{kind}_{tag}.pt" for kind in kinds
                                                                         for tag in tags)]
    for tag in tags:
        for kind, shape in kinds.items():
            tensor = load(folder / "Normal" / f"{kind}_{tag}.pt")
            assert type(tensor) is torch.Tensor and tuple(tensor.shape) == shape and tensor.dtype == torch.float32
            assert tensor.isfinite().all() and not tensor.requires_grad and tensor.device.type == "cpu"
    for picture in ("images.png", "curves.png"):
        content = (folder / picture).read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000
    assert "Normal/distilled.safetensors " in done.stdout and "distil 4/4 100 %" in done.stderr


def test_images_zca_are_the_images_in_pixel_space(distilled):
    """`images_zca` are the set's images un-whitened; whitening them gives the images again."""
    normal = distilled[0] / "Normal"
    data = load_dataset("MiniFashion", "", zca=True)
    images, pixels = load(normal / "images_best.pt"), load(normal / "images_zca_best.pt")
    torch.testing.assert_close(pixels, data.space.whitening.invert(images))
    torch.testing.assert_close(data.space.whitening.apply(pixels), images, rtol=1e-3, atol=1e-3)


def test_the_best_set_is_that_of_the_best_iteration(distilled):
    folder = distilled[0]
    best = json.loads((folder / "result.json").read_text())["best"]
    scores = {line["iteration"]: line["scores"] for line in lines(folder / "metrics.jsonl") if "scores" in line}
    assert sorted(scores) == [0, 2, 4]
    means = {iteration: score[0]["mean"] for iteration, score in scores.items()}
    assert best["iteration"] == max(means, key=means.get) and best["scores"] == scores[best["iteration"]]
    for kind in ("images", "labels", "lr", "images_zca"):
        assert torch.equal(load(folder / "Normal" / f"{kind}_best.pt"),
                           load(folder / "Normal" / f"{kind}_{best['iteration']}.pt"))
    assert best["lr"] == float(load(folder / "Normal" / "lr_best.pt"))


def test_the_first_network_of_the_pool_decides_which_set_is_the_best_and_which_averaged_one(distil):
    means = iter([(0.5, 0.5), (0.5, 0.5), (0.6, 0.4), (0.3, 0.3), (0.6, 0.9), (0.7, 0.1)])

    def evaluate(*arguments, **options):
        return [Score(network, [mean]) for network, mean in zip(("ConvNetD1W4", "ConvNet"), next(means))]
    with mock.patch("distill.run_state.evaluate", evaluate):
        folder = distil("--eval_mode=C", "--ema")
    result = json.loads((folder / "result.json").read_text())
    logged = {(line["set"], line["iteration"]): line["scores"] for line in lines(folder / "metrics.jsonl")
              if "scores" in line}
    for best, name, iteration, reached in (("best", "Normal", 2, [0.6, 0.4]), ("best_ema", "EMA", 4, [0.7, 0.1])):
        assert result[best]["iteration"] == iteration and result[best]["scores"] == logged[name, iteration]
        assert [score["mean"] for score in result[best]["scores"]] == reached


def test_the_metrics_tell_every_iteration(distilled):
    folder = distilled[0]
    steps = [line for line in lines(folder / "metrics.jsonl") if "loss" in line]
    assert [line["iteration"] for line in steps] == [0, 1, 2, 3]
    keys = {"iteration", "loss", "updated", "held", "lr", "start_epoch", "bound", "expert"}
    assert all(set(line) == keys for line in steps)
    assert all(0 <= line["start_epoch"] < line["bound"] == 2 and line["expert"] in (0, 1, 2) for line in steps)
    assert steps[-1]["lr"] == float(load(folder / "Normal" / "lr_4.pt"))
    assert sorted(line["expert"] for line in steps[:3]) == [0, 1, 2]  # one round visits every expert


def test_the_result_says_what_was_measured_on_what(distilled):
    result = json.loads((distilled[0] / "result.json").read_text())
    for score in result["best"]["scores"]:
        assert score["network"] == "ConvNetD1W4" and len(score["accuracies"]) == 2
        assert score["mean"] == pytest.approx(np.mean(score["accuracies"]))
        assert score["std"] == (pytest.approx(np.std(score["accuracies"])) if len(score["accuracies"]) > 1 else None)
    assert result["chosen_on"] == "test" and "best on the test images" in result["summary"]
    assert result["fixed_loss"]["after"] != result["fixed_loss"]["before"]
    assert result["environment"]["torch"] == torch.__version__
    commit = result["environment"].get("commit", "")  # known in a git clone only
    assert bool(commit) == (REPOSITORY / ".git").exists() and re.fullmatch(r"([0-9a-f]{12}\+?)?", commit)


def test_the_saved_config_is_what_was_asked_for(distilled):
    saved = yaml.safe_load((distilled[0] / "config.yaml").read_text())
    assert saved["data_path"] == "dataset" and saved["syn_steps"] == 3 and saved["lr_lr"] == 1e-5
    assert saved["model"] == "ConvNetD1W4" and saved["ipc"] == 1 and saved["seed"] == 0


def test_distillation_from_inside_its_folder_is_the_same_to_the_bit(run, experts, distilled, tmp_path):
    inside = REPOSITORY / "distill"
    run("DATM.py", "--cfg", "../configs/MiniFashion/ConvIN/IPC1.yaml", *TINY, "--run_name", "inside",
        "--buffer_path", os.path.relpath(experts, inside), "--log_path", os.path.relpath(tmp_path, inside), cwd=inside)
    one, other = distilled[0] / "Normal", tmp_path / "MiniFashion" / "1" / "ConvNetD1W4" / "inside" / "Normal"
    assert names(one) == names(other)
    assert all(torch.equal(load_any(one / name), load_any(other / name)) for name in names(one))


def test_a_finished_run_is_not_run_again(call, distilled):
    folder, arguments, _ = distilled
    before = contents(folder)
    done = call("distill/DATM.py", *arguments)
    assert "is finished, after 4 iterations (best on the test images" in done.stdout and "--run_name" in done.stdout
    assert contents(folder) == before


# Runs each line of stdin as a command, all in one process; prints its output and the heavy modules imported so far.
WITHOUT_TORCH = """
import contextlib, io, json, runpy, shlex, sys
heavy = "torch", "torchvision", "kornia", "wandb", "matplotlib", "scipy", "sympy", "jinja2", "PIL"
for line in sys.stdin.read().splitlines():
    sys.argv, out = shlex.split(line), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
        runpy.run_path(sys.argv[0], run_name="__main__")
    print(json.dumps([out.getvalue(), [name for name in heavy if name in sys.modules]]))
"""


def test_help_and_refusals_need_no_torch(environment, distilled, tmp_path):
    """Importing torch takes seconds; a misspelt option should be reported at once."""
    folder, arguments, _ = distilled
    none = f"--buffer_path={tmp_path / 'none'}"
    stopped, begun = tmp_path / "stopped" / folder.relative_to(folder.parents[3]), tmp_path / "MiniFashion" / "ConvNet"
    stopped.mkdir(parents=True)
    shutil.copy(folder / "config.yaml", stopped)
    save_config(run_file(begun), {"seed": 5, "num_experts": 1, "first_expert": 0, "threads": 1})
    commands = {  # command → phrase in its output
        **{f"{script} --help": "--help" for script in [*ENTRIES, *(
            path for path in sorted((REPOSITORY / "scripts").rglob("*.py")) if "entry(main)" in path.read_text())]},
        f"buffer/buffer_FTD.py --rho_max=1 {none}": "give both the same value",
        f"buffer/buffer_FTD.py --model=ConvNetD9 {none}": "unknown network",
        f"buffer/buffer_FTD.py --dataset=MiniFashion --buffer_path={tmp_path}": "unfinished run of other options: seed",
        "distill/DATM.py --cfg nowhere.yaml": "No such file",
        shlex.join(["distill/DATM.py", *arguments, f"--log_path={tmp_path / 'stopped'}", "--lr_img=7"]):
            "holds a run of other options: lr_img",
        shlex.join(["distill/DATM.py", *arguments, none]): "no replay_buffer_*.pt in",
        shlex.join(["distill/DATM_tesla.py", *arguments, "--dataset=CIFAR"]): "unknown dataset",
        "distill/evaluation.py": "--data_dir is missing",
        f"distill/evaluation.py --data_dir={tmp_path}/no.safetensors --num_eval=1": "does not exist",
        f"distill/baseline.py --pick=herding {none}": "no replay_buffer_*.pt in",
        f"scripts/report.py {tmp_path}": "is not a run's folder",
        f"scripts/summary.py {tmp_path}/no.json": "No such file",
        f"scripts/inspect_buffer.py {tmp_path}": "no replay_buffer_*.pt in",
        shlex.join(["scripts/sweep.py", *arguments]): "give several to one at least",
        f"scripts/export.py {tmp_path} --card": "distilled set",
        "scripts/measure/benchmark.py --shape=cpu_w3": "invalid choice",
        "scripts/measure/benchmark.py --rounds=0": "give a whole number above 0"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], input="\n".join(commands), text=True, cwd=REPOSITORY,
                          capture_output=True, env=os.environ | environment)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    for (command, phrase), (out, imported) in zip(commands.items(), said, strict=True):
        assert phrase in out and not imported, f"{command}\n{out}\n{imported}"


def test_a_run_name_of_other_options_is_refused_with_what_differs(call, distilled):
    folder, arguments, _ = distilled
    before = contents(folder)
    done = call("distill/DATM.py", *arguments, "--lr_img=7", "--seed=3", expect=2)
    assert "holds a finished run of other options: " in done.stderr
    different = done.stderr.split("other options: ")[1].split("; give another")[0]
    assert different == "seed (0 there, 3 here), lr_img (100.0 there, 7.0 here)"
    assert contents(folder) == before


def test_device_project_and_native_size_do_not_make_another_run(call, distilled, experts):
    done = call("distill/DATM.py", *distilled[1], "--device=auto", "--project=mine", "--res=28")
    assert "is finished" in done.stdout
    (kind,) = made_by(experts / "MiniFashion" / "ConvNetD1W4")
    check_same_kind(experts / "MiniFashion" / "ConvNetD1W4", make(BufferConfig, **kind | {"res": 28}))


# --- evaluation and baseline ---------------------------------------------------------------------------------


def set_files(normal, start=None):
    paths = (normal / f"{kind}_best.pt" for kind in ("images", "labels", "lr"))
    paths = (os.path.relpath(path, start) for path in paths) if start else paths
    return [f"--{option}={path}" for option, path in zip(("data_dir", "label_dir", "lr_dir"), paths)]


def check_result(path, networks, count, images):
    result = json.loads(path.read_text())
    assert [score["network"] for score in result["scores"]] == networks and result["images"] == images
    for score in result["scores"]:
        assert len(score["accuracies"]) == count and all(0 <= value <= 1 for value in score["accuracies"])
        assert score["mean"] == pytest.approx(np.mean(score["accuracies"]))
        assert score["std"] == (pytest.approx(np.std(score["accuracies"])) if len(score["accuracies"]) > 1 else None)
        counts = np.array(score["confusion"])  # summed over the networks; one row per class of the test images
        assert np.trace(counts) / counts.sum() == pytest.approx(score["mean"])
        assert len(counts) == len(counts[0]) and len(set(counts.sum(axis=1))) == 1 and counts[0].sum() % count == 0
    return result


def test_evaluation_from_the_root(call, distilled, tmp_path):
    done = call("distill/evaluation.py", "--dataset=MiniFashion", "--model=ConvNetD1W4", "--zca", "--device=cpu",
               "--epoch_eval_train=2", "--num_eval=2", *set_files(distilled[0] / "Normal", REPOSITORY),
               "--json", os.path.relpath(tmp_path / "result.json", REPOSITORY))
    result = check_result(tmp_path / "result.json", ["ConvNetD1W4"], 2, 10)
    assert result["tested_on"] == "test" and result["config"]["epoch_eval_train"] == 2
    score = result["scores"][0]
    assert f"ConvNetD1W4: {100 * score['mean']:.2f} ± {100 * score['std']:.2f} % over 2" in done.stdout


def test_evaluation_from_inside_its_folder_is_the_same(call, toy, toy_run, tmp_path):
    inside = REPOSITORY / "distill"
    call("evaluation.py", *toy.evaluate, *set_files(toy_run, inside), "--json",
         os.path.relpath(tmp_path / "inside.json", inside), cwd=inside)
    call("distill/evaluation.py", *toy.evaluate, *set_files(toy_run), f"--json={tmp_path / 'root.json'}")
    one, other = (check_result(tmp_path / name, ["ConvNetD1W4"], 1, 6) for name in ("inside.json", "root.json"))
    assert one["scores"] == other["scores"]


def test_a_set_is_saved_for_the_data_that_it_was_made_with_only(call, toy, toy_run, tmp_path):
    done = call("distill/evaluation.py", *toy.evaluate, f"--data_dir={toy_run.parent}", "--zca=False",
                f"--save={tmp_path / 'x.safetensors'}", expect=2)
    check_refusal(done, "zca differs here; leave out --zca, or --save")
    assert not list(tmp_path.iterdir())


def test_a_set_says_itself_how_it_is_read(call, toy, toy_run, tmp_path):
    """A run's folder, its set's file, its tensors beside a config.yaml and an unfinished run are all evaluated, on the
    test images, as with all options given; given options override what the set says."""
    def scores(*options):
        done = call("distill/evaluation.py", "--epoch_eval_train=2", "--num_eval=1", "--device=cpu", *options,
                    f"--json={tmp_path / 'result.json'}")
        result = json.loads((tmp_path / "result.json").read_text())
        assert result["tested_on"] == "test"
        return result["scores"], done.stderr

    usual, _ = scores(*toy.evaluate, *set_files(toy_run))
    run, unfinished = toy_run.parent, tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=lambda _, names: {"result.json", "distilled.safetensors"} & set(names))
    moved = shutil.copy(toy_run / "distilled.safetensors", tmp_path)
    for given in ([f"--data_dir={run}"], [f"--data_dir={moved}"], set_files(toy_run), [f"--data_dir={unfinished}"]):
        found, said = scores(*given)
        assert found == usual and "note:" not in said
    other, said = scores(f"--data_dir={moved}", "--zca=False")
    assert other != usual and "made with zca True, and here zca is False" in said and said.count("note:") == 1
    whole = tmp_path / "set.safetensors"
    other, said = scores(f"--data_dir={run}", "--model=MLP", f"--save={whole}")
    assert other[0]["network"] == "MLP" and said.count("note:") == 1
    assert "rate was learned with ConvNetD1W4; --lr_teacher auto looks for one that suits MLP" in said
    assert DistilledSet.load(whole).config["model"] == "ConvNetD1W4"  # which made it

    config = unfinished / "config.yaml"
    config.write_text(config.read_text().replace(str(toy.data), "/no/photos"))
    check_refusal(call("distill/evaluation.py", f"--data_dir={unfinished}", expect=2), "ImageFolder: /no/photos")


def test_of_a_run_with_averaged_images_the_better_set_is_tested(distil, call, tmp_path):
    run = distil("--ema", "--ema_decay=0.5")
    result = json.loads((run / "result.json").read_text())
    for better, worse, folder in (("best", "best_ema", "Normal"), ("best_ema", "best", "EMA")):
        result[better]["scores"][0]["accuracies"], result[worse]["scores"][0]["accuracies"] = [0.9], [0.1]
        (run / "result.json").write_text(json.dumps(result))
        call("distill/evaluation.py", f"--data_dir={run}", "--num_eval=1", "--epoch_eval_train=1", "--device=cpu",
             f"--save={tmp_path / 'set.safetensors'}")
        assert torch.equal(load_any(tmp_path / "set.safetensors"), load(run / folder / "images_best.pt"))
        made = DistilledSet.load(run / folder / "distilled.safetensors").config
        assert DistilledSet.load(tmp_path / "set.safetensors").config == made


def test_evaluation_of_a_pool_and_on_held_out_images(call, toy, toy_run, tmp_path):
    done = call("distill/evaluation.py", *toy.evaluate, *set_files(toy_run), "--eval_mode=C", "--val_fraction=0.25",
                f"--json={tmp_path / 'result.json'}")
    result = check_result(tmp_path / "result.json", ["ConvNetD1W4", "ConvNet"], 1, 6)
    assert result["tested_on"] == "validation" and "ConvNet:" in done.stdout and "18 held-out images" in done.stdout
    assert "made with val_fraction 0, so that it may have learned from the images that are held out" in done.stderr
    eighteenths = [value * 18 for score in result["scores"] for value in score["accuracies"]]
    assert eighteenths == pytest.approx(np.round(eighteenths))  # a quarter of 24 images in each of three classes


def test_evaluation_without_augmentation(call, toy, toy_run, tmp_path):
    scores = []
    for options in ([], ["--no_aug"], ["--dsa=False"], ["--seed=1"]):
        call("distill/evaluation.py", *toy.evaluate, *set_files(toy_run), *options, "--epoch_eval_train=20",
             "--num_eval=3", f"--json={tmp_path / 'result.json'}")
        scores.append(check_result(tmp_path / "result.json", ["ConvNetD1W4"], 3, 6)["scores"])
    usual, no_aug, no_dsa, another_seed = scores
    assert no_aug == no_dsa != usual != another_seed


def test_evaluation_needs_no_learning_rate_file(call, toy, toy_run):
    images, labels, lr = set_files(toy_run)
    rate = float(load(lr.split("=")[1]))
    assert f"learning rate {rate:.4g}," in call("distill/evaluation.py", *toy.evaluate, images, labels, lr).stdout
    done = call("distill/evaluation.py", *toy.evaluate, images, labels, "--lr_teacher=0.125")
    assert "learning rate 0.125," in done.stdout


def test_baseline_of_random_images_from_the_root(call, tmp_path):
    done = call("distill/baseline.py", "--dataset=MiniFashion", "--model=ConvNetD1W4", "--device=cpu", "--ipc=2",
               "--epoch_eval_train=2", "--num_eval=2", f"--json={tmp_path / 'result.json'}")
    check_result(tmp_path / "result.json", ["ConvNetD1W4"], 2, 20)
    assert "\n2 random real images per class: 20 images" in done.stdout


def test_baseline_by_experts_from_inside_its_folder(call, toy, toy_experts, tmp_path):
    inside = REPOSITORY / "distill"
    done = call("baseline.py", *toy.evaluate, "--ipc=2", "--pick=herding", "--num_eval=1", "--json",
               os.path.relpath(tmp_path / "result.json", inside), "--buffer_path",
               os.path.relpath(toy_experts, inside), cwd=inside)
    check_result(tmp_path / "result.json", ["ConvNetD1W4"], 1, 6)
    assert "2 herded real images per class with expert labels: 6 images" in done.stdout


@pytest.fixture
def real_sets(call, toy, toy_experts):
    """Options of baseline.py → the sets it would test, one for each of two networks, of four images per class."""
    def real_sets(*options):
        with mock.patch("distill.evaluate.real_images.evaluate_and_say") as report:
            call("distill/baseline.py", *toy.evaluate, "--num_eval=2", "--ipc=4", f"--buffer_path={toy_experts}",
                 *options)
        return report.call_args.args[2]

    return real_sets


def test_baseline_labels(real_sets, toy_data, toy_experts):
    """--label_source changes the labels, not which random images are drawn."""
    classes, drawn = torch.arange(3).repeat_interleave(4), []
    for hard, soft in zip(real_sets(), real_sets("--label_source=experts"), strict=True):
        assert torch.equal(hard.images, soft.images) and torch.equal(hard.labels, classes)
        drawn.append(rows_of(hard.images, toy_data.train_images).tolist())
        assert torch.equal(toy_data.train_labels[drawn[-1]], classes) and len(set(drawn[-1])) == 12
        torch.testing.assert_close(soft.labels, mean_of_right(toy_experts, soft.images, classes)[0])
    assert len(drawn) == 2 and drawn[0] != drawn[1]  # each network has its own images


@pytest.mark.parametrize("pick", ["correct", "herding", "k_center"])
def test_baseline_of_images_that_experts_choose(real_sets, toy_data, toy_experts, pick):
    """They carry the experts' labels; each network has its own coreset, in the features of one of the experts."""
    classes, (model, ends) = torch.arange(3).repeat_interleave(4), toy_model(toy_experts)
    sets = real_sets(f"--pick={pick}")
    found = [rows_of(each.images, toy_data.train_images) for each in sets]
    for each, rows in zip(sets, found):
        assert torch.equal(toy_data.train_labels[rows], classes) and len(set(rows.tolist())) == 12
        labels, right = mean_of_right(toy_experts, each.images, classes)
        torch.testing.assert_close(each.labels, labels)
        assert right.all() or pick != "correct"
    assert len(found) == 2 and not torch.equal(*found)
    if pick != "correct":
        of_class = toy_data.class_indices(2)
        of_experts = [of_class[CORESETS[pick](features, 4)].tolist() for features in (
            expert_features(model, theta, toy_data.train_images[of_class]) for theta in ends)]
        assert all(rows[8:].tolist() in of_experts for rows in found)
        assert not torch.equal(real_sets(f"--pick={pick}", "--num_eval=1", "--seed=2")[0].images, sets[0].images)
        (hard, _) = real_sets(f"--pick={pick}", "--label_source=hard")
        assert torch.equal(hard.labels, classes) and torch.equal(hard.images, sets[0].images)


def test_baseline_of_the_whole_training_set_learns(call, toy, tmp_path):
    call("distill/baseline.py", *toy.evaluate, "--ipc=None", "--epoch_eval_train=40", "--batch_train=8",
         "--lr_teacher=0.02", f"--json={tmp_path / 'result.json'}")
    result = check_result(tmp_path / "result.json", ["ConvNetD1W4"], 1, 3 * toy.per_class)
    assert result["what"] == "the whole training set" and result["scores"][0]["mean"] > 0.6


# --- the variants of the distillation, on the toy ------------------------------------------------------------


@pytest.fixture(scope="module")
def distil(call, toy, toy_experts, tmp_path_factory):
    """Options → the folder of a run with them. Pictures are not drawn, to save time; the runs above draw them."""
    def distil(*options, script="distill/DATM.py"):
        logs = tmp_path_factory.mktemp("toy_logs")
        with mock.patch.multiple("distill.report.show", save_images=mock.Mock(), save_curves=mock.Mock()):
            call(script, *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={logs}", *options)
        (saved,) = logs.rglob("config.yaml")
        return saved.parent
    return distil


@pytest.fixture(scope="module")
def toy_run(distil):
    """The `Normal` folder of a run with the toy's options unchanged."""
    return distil() / "Normal"


def final(normal, iteration=4):
    return tuple(load(normal / f"{kind}_{iteration}.pt") for kind in ("images", "labels", "lr"))


def same(ones, others):
    return [torch.equal(one, other) for one, other in zip(ones, others)]


def test_a_class_with_fewer_images_than_ipc_gives_some_twice(distil):
    images = load(distil("--ipc=25", "--Iteration=0") / "Normal" / "images_0.pt")
    assert [len(of_class.unique(dim=0)) for of_class in images.split(25)] == [24, 24, 24]


def test_the_same_seed_distils_the_same_and_another_seed_another(distil, toy_run):
    again, other = distil() / "Normal", distil("--seed=1") / "Normal"
    assert names(again) == names(toy_run)
    assert all(torch.equal(load_any(again / name), load_any(toy_run / name)) for name in names(toy_run))
    assert same(final(other), final(toy_run)) == [False, False, False]
    assert same(final(other, 0), final(toy_run, 0)) == [False, False, True]


def test_unroll_is_the_exact_gradient_and_tesla_is_not(distil, toy_run):
    exact = final(toy_run)
    unroll, tesla = (final(distil(f"--matching={method}") / "Normal") for method in ("unroll", "tesla"))
    start = final(toy_run, 0)
    for one, other, frozen, first in zip(exact, unroll, tesla, start):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert (frozen - one).norm() > 1e-4 * (one - first).norm() > 0


def test_datm_tesla_is_matching_tesla(distil):
    by_entry = distil("--run_name=tesla", script="distill/DATM_tesla.py")
    by_option = distil("--run_name=tesla", "--matching=tesla")
    assert (by_entry / "config.yaml").read_text() == (by_option / "config.yaml").read_text()
    assert names(by_entry / "Normal") == names(by_option / "Normal")
    assert all(torch.equal(load_any(by_entry / "Normal" / name), load_any(by_option / "Normal" / name))
               for name in names(by_entry / "Normal"))


def rows_of(images, among):
    """For each image, the index of the identical image in `among`; −1: there is none."""
    equal = (images[:, None] == among[None]).flatten(2).all(dim=2)
    return torch.where(equal.any(dim=1), equal.int().argmax(dim=1), -1)


def toy_model(toy_experts):
    model = FlatModel(build_network("ConvNetD1W4", 3, 3, (8, 8)))
    return model, [trajectory[-1] for trajectory in thetas(toy_experts / TOY_EXPERTS)]


def mean_of_right(toy_experts, images, classes):
    """The mean logits of the experts that are right (of all, where none is), and whether any is right, by image."""
    model, ends = toy_model(toy_experts)
    logits = torch.stack([model(theta, images) for theta in ends])
    right = (logits.argmax(dim=2) == classes)[..., None].float()
    known = right.any(dim=0)
    return torch.where(known, (right * logits).sum(0) / right.sum(0), logits.mean(0)), known


def test_real_images_start_with_the_first_experts_logits(distil, toy_data, toy_experts):
    images, labels, lr = final(distil("--pix_init=real", "--Iteration=0", "--ipc=3") / "Normal", 0)
    rows = rows_of(images, toy_data.train_images)
    assert toy_data.train_labels[rows].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len(set(rows.tolist())) == 9
    model, ends = toy_model(toy_experts)
    torch.testing.assert_close(labels, model(ends[0], images))
    assert float(lr) == pytest.approx(0.01)


def test_images_that_experts_predict_correctly_start_with_those_experts_mean(distil, toy_data, toy_experts):
    images, labels, _ = final(distil("--Iteration=0") / "Normal", 0)
    rows, classes = rows_of(images, toy_data.train_images), torch.tensor([0, 0, 1, 1, 2, 2])
    assert (rows >= 0).all() and torch.equal(toy_data.train_labels[rows], classes)
    assert mean_of_right(toy_experts, images, classes)[1].all()  # some expert is right about every image
    torch.testing.assert_close(labels, mean_of_right(toy_experts, images, classes)[0])


def test_an_earlier_snapshot_can_label_the_images(distil, toy_experts):
    images, labels, _ = final(distil("--Iteration=0", "--Label_Model_Timestamp=1") / "Normal", 0)
    model, _ = toy_model(toy_experts)
    early = [snapshots[1] for snapshots in thetas(toy_experts / TOY_EXPERTS)]
    expected, _ = expert_labels(model, early, images, torch.arange(3).repeat_interleave(2))
    torch.testing.assert_close(labels, expected)


def test_all_experts_label_whichever_are_matched(distil, toy_experts):
    images, labels, _ = final(distil("--Iteration=0", "--max_files=1", "--max_experts=1") / "Normal", 0)
    model, _ = toy_model(toy_experts)
    last = [snapshots[-1] for snapshots in thetas(toy_experts / TOY_EXPERTS)]
    expected, _ = expert_labels(model, last, images, torch.arange(3).repeat_interleave(2))
    torch.testing.assert_close(labels, expected)


def test_another_networks_experts_can_label_the_images(call, distil, toy, toy_experts, tmp_path):
    call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", "--num_experts=1", "--model=MLP")
    folder = tmp_path / "ImageFolder" / "MLP"
    labelled = ["--Initialize_Label_With_Another_Model", "--Initialize_Label_Model=MLP",
                f"--Initialize_Label_Model_Dir={folder}"]
    images, labels, _ = final(distil("--pix_init=real", "--Iteration=0", *labelled) / "Normal", 0)
    model = FlatModel(build_network("MLP", 3, 3, (8, 8)))
    torch.testing.assert_close(labels, model(thetas(folder)[0][-1], images))
    manifest = folder / "replay_buffer_0.yaml"
    save_config(manifest, read_config(manifest) | {"fingerprint": "another"})
    done = call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", *labelled,
                expect=2)
    assert "trained on other images" in done.stderr and "another --Initialize_Label_Model_Dir" in done.stderr


def test_another_networks_experts_must_be_of_the_network_that_is_named(call, toy, toy_experts, tmp_path):
    """ConvNets that differ in activation or pooling have parameters of the same shapes."""
    folder = toy_experts / TOY_EXPERTS
    done = call("distill/DATM.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}",
                "--Initialize_Label_With_Another_Model", "--Initialize_Label_Model=ConvNetD1W4MP",
                f"--Initialize_Label_Model_Dir={folder}", expect=2)
    assert "are of the network ConvNetD1W4, not ConvNetD1W4MP; name that network" in done.stderr


def test_noise_starts_from_no_image_and_labels_of_each_class(distil, toy_data):
    normal = distil("--pix_init=noise") / "Normal"
    images, labels, _ = final(normal, 0)
    assert (rows_of(images, toy_data.train_images) == -1).all() and images.std() > 0.5
    assert len(labels.unique(dim=0)) == 3


def test_the_whole_training_set_can_be_distilled(distil, toy, toy_data):
    images, _, _ = final(distil(f"--ipc={toy.per_class}", "--Iteration=0") / "Normal", 0)
    assert sorted(rows_of(images, toy_data.train_images).tolist()) == list(range(3 * toy.per_class))


def experts_drawn(folder):
    return [line["expert"] for line in lines(folder / "metrics.jsonl") if "expert" in line]


def test_experts_are_walked_through_or_drawn_from_all(distil):
    longer = ["--Iteration=12", "--eval_it=12", "--syn_steps=1"]
    walked, drawn = (experts_drawn(distil(*longer, *options)) for options in ([], ["--load_all"]))
    rounds = [walked[first: first + 3] for first in range(0, 12, 3)]
    assert all(sorted(round_) == [0, 1, 2] for round_ in rounds) and len({tuple(round_) for round_ in rounds}) > 1
    assert set(drawn) == {0, 1, 2}
    assert not all(sorted(drawn[first: first + 3]) == [0, 1, 2] for first in range(0, 12, 3))


def test_the_seed_decides_what_an_iteration_draws(distil):
    folders = [distil("--Iteration=16", "--eval_it=16", "--syn_steps=1", f"--seed={seed}") for seed in (0, 0, 1)]
    starts = [[line["start_epoch"] for line in lines(folder / "metrics.jsonl") if "loss" in line] for folder in folders]
    experts = [experts_drawn(folder) for folder in folders]
    assert starts[0] == starts[1] != starts[2] and set(starts[0]) == {0, 1} and experts[0] == experts[1] != experts[2]


def ten_samples(config):
    """The distillation of a set of ten samples, with three experts."""
    return Distillation(config, SimpleNamespace(image_size=(8, 8)), [None] * 3,
                        DistilledSet(torch.zeros(10, 1, 8, 8), torch.zeros(10, 2), torch.tensor(0.1)))


@pytest.mark.parametrize("size, sizes", [(4, [2, 4, 4, 2, 4, 4, 2]), (None, [10] * 7), (99, [10] * 7), (5, [5] * 7)])
def test_batches_are_popped_from_permutations(size, sizes):
    """Chunks of a permutation are used from its end, so a short one comes first, as published."""
    config = make(DistillConfig, syn_steps=7, batch_syn=size)
    segment = ten_samples(config).segment(None, 5, generator(0))
    assert [len(batch) for batch in segment.batches] == sizes
    epoch = sizes[:sizes.index(sizes[0], 1)] if size == 4 else sizes[:10 // sizes[0]]
    assert torch.cat(segment.batches[:len(epoch)]).sort().values.tolist() == list(range(10))
    assert len(segment.augment) == 7


def test_everything_of_a_segment_is_drawn():
    """Its expert, its start epoch within the window, a permutation for every two batches, a scale for every batch."""
    config = make(DistillConfig, min_start_epoch=2, syn_steps=6, batch_syn=5, dsa_strategy="scale")
    segments = [ten_samples(config).segment(None, 5, generator(number)) for number in range(40)]
    assert {segment.expert for segment in segments} == {0, 1, 2}
    assert {segment.start_epoch for segment in segments} == {2, 3, 4}
    orders = torch.stack([torch.cat(segment.batches) for segment in segments]).view(120, 10)
    assert orders.sort().values.eq(torch.arange(10)).all() and len(orders.unique(dim=0)) == 120
    scales = torch.stack([draw.parameters["scale"][0] for segment in segments for draw in segment.augment])
    assert len(scales.unique(dim=0)) == 240


@pytest.mark.parametrize("option, count", [("--max_files=1", 2), ("--max_experts=1", 2), ("--max_files=9", 3)])
def test_fewer_experts_can_be_used(distil, option, count):
    folder = distil(option, "--Iteration=6", "--eval_it=6", "--syn_steps=1")
    assert set(experts_drawn(folder)) == set(range(count))


def test_no_aug_is_the_inner_loop_without_dsa(distil, toy_run):
    """Compares the sets only: with --no_aug the evaluation still augments, so scores may differ."""
    without = final(distil("--no_aug", "--eval_it=4", "--skip_first_eva") / "Normal")
    assert same(without, final(distil("--dsa=False", "--eval_it=4", "--skip_first_eva") / "Normal")) == [True] * 3
    assert same(without, final(toy_run)) == [False] * 3


def test_no_aug_leaves_the_evaluation_augmented(distil):
    options = ["--Iteration=0", "--epoch_eval_train=20", "--num_eval=3"]
    plain, no_aug, no_dsa = (json.loads((distil(*options, *more) / "result.json").read_text())["best"]["scores"]
                             for more in ([], ["--no_aug"], ["--dsa=False"]))
    assert plain == no_aug != no_dsa


@pytest.mark.parametrize("option, moved", [("--lr_img=0", [False, True, True]), ("--lr_y=0", [True, False, True]),
                                           ("--lr_lr=0", [True, True, False]), ("--threshold=0", [False] * 3),
                                           ("--labels=soft", [True, False, True])])
def test_each_rate_moves_its_part(distil, option, moved):
    folder = distil(option)
    assert [not equal for equal in same(final(folder / "Normal"), final(folder / "Normal", 0))] == moved
    skipped = json.loads((folder / "result.json").read_text())["skipped"]
    assert skipped == (4 if "threshold" in option else 0)


@pytest.mark.parametrize("option", ["--syn_steps=2", "--batch_syn=4", "--Momentum_y=0", "--expert_epochs=2",
                                    "--lr_teacher=0.02", "--max_start_epoch=1", "--dsa_strategy=flip",
                                    "--depth_ratio=0.5", "--loss_ratio=0.5", "--lr_param=log", "--adjoint_steps=1"])
def test_every_option_of_the_matching_changes_the_set(distil, toy_run, option):
    assert same(final(distil(option) / "Normal"), final(toy_run)) == [False] * 3


def test_the_window_grows(distil):
    folder = distil("--Sequential_Generation", "--min_start_epoch=0", "--current_max_start_epoch=1",
                    "--max_start_epoch=3", "--expansion_end_epoch=4", "--Iteration=8", "--eval_it=8", "--syn_steps=1")
    steps = [line for line in lines(folder / "metrics.jsonl") if "bound" in line]
    assert [line["bound"] for line in steps] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert all(line["start_epoch"] < line["bound"] for line in steps)


def test_the_window_never_exceeds_its_maximum(distil):
    """current_max_start_epoch defaults to 20, which is beyond the end of most windows."""
    folder = distil("--Sequential_Generation", "--expansion_end_epoch=1")
    assert [line["bound"] for line in lines(folder / "metrics.jsonl") if "bound" in line] == [2, 2, 2, 2]


def test_the_best_set_can_be_chosen_on_held_out_images(call, distil, toy, tmp_path):
    done = call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", "--val_fraction=0.25")
    assert ", held-out " in done.stderr and ", test " not in done.stderr
    folder = distil("--val_fraction=0.25", f"--buffer_path={tmp_path}")
    result = json.loads((folder / "result.json").read_text())
    assert result["chosen_on"] == "validation" and "best on the held-out images" in result["summary"]
    eighteenths = [18 * line["scores"][0]["mean"] for line in lines(folder / "metrics.jsonl") if "scores" in line]
    assert len(eighteenths) == 3 and eighteenths == pytest.approx(np.round(eighteenths))

    # A coreset of these experts holds only images they were trained on; it is still tested on the test images.
    held, whole = (load_dataset("ImageFolder", toy.data, res=8, zca=True, val_fraction=each) for each in (0.25, 0.0))
    with mock.patch("distill.evaluate.real_images.evaluate_and_say") as report:
        call("distill/baseline.py", *toy.evaluate, "--ipc=4", "--pick=herding", f"--buffer_path={tmp_path}")
    _, tested, (coreset,) = report.call_args.args[:3]
    apart = (coreset.images[:, None] - held.train_images).flatten(2).abs().amax(dim=2).amin(dim=1)
    assert apart.max() < 1e-3 and tested.fingerprint == whole.fingerprint

    # Of published experts, which have no manifests, nobody knows what they saw.
    for manifest in tmp_path.rglob("replay_buffer_*.yaml"):
        manifest.unlink()
    done = call("distill/DATM.py", *toy.distil, "--val_fraction=0.25", "--Iteration=0", f"--buffer_path={tmp_path}",
                f"--log_path={tmp_path / 'log'}")
    assert "have no manifest, as published ones, which were trained on the held-out images too" in done.stderr


def test_the_first_evaluation_can_be_skipped(distil):
    folder = distil("--skip_first_eva")
    assert [line["iteration"] for line in lines(folder / "metrics.jsonl") if "scores" in line] == [2, 4]


def test_without_zca_nothing_is_unwhitened(call, distil, toy, tmp_path):
    call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", "--zca=False")
    folder = distil("--zca=False", "--Iteration=0", f"--buffer_path={tmp_path}")
    assert not list((folder / "Normal").glob("images_zca*"))


def test_a_name_is_made_of_the_options(distil):
    usual, again, other = distil("--Iteration=0"), distil("--Iteration=0"), distil("--Iteration=0", "--lr_y=3")
    assert usual.name == again.name != other.name and re.fullmatch(r"exact_seed0_[0-9a-f]{8}", usual.name)


# --- help ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ENTRIES)
def test_help_begins_with_an_example(call, script):
    done = call(script, "--help")
    assert ("--cfg" in done.stdout) == ("DATM" in script) and done.stderr == ""
    assert f"python {script}" in re.sub(r"\s+", " ", done.stdout)  # the example in its docstring


@pytest.mark.parametrize("script, held_out", [("distill/DATM.py", "0.0"), ("scripts/sweep.py", "0.1")])
def test_help_shows_the_default_of_the_script(call, script, held_out):
    text = re.sub(r"\s+", " ", call(script, "--help").stdout)
    assert f"test on it instead of on the test images [{held_out}]" in text


# --- speed and memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["--backend=plain"], ["--backend=eager", "--micro_batch=2"]])
def test_backends_and_micro_batches_distil_the_same(distil, toy_run, options):
    """Equal up to rounding."""
    for here, there in zip(final(distil(*options) / "Normal"), final(toy_run)):
        torch.testing.assert_close(here, there, rtol=1e-3, atol=1e-4)


def test_bf16_distils_nearly_the_same(distil, toy_run):
    here, there = (final(each)[0] for each in (distil("--precision=bf16") / "Normal", toy_run))
    assert not torch.equal(here, there)
    torch.testing.assert_close(here, there, rtol=0.1, atol=0.1)


def test_micro_batches_train_the_same_experts(call, toy, toy_experts, tmp_path):
    call("buffer/buffer_FTD.py", *toy.train, f"--buffer_path={tmp_path}", "--num_experts=1", "--micro_batch=5")
    ours, usual = (torch.load(next(folder.rglob("replay_buffer_0.pt")), weights_only=True)[0]
                   for folder in (tmp_path, toy_experts))
    for here, there in zip(ours[-1], usual[-1]):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options, gradient, times, seconds", [
    # Matching three steps and one, then evaluations: 1 s once and 2 s a step.
    (["--matching=unroll", "--labels=hard"], "unroll gradient, T 3", [7, 3, 0, 0], 7),
    # Also training three steps: the two that are not matched take 1 s each.
    (["--adjoint_steps=1", "--labels=target", "--factor=2", "--loss_ratio=0.5"],
     "exact gradient, T 3 truncated to the last 1", [7, 3, 4, 0, 0], 5)])
def test_a_dry_run_estimates_and_suggests_and_leaves_nothing(call, toy, toy_experts, tmp_path, monkeypatch, options,
                                                             gradient, times, seconds):
    arguments = [*toy.distil, f"--log_path={tmp_path / 'out'}", *options, "--dry_run"]
    times = iter(times)
    monkeypatch.setattr("distill.estimate._measured", lambda measured, device: (measured(), (next(times), 0))[1])
    done = call("distill/DATM.py", *arguments, f"--buffer_path={toy_experts}")
    assert f"{gradient} (" in done.stdout and f"an iteration takes about {seconds} s," in done.stdout
    assert ("activations of the last 1 step kept), on cpu" in done.stdout) == ("truncated" in gradient)
    assert "GB of data" in done.stdout
    assert "(Ctrl-C, if the estimate is enough)" in done.stdout and "--lr_teacher=" in done.stdout
    assert "mean matching loss of the first set" in done.stdout and "measuring updates 8/8" in done.stderr
    # It refuses what a run would refuse.
    assert not list(tmp_path.iterdir())
    (tmp_path / "out/ImageFolder/2/ConvNetD1W4/mine/Normal").mkdir(parents=True)
    (tmp_path / "file").touch()
    for odd, phrase in (([f"--buffer_path={tmp_path / 'none'}"], "no replay_buffer_*.pt"),
                        ([f"--buffer_path={toy_experts}", "--max_start_epoch=9"], "has 3 epochs"),
                        ([f"--buffer_path={toy_experts}", "--run_name=mine"], "holds Normal and is no run's"),
                        ([f"--buffer_path={toy_experts}", f"--log_path={tmp_path}/file"], "cannot write")):
        assert phrase in call("distill/DATM.py", *arguments, *odd, expect=2).stderr


def test_the_rate_is_measured_where_it_is_auto(call, toy, toy_experts, tmp_path):
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--run_name=auto",
                 "--lr_teacher=auto", "--max_start_epoch=1"]
    done = call("distill/DATM.py", *arguments)
    rate, gains = re.search(r"--lr_teacher auto is (\S+), .* over the window\): (.*)", done.stderr).groups()
    gains = {at: float(gain) for gain, at in re.findall(r"(\S+) at ([\d.]*\d)", gains)}
    # The chosen rate is the largest whose gain is close to the best.
    assert gains[rate] >= 0.78 * max(gains.values()) > 0 and len(gains) >= 3
    assert all(gains[other] < 0.82 * max(gains.values()) for other in gains if float(other) > float(rate))
    run = next(tmp_path.rglob("result.json")).parent
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first["lr"] == pytest.approx(float(rate), rel=0.1)
    # A finished run is recognised without measuring the rate again.
    assert "is finished" in call("distill/DATM.py", *arguments).stdout
