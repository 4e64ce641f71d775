"""Every user mistake gives one line that says what was given and what to do, exit code 2, and no files."""

import json
import re
import shutil
from unittest import mock

import pytest
import torch
import yaml
from helpers import TOY_EXPERTS, TOY_RUN, check_refusal
from PIL import Image

from utils.files import REPOSITORY
from utils.program.entry import entry

DATM, BUFFER = "distill/DATM.py", "buffer/buffer_FTD.py"
EVALUATION, BASELINE = "distill/evaluation.py", "distill/baseline.py"


@pytest.fixture
def refused(call, toy, toy_experts, tmp_path):
    """`refused(script, options, phrases)` asserts one line with these phrases, and that nothing was written."""
    def refused(script, options, phrases):
        out = tmp_path / "out"
        usual = {
            BUFFER: [*toy.train, f"--buffer_path={out}"],
            DATM: [*toy.distil, f"--buffer_path={toy_experts}", f"--log_path={out}"],
            EVALUATION: [*toy.evaluate, f"--json={out / 'x.json'}"],
            BASELINE: [*toy.evaluate, f"--json={out / 'x.json'}", f"--buffer_path={toy_experts}"]}[script]
        check_refusal(call(script, *usual, *options, expect=2), *phrases)
        assert not out.exists(), f"left behind: {sorted(out.rglob('*'))}"
    return refused


# --- options -------------------------------------------------------------------------------------------------

COMMON = {
    "unknown option": (["--momentun=1"], ["unknown option '--momentun'"]),
    "misspelt option": (["--datasett=MNIST"], ["unknown option '--datasett'; did you mean '--dataset'"]),
    "an argument that is no option": (["configs/x.yaml"], ["unexpected argument 'configs/x.yaml'", "--key value"]),
    "an option without its value": (["--seed"], ["--seed: expected one argument"]),
    "unknown dataset": (["--dataset=CIFAR-10"], ["unknown dataset 'CIFAR-10'; did you mean 'CIFAR10'", "CIFAR100"]),
    "unknown network": (["--model=ConvNetD9"], ["unknown network 'ConvNetD9'", "did you mean 'ConvNetD", "D1-D8"]),
    "unknown augmentation": (["--dsa_strategy=flip_colour"], ["--dsa_strategy", "'colour'; did you mean 'color'",
                                                              "cutout"]),
    "nonsense device": (["--device=gpu"], ["--device gpu", "allowed are auto, cpu, cuda", "[0]"]),
    "a device of another kind": (["--device=meta"], ["--device meta", "allowed are auto, cpu, cuda"]),
    "val_fraction": (["--val_fraction=1.5"], ["--val_fraction 1.5: it must be less than 1"]),
    "val_fraction of a whole class": (["--val_fraction=0.99"], ["val_fraction 0.99", "all 24", "give a smaller one"]),
    "backend": (["--backend=fast"], ["--backend fast", "'plain', 'eager', 'compile' or 'graph'"]),
    "CUDA graphs on a CPU": (["--backend=graph"], ["--backend graph", "runs on the CPU", "give auto, eager"]),
    "precision": (["--precision=fp16"], ["--precision fp16", "'fp32', 'tf32' or 'bf16'"]),
    "TF32 on a CPU": (["--precision=tf32"], ["--precision tf32", "runs on the CPU"]),
    "type": (["--batch_train=many"], ["--batch_train many: it must be a valid integer"]),
    "seed": (["--seed=1.5"], ["--seed 1.5: it must be a valid integer"]),
    "no data": (["--data_path=/nowhere"], ["ImageFolder", "/nowhere", "train/<class>"]),
}
TOO_MANY_GPUS = (["--device=cuda:7"], ["--device cuda:7", f"this machine has {torch.cuda.device_count()} GPU",
                                       "--device auto or cpu"])


@pytest.mark.parametrize("case", COMMON)
@pytest.mark.parametrize("script", [DATM, BUFFER, EVALUATION, BASELINE])
def test_what_every_program_refuses(refused, script, case, sets):
    if script == EVALUATION:
        options, phrases = COMMON[case]
        return refused(script, [*sets.options(), *options], phrases)
    if script == DATM and case == "val_fraction of a whole class":
        return refused(script, COMMON[case][0], ["trained on other data: val_fraction (0.0 there, 0.99 here)"])
    refused(script, *COMMON[case])


@pytest.mark.skipif(torch.cuda.device_count() > 7, reason="this machine has that GPU")
@pytest.mark.parametrize("script", [DATM, BUFFER, EVALUATION, BASELINE])
def test_a_gpu_that_is_not_there_is_refused(refused, script, sets):
    options, phrases = TOO_MANY_GPUS
    refused(script, [*(sets.options() if script == EVALUATION else []), *options], phrases)


