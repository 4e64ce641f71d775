"""The configs of DATM and of related methods: published values, and a run of each from experts to evaluation."""

import dataclasses
import re
from functools import cache

import pytest
import torch
import yaml
from test_datasets import write_cifar, write_idx_folder, write_tiny

from utils import files
from utils.config import BufferConfig, DistillConfig
from utils.data.datasets import DATASETS
from utils.data.zca import Whitening
from utils.files import REPOSITORY
from utils.program.command_line import parse

CONFIGS = REPOSITORY / "configs"
ALL = sorted(str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.glob("*/*/*.yaml"))

# syn_steps, batch_syn, lr_img, lr_y, lr_lr, (min, current_max, max, expansion_end), threshold, eval_it,
# skip_first_eva, device. None in a window: not sequential.
PUBLISHED = {
    "CIFAR-10/ConvIN/IPC1": (80, 10, 100, 5, 1e-7, (0, None, 4, None), 1.1, 500, True, [3]),
    "CIFAR-10/ConvIN/IPC10": (80, 100, 100, 2, 1e-5, (0, 10, 20, 1000), 1, 500, True, [3]),
    "CIFAR-10/ConvIN/IPC50": (80, 500, 1000, 2, 1e-5, (0, 20, 40, 2000), 1, 500, False, [0, 1]),
    "CIFAR-10/ConvIN/IPC500": (40, 1000, 50, 10, 1e-5, (40, None, 60, None), 1, 1000, False, [2, 3]),
    "CIFAR-10/ConvIN/IPC1000": (100, 1000, 50, 10, 1e-5, (40, None, 60, None), 1, 1000, True, [0, 1, 2, 3]),
    "CIFAR-100/ConvIN/IPC1": (40, 1000, 1000, 10, 1e-5, (0, 10, 20, 1000), 1, 500, False, [0]),
    "CIFAR-100/ConvIN/IPC10": (80, 1000, 1000, 10, 1e-5, (0, 30, 50, 2000), 1, 500, True, [0, 1, 2, 3]),
    "CIFAR-100/ConvIN/IPC50": (80, 1000, 1000, 10, 1e-5, (20, None, 70, None), 1, 500, False, [0, 1, 2, 3]),
    "CIFAR-100/ConvIN/IPC100": (80, 1000, 50, 10, 1e-5, (30, None, 70, None), 1, 500, True, [0, 1, 2, 3]),
    "TinyImageNet/ConvIN/IPC1": (40, 1000, 10000, 10, 1e-4, (0, 15, 20, 2000), 1, 500, True, [0, 1]),
    "TinyImageNet/ConvIN/IPC10": (40, 500, 100, 10, 1e-4, (10, None, 50, None), 1, 500, False, [0, 1, 2, 3]),
    "TinyImageNet/ConvIN/IPC50": (20, 1000, 100, 10, 1e-4, (40, None, 70, 1), 1, 500, True, [0, 1, 2, 3]),
    # PAD, from its code.
    "CIFAR-10/PAD/IPC1": (80, 1000, 100, 5, 1e-7, (0, None, 4, None), 1.1, 500, True, [3]),
    "CIFAR-10/PAD/IPC10": (80, 500, 100, 2, 1e-5, (0, 10, 20, 1000), 1, 500, True, [3]),
    "CIFAR-10/PAD/IPC50": (80, 1000, 1000, 2, 1e-5, (0, 20, 40, 2000), 1, 500, False, [0, 1]),
    "CIFAR-10/PAD/IPC500": (40, 1000, 50, 10, 1e-5, (40, 60, 70, 2000), 1, 1000, False, [0, 1, 2]),
    "CIFAR-10/PAD/IPC1000": (100, 1000, 50, 10, 1e-5, (40, None, 60, None), 1, 1000, False, [0, 1, 2]),
    "CIFAR-100/PAD/IPC1": (40, 1000, 1000, 10, 1e-5, (0, 20, 30, 1000), 1, 500, False, [0]),
    "CIFAR-100/PAD/IPC10": (80, 1000, 1000, 10, 1e-5, (0, 30, 50, 2000), 1, 500, True, [0, 1, 2, 3]),
    "CIFAR-100/PAD/IPC50": (80, 1000, 1000, 10, 1e-5, (20, None, 70, None), 1, 500, False, [0, 1, 2, 3]),
    "CIFAR-100/PAD/IPC100": (80, 1000, 50, 10, 1e-5, (30, None, 70, None), 1, 500, True, [0, 1, 2, 3]),
    "TinyImageNet/PAD/IPC1": (40, 1000, 10000, 10, 1e-4, (0, 15, 20, 2000), 1, 500, True, [0, 1]),
    "TinyImageNet/PAD/IPC10": (40, 500, 100, 10, 1e-4, (10, None, 50, None), 1, 500, False, [0, 1, 2, 3]),
    "TinyImageNet/PAD/IPC50": (20, 1000, 100, 10, 1e-4, (40, None, 70, None), 1, 500, True, [0, 1, 2, 3]),
}
# The share of the parameters that PAD leaves out; one half where a config is not listed.
RATIOS = {"CIFAR-10/PAD/IPC1": 0, "CIFAR-10/PAD/IPC50": 0.25, "CIFAR-100/PAD/IPC50": 0}
NOTES = {  # wandb project, ema_decay
    "CIFAR-10/ConvIN/IPC1": ("CIFAR10_ipc1", 0.995), "CIFAR-10/ConvIN/IPC10": ("CIFAR10_ipc10", 0.9995),
    "CIFAR-10/ConvIN/IPC50": ("CIFAR10_ipc50", 0.995), "CIFAR-10/ConvIN/IPC500": ("CIFAR10_ipc500", 0.995),
    "CIFAR-10/ConvIN/IPC1000": ("CIFAR10_ipc1000", 0.995), "CIFAR-100/ConvIN/IPC1": ("CIFAR100_ipc1", 0.9995),
    "CIFAR-100/ConvIN/IPC10": ("CIFAR100_ipc10", 0.9995), "CIFAR-100/ConvIN/IPC50": ("CIFAR100_ipc50", 0.9995),
    "CIFAR-100/ConvIN/IPC100": ("CIFAR100_ipc100", 0.9995), "TinyImageNet/ConvIN/IPC1": ("Tiny", 0.9995),
    "TinyImageNet/ConvIN/IPC10": ("Tiny_ipc10", 0.9995), "TinyImageNet/ConvIN/IPC50": ("Tiny_ipc50", 0.995)}


