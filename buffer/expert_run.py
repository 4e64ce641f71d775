"""A run that trains experts: load the data, start or resume, train what is missing, write the files.

Experts are kept in `unfinished/`, epoch by epoch, until they are written, `save_interval` to a file. The experts that
are missing are dealt out to the ranks; the first rank writes the files.
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from buffer import trajectories
from buffer.curriculum import Curriculum, grand_scores
from buffer.experts import DivergedError, Epoch, SavedEpochs, train_expert, work_of
from buffer.manifests import (
    buffer_folder,
    check_same_images,
    check_same_kind,
    check_same_run,
    expert_files,
    experts_in_words,
    manifests_of,
    resumed_run,
    run_file,
)
from utils import files
from utils.config import BufferConfig, influential
from utils.data.datasets import Dataset
from utils.derivatives.choose_engine import Work
from utils.derivatives.engine import describe_engine
from utils.errors import UserError, note, number_of, some_of, wrapped
from utils.memory import available
from utils.parameters import FlatModel
from utils.program import interrupt, ranks, threads
from utils.program.commands import command, say_next
from utils.program.console import say, shown
from utils.program.device import announce, kind_of
from utils.program.locks import kept_to_this_run
from utils.program.prepare import begin, flat_model, network_for
from utils.program.progress import Progress

AT_CHANCE = 1.2  # times the accuracy of guessing; an expert not above this did not learn
MOST_AT_CHANCE = 5  # such experts in a row, after which a run stops


def train_buffer(config: BufferConfig) -> None:
    """Trains `num_experts` experts and writes them: all of `buffer/buffer_FTD.py` except `option_checks`.

    Raises:
        UserError: the config, the data and the folder do not fit together.
    """
    # Load the data and build the network before anything is written, as either may be refused.
    folder = buffer_folder(config)
    dataset = begin(config)
    dataset = dataset.to(dataset.device)  # the training images too, as an epoch uses all of them
    check_same_images(folder, dataset)
    network = network_for(config.model, dataset).to(dataset.device)
    of_one = work_of(config, dataset)
    resumed = resumed_run(folder, config)
    threads.settle(config, network, config.batch_train, Work(of_one.gradients * config.num_experts),
                   resumed and resumed["threads"])
    model = flat_model(config, network, of_one, config.micro_batch)

    # Lock the folder; start, or resume the unfinished run there.
    with kept_to_this_run(folder, "give another --buffer_path"):
        run = ranks.first_rank_first(lambda: ExpertRun(config, dataset, folder, model))
        run.announce()
        _note_whitening(config, dataset)

        # Order the images from easy to hard, if epochs use only some of them.
        curriculum = None
        if config.pad:
            curriculum = Curriculum(config, dataset, ranks.from_first_rank(lambda: grand_scores(config, dataset)))

        # Train what is missing and write the files. After that there is nothing to resume: the same command would train
        # further experts.
        with interrupt.deferred(check_at_end=False):
            train_missing(run, curriculum)
        interrupt.saves("")

    # Say where they are, and what to type next.
    if ranks.first():
        _say_where(run)


def train_missing(run: "ExpertRun", curriculum: Curriculum | None) -> None:
    """Trains the experts that are missing and writes the files.

    Raises:
        DivergedError: an expert diverged; those before it are written.
        UserError: several experts in a row did not learn, or a file cannot be written.
        Stopped: a signal came; what was finished is saved.
    """
    missing = ranks.from_first_rank(lambda: [number for number in range(run.written, run.end_number)
                                             if not run.is_trained(number)])
    with ExpertView(run) as view:
        # Write what an earlier command trained and did not write.
        if ranks.first():
            run.write_complete(view.say)

        for number in ranks.deal(missing):
            # An expert that diverged on any rank ends the run.
            if run.diverged.exists():
                break
            try:
                train_one(run, number, curriculum, view)
            except DivergedError as error:
                files.write_json(run.diverged, str(error))

            # Write the files that are now complete.
            if ranks.first():
                run.write_complete(view.say)

        # Once all ranks are done, write what is left and clean up.
        ranks.barrier()
        diverged = json.loads(run.diverged.read_text()) if run.diverged.exists() else None
        ranks.barrier()  # all have read the file before the first rank removes it
        if ranks.first():
            view.reach(run.epochs_done)  # those of all ranks
            run.write_complete(view.say, partly=diverged is not None)
            run.clear(partly=diverged is not None)
        if diverged:  # raised after the clean-up, as resuming this expert would diverge again
            kept = run.written - run.first_number
            raise DivergedError(diverged + f" (kept: {number_of(kept, 'expert')} before it; in this folder give "
                                f"--num_experts {run.end_number - run.written} for the rest)" * (kept > 0))


def train_one(run: "ExpertRun", number: int, curriculum: Curriculum | None, view: "ExpertView") -> None:
    """Trains one expert, from its first epoch or from its last saved one."""
    view.begin(number)
    train_expert(run.config, run.dataset, number, saved=run.saved(number), report=view.after_epoch,
                 curriculum=curriculum, progress=view.after_batch)


class ExpertRun:
    """The experts of one command.

    `unfinished/run.yaml` holds the run's options and the number of its first expert, `unfinished/expert_{n}/` the
    epochs of expert n. A run that was stopped or killed resumes from there. Constructed on the first rank, it writes
    that file, and discards what another run left if it does not resume it. Experts below `written` are in files, those
    below `_judged` have been reported.

    Raises:
        UserError: the folder holds experts or an unfinished run of other options or images, or there is no room.
    """

    def __init__(self, config: BufferConfig, dataset: Dataset, folder: Path, model: FlatModel):
        self.config, self.dataset, self.folder, self.model = config, dataset, folder, model
        # Checked again now that the folder is locked, as it may have changed while the data was loaded.
        check_same_kind(folder, config)
        check_same_images(folder, dataset)
        self.run_file = run_file(folder)
        self.unfinished = self.run_file.parent
        self.diverged = self.unfinished / "diverged.json"  # tells all ranks that an expert diverged
        self.options = influential(config) | {"fingerprint": dataset.fingerprint}
        self.on = f"{kind_of(dataset.device)}, torch {torch.__version__}"
        self.engine = model.engine.name
        self.written = self._judged = trajectories.count_experts(folder)  # earlier ones are in files, and judged
        self._at_chance = 0
        # A run after a finished one continues the numbers, so that it trains other experts.
        self.first_number = self.written
        before = resumed_run(folder, config)
        self.resumes = before is not None
        if before is not None:
            check_same_run(folder, config, {"fingerprint": dataset.fingerprint})
            self.first_number = before["first_expert"]
            self.last_on = before.get("on"), before.get("engine", self.engine)
            own = [expert for manifest in manifests_of(folder).values() if manifest.get("seed") == config.seed
                   for expert in manifest["experts"] if expert["number"] >= self.first_number]
            self._check_no_others(len(own))
            self._at_chance = sum(1 for _ in itertools.takewhile(
                lambda expert: not self._learned(expert["train_accuracy"]), reversed(own)))
        interrupt.saves("the finished epochs")
        if ranks.first():
            self._start()

    def _check_no_others(self, own: int) -> None:
        """Refuses to resume where experts of another run came in the meantime: they have the numbers of the run's own,
        which would be taken for written.

        Args:
            own: how many of the run's own experts are in files.
        """
        if self.written < self.first_number:
            raise UserError(f"{self.folder} held {number_of(self.first_number, 'expert')} when its unfinished run was "
                            f"begun, and holds {self.written} now; put the others back until it is finished")
        if others := self.written - self.first_number - own:
            raise UserError(f"{self.folder} got {number_of(others, 'expert')} of another run, or without manifest, "
                            "since its unfinished run was begun; move them away until it is finished")

    def _begun(self) -> list[int]:
        """The numbers of the experts that have saved epochs and are not in a file yet."""
        numbers = (path.name.removeprefix("expert_") for path in self.unfinished.glob("expert_*"))
        return sorted(int(number) for number in numbers if number.isdecimal() and int(number) >= self.written)

    def _start(self) -> None:
        beyond = [number for number in self._begun() if number >= self.end_number]
        if self.resumes and beyond:
            raise UserError(f"--num_experts {self.config.num_experts}: {self.unfinished} holds more, begun and not "
                            f"written yet; give at least {beyond[-1] + 1 - self.first_number}, or --resume never to "
                            "discard them")
        self._check_room()
        if not self.resumes:
            for path in self.unfinished.glob("*"):  # the folder itself may be a link to another disk
                files.remove(path)
        files.save_config(self.run_file, self.options | {
            "first_expert": self.first_number, "threads": torch.get_num_threads(), "on": self.on,
            "engine": self.engine})
        for number in range(self.written):  # left by a kill just after a file was written
            shutil.rmtree(self.saved(number).folder, ignore_errors=True)

    def _check_room(self) -> None:
        """Refuses a run whose files do not fit on the disk, or whose experts of one file do not fit in memory."""
        config, left = self.config, max(0, self.end_number - self.written)
        expert = 4 * self.model.num_parameters * (config.train_epochs + 1)
        at_once = min(config.save_interval, left)
        disk, memory = shutil.disk_usage(self.folder).free, available()
        # The epochs of a file's experts, with their momenta, stay on the disk until the file is written.
        there = sum(path.stat().st_size for path in self.unfinished.rglob("*") if path.is_file())
        # The first rank writes, in order, after each expert of its own.
        unwritten = min(config.save_interval + 2 * (ranks.size() - 1), left)
        needed = expert * (left + unwritten * (2 if config.mom else 1)) - there
        if needed > disk:
            raise UserError(f"{experts_in_words(left, config.train_epochs)} need {needed / 1e9:.2g} GB on the disk of "
                            f"{self.folder}, which has {disk / 1e9:.2g} GB free; give a smaller --num_experts or "
                            "--train_epochs, or another --buffer_path")
        if expert * at_once > memory:
            raise UserError(f"a file of {number_of(at_once, 'expert')} needs {expert * at_once / 1e9:.2g} GB of memory "
                            f"while it is written, and {memory / 1e9:.2g} GB are free; give a smaller --save_interval")

    def announce(self) -> None:
        """Prints the first lines."""
        config, images, device = self.config, len(self.dataset.train_labels), self.dataset.device
        announce(config, device, describe_engine(self.model.engine, min(config.batch_train, images)),
                 f"{experts_in_words(config.num_experts, config.train_epochs)}: {config.model} on "
                 f"{config.dataset} ({number_of(images, 'image')}) · {shown(self.folder)}")
        if self.resumes:
            say(config, f"resuming an unfinished run (epochs done: {self.epochs_done} of "
                        f"{config.num_experts * config.train_epochs})")
            if self.last_on[0] and self.last_on != (self.on, self.engine):
                note(f"it was last on {', '.join(self.last_on)}, and is on {self.on}, {self.engine} now; what follows "
                     "may be rounded differently")
        elif self.first_number:
            say(config, f"{shown(self.folder)} holds {number_of(self.first_number, 'expert')} already; this trains "
                        "others")
            known = {saved.get("train_epochs", config.train_epochs) for saved in manifests_of(self.folder).values()}
            if other := sorted(known - {config.train_epochs}):
                note(f"there are some of {' and '.join(map(str, other))} epochs, and these have {config.train_epochs}; "
                     "a distillation that uses all of them can only go up to the shortest ones' last epoch")

    @property
    def end_number(self) -> int:
        return self.first_number + self.config.num_experts

    @property
    def trained(self) -> int:
        """The number of the run's experts that are trained, whether in a file yet or not."""
        return sum(number < self.written or self.is_trained(number)
                   for number in range(self.first_number, self.end_number))

    @property
    def epochs_done(self) -> int:
        """The number of epochs done, over all the run's experts."""
        return sum(self.config.train_epochs if number < self.written else self.saved(number).done
                   for number in range(self.first_number, self.end_number))

    def saved(self, number: int) -> SavedEpochs:
        return SavedEpochs(self.unfinished / f"expert_{number}")

    def is_trained(self, number: int) -> bool:
        return len(self.saved(number)) > self.config.train_epochs

    def write_complete(self, tell: Callable[[str], None], partly: bool = False) -> None:
        """Judges the trained experts, and writes the files that are complete.

        Args:
            tell: prints what each expert reached.
            partly: also write a last file of fewer experts.

        Raises:
            UserError: several experts in a row did not learn, or a file cannot be written.
        """
        self._judge_trained(tell)
        while self.written < self._judged:
            number = min(self.config.save_interval, (self._judged if partly else self.end_number) - self.written)
            if self.written + number > self._judged or not all(
                    map(self.is_trained, range(self.written, self.written + number))):  # their epochs were removed
                return
            self._write(number)

    def _learned(self, train_accuracy: float) -> bool:
        return train_accuracy > AT_CHANCE / self.dataset.num_classes

    def _judge_trained(self, tell: Callable[[str], None]) -> None:
        """Says in order what the trained experts reached, with a note on each that did not learn.

        Raises:
            UserError: `MOST_AT_CHANCE` experts in a row did not learn.
        """
        while self._judged < self.end_number and self.is_trained(self._judged):
            reached = Epoch(**self.saved(self._judged)[self.config.train_epochs]["reached"])
            tell(f"expert {self._judged}: {', '.join(_in_words(reached, self.config))}")
            self._at_chance = 0 if self._learned(reached.train_accuracy) else self._at_chance + 1
            if self._at_chance:
                note(f"expert {self._judged} did not learn: {100 * reached.train_accuracy:.1f} % of the training "
                     f"images right (guessing gives {100 / self.dataset.num_classes:.1f} %)")
            self._judged += 1
            if self._at_chance == MOST_AT_CHANCE:
                rho = f", a smaller --rho_max (now {self.config.rho_max:g})" if self.config.rho_max else ""
                raise UserError(f"{MOST_AT_CHANCE} experts in a row did not learn; give more --train_epochs or "
                                "another --seed with --resume never, or in another --buffer_path another --lr_teacher "
                                f"(now {self.config.lr_teacher:g}){rho}")

    def _write(self, count: int) -> None:
        """Writes a file of the next `count` experts."""
        numbers = range(self.written, self.written + count)
        experts = [trajectories.as_expert(self.model, self.saved(number).snapshots()) for number in numbers]
        epochs = [{"expert": number, **epoch} for number in numbers for epoch in self.saved(number).reached()]
        threads = {"threads": torch.get_num_threads()} if self.dataset.device.type == "cpu" else {}
        trajectories.write_experts(self.folder, experts, self.options | threads | {"on": self.on}, epochs)
        self.written += count
        for number in numbers:
            shutil.rmtree(self.saved(number).folder)

    def clear(self, partly: bool = False) -> None:
        """Removes what was kept for resuming.

        Args:
            partly: an expert diverged, so those after it are not written.

        Raises:
            UserError: an expert is missing from the files, as its epochs were removed.
        """
        self.diverged.unlink(missing_ok=True)
        if partly and any(map(self.is_trained, self._begun())):
            return  # experts after the diverged one are kept, in case it can be trained otherwise
        if self.written < self.end_number and not partly:
            missing = [number for number in range(self.written, self.end_number) if not self.is_trained(number)]
            raise UserError(f"epochs of {', '.join(f'expert {number}' for number in missing)} are gone from "
                            f"{self.unfinished}, so that experts from {self.written} on are not written yet; the same "
                            "command trains what is missing")
        # The run file first: without it the rest is ignored.
        self.run_file.unlink(missing_ok=True)
        files.remove(self.unfinished)