@pytest.mark.parametrize("options, phrases", [
    (["--rho_max=0.02"], ["--rho_max 0.02 --rho_min 0.01", "give both the same value"]),
    (["--rho_max=-1", "--rho_min=-1"], ["--rho_max -1: it must be greater than or equal to 0"]),
    (["--save_interval=0"], ["--save_interval 0: it must be greater than or equal to 1"]),
    (["--num_experts=0"], ["--num_experts 0"]),
    (["--train_epochs=2000000000"], ["GB on the disk of", "--train_epochs"]),
    (["--train_epochs=99999999999999999999"], ["--train_epochs 99999999999999999999: it must be less than or equal"]),
    (["--model=" + "x" * 300], ["unknown network 'xxx"]),
    (["--dataset=" + "x" * 300], ["unknown dataset 'xxx", "allowed: MiniFashion"]),
    (["--dataset=ImageNet", "--subset=" + "x" * 300], ["--subset xxx", "longer than a path can be"]),
    (["--lr_teacher=1e300"], ["--lr_teacher 1e300: it must be less than or equal to"]),
    (["--alpha=1e39"], ["--alpha 1e39: it must be less than or equal to"]),
    (["--micro_batch=0"], ["--micro_batch 0: it must be greater than or equal to 1"]),
    (["--micro_batch=2", "--model=ConvNetD1W4BN"], ["--micro_batch 2", "batch norm", "cannot be split"]),
    (["--cfg=x.yaml"], ["unknown option '--cfg'"])])
def test_what_the_experts_refuse(refused, options, phrases):
    refused(BUFFER, options, phrases)


def test_a_single_class_is_refused(refused, toy, tmp_path):
    for split in ("train", "test"):
        shutil.copytree(toy.data / split / "red", tmp_path / "one" / split / "red")
    refused(BUFFER, [f"--data_path={tmp_path / 'one'}"], ["ImageFolder in", "only the class red", "need at least two"])


@pytest.mark.parametrize("options, phrases", [
    (["--max_start_epoch=3", "--expert_epochs=2"], ["--max_start_epoch 3 --expert_epochs 2", "end at epoch 4",
                                                    "has 3 epochs", "give --max_start_epoch 2 or less"]),
    (["--min_start_epoch=2"], ["--min_start_epoch 2 --max_start_epoch 2", "no start epoch", "must be larger"]),
    (["--Sequential_Generation", "--current_max_start_epoch=1", "--min_start_epoch=1"],
     ["--min_start_epoch 1 --current_max_start_epoch 1", "must be larger"]),
    (["--threshold=nan"], ["--threshold nan"]),
    (["--lr_img=1e300"], ["--lr_img 1e300: it must be less than or equal to"]),
    (["--lr_teacher=1e-200", "--lr_param=log"], ["--lr_teacher 1e-200: it must be greater than or equal to 1e-10"]),
    (["--pix_init=zeros"], ["--pix_init zeros", "samples_predicted_correctly, real, noise, or the path"]),
    (["--matching=unroll", "--micro_batch=2", "--backend=compile"],
     ["--matching unroll --backend compile --micro_batch 2", "plain autograd", "--matching exact"]),
    (["--adjoint_steps=4"], ["--adjoint_steps 4 --syn_steps 3", "give 3 or less"]),
    (["--adjoint_steps=0"], ["--adjoint_steps 0: it must be greater than or equal to 1"]),
    (["--matching=tesla", "--adjoint_steps=3"], ["--matching tesla --adjoint_steps 3", "DATM.py --matching exact"]),
    (["--lr_teacher=fast"], ["--lr_teacher fast: it must be a number, or auto"]),
    (["--matching=fast"], ["--matching fast", "'exact', 'unroll' or 'tesla'"]),
    (["--ipc=None"], ["--ipc None: it must be a valid integer"]),
    (["--model=MLP"], ["no replay_buffer_*.pt in", "ImageFolder/MLP", "buffer/buffer_FTD.py", "--buffer_path"]),
    (["--buffer_path=/nowhere"], ["no replay_buffer_*.pt in /nowhere/ImageFolder/ConvNetD1W4"]),
    ([f"--buffer_path={__file__}"], ["test_refusals.py is a file; give the folder that holds"])])
def test_what_the_distillation_refuses(refused, options, phrases):
    refused(DATM, options, phrases)


LATE = {
    "a start that is not there": (["--pix_init=x.safetensors"], ["--pix_init", "x.safetensors does not exist"]),
    "snapshot beyond the last": (["--Label_Model_Timestamp=4"], ["--Label_Model_Timestamp 4", "0 … 3", "-1 for the"]),
    "snapshot before the first": (["--Label_Model_Timestamp=-2"], ["--Label_Model_Timestamp -2", "0 … 3"]),
    "no labelling network": (["--Initialize_Label_With_Another_Model", "--Initialize_Label_Model_Dir=/nowhere"],
                             ["needs --Initialize_Label_Model, a network, and --Initialize_Label_Model_Dir"]),
    "unknown labelling network": (["--Initialize_Label_With_Another_Model", "--Initialize_Label_Model=ConvNett",
                                   "--Initialize_Label_Model_Dir=/nowhere"], ["unknown network 'ConvNett'"]),
    "no labelling experts": (["--Initialize_Label_With_Another_Model", "--Initialize_Label_Model=MLP",
                              "--Initialize_Label_Model_Dir=/nowhere"], ["no replay_buffer_*.pt in /nowhere"]),
}


