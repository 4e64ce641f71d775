"""How much a distillation does, and when: known before it begins."""

from distill.evaluate.networks import num_networks
from utils.config import DistillConfig
from utils.data.datasets import Dataset
from utils.derivatives.choose_engine import Work
from utils.errors import number_of
from utils.parameters import FlatModel
from utils.program import ranks

SAVE_INTERVAL = 1000  # the set is always written at iterations divisible by this


def num_samples(config: DistillConfig, dataset: Dataset) -> int:
    """The number of samples that networks see, each with its label."""
    return config.ipc * dataset.num_classes * config.factor**2


def set_in_words(config: DistillConfig, dataset: Dataset) -> str:
    """The size of the set, in words."""
    more = f", factor {config.factor} ({num_samples(config, dataset)} labels)" if config.factor > 1 else ""
    return f"ipc {config.ipc}{more}"


def batch_size(config: DistillConfig, dataset: Dataset) -> int:
    """Samples per inner step."""
    samples = num_samples(config, dataset)
    return min(config.batch_syn or samples, samples)


def share_of_batch(config: DistillConfig, dataset: Dataset) -> int:
    """Samples per inner step on each of several ranks."""
    return -(-batch_size(config, dataset) // ranks.size())


def is_evaluated(config: DistillConfig, iteration: int) -> bool:
    """Whether the set is evaluated at this iteration, before its update."""
    return iteration == config.Iteration or (iteration % config.eval_it == 0
                                             and not (iteration == 0 and config.skip_first_eva))


def is_written(config: DistillConfig, iteration: int) -> bool:
    """Whether the set is written at this iteration whatever its score (published: only after an evaluation)."""
    return iteration == config.Iteration or iteration % SAVE_INTERVAL == 0


def evaluations(config: DistillConfig, begin: int = 0) -> int:
    """The number of evaluations from iteration `begin` on."""
    return sum(is_evaluated(config, iteration) for iteration in
               {config.Iteration, *range(-(-begin // config.eval_it) * config.eval_it, config.Iteration,
                                         config.eval_it)})


def evaluation_in_iterations(config: DistillConfig, dataset: Dataset) -> float:
    """About how many iterations take as long as an evaluation, from their amounts of work. Used until the first
    evaluation of a run, since compiling and timing one beforehand would be slow."""
    samples = config.epochs_trained * num_samples(config, dataset)
    tested = len(dataset.test_labels) / 3  # a forward pass is about a third of a gradient
    evaluation = Work(gradients=(1 + config.ema) * num_networks(config) * (samples + tested))
    return evaluation.total / work_of_an_iteration(config, dataset).total


def matched_steps(config: DistillConfig) -> int:
    """The number of inner steps that the gradient goes through; they are the last ones."""
    return config.adjoint_steps or config.syn_steps


def kept_steps(config: DistillConfig, dataset: Dataset, model: FlatModel) -> int:
    """The number of inner steps that keep activations for their adjoints; they are the last ones."""
    return min(model.kept_steps(share_of_batch(config, dataset)), matched_steps(config))


def kept_in_words(config: DistillConfig, dataset: Dataset, model: FlatModel) -> str:
    """A suffix to the engine's description; empty if no activations are kept."""
    steps = kept_steps(config, dataset, model)
    return f", activations of the last {number_of(steps, 'step')} kept" if steps else ""


def work_of_an_iteration(config: DistillConfig, dataset: Dataset) -> Work:
    """The work of its inner steps."""
    matched, batch = matched_steps(config), batch_size(config, dataset)
    return Work(gradients=(config.syn_steps - matched) * batch, matched=matched * batch)


def work_of(config: DistillConfig, dataset: Dataset) -> Work:
    """The work of all inner steps of a run; of several ranks, that of each."""
    return Work(*(config.Iteration * part / ranks.size() for part in work_of_an_iteration(config, dataset)))


def gradient_in_words(config: DistillConfig) -> str:
    """Such as `exact gradient, T 20`."""
    steps = matched_steps(config)
    truncated = f" truncated to the last {steps}" if steps < config.syn_steps else ""
    return f"{config.matching} gradient, T {config.syn_steps}{truncated}"
