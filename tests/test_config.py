"""Option values in any spelling give the same typed config; every option has its published default."""

import dataclasses
import math
import os
import re
from pathlib import Path

import pytest
import yaml

from distill import run_folder
from distill.run_folder import run_id
from utils.config import (
    BaselineConfig,
    BufferConfig,
    DistillConfig,
    EvaluationConfig,
    TeslaConfig,
    about,
    as_dict,
    defaults,
    differences,
    identity,
    influential,
    make,
)
from utils.config.options import OWN_SIZES
from utils.data.datasets import load_dataset
from utils.data.names import NAMES as DATASETS
from utils.errors import UserError
from utils.files import REPOSITORY
from utils.networks.names import CLASSICS, SUFFIX_RULE, SUFFIXES
from utils.program.command_line import parse

CONFIGS = [BufferConfig, DistillConfig, TeslaConfig, EvaluationConfig, BaselineConfig]

# The published code's defaults. Not published: res, which ImageNet needs, and the device, which is left out here.
BUFFER = dict(
    dataset="CIFAR10", subset="imagenette", model="ConvNet", num_experts=100, lr_teacher=0.01, batch_train=256,
    batch_real=256, dsa=True, dsa_strategy="color_crop_cutout_flip_scale_rotate", data_path="data",
    buffer_path="buffers", train_epochs=50, zca=False, decay=False, mom=0.0, l2=0.0, save_interval=10, rho_max=2.0,
    rho_min=2.0, alpha=0.4, adaptive=True, res=None)

# The published code's, except res: None here, the dataset's own size; the published 32 fits CIFAR only.
DISTILL = dict(
    dataset="CIFAR10", subset="imagenette", model="ConvNet", ipc=1, eval_mode="S", num_eval=5, eval_it=100,
    epoch_eval_train=1000, Iteration=5000, lr_img=1000.0, lr_teacher=0.01, lr_lr=1e-5, lr_y=2.0, Momentum_y=0.9,
    batch_syn=None, batch_train=256, batch_real=256, pix_init="samples_predicted_correctly", dsa=True,
    dsa_strategy="color_crop_cutout_flip_scale_rotate", no_aug=False, data_path="dataset",
    buffer_path="buffer_storage", expert_epochs=2, syn_steps=80, min_start_epoch=0, max_start_epoch=25,
    Sequential_Generation=True, current_max_start_epoch=20, expansion_end_epoch=3000, threshold=1.0, zca=True,
    load_all=False, max_files=None, max_experts=None, skip_first_eva=False, parall_eva=False, force_save=False,
    record_loss=False, project="TEST", res=None, device=[0], ema_decay=0.999, lr_init=0.01, texture=False,
    canvas_size=2, canvas_samples=1, Initialize_Label_With_Another_Model=False, Initialize_Label_Model="",
    Initialize_Label_Model_Dir="", Label_Model_Timestamp=-1)

# The published code's.
EVALUATION = dict(
    dataset="CIFAR10", subset="imagenette", model="ConvNet", eval_mode="S", epoch_eval_train=1000, batch_real=256,
    dsa=True, dsa_strategy="color_crop_cutout_flip_scale_rotate", data_path="data", zca=False, lr_teacher=0.01,
    no_aug=False, batch_train=128, parall_eva=False, data_dir="", label_dir="", lr_dir="")

WITHOUT_EFFECT = {
    BufferConfig: {"decay", "batch_real"},
    DistillConfig: {"ema_decay", "lr_init", "texture", "canvas_size", "canvas_samples"},
    EvaluationConfig: {"batch_real"}}


def names(config_type):
    return [field.name for field in dataclasses.fields(config_type)]


@pytest.fixture
def written(tmp_path):
    """Text → the path of a YAML file with that text."""
    def write(text):
        path = tmp_path / "given.yaml"
        path.write_text(text)
        return str(path)
    return write


def distill_config(path, *arguments):
    return parse(DistillConfig, "", ["--cfg", path, *arguments], yaml_file=True)


def buffer_config(*arguments):
    return parse(BufferConfig, "", list(arguments))


# --- defaults ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config_type, published", [
    (BufferConfig, BUFFER), (DistillConfig, DISTILL), (TeslaConfig, DISTILL), (EvaluationConfig, EVALUATION)])
