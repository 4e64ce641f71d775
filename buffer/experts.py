"""Train experts and keep the whole trajectory of their parameters (MTT, section 3.1; FTD, section 3.3)."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from buffer.curriculum import Curriculum, grand_scores
from buffer.gsam import gsam_gradient
from buffer.trajectories import (
    as_expert,
    buffer_folder,
    check_same_data,
    check_same_images,
    check_same_kind,
    count_experts,
    expert_files,
    next_file,
    write_experts,
)
from utils import augment, files, interrupt, parallel
from utils.config import BufferConfig, differences, influential
from utils.datasets import Dataset, check_dataset_name
from utils.engine import GRADIENT_ALONE, describe_engine
from utils.errors import UserError
from utils.files import read_config, save_config, write_json
from utils.memory import available
from utils.metrics import accuracy, count_correct
from utils.networks import check_network_name
from utils.parameters import FlatModel
from utils.program import commands
from utils.program.console import announce, note, say, shown, wrapped
from utils.program.prepare import begin, drawer, dsa_groups, flat_model, network_for
from utils.program.run_folder import kept_to_this_run
from utils.program.seeds import generator, seeded
from utils.progress import Progress

AT_CHANCE = 1.2  # times the accuracy of guessing, up to which an expert counts as one that did not learn
MOST_AT_CHANCE = 5  # such experts in a row, after which a run stops


class DivergedError(UserError):
    """An expert's parameters are no longer finite."""


class Epoch(NamedTuple):
    """What one epoch of an expert reached; accuracies in [0, 1]."""

    epoch: int
    loss: float
    train_accuracy: float
    test_accuracy: float