@pytest.mark.parametrize("case", LATE)
def test_what_the_initialisation_refuses_leaves_nothing(refused, case):
    refused(DATM, *LATE[case])


@pytest.mark.parametrize("options, phrases", [
    (["--eval_mode=Z"], ["unknown eval_mode 'Z'", "allowed: S, C, M, W"]),
    (["--eval_mode=M"], ["AlexNet cannot read 3×8×8"])])
def test_an_evaluation_that_cannot_be_is_refused_before_the_distillation(refused, options, phrases):
    refused(DATM, ["--skip_first_eva", *options], phrases)


def test_an_expert_segment_longer_than_the_trajectory_has_advice_that_helps(call, toy, toy_experts):
    done = call(DATM, *toy.distil, f"--buffer_path={toy_experts}", "--expert_epochs=4", expect=2)
    check_refusal(done, "--expert_epochs 4", "has 3 epochs")
    assert "give --max_start_epoch" not in done.stderr  # no start epoch would help


def test_a_learning_rate_that_would_turn_negative_is_held_and_then_stops_the_run(call, toy, toy_experts, tmp_path,
                                                                                 monkeypatch):
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--lr_teacher=1",
                 "--lr_lr=1000", "--threshold=1e9", "--skip_first_eva"]
    assert "4 updates of α held back" in call(DATM, *arguments).stdout
    monkeypatch.setattr("distill.distillation.MOST_HELD", 3)
    message = call(DATM, *arguments, "--seed=1", expect=2).stderr.splitlines()[-1]
    assert message.startswith("DATM.py: error: the learning rate α would") and "lower --lr_lr" in message


@pytest.mark.parametrize("options, phrases", [
    (["--ipc=None", "--label_source=experts"], ["--label_source experts --ipc None", "give --ipc a number"]),
    (["--label_source=soft"], ["--label_source soft", "'hard' or 'experts'"]),
    (["--label_source=experts", "--buffer_path=/nowhere"], ["no replay_buffer_*.pt in /nowhere"]),
    (["--pick=herding", "--buffer_path=/nowhere"], ["no replay_buffer_*.pt in /nowhere"]),
    (["--pick=k_center", "--model=MLP"], ["no replay_buffer_*.pt in", "same --dataset, --model"]),
    (["--pick=correct", "--ipc=None"], ["--pick correct --ipc None", "give --ipc a number"]),
    (["--pick=herding", "--ipc=7", "--factor=2"], ["--pick herding chooses 28 images per class", "class blue has 24"]),
    (["--pick=centre"], ["--pick centre", "'random', 'correct', 'herding' or 'k_center'"]),
    (["--eval_mode=Z"], ["unknown eval_mode 'Z'"])])
def test_what_the_baseline_refuses(refused, options, phrases):
    refused(BASELINE, options, phrases)


@pytest.mark.parametrize("options, phrases", [
    (["--seed=\x1b[31mred"], ["--seed \\x1b[31mred: it must be a valid integer"]),
    (["--seed=a\u202eb\udcff"], ["--seed a\\u202eb\\udcff: it must be"]),
    (["--seed=" + "9" * 100000 + "x"], ["--seed 999", "9x: "]),
    (["--" + "x" * 10000], ["unknown option '--xxx", "allowed"])])
def test_a_refusal_is_a_line_that_a_terminal_can_show(call, options, phrases):
    done = call(BUFFER, *options, expect=2)
    check_refusal(done, *phrases)
    assert done.stderr.rstrip("\n").isprintable() and len(done.stderr) <= 1000


@pytest.mark.parametrize("script, options", [
    (BUFFER, ["--buffer_path=" + "x" * 300]), (DATM, ["--log_path=" + "y/" * 3000]),
    (DATM, ["--run_name=" + "x" * 300]), (EVALUATION, ["--data_dir=" + "x" * 300]),
    (BASELINE, ["--json=" + "x" * 300])])
def test_a_path_longer_than_a_path_can_be_is_refused(refused, script, options):
    refused(script, options, [options[0].split("=")[0], "longer than a path can be"])


# --- configs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content, phrases", [
    (b"lr_image: 100\nipc: 1\n", ["unknown key 'lr_image'; did you mean 'lr_img'"]),
    (b"lr_image: 1\nfoo: 2\nipc: 1\nsynsteps: 3\n", [
        "unknown keys 'lr_image' (did you mean 'lr_img'?), 'foo', 'synsteps' (did you mean 'syn_steps'?); --help"]),
    (b"Iteration 100\n", ["is not a list of options", "`key: value`"]),
    (b"a: b: c\n", ["is not YAML near line 1", "`key: value`"]),
    (b"ipc: 1\nlr_y: [1\n", ["is not YAML near line 3"]),
    (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", ["is not YAML"]),
    (b"ipc: 1\x00\n", ["is not YAML"]),
    (b"\xff\xfei\x00p\x00c\x00", ["is not YAML"]),
    (b"- ipc\n- 1\n", ["is not a list of options"]),
    (b"3\n", ["is not a list of options"]),
    (b"3: 4\n", ["unknown key '3'"]),
    (b"[a]: 4\n", ["is not"]),
    (b"", ["is not a list of options"]),
    (b"# nothing but a comment\n", ["is not a list of options"]),
    (b"ipc: many\n", ["--ipc many: it must be a valid integer"]),
    (b"ipc: {a: 1}\n", ["--ipc {'a': '1'}: it must be a valid integer"]),
    (b"zca:\n", ["--zca '': it must be True or False"]),
    (b"ipc: !!python/object/apply:os.system ['true']\n", ["--ipc ['true']: it must be a valid integer"]),
    (b'log_path: "a\\0b"\n', ["--log_path", "a\\x00b: it must not hold a null character"]),
    (b'run_name: "a\\0b"\n', ["--run_name a\\x00b: it must not hold a null character"])])