def load(name, *arguments):
    return parse(DistillConfig, "", ["--cfg", str(CONFIGS / f"{name}.yaml"), *arguments], yaml_file=True)


@pytest.mark.parametrize("name", PUBLISHED)
def test_values_are_the_published(name, capsys):
    config, (steps, batch, lr_img, lr_y, lr_lr, window, threshold, eval_it, skip, device) = load(name), PUBLISHED[name]
    assert (config.syn_steps, config.batch_syn, config.lr_img, config.lr_y) == (steps, batch, lr_img, lr_y)
    assert (config.lr_lr, config.threshold, config.eval_it, config.skip_first_eva) == (lr_lr, threshold, eval_it, skip)
    first, current, last, end = window
    assert (config.min_start_epoch, config.max_start_epoch) == (first, last)
    assert config.Sequential_Generation == (current is not None)
    assert current is None or (config.current_max_start_epoch, config.expansion_end_epoch) == (current, end)
    group, ipc = name.split("/")[0], int(name.split("IPC")[1])
    assert (config.dataset, config.model) == {"CIFAR-10": ("CIFAR10", "ConvNet"), "CIFAR-100": ("CIFAR100", "ConvNet"),
                                              "TinyImageNet": ("Tiny", "ConvNetD4")}[group]
    assert config.ipc == ipc and config.device == device and config.zca
    assert config.pix_init == ("real" if (group, ipc) == ("CIFAR-100", 50) else "samples_predicted_correctly")
    assert config.expert_epochs == (3 if (group, ipc) == ("CIFAR-100", 1) or name == "CIFAR-10/PAD/IPC50" else 2)
    assert (config.lr_teacher, config.Iteration, config.num_eval) == (0.01, 10000, 1)
    assert (config.Momentum_y, config.batch_train) == (0.9, 128)
    assert config.matching == "exact" and config.labels == "learned" and config.loss_ratio == 0
    assert config.depth_ratio == (RATIOS.get(name, 0.5) if "PAD" in name else 0)
    folder = "dataset/tiny-imagenet-200" if group == "TinyImageNet" else "dataset"
    experts = REPOSITORY / "buffer_storage" / ("PAD" if "PAD" in name else "")  # another method's are of another kind
    assert config.data_path == str(REPOSITORY / folder) and config.buffer_path == str(experts)
    if "PAD" in name:
        assert config.project == f"PAD_{config.dataset}_ipc{ipc}" and capsys.readouterr().err == ""
    else:
        assert (config.project, config.ema_decay) == NOTES[name]
        unused = set(capsys.readouterr().err.strip().removeprefix("note: accepted, but without effect: ").split(", "))
        given = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()).keys()
        of_its_growth = set() if config.Sequential_Generation else {"current_max_start_epoch", "expansion_end_epoch"}
        assert unused == {"ema_decay"} | (of_its_growth & given)


