"""Which imports are allowed, how large a file may be, and which options exist."""

import ast
from dataclasses import fields
from graphlib import TopologicalSorter

import pytest

from utils.config import BaselineConfig, BufferConfig, DistillConfig, EvaluationConfig, TeslaConfig
from utils.files import REPOSITORY

GROUND = ["utils.errors", "utils.files", "utils.memory", "utils.loss_and_accuracy", "utils.networks"]
UNDER_CONFIG = [*GROUND, "utils.parameters", "utils.data", "utils.derivatives"]
SETS = ["distill.schedule", "distill.matching", "distill.distilled_set", "distill.set_files", "distill.result_files",
        "distill.shared_model"]
STATE = [*SETS, "distill.initialize", "distill.distillation", "buffer.trajectories", "buffer.manifests"]

# A module or package (the longest matching name counts) → what it may import from this repository.
MAY_IMPORT = {
    **{module: ["utils.errors", "utils.files"] for module in GROUND},
    "utils.networks": ["utils.errors", "utils.networks"],
    "utils.config": ["utils.errors", "utils.files", "utils.config"],
    "utils.data": [*GROUND, "utils.data"],
    "utils.derivatives": [*GROUND, "utils.derivatives"],
    "utils.parameters": [*GROUND, "utils.derivatives"],
    "utils.program": ["utils"],
    "buffer": ["utils", "buffer"],
    **{module: ["utils", *SETS] for module in SETS},
    **{f"distill.{module}": UNDER_CONFIG for module in ("schedule", "matching")},
    **{f"distill.{module}": ["utils", *STATE] for module in ("initialize", "distillation")},
    "distill.evaluate": ["utils", *STATE, "distill.evaluate"],
    "distill.report": ["utils", "distill.result_files", "distill.distilled_set", "distill.report"],
    "distill": ["utils", "distill", "buffer.trajectories", "buffer.manifests"],
}
PATHS = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
         for top in ("utils", "buffer", "distill") for path in (REPOSITORY / top).rglob("*.py")}


def within(module, names):
    """The longest of the names that is the module or a package containing it; None: none is."""
    return max((name for name in names if f"{module}.".startswith(f"{name}.")), key=len, default=None)


def imported(module):
    """The modules that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(PATHS[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in PATHS else node.module


@pytest.mark.parametrize("module", PATHS)
def test_imports_run_one_way(module):
    for name in imported(module):
        assert name.split(".")[0] not in ("scripts", "tests"), f"{module} imports {name}"
        if name.split(".")[0] in ("utils", "buffer", "distill") and name != "utils":  # `utils.later` is for all
            allowed = MAY_IMPORT[within(module, MAY_IMPORT)]
            assert within(name, allowed), f"{module} imports {name}; it may import {', '.join(allowed)}"
    assert within(module, ["utils.config"]) is None or "torch" not in imported(module)


def test_there_is_no_circle_and_no_large_file():
    list(TopologicalSorter({module: set(imported(module)) & set(PATHS) for module in PATHS}).static_order())
    lines = {module: len(path.read_text().splitlines()) for module, path in PATHS.items()}
    assert max(lines.values()) <= 400 and lines["distill.loop"] <= 220
    assert len([path for path in (REPOSITORY / "utils").iterdir() if path.name[0] != "_"]) <= 10


DATA = ("dataset subset model res seed zca dsa dsa_strategy val_fraction backend precision threads batch_real device "
        "data_path quiet")
TRAIN = f"{DATA} eval_mode num_eval epoch_eval_train batch_train lr_teacher factor no_aug parall_eva"
OPTIONS = {
    BufferConfig: f"{DATA} num_experts train_epochs lr_teacher batch_train mom l2 rho_max rho_min alpha adaptive decay "
                  "pad init_ratio add_end_epoch rm_epoch_first rm_epoch_second rm_easy_ratio_first "
                  "rm_easy_ratio_second micro_batch resume save_interval buffer_path",
    DistillConfig: f"{TRAIN} ipc Iteration matching adjoint_steps labels lr_param ema ema_decay depth_ratio loss_ratio "
                   "lr_img lr_lr lr_y Momentum_y batch_syn pix_init expert_epochs syn_steps min_start_epoch "
                   "max_start_epoch Sequential_Generation current_max_start_epoch expansion_end_epoch threshold "
                   "load_all max_files max_experts Initialize_Label_With_Another_Model Initialize_Label_Model "
                   "Initialize_Label_Model_Dir Label_Model_Timestamp eval_it skip_first_eva buffer_path log_path "
                   "resume run_name force_save record_loss wandb project micro_batch dry_run lr_init texture "
                   "canvas_size canvas_samples",
    EvaluationConfig: f"{TRAIN} protocol data_dir label_dir lr_dir label_kind hard_labels robust_score epoch_eval_real "
                      "buffer_path json save",
    BaselineConfig: f"{TRAIN} ipc pick label_source buffer_path json"}
OPTIONS[TeslaConfig] = OPTIONS[DistillConfig]


@pytest.mark.parametrize("config_type", OPTIONS)
def test_the_options_are_these(config_type):
    """A new option must be added here deliberately: a better default may make it unnecessary."""
    assert {field.name for field in fields(config_type)} == set(OPTIONS[config_type].split())
