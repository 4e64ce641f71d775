"""The options of the programs: one frozen, typed config per program.

An option is a field of its program's dataclass, which is the only place that states its name, type, bounds, default and
help, whether it has an effect and whether the result depends on it.
"""

from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from utils.config.option_types import (
    STARTS,
    AutoRate,
    Count,
    Device,
    FilePath,
    FolderName,
    FolderPath,
    Fraction,
    Index,
    LearningRate,
    Protocols,
    Rate,
    RateOfRate,
    Resolution,
    Start,
    Threads,
)

HOW_MUCH = "how much"
GROUPS = MAIN, METHOD, EVALUATION, SPEED, FILES = "main", "method", "evaluation", "speed", "files"  # as in --help


def option(group: str, default: Any, help: str, effect: bool | str = True, decides: bool | str = True,
           writes: str = "") -> Any:
    """A field of a config, with its help group, default and help text.

    Args:
        effect: False: accepted but unused; the name of another option or of a property: no effect unless that is true
            or not 0.
        decides: True: the result depends on it; False: it only affects how or where a run computes and what it writes;
            HOW_MUCH: it sets how far a run goes, or how its results are divided into files; the same run can be
            resumed with another value, and all ranks must have the same.
        writes: for a file that the program writes, the kind by which its own files are recognised
            (`utils.files.check_outputs`).
    """
    default = {"default_factory": partial(list, default)} if isinstance(default, list) else {"default": default}
    return Field(**default, description=help,
                 json_schema_extra={"group": group, "effect": effect, "decides": decides, "writes": writes})


# Dataset → the values of `res` that mean the same as an unset one: its own size, then 32 where that has no effect
# (published configs give 32 for every dataset).
OWN_SIZES = {"MiniFashion": (28, 32), "FashionMNIST": (28, 32), "MNIST": (28, 32), "CIFAR10": (32,), "CIFAR100": (32,),
             "SVHN": (32,), "Tiny": (64, 32), "ImageNet": (128,), "ImageNet1K": (64, 32), "ImageFolder": (32,)}

# Options that several programs share.
MICRO_BATCH = option(SPEED, None, "samples at a time: changes memory, and the result by rounding only; unset: chosen "
                     "by the memory at hand", decides=False)
RESUME = option(FILES, "auto", "auto: resume an unfinished run of the same options; never: discard it and start "
                "over", decides=False)

config_class = dataclass(frozen=True, kw_only=True, config={"coerce_numbers_to_str": True})


# --- the options of the programs -----------------------------------------------------------------------------


@config_class
class DataConfig:
    """Options that all programs share: the real data, its whitening and augmentation, the seed and the device."""

    dataset: str = option(MAIN, "CIFAR10", "MiniFashion, FashionMNIST, MNIST, CIFAR10, CIFAR100, SVHN, Tiny, ImageNet, "
                          "ImageNet1K or ImageFolder (your own)")
    subset: FolderName = option(MAIN, "imagenette", "which ten classes, for ImageNet: imagenette, imagewoof, "
                                "imagemeow, imagesquawk, imagefruit or imageyellow")
    model: str = option(MAIN, "ConvNet", "ConvNet with any of D1-D8, W1-W4096, AS AR AL, NN BN LN IN GN, NP MP AP; "
                        "MLP, LeNet, AlexNet, VGG11, VGG11BN, ResNet18, ResNet18BN, ResNet18_AP, ResNet18BN_AP, each "
                        "also _Tiny")
    res: Resolution = option(MAIN, None, "image size: a square's side, or HxW such as 32x48; unset: the dataset's own "
                             "(32 for ImageFolder, 128 for ImageNet)")
    seed: int = option(MAIN, 0, "the same seed gives the same result")
    zca: bool = option(METHOD, False, "whiten the images (ZCA, eps 0.1)")
    dsa: bool = option(METHOD, True, "augment training batches by DSA; False: experts get the older augmentation, the "
                       "inner loop none, and evaluations what DC used")
    dsa_strategy: str = option(METHOD, "color_crop_cutout_flip_scale_rotate", "DSA operations, joined by _; "
                               "none: no augmentation", effect="dsa")
    val_fraction: Fraction = option(METHOD, 0.0, "hold out this share of the training images and test on it instead "
                                    "of on the test images")
    backend: Literal["auto", "plain", "eager", "compile", "graph"] = option(
        SPEED, "auto", "how derivatives are computed. plain: autograd; eager: hand-written for the plain ConvNet on a "
        "CPU, else autograd; compile: hand-written for all ConvNets that it covers, compiled; graph: autograd, "
        "replayed from CUDA graphs; auto: compile if the run is long enough to repay it, else graph on a GPU and eager "
        "on a CPU", decides=False)
    precision: Literal["auto", "fp32", "tf32", "bf16"] = option(
        SPEED, "auto", "of convolutions and matrix products; auto: torch's own (on a GPU, TF32 in convolutions)")
    threads: Threads = option(SPEED, "auto", "CPU threads; auto: OMP_NUM_THREADS, else all cores; long runs first "
                              "measure whether several help, and use one if not", decides=False)
    batch_real: Count = option(SPEED, 256, "batch of the ImageNet loaders; real data is held whole here", effect=False)
    device: Device = option(SPEED, "auto", "auto, cpu, cuda, cuda:N or a list of GPU indices", decides=False)
    data_path: FolderPath = option(FILES, "data", "folder of the real data")
    quiet: bool = option(FILES, False, "print the results, warnings and errors only", decides=False)


