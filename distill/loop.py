"""The distillation: draw a segment of an expert's trajectory, match it, update images, labels and α; repeat."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from buffer.trajectories import Buffer, buffer_folder
from distill.distilled_set import DistilledSet
from distill.evaluate import Score, check_pool, evaluate
from distill.initialize import initial_set
from distill.matching import match_trajectory, matching_loss
from distill.schedule import start_epoch_bound
from utils import augment, figures
from utils.config import DistillConfig
from utils.datasets import Dataset, load_configured
from utils.errors import UserError
from utils.networks import network_for
from utils.parameters import FlatModel
from utils.run import Progress, RunFolder, config_name, describe, environment, finite, generator, select_device, shown

MOMENTUM = 0.5  # of images and α, as published
SAVE_INTERVAL = 1000  # an evaluated iteration divisible by this is always saved, as published
FIXED_SEGMENTS = 16  # segments on which the loss before and after is compared


@dataclass(frozen=True)
class Segment:
    """What one iteration matches: M epochs of an expert, and the inner loop's batches and augmentation."""

    expert: int
    start_epoch: int
    batches: Sequence[Tensor]
    augment: Sequence[augment.Draw | None]


def draw_segment(config: DistillConfig, buffer: Buffer, image_size: tuple[int, int], num_images: int,
                 device: torch.device, expert: int | None, bound: int, random: torch.Generator) -> Segment:
    """Draws everything random in one iteration, before any of its mathematics.

    Args:
        expert: which one, or None to draw it.
        bound: exclusive upper bound of the start epoch.
    """
    if expert is None:
        expert = int(torch.randint(len(buffer), (), generator=random))
    start = int(torch.randint(config.min_start_epoch, bound, (), generator=random))

    batches: list[Tensor] = []
    chunks: list[Tensor] = []
    while len(batches) < config.syn_steps:
        if not chunks:
            chunks = list(torch.randperm(num_images, generator=random).split(config.batch_syn or num_images))
        batches.append(chunks.pop())  # from the end, as published: a short chunk comes first

    groups = augment.parse_strategy(config.dsa_strategy) if config.dsa and not config.no_aug else ()
    draws = [augment.draw(groups, len(batch), image_size, random) for batch in batches]
    return Segment(expert, start, [batch.to(device) for batch in batches], [draw and draw.to(device) for draw in draws])


def set_optimiser(config: DistillConfig, distilled: DistilledSet) -> torch.optim.SGD:
    """SGD on images, labels and α, each with its own rate and momentum, as published."""
    return torch.optim.SGD([
        {"params": [distilled.images], "lr": config.lr_img, "momentum": MOMENTUM},
        {"params": [distilled.labels], "lr": config.lr_y, "momentum": config.Momentum_y},
        {"params": [distilled.lr], "lr": config.lr_lr, "momentum": MOMENTUM}])