# TESLA's lr_img is half of the published one: its code moves the images by half of the gradient.
RELATED = {
    "CIFAR-100/MTT/IPC1": dict(syn_steps=20, expert_epochs=3, max_start_epoch=20, lr_img=1000, lr_lr=1e-5,
                               lr_teacher=0.01, zca=True, labels="hard", matching="exact"),
    "CIFAR-10/TESLA/IPC1": dict(syn_steps=50, expert_epochs=2, max_start_epoch=5, lr_img=500, lr_lr=1e-7,
                                lr_teacher=0.01, zca=False, labels="hard", matching="tesla", num_eval=3),
    "CIFAR-100/TESLA/IPC50": dict(syn_steps=80, expert_epochs=2, max_start_epoch=40, lr_img=500, lr_lr=1e-5,
                                  lr_teacher=0.01, batch_syn=125, zca=True, labels="hard", matching="tesla",
                                  num_eval=3),
    "ImageNet-1K/TESLA/IPC1": dict(syn_steps=10, expert_epochs=3, max_start_epoch=10, lr_img=5000, lr_lr=1e-4,
                                   lr_teacher=0.01, batch_syn=100, model="ConvNetD4", zca=False, labels="target",
                                   matching="tesla", num_eval=3),
}
# FTD, table 7: syn_steps, expert_epochs, max_start_epoch, batch_syn, lr_img, lr_lr, lr_teacher, alpha, ema_decay.
FTD = {"CIFAR-10/FTD/IPC1": (50, 2, 2, None, 100, 1e-7, 0.01, 0.3, 0.9999),
       "CIFAR-10/FTD/IPC10": (30, 2, 20, None, 100, 1e-5, 0.001, 0.3, 0.9995),
       "CIFAR-10/FTD/IPC50": (30, 2, 40, None, 1000, 1e-5, 0.01, 1.0, 0.999),
       "CIFAR-100/FTD/IPC1": (40, 3, 20, None, 1000, 1e-5, 0.01, 1.0, 0.9995),
       "CIFAR-100/FTD/IPC10": (20, 2, 40, None, 1000, 1e-5, 0.01, 1.0, 0.9995),
       "CIFAR-100/FTD/IPC50": (80, 2, 40, 1000, 1000, 1e-5, 0.01, 1.0, 0.999),
       "TinyImageNet/FTD/IPC1": (30, 2, 10, None, 10000, 1e-4, 0.01, 1.0, 0.999),
       "TinyImageNet/FTD/IPC10": (20, 2, 40, 500, 10000, 1e-4, 0.01, 1.0, 0.999)}