def test_a_config_that_is_none_is_refused(call, tmp_path, content, phrases):
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    done = call(DATM, "--cfg", path, expect=2)
    check_refusal(done, *phrases)
    assert str(path) in done.stderr


TEXTS = "ipc", "data_path", "log_path", "buffer_path", "model", "dataset", "run_name", "dsa_strategy", "device"


@pytest.mark.parametrize("content", [
    # No options.
    b"\n\n", b"---\n", b"--- \n...\n", b"null\n", b"ipc\n", b"[]\n", b"!!set {ipc, zca}\n", b"? ipc\n? zca\n",
    # Not one document, or not YAML.
    b"ipc: 1\n---\nipc: 2\n", b"ipc: &a [*a]\n", b"ipc: &a 2\nnum_eval: *a\n", b"&a ipc: *a\n", b"<<: {ipc: 1}\n",
    b"ipc: \t1\n\t- x\n", b"%YAML 9.9\n---\nipc: 1\n", b"ipc : 1\n ipc: 2\n", bytes(range(256)),
    # Code.
    b"!!python/object/apply:os.system ['touch pwned']\n", b"ipc: !!python/object/apply:os.system ['touch pwned']\n",
    b"ipc: !!python/name:os.system\nzca: maybe\n",
    # Keys that are given twice, or are no options.
    b"ipc: 1\nipc: 2\n", b"ipc: 1\n'ipc': 1\n", b"? [a]\n: 1\n", b"? {a: 1}\n: 1\n", b"cfg: given.yaml\n",
    b"".join(b"unknown%d: 1\n" % number for number in range(500)),
    *(b"%s: 1\n" % key for key in (b"momentun", b"lr-img", b"IPC", b"help", b"true", b"null", b"~", b"''", b'"a\\nb"',
                                   b'"\\e[31m"', b"? " + b"k" * 2000 + b"\n")),
    # Values that are none of their option.
    b"model: " + b"x" * 100000 + b"\n", b"device: [" + b"0, " * 500 + b"x]\n", b"threshold: .nan\n", b"lr_img: .inf\n",
    b"lr_img: 1e400\n", b"Iteration: 1:30\n", b"seed: 1:30\n",
    *(b"ipc: %s\n" % number for number in (
        b"0o2", b"0x2", b"2024-01-05", b"\xff", b"\x1b[31m", b"", b"9" * 100000, b"[" * 400 + b"]" * 400,
        b"'x", b'"\\q"', b"*missing", b"!!binary aGFsbG8=")),
    *(f'{name}: "a\\0b"\n'.encode() for name in TEXTS if name != "device"),  # which is checked later
    *(f"{name}: {value}\n".encode() for name in (*TEXTS, "zca") for value in ("[a]", "[[0]]", "{}", "{a: 1}"))],
    ids=lambda content: repr(content[:40])[1:])
def test_any_odd_config_is_refused_in_one_line(call, tmp_path, content):
    path = tmp_path / "given.yaml"
    path.write_bytes(content)
    done = call(REPOSITORY / DATM, f"--cfg={path}", cwd=tmp_path, expect=2)
    check_refusal(done)
    # A name that no option has at all is refused with the option alone, after the file was read.
    assert str(path) in done.stderr or re.search(r"x{20}|a\\x00b", done.stderr), done.stderr
    assert len(done.stderr) <= 1000 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("whose", ["config", "manifest"])
def test_aliases_which_make_a_few_lines_huge_are_refused_at_once(call, toy, toy_experts, tmp_path, whose):
    """Twelve levels of lists, each nine times the size of the one before: expanded, they would fill the memory."""
    layers = "[" + ", ".join("x" * 9) + "]"
    for level in range(12):
        layers = f"[&a{level} {layers}" + f", *a{level}" * 8 + "]"
    experts = tmp_path / "ImageFolder/ConvNetD1W4"
    shutil.copytree(toy_experts / "ImageFolder/ConvNetD1W4", experts)
    path = tmp_path / "given.yaml" if whose == "config" else experts / "replay_buffer_0.yaml"
    path.write_text(f"dataset: {layers}\n")
    given = toy.distil if whose == "manifest" else ["--cfg", path]
    check_refusal(call(DATM, *given, f"--buffer_path={tmp_path}", expect=2), path.name, "the alias *a")


