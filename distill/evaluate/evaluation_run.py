"""The frame of an evaluation: its header, the results of a stopped run, the progress bar and the result file."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.distilled_set import DistilledSet
from distill.evaluate.networks import epochs_to_come, evaluate, num_networks, pool, work_of
from distill.evaluate.saved_accuracies import Accuracies, key_of, threads_of
from distill.result_files import OF_SET, EvaluationResult, Score, UnderProtocol, tested_in_words, tested_on
from utils.config import BaselineConfig, EvaluationConfig, as_dict, defaults, influential
from utils.data.datasets import Dataset
from utils.derivatives.choose_engine import Work
from utils.derivatives.engine import describe_engine
from utils.errors import number_of
from utils.files import resolved
from utils.program import interrupt, ranks, threads
from utils.program.console import say, shown
from utils.program.device import announce
from utils.program.machine import environment
from utils.program.prepare import flat_model, network_for
from utils.program.progress import Progress


def unfinished(config: EvaluationConfig | BaselineConfig) -> Path | None:
    """The file of partial results, from which a stopped evaluation resumes; None: nothing is written."""
    return Path(f"{config.json}.unfinished") if config.json else None


def settle_threads(config: EvaluationConfig | BaselineConfig, dataset: Dataset, samples: int) -> None:
    """Uses as many threads as help the first kind of network on this many samples, or as a stopped evaluation had. To
    be called before anything is computed with them."""
    network = network_for(pool(config, dataset)[0], dataset).to(dataset.device)
    work = Work(samples * config.epochs_trained * num_networks(config))
    threads.settle(config, network, min(config.batch_train, samples), work, threads_of(unfinished(config)))


def say_replaced(config: EvaluationConfig | BaselineConfig, path: str) -> None:
    """Says that an output file exists and will be replaced, if it does."""
    if path and ranks.first() and resolved(path).exists():
        say(config, f"{shown(path)} exists and will be replaced")


class Session:
    """One evaluation of a set; announces it. `accuracies` holds results from before it was stopped; `write` ends it.

    Args:
        sets: one, or several of one size, as `evaluate` takes them.
        what: what they are, in words.
        notes: further lines of the announcement.
        trained: learning rate and epochs, in words, if not those of set and config.
        beside: other sets on which the result depends.
        configs: the options of single parts, on which the result depends too. Options that differ among them are left
            to `trained` and `notes`, and are not in the result's config.
    """

    def __init__(self, config: EvaluationConfig | BaselineConfig, dataset: Dataset, sets: Sequence[DistilledSet],
                 what: str, *notes: str, trained: str = "", beside: Sequence[DistilledSet] = (),
                 configs: Sequence[EvaluationConfig] = ()):
        self.config, self.what, self.set = config, what, sets[0]
        networks = pool(config, dataset)
        trained = trained or f"learning rate {float(self.set.lr):.4g}, {number_of(config.epoch_eval_train, 'epoch')}"
        # Only to describe the engine that networks of the first kind get; costs next to nothing.
        model = flat_model(config, network_for(networks[0], dataset).to(self.set.images.device),
                           work_of(config, self.set))
        self.differ = {name for each in configs for name, value in as_dict(each).items()
                       if name != "protocol" and value != getattr(configs[0], name)}
        default = defaults(type(config))
        announce(replace(config, **{name: default[name] for name in self.differ}), self.set.images.device,
                 describe_engine(model.engine, min(config.batch_train, len(self.set))),
                 f"{what}: {self.set.size}, {trained} · {config.num_eval} × {' and '.join(networks)}, tested on "
                 f"{tested_in_words(config.val_fraction, len(dataset.test_labels))}", *notes)
        say_replaced(config, config.json)
        path = unfinished(config)
        interrupt.saves("the networks that were tested", "" if path else "--json FILE")
        self.accuracies = ranks.from_first_rank(
            lambda: Accuracies(path, key_of([config, *configs], dataset, *sets, *beside)))

    def say_resumed(self, tested: int, networks: int) -> None:
        if tested:
            say(self.config, f"resuming a stopped evaluation: {tested} of {networks} networks were tested")

    def write(self, scores: list[Score], lr: float | None, protocols: dict[str, UnderProtocol] | None = None,
              **more: Any) -> None:
        """Writes the result to `--json`, if given; arguments as for `EvaluationResult` and its `write`."""
        config = self.config
        if config.json and ranks.first():
            options = {name: value for name, value in influential(config).items() if name not in self.differ}
            EvaluationResult(
                self.what, len(self.set.images), scores, lr, tested_on(config.val_fraction),
                self.accuracies.seconds, options, environment(self.set.images.device),
                len(self.set) if self.set.factor > 1 else None, protocols or {},
                self.set.images_sha256 if self.what.startswith(OF_SET) else None
            ).write(config.json, **more)
            self.accuracies.forget()
            say(config, f"in {shown(config.json)}")


def evaluate_and_say(config: EvaluationConfig | BaselineConfig, dataset: Dataset, sets: Sequence[DistilledSet],
                     what: str, *notes: str) -> None:
    """Evaluates with a progress bar, prints the scores and writes them to `--json`; arguments as for `Session`."""
    session = Session(config, dataset, sets, what, *notes)
    accuracies, networks = session.accuracies, num_networks(config)
    session.say_resumed(len(accuracies), networks)
    before = len(accuracies) * config.epochs_trained
    with Progress(before + epochs_to_come(config, accuracies), "evaluate", initial=before, quiet=config.quiet,
                  images=len(sets[0]), device=sets[0].images.device) as bar:
        def show() -> None:
            bar.show(f"{len(accuracies)} of {number_of(networks, 'network')}", *accuracies.so_far())

        def after_epoch() -> None:
            show()
            bar.update()

        show()
        # The same networks and the same order of samples for every set, so that sets are compared like with like.
        scores = evaluate(config, dataset, sets, augmented=not config.no_aug, on_epoch=after_epoch,
                          accuracies=accuracies)
        show()
    for score in scores:
        print(score)
    session.write(scores, float(sets[0].lr))
