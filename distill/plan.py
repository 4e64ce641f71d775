"""How much a distillation does, and when: known before it begins."""

from utils.config import DistillConfig
from utils.data.datasets import Dataset
from utils.derivatives.choose_engine import Work
from utils.errors import number_of
from utils.networks import evaluation_pool
from utils.parameters import FlatModel

SAVE_INTERVAL = 1000  # the set of an iteration divisible by this is always written


def num_samples(config: DistillConfig, dataset: Dataset) -> int:
    """What networks see of the set, each with its label."""
    return config.ipc * dataset.num_classes * config.factor**2


def set_in_words(config: DistillConfig, dataset: Dataset) -> str:
    """The size of the set."""
    more = f", factor {config.factor} ({num_samples(config, dataset)} labels)" if config.factor > 1 else ""
    return f"ipc {config.ipc}{more}"


def batch_size(config: DistillConfig, dataset: Dataset) -> int:
    """Samples of an inner step."""
    samples = num_samples(config, dataset)
    return min(config.batch_syn or samples, samples)


def is_evaluated(config: DistillConfig, iteration: int) -> bool:
    """Whether the set is evaluated at this iteration, before its update."""
    return iteration == config.Iteration or (iteration % config.eval_it == 0
                                             and not (iteration == 0 and config.skip_first_eva))


def is_published(config: DistillConfig, iteration: int) -> bool:
    """Whether the set is written at this iteration whatever it scores (published: never without an evaluation)."""
    return iteration == config.Iteration or iteration % SAVE_INTERVAL == 0


def evaluations(config: DistillConfig, begin: int = 0) -> int:
    """How often a run is evaluated, from this iteration on."""
    return sum(is_evaluated(config, iteration) for iteration in
               {config.Iteration, *range(-(-begin // config.eval_it) * config.eval_it, config.Iteration,
                                         config.eval_it)})


def evaluation_in_iterations(config: DistillConfig, dataset: Dataset) -> float:
    """About how many iterations take as long as an evaluation, by the work that engines count; for a run that has
    had none yet, as compiling and measuring one would take its time."""
    samples = (config.epoch_eval_train + 1) * num_samples(config, dataset)
    tested = len(dataset.test_labels) / 3  # a forward pass is about a third of a gradient
    evaluation = Work(gradients=networks(config) * (samples + tested))
    return evaluation.total / work_of_an_iteration(config, dataset).total


def networks(config: DistillConfig) -> int:
    """How many an evaluation trains."""
    return config.num_eval * len(evaluation_pool(config.eval_mode, config.model)) * (2 if config.ema else 1)


def matched_steps(config: DistillConfig) -> int:
    """The inner steps that the gradient goes through, the last ones."""
    return config.adjoint_steps or config.syn_steps


def kept_steps(config: DistillConfig, dataset: Dataset, model: FlatModel) -> int:
    """The inner steps that leave maps to their adjoints, the last ones."""
    if config.matching == "unroll":
        return 0
    return min(model.kept_steps(batch_size(config, dataset)), matched_steps(config))


def kept_in_words(config: DistillConfig, dataset: Dataset, model: FlatModel) -> str:
    """To be said after the engine; empty where nothing is kept."""
    steps = kept_steps(config, dataset, model)
    return f", activations of the last {number_of(steps, 'step')} kept" if steps else ""


def work_of_an_iteration(config: DistillConfig, dataset: Dataset) -> Work:
    """Its inner steps together."""
    matched, batch = matched_steps(config), batch_size(config, dataset)
    return Work(gradients=(config.syn_steps - matched) * batch, matched=matched * batch)


def work_of(config: DistillConfig, dataset: Dataset) -> Work:
    """All inner steps of a run together."""
    return Work(*(config.Iteration * part for part in work_of_an_iteration(config, dataset)))


def gradient_in_words(config: DistillConfig) -> str:
    """Such as `exact gradient, T 20`."""
    steps = matched_steps(config)
    truncated = f" truncated to the last {steps}" if steps < config.syn_steps else ""
    return f"{config.matching} gradient, T {config.syn_steps}{truncated}"