def test_published_options_have_their_published_defaults(config_type, published, written):
    yaml_file = issubclass(config_type, DistillConfig)
    config = parse(config_type, "", ["--cfg", written("ipc: 1")] if yaml_file else [], yaml_file)
    for name, default in published.items():
        value = getattr(config, name)
        if name.endswith("_path"):
            default = str(REPOSITORY / default)
        assert value == default and type(value) is type(default), name


def test_tesla_differs_in_one_default():
    plain, tesla = make(DistillConfig), make(TeslaConfig)
    assert {name for name in names(DistillConfig) if getattr(plain, name) != getattr(tesla, name)} == {"matching"}
    assert (plain.matching, tesla.matching) == ("exact", "tesla")


@pytest.mark.parametrize("content, expected", [
    (b"{}\n", {}), (b"ipc: !!int 2\n", {"ipc": 2}), (b"ipc: !!str 2\n", {"ipc": 2}),
    (b"{ipc: 2, ema: yes}\n", {"ipc": 2, "ema": True}),
    (b"--- # config\nipc: 2\n...\n", {"ipc": 2}), (b"\xef\xbb\xbfipc: 2\n", {"ipc": 2}),
    (b"ipc: 2\r\nlr_y: 3\r\n", {"ipc": 2, "lr_y": 3.0}), (b"%YAML 1.1\n---\nipc: 2\n", {"ipc": 2}),
    (b"? ipc\n: 2\n", {"ipc": 2}), (b"'ipc': \"2\"\n", {"ipc": 2}),
    (b"lr_lr: 1e-5\nema: on\nseed: 010\n", {"lr_lr": 1e-5, "ema": True, "seed": 10}),
    (b"batch_syn:\nmax_files: ~\nmax_experts: null\n", {"batch_syn": None, "max_files": None, "max_experts": None}),
    (b"project: |\n  two\n  lines\nipc: 2\n", {"project": "two\nlines\n", "ipc": 2}),
    (b"seed: 1_000\nipc: 2.0\n", {"seed": 1000, "ipc": 2}), (b"threshold: .inf\n", {"threshold": math.inf}),
    (b"ema: y\nload_all: n\n", {"ema": True, "load_all": False}),
    (b"run_name: 2024-01-05\nproject: 'null'\n", {"run_name": "2024-01-05", "project": "null"}),
    (b"#" * 10000 + b"\nipc: 2\n", {"ipc": 2}), (b"device: [0, 1]\n", {"device": [0, 1]}),
    (b'{"ipc": 2, "ema": true, "batch_syn": null}', {"ipc": 2, "ema": True, "batch_syn": None})],
    ids=lambda given: repr(given[:40])[1:] if isinstance(given, bytes) else "")
def test_unusual_yaml_means_what_it_says(tmp_path, content, expected):
    (tmp_path / "given.yaml").write_bytes(content)
    config = distill_config(str(tmp_path / "given.yaml"))
    found = {name: getattr(config, name) for name in expected}
    assert found == expected and list(map(type, found.values())) == list(map(type, expected.values()))


def test_the_default_of_a_list_is_not_shared():
    make(DistillConfig).device.append(7)
    assert make(DistillConfig).device == [0]


# --- spellings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, name, value", [
    ("1e-5", "lr_lr", 1e-5), ("1E-5", "lr_lr", 1e-5), ("0.00001", "lr_lr", 1e-5), (".5", "lr_y", 0.5),
    ("3", "lr_y", 3.0), ("inf", "threshold", math.inf), (".inf", "threshold", math.inf),
    ("10000", "lr_img", 10000.0), ("-1", "Label_Model_Timestamp", -1),
    ("7", "Label_Model_Timestamp", 7),
    ("True", "no_aug", True), ("true", "no_aug", True), ("on", "no_aug", True), ("yes", "no_aug", True),
    ("1", "no_aug", True), ("False", "zca", False), ("false", "zca", False), ("off", "zca", False),
    ("no", "zca", False), ("0", "zca", False), ("None", "batch_syn", None), ("none", "batch_syn", None),
    ("null", "batch_syn", None), ("~", "max_files", None), ("12", "batch_syn", 12), ("None", "run_name", None),
    ("12", "run_name", "12"), ("[0,1]", "device", [0, 1]), ("[0, 1]", "device", [0, 1]), ("[3]", "device", [3]),
    ("2", "device", [2]), ("cpu", "device", "cpu"), ("cuda:1", "device", "cuda:1"), ("tesla", "matching", "tesla"),
    ("noise", "pix_init", "noise"), ("0.25", "val_fraction", 0.25)])