@config_class
class BufferConfig(DataConfig):
    """Expert training, `buffer/buffer_FTD.py`."""

    num_experts: Count = option(MAIN, 100, "experts to train", decides=HOW_MUCH)
    train_epochs: Count = option(MAIN, 50, "epochs of each expert")
    lr_teacher: LearningRate = option(METHOD, 0.01, "learning rate, constant")
    batch_train: Count = option(METHOD, 256, "training batch")
    mom: Fraction = option(METHOD, 0.0, "momentum")
    l2: Rate = option(METHOD, 0.0, "weight decay")
    rho_max: Rate = option(METHOD, 2.0, "GSAM: radius of the ascent; 0 is plain SGD")
    rho_min: Rate = option(METHOD, 2.0, "GSAM: must equal rho_max, as the learning rate is constant")
    alpha: Rate = option(METHOD, 0.4, "GSAM: weight of the surrogate gap", effect="rho_max")
    adaptive: bool = option(METHOD, True, "GSAM: scale the ascent by the parameters' squares",
                            effect="rho_max")
    decay: bool = option(METHOD, False, "learning rate decay", effect=False)
    pad: bool = option(METHOD, False, "PAD: from easy to hard images, as the options below say")
    init_ratio: Annotated[float, Field(gt=0, le=1)] = option(
        METHOD, 0.75, "PAD: easiest share of each class that the first epoch uses", effect="pad")
    add_end_epoch: Index = option(METHOD, 20, "PAD: epoch from which all images are used", effect="pad")
    rm_epoch_first: Index = option(METHOD, 40, "PAD: epoch from which the easiest are left out", effect="pad")
    rm_epoch_second: Index = option(METHOD, 60, "PAD: epoch from which more of the easiest are left out", effect="pad")
    rm_easy_ratio_first: Fraction = option(METHOD, 0.1, "PAD: share left out from rm_epoch_first", effect="pad")
    rm_easy_ratio_second: Fraction = option(METHOD, 0.2, "PAD: share left out from rm_epoch_second", effect="pad")
    micro_batch: Count | None = MICRO_BATCH
    resume: Literal["auto", "never"] = RESUME
    save_interval: Count = option(FILES, 10, "experts per file", decides=HOW_MUCH)
    buffer_path: FolderPath = option(FILES, "buffers", "folder of the experts, in <dataset>/<model>/ below it")


@config_class
class TrainConfig(DataConfig):
    """How a network is trained and tested on a distilled (or real) set."""

    eval_mode: str = option(EVALUATION, "S", "networks to test: S the model without batch norm, M ConvNet "
                            "AlexNet VGG11 ResNet18, W widths, D depths, A activations, P poolings, N norms, C the "
                            "model and ConvNet, BN with and without batch norm")
    num_eval: Count = option(EVALUATION, 5, "networks of each kind")
    epoch_eval_train: Count = option(EVALUATION, 1000, "epochs of one training")
    batch_train: Count = option(EVALUATION, 128, "training batch")
    lr_teacher: LearningRate = option(METHOD, 0.01, "learning rate")
    factor: Count = option(METHOD, 1, "a stored image holds factor² smaller ones in a grid, each with its label, "
                           "stretched to full size in use (IDC); evaluation.py: for a set that does not record it")
    no_aug: bool = option(METHOD, False, "no augmentation (DATM.py: in the inner loop only)")
    parall_eva: bool = option(SPEED, False, "start one process per GPU", decides=False)

    @property
    def epochs_trained(self) -> int:
        """Epochs of one training; the published code's run from 0 to `epoch_eval_train` inclusive."""
        return self.epoch_eval_train + 1