def test_a_config_that_is_not_there_is_refused(call, tmp_path):
    check_refusal(call(DATM, "--cfg", tmp_path / "none.yaml", expect=2), "none.yaml: No such file", "path of a YAML")
    check_refusal(call(DATM, "--cfg", tmp_path, expect=2), "it is a folder or a device", "path of a YAML")
    check_refusal(call(DATM, "--ipc=1", expect=2), "required: --cfg", "--help")
    check_refusal(call("distill/DATM_tesla.py", expect=2), "required: --cfg")


# --- expert files --------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(call, toy, toy_experts, tmp_path):
    """`damaged(change, phrases)` asserts that a copy of the experts, with file 0 changed, is refused so."""
    shutil.copytree(toy_experts, tmp_path / "buffers")
    folder = tmp_path / "buffers" / TOY_EXPERTS

    def damaged(change, phrases):
        change(folder / "replay_buffer_0.pt")
        out = tmp_path / "out"
        done = call(DATM, *toy.distil, f"--buffer_path={tmp_path / 'buffers'}", f"--log_path={out}", expect=2)
        check_refusal(done, "replay_buffer_0.pt", *phrases)
        assert not out.exists()
    return damaged


def rewritten(change):
    """Returns a function that applies `change` to the experts in a file."""
    return lambda path: torch.save(change(torch.load(path, weights_only=True)), path)


SHAPES = ["holds experts of another network", "give the network and data"]


@pytest.mark.parametrize("change, phrases", [
    (lambda path: path.write_bytes(path.read_bytes()[:3000]), ["cannot be read (truncated, or not a torch file)"]),
    (lambda path: path.write_bytes(b""), ["write"]),
    (lambda path: path.write_text("experts\n"), ["not a torch file"]),
    (rewritten(lambda experts: []), ["is not a list of experts, or is empty", "train the experts again"]),
    (rewritten(lambda experts: {"experts": experts}), ["is not a list of experts"]),
    (rewritten(lambda experts: torch.zeros(3)), ["is not a list of experts"]),
    (rewritten(lambda experts: [experts[0], []]), ["expert 1", "is not a list of snapshots"]),
    (rewritten(lambda experts: [torch.zeros(4, 5)]), ["expert 0", "is not a list of snapshots"]),
    (rewritten(lambda experts: experts[0]), ["expert 0", "is not a list of snapshots"]),  # one expert, not a list
    (rewritten(lambda experts: [[snapshot[:-1] for snapshot in expert] for expert in experts]), SHAPES),
    (rewritten(lambda experts: [[[*snapshot[:-1], torch.zeros(4)] for snapshot in expert] for expert in experts]),
     [*SHAPES, "tensor 6 is (4,), and this network's is (3,)"]),
    (rewritten(lambda experts: [[*experts[0][:-1], [1.0, 2.0]]]), [*SHAPES, "tensor 1 is none"])])
def test_damaged_experts_are_refused(damaged, change, phrases):
    damaged(change, phrases)


def test_experts_that_would_run_code_are_refused(damaged, bomb):
    damaged(lambda path: torch.save([[bomb]], path), ["holds more than tensors", "save plain tensors"])
    assert not bomb.went_off


def test_experts_of_another_network_are_refused(damaged, call, toy, tmp_path):
    call(BUFFER, *toy.train, "--num_experts=1", "--train_epochs=1", "--model=ConvNetD1W8",
         f"--buffer_path={tmp_path / 'other'}")
    other = tmp_path / "other" / "ImageFolder" / "ConvNetD1W8" / "replay_buffer_0.pt"
    damaged(lambda path: shutil.copy(other, path),
            [*SHAPES, "tensor 1 is (8, 3, 3, 3), and this network's is (4, 3, 3, 3)"])


def test_more_experts_are_not_trained_beside_a_file_that_is_none(call, toy, tmp_path):
    folder = tmp_path / TOY_EXPERTS
    folder.mkdir(parents=True)
    torch.save(5, folder / "replay_buffer_0.pt")
    check_refusal(call(BUFFER, *toy.train, f"--buffer_path={tmp_path}", expect=2), "replay_buffer_0.pt")
    assert [path.name for path in folder.iterdir()] == ["replay_buffer_0.pt"]


# --- distilled sets ------------------------------------------------------------------------------------------


class Sets:
    """The three files of a set for the toy; tests replace some of them."""

    def __init__(self, folder):
        self.folder = folder
        self.write(images=torch.randn(6, 3, 8, 8), labels=torch.randn(6, 3), lr=torch.tensor(0.01))

    def write(self, **tensors):
        for name, tensor in tensors.items():
            torch.save(tensor, self.path(name))

    def path(self, name):
        return self.folder / f"{name}_best.pt"

    def options(self):
        return [f"--{option}={self.path(name)}"
                for option, name in (("data_dir", "images"), ("label_dir", "labels"), ("lr_dir", "lr"))]


@pytest.fixture
def sets(tmp_path):
    (tmp_path / "sets").mkdir()
    return Sets(tmp_path / "sets")


def test_the_set_is_good_before_it_is_spoilt(call, toy, sets):
    call(EVALUATION, *toy.evaluate, *sets.options())
    sets.write(images=torch.randn(6, 3, 8, 8, dtype=torch.float64), labels=torch.tensor([0, 1, 2, 0, 1, 2]), lr=0.01)
    call(EVALUATION, *toy.evaluate, *sets.options())