def test_the_command_line_and_yaml_read_a_value_alike(text, name, value, written):
    for config in (distill_config(written(f"{name}: {text}")), distill_config(written("ipc: 1"), f"--{name}={text}"),
                   distill_config(written("ipc: 1"), f"--{name}", text)):
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value)


def test_a_boolean_alone_means_true():
    config = buffer_config("--zca", "--model", "MLP", "--decay")
    assert config.zca is True and config.decay is True and config.model == "MLP"
    assert buffer_config("--zca", "--zca=False").zca is False


@pytest.mark.parametrize("name, text, expected", [
    ("ipc", "0", "--ipc 0: it must be greater than or equal to 1"),
    ("ipc", "1.5", "--ipc 1.5: it must be a valid integer"),
    ("ipc", "ten", "--ipc ten: it must be a valid integer"),
    ("ipc", "None", "--ipc None: it must be a valid integer"),
    ("lr_img", "nan", "--lr_img nan: it must be a finite number"),
    ("lr_img", "-1", "--lr_img -1"),
    ("lr_lr", "fast", "--lr_lr fast: it must be a valid number"),
    ("Momentum_y", "1", "--Momentum_y 1: it must be less than 1"),
    ("pix_init", "", "--pix_init '': it must be"),
    ("zca", "maybe", "--zca maybe: it must be True or False"),
    ("val_fraction", "1.5", "--val_fraction 1.5: it must be less than 1"),
    ("val_fraction", "-0.1", "--val_fraction -0.1: it must be greater than or equal to 0"),
    ("pix_init", "nothing", "it must be samples_predicted_correctly, real, noise, or the path"),
    ("matching", "Exact", "it must be 'exact', 'unroll' or 'tesla'"),
    ("max_files", "0", "--max_files 0: it must be greater than or equal to 1"),
    ("device", "[cpu]", "--device")])
def test_a_wrong_value_is_refused_by_its_option(name, text, expected, written):
    for yaml_text, arguments in ((f"{name}: {text}", []), ("eval_it: 1", [f"--{name}={text}"])):
        with pytest.raises(UserError) as refusal:
            distill_config(written(yaml_text), *arguments)
        assert expected in str(refusal.value)


@pytest.mark.parametrize("text, value", [("data_path: 5", "5"), ("run_name: 2024-13-45", "2024-13-45"),
                                         ("run_name: 007", "007"), ("project: 2024-01-05", "2024-01-05")])
def test_text_in_yaml_stays_as_it_is_written(text, value, written):
    config = distill_config(written(text))
    assert getattr(config, text.split(":")[0]).removeprefix(f"{REPOSITORY}/") == value


@pytest.mark.parametrize("text", ["data_path: [a]", "ipc: !!int abc", "ipc: True", "run_name: ../up", "run_name: ..",
                                  "ipc: 1\nipc: 2", "zca: [True]", "device: [[0]]"])
def test_a_wrong_value_in_yaml_is_the_users_mistake(text, written):
    with pytest.raises(UserError):
        distill_config(written(text))


def test_an_empty_cfg_is_not_left_out():
    """`--cfg "$CFG"` with the variable unset must not start a day-long distillation of CIFAR10."""
    with pytest.raises(UserError, match="cfg"):
        distill_config("")


@pytest.mark.parametrize("name", ["batch_syn", "run_name", "res"])
def test_an_empty_value_on_the_command_line_is_not_unset(name, written):
    """`--ipc "$IPC"` with the variable unset must not take the whole training set."""
    with pytest.raises(UserError, match=f"--{name} '': it is empty"):
        distill_config(written("ipc: 1"), f"--{name}=")
    assert getattr(distill_config(written(f"{name}:")), name) is None


# --- precedence ----------------------------------------------------------------------------------------------


def test_defaults_then_yaml_then_command_line(written):
    config = distill_config(written("ipc: 3\nlr_y: 7\nzca: False"), "--lr_y", "9")
    assert (config.ipc, config.lr_y, config.zca, config.lr_img) == (3, 9.0, False, 1000.0)
    assert distill_config(written("lr_y: 7"), "--lr_y=9", "--lr_y=11").lr_y == 11.0


def test_the_command_line_can_put_a_default_back(written):
    config = distill_config(written("batch_syn: 5\nzca: False"), "--batch_syn", "None", "--zca")
    assert config.batch_syn is None and config.zca is True