class SavedEpochs:
    """The epochs of one expert while it is in training: a file each, from which training goes on.

    Epoch 0 is the initialisation. A file holds θ and whatever else the next epoch needs: the momentum, and batch norm's
    running statistics.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __len__(self) -> int:
        """How many follow each other without a gap, the initialisation included."""
        number = 0
        while self._path(number).exists():
            number += 1
        return number

    def __getitem__(self, epoch: int) -> dict[str, Any]:
        return files.load(self._path(epoch), "file of an unfinished expert", mmap=True,
                          advice="delete it, and training goes on from the epoch before")

    def save(self, epoch: int, theta: Tensor, optimiser: torch.optim.Optimizer, network: nn.Module,
             reached: Epoch | None) -> None:
        momentum = optimiser.state.get(theta, {}).get("momentum_buffer")
        files.save({"theta": theta.detach().cpu(), "momentum": None if momentum is None else momentum.cpu(),
                    "buffers": {name: each.cpu() for name, each in network.named_buffers()},
                    "reached": reached and reached._asdict()}, self._path(epoch))

    def snapshots(self) -> Tensor:
        """θ after every epoch, [E+1, P]."""
        return torch.stack([self[epoch]["theta"] for epoch in range(len(self))])

    def reached(self) -> list[dict[str, Any]]:
        """What each epoch reached, from the first."""
        return [self[epoch]["reached"] for epoch in range(1, len(self))]

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch}.pt"


def train_expert(config: BufferConfig, dataset: Dataset, number: int, device: torch.device,
                 report: Callable[[Epoch], None] = lambda epoch: None, curriculum: Curriculum | None = None,
                 saved: SavedEpochs | None = None, progress: Callable[[float], None] = lambda done: None,
                 ) -> tuple[FlatModel, Tensor]:
    """Trains the expert of that number; the same seed and number give the same expert.

    Args:
        dataset: on `device`.
        report: called after every epoch.
        curriculum: PAD's choice of each epoch's images; None: all of them.
        saved: where every epoch is saved, and from where training goes on; None: nowhere.
        progress: called after every batch with the epochs that are done, in parts of one.

    Returns:
        The network, and the snapshots [train_epochs + 1, P] on the CPU, the first at initialisation.

    Raises:
        DivergedError
        Stopped: a signal came; the finished epochs are saved.
    """
    with seeded(config.seed, "expert", number):
        network = network_for(config.model, dataset)
    model = flat_model(config, network.to(device), _work(config, dataset), config.micro_batch)
    draw = drawer(config, dataset, augment.OLDER_FOR_EXPERTS)

    theta = model.flatten()
    optimiser = torch.optim.SGD([theta], config.lr_teacher, momentum=config.mom, weight_decay=config.l2)
    snapshots = torch.empty(config.train_epochs + 1, model.num_parameters)
    snapshots[0] = theta
    first = _restore(saved, snapshots, theta, optimiser, network, report) if saved is not None else 0
    if saved is not None and not len(saved):
        saved.save(0, theta, optimiser, network, None)
    for epoch in range(first, config.train_epochs):
        random = generator(config.seed, "expert", number, "epoch", epoch)
        network.train()
        total_loss = torch.zeros((), device=device)
        correct = torch.zeros((), dtype=torch.long, device=device)
        images = torch.arange(len(dataset.train_labels)) if curriculum is None else curriculum.indices(epoch)
        order = images[torch.randperm(len(images), generator=random)].to(device)
        batches = order.split(config.batch_train)
        for step, batch in enumerate(batches, start=1):
            interrupt.check()
            drawn = draw(len(batch), random)
            x = augment.apply(dataset.train_images[batch], drawn and drawn.to(device))
            y = dataset.train_labels[batch]
            loss, logits, theta.grad = gsam_gradient(model, theta, x, y, config.rho_max, config.alpha, config.adaptive)
            optimiser.step()
            total_loss += loss * len(batch)
            correct += count_correct(logits, y)
            progress(epoch + step / len(batches))

        snapshots[epoch + 1] = theta
        network.eval()
        tested = accuracy(partial(model, theta), dataset.test_images, dataset.test_labels)
        if not theta.isfinite().all():
            raise DivergedError(f"expert {number} diverged in epoch {epoch + 1}: its parameters are no longer finite; "
                            f"lower --lr_teacher (now {config.lr_teacher:g}) or --rho_max (now {config.rho_max:g})")
        reached = Epoch(epoch + 1, float(total_loss) / len(order), float(correct) / len(order), tested)
        if saved is not None:
            saved.save(epoch + 1, theta, optimiser, network, reached)
        report(reached)
    return model, snapshots


def _restore(saved: SavedEpochs, snapshots: Tensor, theta: Tensor, optimiser: torch.optim.Optimizer,
             network: nn.Module, report: Callable[[Epoch], None]) -> int:
    """Takes up the saved epochs; returns how many there are, the initialisation not counted."""
    for epoch in range(len(saved)):
        state = saved[epoch]
        if state["theta"].shape != snapshots[epoch].shape:
            raise UserError(f"{saved.folder} holds another network; give --resume never to start over")
        snapshots[epoch] = state["theta"]
        if state["reached"]:
            report(Epoch(**state["reached"]))
    if not len(saved):
        return 0
    theta.copy_(snapshots[len(saved) - 1])
    if state["momentum"] is not None:
        optimiser.state[theta]["momentum_buffer"] = state["momentum"].clone().to(theta)
    for name, each in network.named_buffers():
        each.copy_(state["buffers"][name])
    return len(saved) - 1


def _work(config: BufferConfig, dataset: Dataset) -> float:
    """What one expert takes, as engines count it; not all of them, so that their number changes none."""
    passes = 2 if config.rho_max else 1
    return GRADIENT_ALONE * passes * len(dataset.train_labels) * config.train_epochs


def train_buffer(config: BufferConfig) -> None:
    """The whole of `buffer/buffer_FTD.py`: trains `num_experts` experts and writes them, `save_interval` to a file.

    Raises:
        UserError: whatever in the config or the data does not fit together.
    """
    if config.rho_max != config.rho_min:
        raise UserError(f"--rho_max {config.rho_max:g} --rho_min {config.rho_min:g}: rho follows the learning rate, "
                        "which is constant here; give both the same value")
    check_dataset_name(config.dataset)  # these two become folders
    check_network_name(config.model)
    dsa_groups(config)
    if config.pad and not config.add_end_epoch <= config.rm_epoch_first <= config.rm_epoch_second:
        raise UserError(f"--add_end_epoch {config.add_end_epoch} --rm_epoch_first {config.rm_epoch_first} "
                        f"--rm_epoch_second {config.rm_epoch_second}: give them in rising order")
    folder = buffer_folder(config)
    check_same_data(folder, config)
    check_same_kind(folder, config)
    device, dataset = begin(config)
    check_same_images(folder, dataset)
    # Refuses what cannot be built before anything is printed or written.
    model = flat_model(config, network_for(config.model, dataset).to(device), _work(config, dataset),
                       config.micro_batch)
    with kept_to_this_run(folder, "give another --buffer_path"):
        run = parallel.first_then_others(lambda: Run(config, dataset, folder, model))
        announce(config, device, describe_engine(model.engine, min(config.batch_train, len(dataset.train_labels))),
                 f"{config.num_experts} experts of {config.train_epochs} epochs: {config.model} on {config.dataset} "
                 f"({len(dataset.train_labels)} images) · {shown(folder)}")
        if run.resumes:
            say(config, f"going on with an unfinished run: {run.trained} of {config.num_experts} experts are trained")
        elif run.first:
            say(config, f"{run.first} experts are there already; this trains others")
        curriculum = None
        if config.pad:
            curriculum = parallel.first_then_others(
                lambda: Curriculum(config, dataset, grand_scores(config, dataset, device)))
        with interrupt.deferred():
            run.train(curriculum, device)
    if parallel.first():
        _say_where(config, folder)


def _say_where(config: BufferConfig, folder: Path) -> None:
    """Where the experts are, and what to type next."""
    print(wrapped(f"{config.num_experts} experts of {config.train_epochs} epochs are trained; {shown(folder)} holds "
                  f"{count_experts(folder)} in {', '.join(path.name for path in expert_files(folder))}"))
    remark, options = commands.distillation(config)
    commands.say_next(config, "next, to look at them:",
                      commands.command("scripts/inspect_buffer.py", {}, argument=folder))
    commands.say_next(config, f"and to distil them{remark and f' ({remark})'}:",
                      commands.command("distill/DATM.py", options))


class Run:
    """The experts of one command, in `unfinished/` until they are written, `save_interval` to a file.

    `unfinished/run.yaml` holds the run's options and the number of its first expert, `unfinished/expert_{n}/` the
    epochs of expert n. A run that was stopped or killed goes on from there. Several ranks train different experts:
    whoever holds the lock of an expert's number trains it, and the first rank writes the files.

    Raises:
        UserError: the folder holds an unfinished run of other options, or there is no room for the experts.
    """

    def __init__(self, config: BufferConfig, dataset: Dataset, folder: Path, model: FlatModel):
        self.config, self.dataset, self.folder, self.model = config, dataset, folder, model
        # Once more, now that nobody else can write: the data took a while to load.
        check_same_kind(folder, config)
        check_same_images(folder, dataset)
        self.unfinished = folder / "unfinished"
        self.options = influential(config) | {"fingerprint": dataset.fingerprint}
        self.written = self._judged = count_experts(folder)  # experts before these are in files, and judged
        self._at_chance = 0
        # A run after a finished one goes on counting, so that it trains other experts.
        self.first = self.written
        self.resumes = (self.unfinished / "run.yaml").exists() and config.resume == "auto"
        if self.resumes:
            before = read_config(self.unfinished / "run.yaml")
            self.first = before.pop("first_expert", self.written)
            now = {name: value for name, value in self.options.items()
                   if name not in ("num_experts", "save_interval", "buffer_path", "data_path")}
            different = differences(before, now)
            if different:
                raise UserError(f"{folder} holds an unfinished run of other options: {different}; give those to go on "
                                "with it, --resume never to discard it, or another --buffer_path")
        if parallel.first():
            self._start()

    @property
    def end(self) -> int:
        return self.first + self.config.num_experts

    @property
    def trained(self) -> int:
        """How many of the run's experts are, in files or not."""
        return sum(number < self.written or self._is_trained(number) for number in range(self.first, self.end))

    def _start(self) -> None:
        _check_room(self.config, self.folder, self.model, max(0, self.end - self.written), self.unfinished)
        if not self.resumes:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        save_config(self.unfinished / "run.yaml", self.options | {"first_expert": self.first})
        for number in range(self.written):  # what a kill after a file was written left
            shutil.rmtree(self._saved(number).folder, ignore_errors=True)

    def train(self, curriculum: Curriculum | None, device: torch.device) -> None:
        """Trains what is missing and writes the files.

        Raises:
            DivergedError: those experts before it are written.
            UserError: several in a row did not learn, or a file cannot be written.
            Stopped: a signal came; what was finished is saved.
        """
        with Progress(self.config.num_experts * self.config.train_epochs, "experts", initial=self._epochs_done,
                      quiet=self.config.quiet, images=len(self.dataset.train_labels), device=device) as self._bar:
            self._train(curriculum, device)

    def _train(self, curriculum: Curriculum | None, device: torch.device) -> None:
        for number in range(self.written, self.end):
            if self._diverged.exists():
                break
            try:
                with files.locked(self.unfinished / f"lock_{number}", "-"):
                    # Another rank may have trained it meanwhile, and the first one written it.
                    if number >= count_experts(self.folder) and not self._is_trained(number):
                        self._train_one(number, curriculum, device)
            except files.LockedError:
                continue  # another rank trains it
            except DivergedError as error:
                write_json(self._diverged, str(error))
            if parallel.first():
                self._write_complete()
        parallel.barrier()
        diverged = json.loads(self._diverged.read_text()) if self._diverged.exists() else None
        parallel.barrier()
        if parallel.first():
            self._bar.reach(self._epochs_done)  # of all ranks
            self._write_complete(partly=diverged is not None)
            self._clear()
        if diverged:  # it would again, so there was nothing to go on from
            raise DivergedError(diverged)

    @property
    def _epochs_done(self) -> int:
        """Of all the run's experts."""
        epochs = self.config.train_epochs
        return sum(epochs if number < self.written else max(0, len(self._saved(number)) - 1)
                   for number in range(self.first, self.end))

    @property
    def _diverged(self) -> Path:
        """Where a rank leaves word that one of its experts diverged."""
        return self.unfinished / "diverged.json"

    def _is_trained(self, number: int) -> bool:
        return len(self._saved(number)) > self.config.train_epochs

    def _judge(self, number: int, learned: float) -> None:
        """Says so if an expert did not learn.

        Raises:
            UserError: nor did those before it.
        """
        chance = 1 / self.dataset.num_classes
        if learned > AT_CHANCE * chance:
            self._at_chance = 0
            return
        self._at_chance += 1
        note(f"note: expert {number} did not learn: {100 * learned:.1f} % of the training images right, guessing "
             f"{100 * chance:.1f} %")
        if self._at_chance == MOST_AT_CHANCE:
            raise UserError(f"{MOST_AT_CHANCE} experts in a row did not learn; give another --lr_teacher (now "
                            f"{self.config.lr_teacher:g}), a smaller --rho_max (now {self.config.rho_max:g}) or more "
                            "--train_epochs, with --resume never")

    def _train_one(self, number: int, curriculum: Curriculum | None, device: torch.device) -> None:
        bar, epochs, saved = self._bar, self.config.train_epochs, self._saved(number)
        before, begun = self._epochs_done, max(0, len(saved) - 1)
        together = min(parallel.size(), self.config.num_experts - self.trained)  # ranks that train, each as fast
        reached = ""
        bar.set_description(f"expert {number}", refresh=False)
        bar.show()  # the last expert's numbers are not this one's

        def after_batch(done: float) -> None:
            bar.count = f"epoch {min(int(done) + 1, epochs)}/{epochs}"
            bar.reach(min(bar.total, before + together * (done - begun)))

        def after_epoch(epoch: Epoch) -> None:
            nonlocal reached
            numbers = (f"loss {epoch.loss:.3f}", f"train {100 * epoch.train_accuracy:.1f} %",
                       f"test {100 * epoch.test_accuracy:.1f} %")
            reached = ", ".join(numbers)
            bar.show(*numbers)

        train_expert(self.config, self.dataset, number, device, after_epoch, curriculum, saved, after_batch)
        bar.say(f"expert {number}: {reached}")

    def _write_complete(self, partly: bool = False) -> None:
        """Judges the experts that are trained, and writes the files that are complete with them.

        Args:
            partly: write a last file of fewer, too.
        """
        while self._judged < self.end and self._is_trained(self._judged):
            self._judge(self._judged, self._saved(self._judged)[self.config.train_epochs]["reached"]["train_accuracy"])
            self._judged += 1
        while self.written < self._judged:
            number = min(self.config.save_interval, (self._judged if partly else self.end) - self.written)
            if self.written + number > self._judged:
                return
            self._write(number)

    def _write(self, number: int) -> None:
        """Writes a file of the next so many experts."""
        numbers = range(self.written, self.written + number)
        waiting = [as_expert(self.model, self._saved(each).snapshots()) for each in numbers]
        epochs = [{"expert": each, **epoch} for each in numbers for epoch in self._saved(each).reached()]
        last = {epoch["expert"]: epoch for epoch in epochs}
        experts = [{"number": each, "train_accuracy": last[each]["train_accuracy"],
                    "test_accuracy": last[each]["test_accuracy"]} for each in numbers]
        path = next_file(self.folder)
        write_experts(path, waiting, self.options | {"experts": experts}, epochs)
        self.written += number
        for each in numbers:
            shutil.rmtree(self._saved(each).folder)

    def _saved(self, number: int) -> SavedEpochs:
        return SavedEpochs(self.unfinished / f"expert_{number}")

    def _clear(self) -> None:
        # The run file first: without it nothing here counts.
        (self.unfinished / "run.yaml").unlink()
        shutil.rmtree(self.unfinished)


def _check_room(config: BufferConfig, folder: Path, model: FlatModel, left: int, unfinished: Path) -> None:
    """Refuses a run whose files cannot fit the disk, or whose experts of one file cannot fit the memory.

    Args:
        left: how many experts are to be written yet.
        unfinished: holds what is there of them already.

    Raises:
        UserError
    """
    expert = 4 * model.num_parameters * (config.train_epochs + 1)
    at_once = min(config.save_interval, left)
    disk, memory = shutil.disk_usage(folder).free, available()
    # The epochs of a file's experts, with their momenta, lie beside it until it is written.
    there = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
    needed = expert * (left + at_once * (2 if config.mom else 1)) - there
    if needed > disk:
        raise UserError(f"{left} experts of {config.train_epochs} epochs need {needed / 1e9:.2g} GB "
                        f"on the disk of {folder}, which has {disk / 1e9:.2g} GB free; give a smaller --num_experts or "
                        "--train_epochs, or another --buffer_path")
    if expert * at_once > memory:
        raise UserError(f"a file of {at_once} experts needs {expert * at_once / 1e9:.2g} GB of memory while it is "
                        f"written, and {memory / 1e9:.2g} GB are free; give a smaller --save_interval")