def test_a_set_is_not_saved_where_the_result_cannot_be_written(refused, sets, tmp_path):
    (tmp_path / "file").touch()
    refused(EVALUATION, [*sets.options(), f"--save={tmp_path / 'out' / 'set.safetensors'}",
                         f"--json={tmp_path / 'file' / 'x.json'}"], ["cannot write", "file/x.json"])


NAN = torch.full((6, 3, 8, 8), torch.nan)


@pytest.mark.parametrize("spoilt, phrases", [
    (dict(images=torch.randn(6, 1, 8, 8)), ["--data_dir", "[6, 1, 8, 8]", "ImageFolder needs", "[N, 3, 8, 8]"]),
    (dict(images=torch.randn(6, 3, 28, 28)), ["--data_dir", "[6, 3, 28, 28]", "[N, 3, 8, 8]"]),
    (dict(images=torch.randn(3, 8, 8)), ["--data_dir", "[3, 8, 8]"]),
    (dict(images=torch.zeros(6, 3, 8, 8, dtype=torch.uint8)), ["--data_dir", "torch.uint8", "floating-point"]),
    (dict(images=[torch.zeros(3, 8, 8)] * 6), ["--data_dir", "holds no tensor (list)"]),
    (dict(images=NAN), ["not finite"]),
    (dict(images=torch.zeros(6, 3, 8, 8).index_fill(0, torch.tensor([5]), torch.inf)), ["not finite"]),
    (dict(images=torch.full((6, 3, 8, 8), 1e300, dtype=torch.float64)), ["--data_dir", "not finite in float32"]),
    (dict(images=torch.zeros(6, 3, 8, 8).to_sparse()), ["--data_dir", "sparse"]),
    (dict(images=torch.zeros(6, 3, 8, 8, device="meta")), ["--data_dir", "without values"]),
    (dict(images=torch.zeros(0, 3, 8, 8), labels=torch.zeros(0, 3)), ["--data_dir", "[0, 3, 8, 8]"]),
    (dict(labels=torch.randn(6, 10)), ["--label_dir", "[6, 10]", "[6, 3]", "int64 classes [6]"]),
    (dict(labels=torch.randn(5, 3)), ["--label_dir", "[5, 3]", "these 6 images", "[6, 3]"]),
    (dict(labels=torch.randn(6)), ["--label_dir", "[6]"]),
    (dict(labels=torch.zeros(6, 3, dtype=torch.int64)), ["--label_dir", "torch.int64 [6, 3]"]),
    (dict(labels=torch.tensor([0, 1, 2, 3, 0, 0])), ["--label_dir", "classes outside 0 … 2"]),
    (dict(labels=torch.tensor([0, 1, 2, -1, 0, 0])), ["--label_dir", "classes outside 0 … 2"]),
    (dict(labels=torch.full((6, 3), torch.nan)), ["not finite"]),
    (dict(labels=torch.full((6, 3), 1e300, dtype=torch.float64)), ["--label_dir", "not finite in float32"]),
    (dict(labels=torch.zeros(6, dtype=torch.bool)), ["--label_dir", "torch.bool [6]"]),
    (dict(labels={"labels": 3}), ["--label_dir", "holds no tensor (dict)"]),
    (dict(lr=torch.tensor(-0.01)), ["--lr_dir", "-0.00999", "one positive learning rate"]),
    (dict(lr=torch.tensor(0.0)), ["--lr_dir", "one positive learning rate"]),
    (dict(lr=torch.tensor(torch.nan)), ["--lr_dir", "nan", "one positive learning rate"]),
    (dict(lr=torch.tensor([0.01, 0.02])), ["--lr_dir", "0.01999", "one positive learning rate"]),
    (dict(lr=torch.tensor(1e300, dtype=torch.float64)), ["--lr_dir", "one positive learning rate"]),
    (dict(lr=torch.tensor(0.01 + 1j)), ["--lr_dir", "complex numbers"]),
    (dict(lr="0.01"), ["--lr_dir", "holds no tensor (str)"])])
def test_a_spoilt_set_is_refused(refused, sets, spoilt, phrases):
    sets.write(**spoilt)
    refused(EVALUATION, sets.options(), [*phrases])


@pytest.mark.parametrize("option, name", [("--data_dir", "images"), ("--label_dir", "labels"), ("--lr_dir", "lr")])
def test_a_file_of_a_set_that_cannot_be_read_is_refused(refused, sets, bomb, option, name):
    path = sets.path(name)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    refused(EVALUATION, sets.options(), [f"{option} file", str(path), "truncated, or not a torch file"])
    path.write_bytes(b"PK\x03\x04 and no more")
    refused(EVALUATION, sets.options(), [f"{option} file", str(path), "not a torch file"])
    torch.save(bomb, path)
    refused(EVALUATION, sets.options(), [f"{option} file", str(path), "holds more than tensors", "refused"])
    assert not bomb.went_off
    path.unlink()
    refused(EVALUATION, sets.options(), [f"{option} file", str(path), "does not exist"])