@pytest.mark.parametrize("config_type", CONFIGS)
def test_a_saved_config_is_the_config_again(config_type, tmp_path):
    config = make(config_type, lr_teacher=1e-7, seed=5, device=[1, 2], data_path="/x", model="ConvNetD1")
    path = tmp_path / "saved.yaml"
    path.write_text(yaml.safe_dump(as_dict(config)))
    again = parse(config_type, "", ["--cfg", str(path)], yaml_file=True)
    for name in names(config_type):
        if getattr(config, name) != getattr(again, name):  # only default paths differ: they become absolute
            assert Path(getattr(again, name)).is_absolute() and name.endswith("_path")
    assert again.data_path == "/x" and again.lr_teacher == 1e-7 and again.device == [1, 2]


# --- paths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, meant", [
    ("../dataset/", REPOSITORY / "dataset"), ("dataset", REPOSITORY / "dataset"), ("./dataset", REPOSITORY / "dataset"),
    ("../dataset/tiny-imagenet-200", REPOSITORY / "dataset/tiny-imagenet-200"), ("/data/x", Path("/data/x")),
    ("~/x", Path("~/x").expanduser())])
def test_a_path_in_yaml_is_from_the_root(given, meant, written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(distill_config(written(f"data_path: {given}")).data_path) == meant


@pytest.mark.parametrize("given, meant", [
    ("../dataset", "dataset"), ("dataset", "here/dataset"), ("./dataset/", "here/dataset"), ("/data/x", "/data/x"),
    ("~/x", Path("~/x").expanduser())])
def test_a_path_on_the_command_line_is_from_where_the_user_stands(given, meant, written, tmp_path, monkeypatch):
    path = written("data_path: elsewhere")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = distill_config(path, "--data_path", given)
    assert Path(config.data_path).is_absolute()
    assert os.path.normpath(config.data_path) == str(tmp_path / meant)


def test_the_defaults_of_paths_do_not_depend_on_where_the_user_stands(written, tmp_path, monkeypatch):
    path = written("ipc: 1")
    monkeypatch.chdir(tmp_path)
    config = distill_config(path)
    assert config.data_path == str(REPOSITORY / "dataset") and config.log_path == str(REPOSITORY / "logged_files")


def test_what_is_computed_makes_the_run_and_not_where_it_lies_or_how_far_it_goes(written):
    path, data = written("ipc: 1"), {"images": "a"}
    run = run_id(distill_config(path), data)
    assert run == run_id(distill_config(path, "--buffer_path=x", "--data_path=y", "--Iteration=9", "--quiet"), data)
    assert run != run_id(distill_config(path), {"images": "b"})
    assert run != run_id(distill_config(path, "--pix_init=real"), data)


def test_an_option_that_is_added_later_leaves_the_names_of_runs_as_they_are(written, monkeypatch):
    path = written("ipc: 1")
    config = distill_config(path)
    run = run_id(config, {})
    options = identity(config)
    del options["factor"]  # as in a version that does not have it yet
    monkeypatch.setattr(run_folder, "identity", lambda config: options)
    assert run_id(config, {}) == run


@pytest.mark.parametrize("options, other, same", [
    ("dataset: MiniFashion", "--res=28", True), ("dataset: MiniFashion", "--res=28x28", True),
    ("dataset: MiniFashion", "--res=32", True), ("{dataset: Tiny, res: 64}", "--res=None", True),
    ("dataset: ImageNet", "--res=128", True), ("dataset: ImageNet", "--res=32", False),
    ("dataset: ImageFolder", "--res=32", True), ("dataset: ImageFolder", "--res=28", False),
    ("dataset: MiniFashion", "--subset=imagewoof", True), ("dataset: ImageNet", "--subset=imagewoof", False),
    ("syn_steps: 20", "--adjoint_steps=20", True), ("syn_steps: 20", "--adjoint_steps=15", False)])
def test_what_asks_for_the_same_is_the_same_run(options, other, same, written):
    path = written(options)
    one, two = distill_config(path), distill_config(path, other)
    assert (run_id(one, {}) == run_id(two, {})) == same == (not differences(influential(one), identity(two)))


def test_a_datasets_own_size_is_what_its_images_have(toy):
    assert load_dataset("MiniFashion", "").image_size == (OWN_SIZES["MiniFashion"][0],) * 2
    assert load_dataset("ImageFolder", toy.data).image_size == (OWN_SIZES["ImageFolder"][0],) * 2


def test_every_dataset_has_a_size_and_every_name_is_in_the_help():
    assert tuple(OWN_SIZES) == DATASETS
    of_data, of_network = (about(name, DistillConfig)["help"] for name in ("dataset", "model"))
    assert all(re.search(rf"\b{name}\b", of_data) for name in DATASETS)
    suffixes = [suffix for suffix in SUFFIXES if suffix.isalpha()]
    assert all(re.search(rf"\b{name}\b", of_network) for name in (*suffixes, *CLASSICS))
    assert all(re.search(rf"\b{suffix}\b", SUFFIX_RULE) for suffix in suffixes)


def test_the_home_of_an_unknown_user_is_no_crash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = buffer_config("--data_path", "~nobody-has-this-name/x").data_path
    assert path == str(tmp_path / "~nobody-has-this-name/x")


# --- unknown names, help and notes ---------------------------------------------------------------------------


@pytest.mark.parametrize("given, meant", [("lr_image", "lr_img"), ("Iterations", "Iteration"), ("IPC", "ipc"),
                                          ("syn_step", "syn_steps"), ("momentum_y", "Momentum_y")])
def test_an_unknown_name_is_refused_with_the_nearest(given, meant, written):
    with pytest.raises(UserError, match=f"unknown key '{given}'; did you mean '{meant}'"):
        distill_config(written(f"{given}: 1"))
    with pytest.raises(UserError, match=f"unknown option '--{given}'; did you mean '--{meant}'"):
        distill_config(written("ipc: 1"), f"--{given}", "1")


def test_options_are_not_abbreviated(written):
    with pytest.raises(UserError, match="unknown option '--Iter'"):
        distill_config(written("ipc: 1"), "--Iter", "1")


@pytest.mark.parametrize("config_type", CONFIGS)
def test_help_shows_every_option_with_its_default_and_a_sentence(config_type, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stop:
        parse(config_type, "What it is.", ["--help"], yaml_file=True)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "What it is." in text and "--cfg FILE" in text and max(map(len, text.splitlines())) <= 100
    entries = {}
    for line in text.splitlines():
        if option := re.match(r"  --(\w+) ", line):
            entries[option[1]] = line[option.end():]
        elif entries and line.startswith("    "):
            entries[next(reversed(entries))] += " " + line.strip()
    assert set(entries) == {"cfg", *names(config_type)}
    for name, default in defaults(config_type).items():  # paths as they would be typed at the repository's root
        shown = re.sub(r"\s+", " ", entries[name])
        assert len(re.findall(r"[a-z]{3,}", shown)) >= 1, name
        if default != "":
            assert shown.endswith(f"[{'unset' if default is None else default}]"), name


@pytest.mark.parametrize("config_type, unused", WITHOUT_EFFECT.items())
def test_options_without_effect_are_named_in_one_note(config_type, unused, written, capsys):
    yaml_file = config_type is DistillConfig
    arguments = [f"--{name}=1" for name in sorted(unused)]
    parse(config_type, "", ["--cfg", written("ipc: 1"), *arguments] if yaml_file else arguments, yaml_file)
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("note:")
    assert set(err.split("effect: ")[1].strip().split(", ")) == unused


@pytest.mark.parametrize("options, counts", [
    ("ipc: 1", True), ("pix_init: real", False), ("pix_init: noise", True), ("pix_init: noise\nlabels: hard", False)])
def test_a_snapshot_that_labels_nothing_is_noted(written, capsys, options, counts):
    config = distill_config(written(options), "--Label_Model_Timestamp=2")
    assert ("effect: Label_Model_Timestamp" in capsys.readouterr().err) == (not counts)
    assert ("Label_Model_Timestamp" in identity(config)) == counts


def test_options_without_effect_are_noted_from_yaml_too(written, capsys):
    distill_config(written("ema_decay: .9995\nproject: mine\nipc: 1"), "--texture")
    assert set(capsys.readouterr().err.strip().split("effect: ")[1].split(", ")) == {"ema_decay", "texture"}


@pytest.mark.parametrize("config_type", CONFIGS)
def test_options_with_effect_are_not_noted(config_type, capsys):
    parse(config_type, "", ["--model=MLP", "--lr_teacher=1e-3", "--zca", "--seed=3"])
    assert capsys.readouterr().err == ""