RELATED |= {name: dict(syn_steps=steps, expert_epochs=epochs, max_start_epoch=last, batch_syn=batch, lr_img=lr_img,
                       lr_lr=lr_lr, lr_teacher=lr, zca=True, labels="hard", matching="exact", ema=True, ema_decay=decay)
            for name, (steps, epochs, last, batch, lr_img, lr_lr, lr, _, decay) in FTD.items()}


@pytest.mark.parametrize("name", RELATED)
def test_values_of_the_relatives_are_the_published(name):
    config = load(name)
    assert {key: getattr(config, key) for key in RELATED[name]} == RELATED[name]
    assert (config.min_start_epoch, config.Sequential_Generation) == (0, False)
    assert config.Iteration == (10000 if "TESLA" in name else 5000)
    assert config.threshold == float("inf")


def test_every_config_of_a_paper_is_one_of_these():
    assert {name for name in ALL if "MiniFashion" not in name and "FashionMNIST" not in name} == {*PUBLISHED, *RELATED}


def commands_of(name):
    """The options in a header's commands: of the experts (None: no command), and of the distillation beyond --cfg."""
    header = " ".join(line.strip("# ") for line in (CONFIGS / f"{name}.yaml").read_text().splitlines()
                      if line.startswith("#"))
    experts = re.search(r"buffer_FTD\.py((?: --\S+)+)", header)
    distillation = re.search(rf"DATM\.py --cfg configs/{name}\.yaml((?: --\S+)*)", header)
    return experts and experts[1].split(), distillation[1].split()