def test_a_set_without_its_files_is_refused(refused, sets, toy_experts, tmp_path):
    images, labels, _ = sets.options()
    refused(EVALUATION, [labels], ["--data_dir is missing"])
    refused(EVALUATION, [images], ["--label_dir is missing"])
    torch.save(torch.zeros(6, 3, 8, 8), tmp_path / "ema_images_zca_9.pt")
    refused(EVALUATION, [f"--data_dir={tmp_path / 'ema_images_zca_9.pt'}", labels],
            ["holds un-whitened pictures", "; give ema_images_9.pt"])
    for experts in toy_experts.rglob("*.pt"):  # one file of two experts and one of one
        refused(EVALUATION, [f"--data_dir={experts}"], ["is not a set, but perhaps a file of experts"])
    refused(EVALUATION, [*sets.options(), f"--data_dir={sets.folder}"], ["--label_dir with --data_dir"])
    refused(EVALUATION, [f"--data_dir={sets.folder.parent}"], ["is a folder without a set", "give a folder that has"])
    refused(EVALUATION, [*sets.options(), "--eval_mode=Z"], ["unknown eval_mode 'Z'"])


def test_what_is_plainly_no_set_is_refused_as_what_it_is(refused, sets, tmp_path):
    sets.path("images").write_text("größer\n" * 99)
    refused(EVALUATION, sets.options(), ["--data_dir file", "is a text file, not a torch file; give a run's folder, "])
    for name, written, kind in (("images.pt", lambda path: Image.new("L", (2, 2)).save(path, "png"), "a picture"),
                                ("x.safetensors", sets.path("images").rename, "a text file"),
                                ("y.safetensors", sets.path("labels").rename, "a torch file")):
        written(tmp_path / name)
        refused(EVALUATION, [f"--data_dir={tmp_path / name}"], [name, f"is {kind}, not a ", "; give "])


def test_a_set_of_other_data_is_refused_before_these_are_read(refused, tmp_path):
    fashion, other = "results/sets/FashionMNIST_ipc1.safetensors", ["--dataset=CIFAR10", f"--data_path={tmp_path}"]
    refused(EVALUATION, [f"--data_dir={fashion}", *other], ["--data_dir: the images", "28×28", "CIFAR10 here 32×32"])
    with mock.patch("distill.option_checks.require_experts"), mock.patch("distill.option_checks.check_fitting"):
        for options, phrase in ((["--dataset=SVHN"], "SVHN here 32×32"),
                                (["--dataset=MNIST", "--zca=False"], "it is whitened (zca), and the data here is not")):
            refused(DATM, [f"--pix_init={fashion}", f"--data_path={tmp_path}", *options], [phrase])


# --- where to write ------------------------------------------------------------------------------------------


@pytest.fixture
def blocked(tmp_path):
    """A file where a folder should be."""
    path = tmp_path / "file"
    path.write_text("in the way")
    return path


def test_a_distillation_that_cannot_be_written_is_refused(call, toy, toy_experts, blocked):
    done = call(DATM, *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={blocked}", expect=2)
    check_refusal(done, "cannot write", str(blocked), "give a folder that can be written")
    assert blocked.read_text() == "in the way"


def test_experts_that_cannot_be_written_are_refused_before_they_are_trained(call, toy, blocked):
    done = call(BUFFER, *toy.train, f"--buffer_path={blocked}", expect=2)
    check_refusal(done, str(blocked))


@pytest.mark.parametrize("script", [EVALUATION, BASELINE])
def test_a_result_that_cannot_be_written_is_refused_before_the_training(call, toy, sets, blocked, script):
    files = sets.options() if script == EVALUATION else []
    done = call(script, *toy.evaluate, *files, f"--json={blocked / 'x.json'}", expect=2)
    check_refusal(done, str(blocked))


# --- as the shell sees it ------------------------------------------------------------------------------------


def test_the_shell_sees_exit_code_2_and_one_line(run, tmp_path):
    config = tmp_path / "given.yaml"
    config.write_text(yaml.safe_dump({"lr_image": 3, "ipc": 1}))
    done = run("DATM_tesla.py", "--cfg", config, cwd="distill", expect=2)
    check_refusal(done, str(config), "unknown key 'lr_image'; did you mean 'lr_img'")
    assert done.stdout == ""
    done = run("baseline.py", "--ipc=none", "--epoch_eval_train=0", cwd="distill", expect=2)
    check_refusal(done, "--epoch_eval_train 0: it must be greater than or equal to 1")


def test_a_mistake_of_the_programs_is_not_dressed_as_the_users(capsys):
    def broken():
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError):
        entry(broken)
    assert capsys.readouterr().err == ""


# --- experts that do not belong to the data ------------------------------------------------------------------


@pytest.mark.parametrize("option, phrase", [("--zca=False", "zca (True there, False here)"),
                                            ("--val_fraction=0.25", "val_fraction (0.0 there, 0.25 here)")])