class ExpertView(Progress):
    """The progress bar of an expert run."""

    def __init__(self, run: ExpertRun):
        config = run.config
        self._run, self._epochs = run, config.train_epochs
        super().__init__(config.num_experts * config.train_epochs, "experts", initial=run.epochs_done,
                         quiet=config.quiet, device=run.dataset.device,
                         images=0 if config.pad else len(run.dataset.train_labels))  # PAD's number varies

    def begin(self, number: int) -> None:
        """Starts or resumes an expert."""
        self._before, self._begun = self._run.epochs_done, self._run.saved(number).done
        # The number of ranks that train; each is assumed to be as fast as this one.
        self._together = min(ranks.size(), self._run.config.num_experts - self._run.trained)
        self.set_description(f"expert {number}", refresh=False)
        self.show()  # clears the previous expert's numbers

    def after_batch(self, done: float) -> None:
        """Records that `done` of the expert's epochs, as a fraction, are done."""
        self.count = f"epoch {math.ceil(done)}/{self._epochs}"
        self.reach(min(self.total, self._before + self._together * (done - self._begun)))

    def after_epoch(self, epoch: Epoch) -> None:
        self.show(*_in_words(epoch, self._run.config))


def _in_words(epoch: Epoch, config: BufferConfig) -> tuple[str, str, str]:
    """What an expert reached in an epoch."""
    return (f"loss {epoch.loss:.3f}", f"train {100 * epoch.train_accuracy:.1f} %",
            f"{'held-out' if config.val_fraction else 'test'} {100 * epoch.test_accuracy:.1f} %")


def _note_whitening(config: BufferConfig, dataset: Dataset) -> None:
    """Prints a note on whitening with few images: it divides by their spread, which is zero in most directions."""
    count, values = len(dataset.train_images), dataset.test_images[0].numel()
    if config.zca and count < values:
        note(f"--zca with {number_of(count, 'image')} of {values} values each: whitening also amplifies what these "
             "images do not vary in; experts often test better without it")


def _say_where(run: ExpertRun) -> None:
    """Prints where the experts are, and what to type next."""
    config, folder = run.config, run.folder
    trained = experts_in_words(config.num_experts, config.train_epochs)
    print(wrapped(f"trained {trained}; {shown(folder)} holds {run.written} in "
                  f"{some_of([path.name for path in expert_files(folder)])}"))
    say_next(config, "next, to measure which settings fit them and get the command that distils them:",
             command("scripts/inspect_buffer.py", {"suggest": True, "ipc": 1}, argument=folder))