@pytest.mark.parametrize("name", [name for name in [*PUBLISHED, *RELATED] if "ConvIN" not in name])
def test_the_relatives_experts_are_the_published(name):
    """The command is in the config's header; that for DATM's experts is in configs/README.md."""
    config, method = parse(BufferConfig, "", commands_of(name)[0]), name.split("/")[1]
    rho = 0.01 if method in ("FTD", "PAD") else 0  # plain SGD
    assert (config.rho_max, config.rho_min, config.train_epochs) == (rho, rho, 100 if method == "PAD" else 50)
    assert config.num_experts == (50 if "ImageNet-1K" in name else 100)
    assert config.pad == (method == "PAD")
    if rho:  # otherwise alpha has no effect
        assert config.alpha == (FTD[name][7] if method == "FTD" else 0.3)
    distil = load(name)
    assert (config.dataset, config.model, config.zca) == (distil.dataset, distil.model, distil.zca)
    folder = "FTD_alpha_1" if name == "CIFAR-10/FTD/IPC50" else method  # α is 0.3 in the other two of CIFAR-10's FTD
    assert config.buffer_path.endswith(f"buffer_storage/{folder}") and distil.buffer_path == config.buffer_path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*/*/*.yaml")), ids=lambda path: path.stem)
def test_every_config_says_how_it_is_run_and_what_it_costs(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"--cfg {path.relative_to(REPOSITORY)}" in line for line in header)
    assert any("GFLOP" in line or "minutes" in line for line in header)
    assert any("accuracy" in line or "To beat" in line or "quickstart" in line for line in header)
    assert isinstance(yaml.safe_load(path.read_text()), dict)


@dataclasses.dataclass(frozen=True, eq=False)
class NoWhitening(Whitening):
    """Replaces a fit that takes minutes in 12,288 dimensions."""

    def apply(self, images):
        return 2 * images - 1

    def invert(self, images):
        return (images + 1) / 2

    def pulled_back(self, images):
        return (images.flatten(1) - self.mean) / 2

    def to(self, device):
        return self


@pytest.fixture(scope="module")
def experts(call, tmp_path_factory):
    """`experts(*command)` trains tiny experts by this command, once, on random images in the published layout; returns
    their folder and the options for these data."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        # The mean, 0.5, is what 2 x − 1 maps to zero.
        monkeypatch.setattr("utils.data.datasets.fit", lambda images, *given: NoWhitening(
            *(torch.full((1, size), 0.5) for size in (images[0].numel(), 1, 1))))
        monkeypatch.setitem(DATASETS, "MiniFashion", DATASETS["FashionMNIST"])
        # Pictures and pages are tested elsewhere and would take most of the time.
        monkeypatch.setattr("distill.report.show._make", lambda run, name, path: None)
        monkeypatch.setattr("distill.distillation.FIXED_SEGMENTS", 1)

        @cache
        def data(dataset):
            folder = tmp_path_factory.mktemp(dataset)
            if dataset == "Tiny":
                write_tiny(folder)
            elif dataset == "ImageNet1K":
                for place in ("train/a/0", "train/a/1", "train/b/0", "train/b/1", "val/a/0", "val/b/0"):
                    files.save(torch.rand(3, 64, 64), folder / f"{place}.pt")
            elif "Fashion" in dataset:
                write_idx_folder(folder / "FashionMNIST" / "raw")
            else:
                write_cifar(folder, monkeypatch, dataset)
            return folder

        @cache
        def experts(*command):
            config, folder = parse(BufferConfig, "", list(command)), tmp_path_factory.mktemp("experts")
            common = [f"--dataset={config.dataset}", f"--data_path={data(config.dataset)}", "--device=cpu",
                      f"--model={'ConvNetD4W4' if config.model == 'ConvNetD4' else 'ConvNetW4'}"]
            call("buffer/buffer_FTD.py", *command, *common, "--num_experts=2", "--train_epochs=4",
                 f"--buffer_path={folder}")
            return folder, common

        yield experts


# One of each folder, and what is different in another: real images, and PAD's three expert epochs.
RUN = {*{name.rsplit("/", 1)[0]: name for name in reversed(ALL)}.values(), "CIFAR-100/ConvIN/IPC50",
       "CIFAR-10/PAD/IPC50"}


@pytest.mark.parametrize("name", sorted(set(ALL) - RUN))
def test_the_commands_in_a_header_are_valid(name):
    of_experts, of_distillation = commands_of(name)
    parse(BufferConfig, "", of_experts or [])
    parse(DistillConfig, "", ["--cfg", str(CONFIGS / f"{name}.yaml"), *of_distillation], yaml_file=True)


@pytest.mark.parametrize("name", sorted(RUN))
def test_from_experts_to_evaluation(name, call, experts, tmp_path):
    """Runs configs by the commands in their headers, unchanged except for sizes."""
    config, (of_experts, of_distillation) = load(name), commands_of(name)
    of_experts = of_experts or [f"--dataset={config.dataset}", f"--model={config.model}", "--zca", "--rho_max=0.01",
                                "--rho_min=0.01", "--alpha=0.3"]  # DATM's published ones
    buffers, common = experts(*of_experts)
    ipc = 1 if config.dataset == "CIFAR100" else min(config.ipc, 2)  # the stand-in has one image per class
    call("distill/DATM.py", "--cfg", CONFIGS / f"{name}.yaml", *of_distillation, *common, f"--buffer_path={buffers}",
         f"--log_path={tmp_path}", "--run_name=run", f"--ipc={ipc}", "--Iteration=2", "--eval_it=2",
         "--syn_steps=3", "--batch_syn=7", "--num_eval=1", "--epoch_eval_train=1", "--min_start_epoch=0",
         "--current_max_start_epoch=1", "--max_start_epoch=2", "--threshold=inf", "--wandb=disabled",
         "--backend=eager")
    folder = next(tmp_path.glob(f"{config.dataset}/{ipc}/*/run/Normal"))
    images = torch.load(folder / "images_2.pt", weights_only=True)
    labels = torch.load(folder / "labels_2.pt", weights_only=True)
    assert images.isfinite().all() and len(images) == len(labels)
    assert (folder.parent / "EMA" / "images_2.pt").exists() == config.ema
    assert labels.is_floating_point() == (config.labels != "hard")

    done = call("distill/evaluation.py", *common, *["--zca"] * config.zca, "--num_eval=1", "--epoch_eval_train=1",
                *(f"--{option}_dir={folder / kind}_2.pt" for option, kind in
                  (("data", "images"), ("label", "labels"), ("lr", "lr"))))
    assert f"{len(images)} images" in done.stdout and "over 1" in done.stdout
