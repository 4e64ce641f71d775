"""scripts/sweep.py: several settings, one after the other, ranked."""

import json
import signal
import sys
import threading
from unittest import mock

import pytest
from helpers import handlers_as_before, wait_for

from scripts import sweep
from utils.errors import UserError
from utils.program import interrupt


def test_values_are_ranked_and_a_larger_iteration_goes_on(call, toy, toy_experts, tmp_path, monkeypatch, capsys):
    def run_it(run):
        say.append(run.name)
        if run.name == fails:
            return False
        call("distill/DATM.py", *(f"--{name}={value}" for name, value in run.options.items()))
        return True

    def sweep_it(*options):
        monkeypatch.setattr(sys, "argv", [
            "sweep.py", *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--lr_img=0,1e1",
            "--val_fraction=0", "--Iteration=1", "--eval_it=1", f"--json={tmp_path / 'table.json'}", *options])
        with mock.patch.multiple("distill.report.show", save_images=mock.Mock(), save_curves=mock.Mock()):
            sweep.main()
        out, err = capsys.readouterr()
        errors.append(err)
        return out, json.loads((tmp_path / "table.json").read_text())["runs"]

    say, fails, errors = [], "lr_img=0", []
    monkeypatch.setattr(sweep, "run_to_its_end", run_it)
    with pytest.raises(UserError, match="no result of lr_img=0;"):
        sweep_it()
    assert "\n| 10 " in (said := capsys.readouterr().out) and "\n| 0 " not in said
    say, fails = [], None
    said, runs = sweep_it()
    names = ["lr_img=0", "lr_img=10"]
    assert say == names and {run["name"] for run in runs} == set(names)
    folder = tmp_path / "ImageFolder" / "2" / "ConvNetD1W4"
    for best, other in (names, names[::-1]):
        for name, accuracy in ((best, 0.75), (other, 0.25)):
            result = json.loads((folder / name / "result.json").read_text())
            result["best"]["scores"][0]["accuracies"] = [accuracy]
            (folder / name / "result.json").write_text(json.dumps(result))
        said, runs = sweep_it()
        assert [run["name"] for run in runs] == [best, other]
    page = folder / "sweep_lr_img.html"
    assert str(page) in said and all(name in page.read_text() for name in names)
    assert "| lr_img | accuracy on the test images, %" in said and f"--data_dir={folder / runs[0]['name']}" in said

    say = []
    with pytest.raises(UserError, match=r"epoch_eval_train \(1 there, 2 here\); give another --run_name"):
        sweep_it("--epoch_eval_train=2")
    assert not say  # before any run
    assert {run["name"] for run in sweep_it("--epoch_eval_train=2", "--run_name=my")[1]} == {
        f"my_{name}" for name in names}

    _, longer = sweep_it("--Iteration=2")
    assert [run["updates"] for run in longer] == [2, 2]
    sweep_it()  # they are longer than asked for now
    assert errors[-1].count(" had been extended to iteration 2 before, beyond 1") == 2
    for name in names:
        assert (folder / name / "result_1.json").is_file() and (folder / name / "Normal" / "images_2.pt").is_file()


def test_images_are_held_out_unless_it_is_said_otherwise(tmp_path):
    path = tmp_path / "a.yaml"
    for text, options, expected in (("ipc: 1", {}, 0.1), ("val_fraction: 0.2", {}, 0.2),
                                    ("ipc: 1", {"val_fraction": "0"}, 0.0)):
        path.write_text(text)
        assert {run.config.val_fraction for run in sweep.combinations({"cfg": str(path), "seed": "0,1"} | options)} == {
            expected}


def test_names_are_those_of_the_values_however_they_are_typed(tmp_path):
    (tmp_path / "a.yaml").write_text("ipc: 1")
    (tmp_path / "a,b").mkdir()
    runs = sweep.combinations({
        "cfg": str(tmp_path / "a.yaml"), "syn_steps": "20,40.0", "lr_lr": "1E-5,.5", "device": "[0,1]",
        "run_name": "my", "log_path": "x,y", "data_path": str(tmp_path / "a,b"), "buffer_path": "one/of,../two"})
    assert [run.name for run in runs][:3] == ["my_lr_lr=1e-05_syn_steps=20_buffer_path=one-of",
                                              "my_lr_lr=1e-05_syn_steps=20_buffer_path=..-two",
                                              "my_lr_lr=1e-05_syn_steps=40_buffer_path=one-of"]
    assert len(runs) == 8 and runs[0].config.device == [0, 1] and runs[0].folder.name == runs[0].name
    runs = sweep.combinations({"cfg": str(tmp_path / "a.yaml"), "buffer_path": "one,two"})
    assert [run.name for run in runs] == ["buffer_path=one", "buffer_path=two"]


@pytest.mark.parametrize("options, phrase", [
    ({"lr_img": "30"}, "every option has one value"), ({"lr_img": "30,x"}, "--lr_img x: it must be a valid number"),
    ({"lr_img": "30,3e1"}, "lr_img=30 would be the name of two runs"),
    ({"ema_decay": "0.9,0.99"}, "ema_decay=0.99 would be the run of ema_decay=0.9 again"),
    ({"lr_img": "30,"}, "--lr_img '': it must be a valid number"),
    ({"device": "[0,1]"}, "every option has one value"), ({"data_path": "a,b"}, "--data_path has several values")])
def test_what_cannot_be_swept_is_refused(options, phrase, tmp_path):
    (tmp_path / "a.yaml").write_text("ipc: 1")
    with pytest.raises(UserError, match=phrase):
        sweep.combinations({"cfg": str(tmp_path / "a.yaml")} | options)


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Replaces DATM.py by a script that saves when told to stop, or fails."""
    script = tmp_path / "child.py"
    script.write_text("import os, pathlib, signal, sys, time\n"
                      f"folder = pathlib.Path({str(tmp_path)!r})\n"
                      "if '--fails=1' in sys.argv: sys.exit(3)\n"
                      "if '--fails=9' in sys.argv: os.kill(os.getpid(), 9)\n"
                      "def save(number, frame):\n    (folder / 'saved').write_text(os.environ['DATM_PART_OF'])\n"
                      "    sys.exit(128 + number)\n"
                      "signal.signal(signal.SIGTERM, save)\n(folder / 'begun').touch()\ntime.sleep(60)\n")
    monkeypatch.setattr(sweep, "DATM", str(script))
    with handlers_as_before():
        interrupt.install()
        yield lambda **options: sweep.run_to_its_end(sweep.Run("a=1", {}, options, mock.Mock(), None))
    interrupt._received = None


@pytest.mark.parametrize("thread", ["main", "another"])
def test_a_signal_is_handed_to_the_run_which_saves(child, tmp_path, thread):
    def tell():
        wait_for((tmp_path / "begun").exists)
        # A terminal's signal may go to any thread, such as one of a library.
        signal.pthread_kill({"main": threading.main_thread(), "another": threading.current_thread()}[thread].ident,
                            signal.SIGTERM)

    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(interrupt.Stopped) as stopped:
        child()
    assert stopped.value.signal == signal.SIGTERM and (tmp_path / "saved").exists()


@pytest.mark.parametrize("how, code, said", [("1", 3, "ended with exit code 3"), ("9", 137, "was killed by SIGKILL")])
def test_a_run_that_fails_ends_the_sweep_with_its_code(child, capsys, how, code, said):
    with pytest.raises(SystemExit) as end:
        child(fails=how)
    assert end.value.code == code and f"the run a=1 {said}" in capsys.readouterr().err
