"""Trains `num_eval` networks of each kind on a set and tests each on real images."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from distill.distilled_set import DistilledSet
from distill.evaluate.saved_accuracies import Accuracies, Job, Tested
from distill.evaluate.train import train_network
from distill.result_files import Score
from utils.config import TrainConfig
from utils.data import augment
from utils.data.datasets import Dataset
from utils.derivatives.choose_engine import Work, seconds_uncompiled
from utils.loss_and_accuracy import confusion, predictions, share_correct
from utils.networks import evaluation_pool
from utils.program import ranks, threads
from utils.program.prepare import drawer, flat_model, network_for
from utils.program.processes import in_processes
from utils.program.seeds import generator, seeded

# Parallel processes pay off if steps are too short to keep all threads busy (on two cores they gained 40 % at 5 ms a
# step, 18 % at 24 ms and 7 % at 98 ms), but take a few seconds to start.
SHORT_STEP = 0.03  # seconds
PROCESSES_PAY = 60.0  # seconds of training
MOST_PROCESSES = 8  # at once; each imports torch
MOST_COUNTED = 200  # the most classes for which confusions are counted: a file holds the square of it


def evaluate(config: TrainConfig, dataset: Dataset, distilled: DistilledSet | Sequence[DistilledSet],
             *address: int | str, augmented: bool = True, on_epoch: Callable[[], None] = lambda: None,
             accuracies: Accuracies | None = None, networks: Sequence[str] | None = None) -> list[Score]:
    """Trains `num_eval` networks of each kind in the pool of `eval_mode` and tests each after its last epoch.

    Several ranks share the networks. Otherwise, small networks on a CPU are trained in parallel processes that divide
    its threads, if that is faster; this changes rounding. Every network has its own random numbers, so it does not
    matter where it is trained.

    Args:
        dataset, distilled: on one device, with images in the same space. With several sets, all of one size, network n
            is trained on set n modulo their number.
        address: distinguishes this evaluation's random numbers from those of others with the same seed.
        augmented: False: train on the images as they are.
        on_epoch: called after each epoch of each network.
        accuracies: results from before; new ones are added.
        networks: these kinds instead of the pool.
    """
    accuracies = Accuracies() if accuracies is None else accuracies
    jobs = [Job(name, number) for name in networks or pool(config, dataset)
            for number in range(config.num_eval)]
    # Copies here and below, since pickling a view for another process would write the whole tensor that it is of.
    tested = dataclasses.replace(dataset, train_images=dataset.train_images[:0].clone(),
                                 train_labels=dataset.train_labels[:0].clone(),
                                 space=dataset.space._replace(whitening=None))
    sets = (distilled,) if isinstance(distilled, DistilledSet) else distilled
    sets = tuple(each.seen() for each in sets)
    train = Training(config, tested, sets, address, augmented, work_of(config, sets[0]))

    processes = 0 if ranks.size() > 1 else _processes_that_pay(train, jobs)
    if processes:
        # Processes take full rounds of networks; the rest are then trained with all threads. Each process has a share
        # of the threads, so it is told that share of the work and chooses the same engine; one thread is not divided.
        shares = processes if torch.get_num_threads() > 1 else 1
        shared = dataclasses.replace(train, sets=tuple(distilled.copy() for distilled in train.sets),
                                     work=Work(train.work.gradients / shares))
        full_rounds = jobs[:len(jobs) - len(jobs) % processes]
        in_processes(shared, accuracies.missing(full_rounds), processes, on_epoch, accuracies.add)
    mine = ranks.deal(accuracies.missing(jobs))
    for job in mine:
        accuracies.add(job, train(job, on_epoch))
    accuracies.learn(ranks.gather({job: accuracies[job] for job in mine}))
    return [_score(name, [accuracies[Job(name, number)] for number in range(config.num_eval)])
            for name in dict.fromkeys(job.network for job in jobs)]


def _score(network: str, tested: Sequence[Tested]) -> Score:
    """The score of the networks of one kind, with their confusions summed."""
    counts = [each.confusion for each in tested]
    together = None if None in counts else torch.tensor(counts).sum(dim=0).tolist()
    return Score(network, [each.accuracy for each in tested], together)


def _processes_that_pay(train: "Training", jobs: Sequence[Job]) -> int:
    """How many processes to train these networks in; 0: none, as steps take too long or all of it too little time."""
    processes = min(len(jobs), threads.available(), MOST_PROCESSES)
    if train.sets[0].images.device.type != "cpu" or processes < 2:
        return 0
    networks = [train.network(Job(name, 0)) for name in dict.fromkeys(job.network for job in jobs)]
    step = Work(gradients=min(train.config.batch_train, len(train.sets[0])))
    seconds = sum(seconds_uncompiled(network, train.work) for network in networks) * train.config.num_eval
    short = max(seconds_uncompiled(network, step) for network in networks) < SHORT_STEP
    return processes if short and seconds > PROCESSES_PAY else 0


def work_of(config: TrainConfig, distilled: DistilledSet) -> Work:
    """The work of training one network."""
    return Work(gradients=len(distilled) * config.epochs_trained)


def num_networks(config: TrainConfig) -> int:
    """The number of networks that `evaluate` trains."""
    return config.num_eval * len(evaluation_pool(config.eval_mode, config.model))


def epochs_to_come(config: TrainConfig, accuracies: Accuracies) -> int:
    """How many epochs `evaluate` has yet to train, over all networks; with several ranks, on this one."""
    return len(ranks.deal(range(num_networks(config) - len(accuracies)))) * config.epochs_trained


@dataclasses.dataclass(frozen=True)
class Training:
    """What the networks of an evaluation are trained and tested on; called with a job, trains and tests one."""

    config: TrainConfig
    dataset: Dataset  # only its test images are used
    sets: tuple[DistilledSet, ...]  # of one size; network n is trained on set n modulo their number
    address: tuple[int | str, ...]
    augmented: bool
    work: Work  # of one network

    def __call__(self, job: Job, on_epoch: Callable[[], None]) -> Tested:
        config, dataset = self.config, self.dataset
        distilled = self.sets[job.number % len(self.sets)]
        address = config.seed, "evaluation", *self.address, *job
        model = flat_model(config, self.network(job).to(distilled.images.device), self.work)
        older = augment.older_operations(dataset.name, job.network)
        draw = drawer(config, dataset, older) if self.augmented else lambda batch, random: augment.Draw()
        theta = train_network(model, model.flatten(), distilled.images, distilled.labels, float(distilled.lr),
                              epochs=config.epoch_eval_train, batch_size=config.batch_train, draw=draw,
                              random=generator(*address, "order"), on_epoch=on_epoch)
        model.network.eval()
        predicted, labels, classes = (predictions(partial(model, theta), dataset.test_images), dataset.test_labels,
                                      dataset.num_classes)
        return Tested(share_correct(predicted, labels),
                      confusion(predicted, labels, classes).tolist() if classes <= MOST_COUNTED else None)

    def network(self, job: Job) -> nn.Module:
        """The network before its training."""
        with seeded(self.config.seed, "evaluation", *self.address, *job):
            return network_for(job.network, self.dataset)


def check_pool(config: TrainConfig, dataset: Dataset) -> None:
    """Builds each network of the evaluation once, so that impossible ones are refused at the start.

    Raises:
        UserError: a network that cannot read these images.
    """
    for name in pool(config, dataset):
        network_for(name, dataset)


def pool(config: TrainConfig, dataset: Dataset) -> list[str]:
    """The names of the networks that are evaluated on a dataset."""
    return evaluation_pool(config.eval_mode, config.model, dataset.image_size)