def test_experts_of_other_data_are_refused(call, toy, toy_experts, tmp_path, option, phrase):
    for script, usual, why in ((DATM, [*toy.distil, f"--log_path={tmp_path}"], "were trained on other data"),
                               (BUFFER, toy.train, "experts of another kind"),
                               (BASELINE, [*toy.evaluate, "--pick=correct"], "were trained on other data")):
        done = call(script, *usual, f"--buffer_path={toy_experts}", option, expect=2)
        check_refusal(done, why, phrase, "another --buffer_path")


def test_published_experts_without_saved_options_are_taken(call, toy, toy_experts, tmp_path):
    shutil.copytree(toy_experts, tmp_path / "published", ignore=shutil.ignore_patterns("*.yaml", "*.jsonl"))
    call(DATM, *toy.distil, f"--buffer_path={tmp_path / 'published'}", f"--log_path={tmp_path}", "--Iteration=0")


def test_a_gap_in_the_expert_files_is_refused(call, toy, toy_experts, tmp_path):
    shutil.copytree(toy_experts, tmp_path, dirs_exist_ok=True)
    (tmp_path / TOY_EXPERTS / "replay_buffer_0.pt").unlink()
    done = call(BUFFER, *toy.train, f"--buffer_path={tmp_path}", expect=2)
    check_refusal(done, "holds replay_buffer_1.pt but no replay_buffer_0.pt")


def test_options_are_refused_before_the_data_is_read(call, toy):
    with mock.patch("utils.program.prepare.load_dataset", side_effect=AssertionError("the data was read")):
        for script, options in ((DATM, [*toy.distil, "--eval_mode=Z"]), (DATM, [*toy.distil, "--buffer_path=/nowhere"]),
                                (EVALUATION, toy.evaluate), (EVALUATION, [*toy.evaluate, "--data_dir=/nowhere.pt"]),
                                (BASELINE, [*toy.evaluate, "--ipc=None", "--label_source=experts"]),
                                (BUFFER, [*toy.train, "--rho_max=3"])):
            call(script, *options, expect=2)


@pytest.mark.parametrize("name, content", [("config.yaml", ""), ("config.yaml", "[1"), ("result.json", "{")])
def test_damaged_files_of_a_run_are_refused(call, toy, toy_experts, tmp_path, name, content):
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--run_name=run",
                 "--Iteration=0"]
    call(DATM, *arguments)
    (tmp_path / TOY_RUN / name).write_text(content)
    check_refusal(call(DATM, *arguments, expect=2), name, "is damaged")


def test_a_size_that_a_dataset_does_not_have_is_refused(call):
    done = call(BASELINE, "--dataset=MiniFashion", "--res=64", expect=2)
    check_refusal(done, "res is 64", "28×28", "ImageFolder")


def test_losses_that_stay_not_finite_stop_the_run(call, toy, toy_experts, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.distillation.MOST_LOST", 3)
    done = call(DATM, *toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--lr_img=1e38",
                "--lr_y=0", "--threshold=inf", "--skip_first_eva", expect=2)
    assert "not finite 3 times in a row, the last time at iteration 3" in done.stderr and "--lr_img" in done.stderr


def test_a_run_in_which_nothing_was_updated_says_so(call, toy, toy_experts, tmp_path, monkeypatch):
    """Early and at the end, with the loss, the threshold, and what to change first."""
    # The fixed segments' loss is not compared with the threshold, so the notes must not quote it.
    monkeypatch.setattr("distill.distillation.Distillation.fixed_loss", lambda *_: 1e-10)
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--threshold=1e-9",
                 "--Iteration=12", "--eval_it=12", "--skip_first_eva"]
    done = call(DATM, *arguments)
    assert "12 of 12 updates skipped" in done.stdout
    early, late = [line for line in done.stderr.splitlines() if line.startswith("note: ") and "--threshold" in line]
    assert "the first 10 updates were all skipped: the matching loss (" in early and "every update" in late
    for said in (early, late):
        assert "is above --threshold 1e-09" in said and "in this order: a larger --threshold; --lr_teacher auto" in said
        assert float(said.split("the matching loss (")[1].split(")")[0]) > 1e-9
    done = call(DATM, *arguments, "--lr_teacher=auto", "--run_name=auto")
    assert "; --lr_teacher auto" not in done.stderr
    assert done.stderr.count("a smaller --lr_teacher than the one that auto measured") == 2


def test_a_run_says_what_was_skipped_and_that_few_images_choose_its_set(call, toy, toy_experts, tmp_path):
    arguments = [*toy.distil, f"--buffer_path={toy_experts}", f"--log_path={tmp_path}", "--lr_img=0", "--lr_y=0",
                 "--lr_lr=0", "--Iteration=4", "--eval_it=4", "--skip_first_eva"]  # the same losses in both runs
    assert "updates were skipped" not in call(DATM, *arguments, "--threshold=inf", "--run_name=all").stderr
    lines = map(json.loads, next(tmp_path.glob("*/*/*/all/metrics.jsonl")).read_text().splitlines())
    least = min(line["loss"] for line in lines if "loss" in line)
    done = call(DATM, *arguments, f"--threshold={least}")
    assert "note: 3 of 4 updates were skipped" in done.stderr and "a smaller --lr_img" in done.stderr
    assert "note: the best set is chosen on 24 test images, of which each is worth 4.2 points" in done.stderr