@config_class
class DistillConfig(TrainConfig):
    """Distillation, `distill/DATM.py`."""

    ipc: Count = option(MAIN, 1, "synthetic images per class")
    Iteration: Index = option(MAIN, 5000, "number of updates; sets are tested from iteration 0 to this one; a finished "
                              "run is extended if this is larger", decides=HOW_MUCH)
    zca: bool = option(METHOD, True, "whiten the images (ZCA, eps 0.1)")
    lr_teacher: AutoRate = option(METHOD, 0.01, "start of the learned learning rate; auto: measured, the rate at which "
                                  "the first set follows the experts best")
    matching: Literal["exact", "unroll", "tesla"] = option(METHOD, "exact", "how the gradient is computed")
    adjoint_steps: Count | None = option(METHOD, None, "exact: through how many of the last inner steps the gradient "
                                         "goes, for less time; unset: through all, which alone is exact")
    labels: Literal["learned", "soft", "hard", "target"] = option(
        METHOD, "learned", "soft and learned; soft and fixed; the classes themselves; or, as in TESLA, what the target "
        "expert says of the images at each iteration")
    lr_param: Literal["plain", "log"] = option(METHOD, "plain", "log: learn log α, so that α stays positive")
    ema: bool = option(METHOD, False, "average the images over the iterations too (FTD), and evaluate both")
    ema_decay: Annotated[float, Field(ge=0, le=1)] = option(METHOD, 0.999, "decay of that average", effect="ema")
    depth_ratio: Fraction = option(METHOD, 0.0, "PAD (the paper): match without this first share of the parameters")
    loss_ratio: Fraction = option(METHOD, 0.0, "PAD (its code): match without this share of the parameters, those "
                                  "nearest to the target")
    lr_img: Rate = option(METHOD, 1000.0, "SGD rate of the images")
    lr_lr: RateOfRate = option(METHOD, 1e-5, "SGD rate of the learning rate")
    lr_y: Rate = option(METHOD, 2.0, "SGD rate of the label logits", effect="learns_labels")
    Momentum_y: Fraction = option(METHOD, 0.9, "momentum of the label logits", effect="learns_labels")
    batch_syn: Count | None = option(METHOD, None, "synthetic batch of an inner step; unset: the whole set")
    pix_init: Start = option(METHOD, STARTS[0], f"how the images start: {', '.join(STARTS)}, or a "
                             "distilled.safetensors, to start from its images, labels and rate")
    expert_epochs: Count = option(METHOD, 2, "expert epochs M between start and target")
    syn_steps: Count = option(METHOD, 80, "inner steps T on the synthetic set")
    min_start_epoch: Index = option(METHOD, 0, "first epoch of the difficulty window")
    max_start_epoch: Count = option(METHOD, 25, "end of the difficulty window, exclusive")
    Sequential_Generation: bool = option(METHOD, True, "let the window's end grow")
    current_max_start_epoch: Count = option(METHOD, 20, "end of the window at iteration 0",
                                            effect="Sequential_Generation")
    expansion_end_epoch: Count = option(METHOD, 3000, "iteration at which the window has its full size",
                                        effect="Sequential_Generation")
    threshold: Annotated[float, Field(ge=0)] = option(METHOD, 1.0, "skip an update whose matching loss exceeds this; "
                                                      "inf: none")
    load_all: bool = option(METHOD, False, "draw one of all experts at each iteration, instead of walking through them")
    max_files: Count | None = option(METHOD, None, "use at most this many expert files")
    max_experts: Count | None = option(METHOD, None, "use at most this many experts of a file")
    Initialize_Label_With_Another_Model: bool = option(METHOD, False, "label the images by another network's experts",
                                                       effect="uses_experts")
    Initialize_Label_Model: str = option(METHOD, "", "that network's name", effect="labelled_by_another")
    Initialize_Label_Model_Dir: FilePath = option(METHOD, "", "the folder that holds its "
                                                  "replay_buffer_*.pt",
                                                  effect="labelled_by_another")
    Label_Model_Timestamp: int = option(METHOD, -1, "which snapshot of the experts chooses and labels the images; -1: "
                                        "the last",
                                        effect="uses_snapshot")
    eval_it: Count = option(EVALUATION, 100, "evaluate every so many iterations")
    skip_first_eva: bool = option(EVALUATION, False, "do not evaluate at iteration 0")
    batch_train: Count = option(EVALUATION, 256, "training batch")
    data_path: FolderPath = option(FILES, "../dataset/", "folder of the real data")
    buffer_path: FolderPath = option(FILES, "../buffer_storage/", "folder of the experts, in <dataset>/<model>/ "
                                     "below it")
    log_path: FolderPath = option(FILES, "logged_files", "folder of the results", decides=False)
    resume: Literal["auto", "never"] = RESUME
    run_name: FolderName | None = option(FILES, None, "name of the run's folder; unset: made from the config",
                                         decides=False)
    force_save: bool = option(FILES, False, "send wandb pictures at ipc 50 and above, too", decides=False)
    record_loss: bool = option(FILES, False, "record the loss; metrics.jsonl always does", effect=False)
    wandb: Literal["auto", "online", "offline", "disabled"] = option(
        FILES, "auto", "Weights & Biases; auto: as its own settings say, but not online without an account",
        decides=False)
    project: str = option(FILES, "TEST", "wandb project", decides=False)
    micro_batch: Count | None = MICRO_BATCH
    dry_run: bool = option(SPEED, False, "estimate time and memory on this machine, measure which settings fit the "
                           "experts, and stop", decides=False)
    device: Device = option(SPEED, [0], "auto, cpu, cuda, cuda:N or a list of GPU indices", decides=False)
    parall_eva: bool = option(SPEED, False, "unused: the list of devices starts the ranks", effect=False)
    lr_init: float = option(METHOD, 0.01, "unused", effect=False)
    texture: bool = option(METHOD, False, "unused", effect=False)
    canvas_size: int = option(METHOD, 2, "unused", effect=False)
    canvas_samples: int = option(METHOD, 1, "unused", effect=False)

    @property
    def learns_labels(self) -> bool:
        return self.labels == "learned"

    @property
    def uses_experts(self) -> bool:
        """Whether experts choose or label the initial images."""
        return self.pix_init == STARTS[0] or (self.pix_init in STARTS and self.labels != "hard")

    @property
    def labelled_by_another(self) -> bool:
        return self.Initialize_Label_With_Another_Model and self.uses_experts

    @property
    def uses_snapshot(self) -> bool:
        """Whether the experts' snapshot `Label_Model_Timestamp` chooses or labels the initial images."""
        return self.uses_experts and self.pix_init != "real"