class Distillation:
    """The state of a distillation and its two moves: `step` and `fixed_loss`.

    Everything random in iteration `it` comes from a generator addressed (seed, "iteration", it), so an iteration
    can be repeated without the ones before it.
    """

    def __init__(self, config: DistillConfig, dataset: Dataset, buffer: Buffer, start: DistilledSet):
        self.config, self.buffer, self.image_size = config, buffer, dataset.image_size
        self.device = start.images.device
        self.set = start.detach()
        self.optimiser = set_optimiser(config, self.set)
        self.skipped = 0

    def step(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns what to record of it.

        Raises:
            UserError: the learning rate has left the positive numbers.
        """
        config = self.config
        bound = start_epoch_bound(iteration, config.max_start_epoch, config.current_max_start_epoch,
                                  config.expansion_end_epoch, config.Sequential_Generation)
        segment = draw_segment(config, self.buffer, self.image_size, len(self.set), self.device,
                               None if config.load_all else self._walk(iteration), bound,
                               generator(config.seed, "iteration", iteration))
        theta_start, theta_target = self._ends(segment)
        match = match_trajectory(self.buffer.model, theta_start, theta_target, self.set.images, self.set.labels,
                                 self.set.lr, segment.batches, segment.augment, config.matching)

        loss = float(match.loss)  # the iteration's one wait for the device
        update = loss <= config.threshold  # False for NaN
        if update:
            self.set.images.grad, self.set.labels.grad, self.set.lr.grad = match[1:]
            self.optimiser.step()
        else:
            self.skipped += 1
        lr = float(self.set.lr.detach())
        if not lr > 0:
            raise UserError(f"the synthetic learning rate became {lr:.2g} at iteration {iteration}, and training with "
                            f"it is meaningless; lower --lr_lr (now {config.lr_lr:g})")
        return {"iteration": iteration, "loss": finite(loss), "updated": update, "lr": lr,
                "start_epoch": segment.start_epoch, "bound": bound, "expert": segment.expert}

    def fixed_loss(self, distilled: DistilledSet) -> float:
        """The mean matching loss over segments that are the same whenever it is called with the same config."""
        config, total = self.config, torch.zeros((), device=self.device)
        for number in range(FIXED_SEGMENTS):
            segment = draw_segment(config, self.buffer, self.image_size, len(distilled), self.device, None,
                                   config.max_start_epoch, generator(config.seed, "fixed segment", number))
            total += matching_loss(self.buffer.model, *self._ends(segment), distilled.images, distilled.labels,
                                   distilled.lr, segment.batches, segment.augment)
        return float(total) / FIXED_SEGMENTS

    def _walk(self, iteration: int) -> int:
        """Every expert once a round, in an order of the round's own."""
        round_, position = divmod(iteration, len(self.buffer))
        return self.buffer.walk_order(generator(self.config.seed, "walk", round_))[position]

    def _ends(self, segment: Segment) -> tuple[Tensor, Tensor]:
        epochs = segment.start_epoch, segment.start_epoch + self.config.expert_epochs
        theta_start, theta_target = (self.buffer.snapshot(segment.expert, epoch).to(self.device) for epoch in epochs)
        return theta_start, theta_target


def check_window(config: DistillConfig, buffer: Buffer) -> None:
    """Refuses a difficulty window that is empty or reaches beyond the experts' trajectories.

    Raises:
        UserError
    """
    last = config.max_start_epoch - 1 + config.expert_epochs
    if last > buffer.epochs:
        most = buffer.epochs - config.expert_epochs + 1
        advice = f"--max_start_epoch {most} or less" if most > 0 else f"--expert_epochs {buffer.epochs} or less"
        raise UserError(f"--max_start_epoch {config.max_start_epoch} --expert_epochs {config.expert_epochs}: a segment "
                        f"would end at epoch {last}, but the experts in {buffer.folder} have {buffer.epochs} epochs; "
                        f"give {advice}, or train the experts for longer")
    first = start_epoch_bound(0, config.max_start_epoch, config.current_max_start_epoch, config.expansion_end_epoch,
                              config.Sequential_Generation)
    if config.min_start_epoch >= first:
        name = "current_max_start_epoch" if first < config.max_start_epoch else "max_start_epoch"
        raise UserError(f"--min_start_epoch {config.min_start_epoch} --{name} {first}: the difficulty window holds no "
                        f"start epoch; --{name} is exclusive and must be larger")


def run_folder(config: DistillConfig) -> Path:
    """`logged_files/<dataset>/<ipc>/<model>/<run name>`, as published; the name defaults to one made of the config."""
    name = config.run_name or f"{config.matching}_seed{config.seed}_{config_name(config)}"
    return Path(config.log_path) / config.dataset / str(config.ipc) / config.model / name


def distill(config: DistillConfig) -> None:
    """The whole of `distill/DATM.py`: a config in, a run folder out.

    Raises:
        UserError: whatever in the config, the data or the experts does not fit together.
    """
    device = select_device(config.device)
    augment.parse_strategy(config.dsa_strategy)
    dataset = load_configured(config, device)
    buffer = Buffer(buffer_folder(config), FlatModel(network_for(config.model, dataset).to(device)), config.max_files,
                    config.max_experts)
    check_window(config, buffer)
    check_pool(config, dataset)
    folder = RunFolder(run_folder(config), config)
    if folder.result is not None:
        print(f"{shown(folder.path)} is finished ({folder.result['summary']}); give another --run_name or --seed to "
              "run it again")
        return
    start, notes = initial_set(config, dataset, buffer)
    folder.start()
    print(f"{config.dataset}, {config.model}, ipc {config.ipc} · {len(buffer)} experts of {buffer.epochs} epochs · "
          f"{config.matching} gradient, T {config.syn_steps}, M {config.expert_epochs} · {describe(device)}")
    for note in notes:
        print(f"note: {note}")

    distillation = Distillation(config, dataset, buffer, start)
    best, seconds = _iterate(config, dataset, distillation, folder)

    before, after = (distillation.fixed_loss(each) for each in (start, distillation.set.detach()))
    chosen_on = "validation" if config.val_fraction else "test"
    summary = (f"best on the {chosen_on} images {100 * best.scores[0].mean:.2f} ± {100 * best.scores[0].std:.2f} % at "
               f"iteration {best.iteration}")
    figures.save_images(folder.path / "images.png", dataset.to_pixels(start.images), dataset.to_pixels(best.set.images),
                        dataset.classes)
    figures.save_curves(folder.path / "curves.png", folder.metrics(), config.threshold)
    # Last of all: with this file the run counts as finished.
    folder.finish(summary=summary, best=best.as_dict(), chosen_on=chosen_on, skipped=distillation.skipped,
                  fixed_loss={"before": finite(before), "after": finite(after), "segments": FIXED_SEGMENTS},
                  seconds=seconds, environment=environment(device))
    print(f"matching loss over {FIXED_SEGMENTS} fixed segments: {before:.4f} before, {after:.4f} after")
    print(f"{summary}; {distillation.skipped} of {config.Iteration} updates skipped")
    print(f"in {shown(folder.path)}: Normal/images_best.pt, labels_best.pt, lr_best.pt · images.png · curves.png · "
          "metrics.jsonl · result.json")


class Evaluated(NamedTuple):
    """A set on the way, and how it scored; the first network of the pool decides which is the best, as published."""

    iteration: int
    set: DistilledSet
    scores: list[Score]

    def as_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "lr": float(self.set.lr),
                "scores": [score.as_dict() for score in self.scores]}