@config_class
class TeslaConfig(DistillConfig):
    """Distillation with the TESLA gradient, `distill/DATM_tesla.py`."""

    matching: Literal["tesla"] = option(METHOD, "tesla", "how the gradient is computed; DATM.py offers others")


@config_class
class EvaluationConfig(TrainConfig):
    """Evaluation of a saved set, `distill/evaluation.py`."""

    protocol: Protocols = option(EVALUATION, "datm", "whose evaluation: datm, mtt or dc, or several, such as dc,datm; "
                                 "epochs, batch, learning rate and augmentation that are not given follow it")
    lr_teacher: AutoRate = option(METHOD, 0.01, "learning rate of sets that have none; if given, it replaces a set's "
                                  "own; auto: the best of several for each kind of network, on a tenth of the "
                                  "training images")
    data_dir: FilePath = option(FILES, "", "a run's folder or a distilled.safetensors; what DC, DSA, DM, MTT, FTD, "
                                "TESLA, DATM, PAD, IDC or NCFM released, as a file or the folder that holds it; or the "
                                "file of the images alone")
    label_dir: FilePath = option(FILES, "", "file of the label logits or classes")
    lr_dir: FilePath = option(FILES, "", "file of the learning rate; unset: lr_teacher")
    label_kind: Literal["logits", "probabilities"] = option(
        METHOD, "logits", "what soft labels are: logits in DATM's and PAD's files, probabilities in TESLA's")
    hard_labels: bool = option(METHOD, False, "train on the images' classes instead of their soft labels")
    robust_score: bool = option(EVALUATION, False, "also compute DD-Ranking's scores (21 × num_eval trainings of each "
                                "kind of network)")
    epoch_eval_real: Count = option(EVALUATION, 50, "robust_score: epochs on the whole training set; the default is an "
                                    "expert's, as the set's would take days", effect="robust_score")
    buffer_path: FolderPath = option(FILES, "../buffer_storage/", "robust_score: folder of the experts that label the "
                                     "random images", effect="robust_score")
    json: FilePath = option(FILES, "", "write the result to this file", decides=False, writes="json:what")
    save: FilePath = option(FILES, "", "write the set to this file, as a self-describing safetensors", decides=False,
                            writes="safetensors:datm-distilled-set")


@config_class
class BaselineConfig(TrainConfig):
    """Training on real images, `distill/baseline.py`."""

    ipc: Count | None = option(MAIN, 1, "real images per class; None: the whole training set")
    pick: Literal["random", "correct", "herding", "k_center"] = option(
        MAIN, "random", "which ones; correct: random ones that an expert predicts correctly, as DATM starts; or a "
        "coreset in an expert's features, by herding or greedy k-center")
    label_source: Literal["auto", "hard", "experts"] = option(
        METHOD, "auto", "the images' own labels, or the mean logits of the experts that are right; auto: hard for "
        "random images, else experts")
    buffer_path: FolderPath = option(FILES, "../buffer_storage/", "folder of the experts that choose and label")
    json: FilePath = option(FILES, "", "write the result to this file", decides=False, writes="json:what")