def _iterate(config: DistillConfig, dataset: Dataset, distillation: Distillation,
             folder: RunFolder) -> tuple[Evaluated, float]:
    """Runs all iterations, evaluating and saving on the way; returns the best set and the seconds it took."""
    groups = augment.parse_strategy(config.dsa_strategy) if config.dsa else ()
    best: Evaluated | None = None
    began = perf_counter()
    with Progress(config.Iteration, "distil") as bar:
        for iteration in range(config.Iteration + 1):
            last = iteration == config.Iteration
            if last or (iteration % config.eval_it == 0 and not (iteration == 0 and config.skip_first_eva)):
                now = distillation.set.detach()
                now = Evaluated(iteration, now, evaluate(config, dataset, now, "iteration", iteration, groups=groups))
                folder.log(iteration=iteration, scores=[score.as_dict() for score in now.scores])
                bar.write(f"iteration {iteration}: {', '.join(map(str, now.scores))}")
                improved = best is None or now.scores[0].mean > best.scores[0].mean
                if improved:
                    best = now
                    now.set.save(folder.path / "Normal", "best", dataset)
                if improved or last or iteration % SAVE_INTERVAL == 0:
                    now.set.save(folder.path / "Normal", iteration, dataset)
            if last:
                break  # nobody would see an update after the last evaluation
            record = distillation.step(iteration)
            folder.log(**record)
            loss = math.nan if record["loss"] is None else record["loss"]
            bar.set_postfix_str(f"loss {loss:.3f}, α {record['lr']:.4f}, start {record['start_epoch']}, "
                                f"skipped {distillation.skipped}", refresh=False)
            bar.update()
    return best, perf_counter() - began
