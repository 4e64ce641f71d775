"""Settings that fit the given experts, from the initial set's matching loss at several learning rates, step counts and
segment lengths: how close training on it gets to the experts before anything is distilled."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from buffer.trajectories import Buffer
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.initialize import initial_set
from distill.matching import losses_on_the_way
from utils.config import AUTO, DistillConfig
from utils.data.datasets import Dataset
from utils.errors import UserError, number_of
from utils.files import finite
from utils.program import ranks
from utils.program.console import table, thinned
from utils.program.progress import Progress
from utils.program.seeds import generator

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # α
STEPS = (10, 20, 40)  # T
SEGMENTS = (1, 2, 3, 5, 8)  # M
MOST_STARTS = 6  # the most start epochs that are measured, evenly over the trajectory
DRAWS = 2  # draws of an expert and augmentations for each start epoch
UPDATES = 8  # matches whose gradients determine the rates of images and labels
BATCH = 50  # the most samples per inner step; the loss depends little on it
DIVERGED_LOSS = 4.0  # above this loss, larger rates are not tried
GAIN_SHARES = 0.6, 0.8  # of the best gain, which suffice for shorter segments and fewer steps; for larger rates
END_GAIN_SHARE = 0.5  # the window ends below this share of the best start epoch's gain
FIRST_STEP = {"lr_img": 0.2, "lr_y": 0.003}  # size of a first update, in standard deviations; labels have more momentum
EPOCHS, STEPS_OF_A_TEST = 300, 1000  # minimum for a network that is trained on the set
HARD_LOSS = 0.98  # if even the smallest loss is above this, there is little to match
EASY_LOSS = 0.6  # below this loss, real images already teach a start epoch
THRESHOLD_FACTOR = 1.5  # threshold = this times the initial set's largest loss; drawn losses should seldom exceed it


class Losses(NamedTuple):
    """Mean matching losses [segments, steps, rates, starts]; NaN where a segment would leave the trajectory."""

    segments: Sequence[int]
    steps: Sequence[int]
    rates: Sequence[float]
    starts: Sequence[int]
    values: np.ndarray


class Suggestion(NamedTuple):
    """Proposed options, the losses they are based on, and notes for the user."""

    options: dict[str, Any]
    losses: Losses
    notes: list[str]

    def __str__(self) -> str:
        """A table of the losses at the proposed segment length, then the proposed options and notes."""
        segments, steps, rates, starts, values = self.losses
        of_segment = values[segments.index(self.options["expert_epochs"])]
        rows = [["T", "α", *(f"s = {start}" for start in starts)],
                *([str(step), f"{rate:g}", *map(_cell, of_segment[number, at])]
                  for number, step in enumerate(steps) for at, rate in enumerate(rates))]
        given = " ".join(f"--{name}={value}" for name, value in self.options.items())
        return "\n".join([
            "mean matching loss of the first set, for segments of "
            f"{number_of(self.options['expert_epochs'], 'epoch')} from epoch s, after T steps at a rate of α:", "",
            table(rows), "", f"settings that fit these experts: {given}",
            *(f"note: {note}" for note in self.notes)])

    def as_json(self) -> dict[str, Any]:
        return {"options": self.options, "notes": self.notes, "losses": [
            {"expert_epochs": epochs, "syn_steps": step, "lr_teacher": rate,
             "by_start_epoch": [finite(loss) for loss in self.losses.values[segment, number, at]]}
            for segment, epochs in enumerate(self.losses.segments) for number, step in enumerate(self.losses.steps)
            for at, rate in enumerate(self.losses.rates)], "start_epochs": self.losses.starts}


def suggestion(config: DistillConfig, dataset: Dataset, buffer: Buffer, labellers: Buffer) -> Suggestion:
    """Measures the initial set over the whole trajectory and proposes options for a distillation.

    Args:
        labellers: the experts that label the initial images.

    Raises:
        UserError: no loss is finite, whatever the rate.
    """
    first, notes = ranks.from_first_rank(lambda: initial_set(replace(config, lr_teacher=AUTO), dataset, labellers))
    segments = [epochs for epochs in SEGMENTS if epochs <= max(1, buffer.epochs // 2)]
    rates = RATES if math.isnan(first.lr) else [float(first.lr)]  # a saved set has its own
    losses = measured(config, dataset, buffer, first, segments, STEPS, rates,
                      thinned(range(buffer.epochs - segments[0] + 1), MOST_STARTS))
    options = proposed(losses)
    options |= {"batch_syn": batch} if (batch := _batch(len(first), options["syn_steps"])) else {}
    options["epoch_eval_train"] = max(EPOCHS, STEPS_OF_A_TEST // -(-len(first) // config.batch_train))
    options |= {"Sequential_Generation": False} if config.Sequential_Generation else {}  # the whole window at once
    options |= {"adjoint_steps": None} if (config.adjoint_steps or 0) > options["syn_steps"] else {}
    first = first.at(options["lr_teacher"]).to(dataset.device)
    options |= fitting_rates(replace(config, **options), dataset, buffer, first)
    notes += doubts(losses, replace(config, **options))
    if config.factor > 1:
        notes.insert(0, f"each image holds {config.factor**2} smaller ones with a label each (--factor "
                     f"{config.factor}); whole images, --factor 1, may need other settings, which DATM.py --dry_run "
                     "measures")
    if rates is not RATES:
        del options["lr_teacher"]
    return Suggestion(options, losses, notes)


def fitting_rates(config: DistillConfig, dataset: Dataset, buffer: Buffer, first: DistilledSet) -> dict[str, float]:
    """The rates at which a first update moves images and labels by `FIRST_STEP` of their standard deviation, except for
    what has none; empty if every drawn loss is above the threshold."""
    distillation = Distillation(config, dataset, buffer, first)
    moved = {"lr_img": first.images} | ({"lr_y": first.labels} if config.learns_labels else {})
    squares: dict[str, list[float]] = {name: [] for name in moved}  # mean squares of the gradients
    with Progress(UPDATES, "measuring updates", quiet=config.quiet) as bar:
        for number in range(UPDATES):
            match = distillation.match(distillation.draw(number))
            if ranks.from_first_rank(lambda match=match: float(match.loss)) <= config.threshold:
                for name, gradient in (("lr_img", match.grad_images), ("lr_y", match.grad_labels)):
                    if name in moved:
                        squares[name].append(float(gradient.square().mean()))
            bar.update()
    size = {name: math.sqrt(fmean(squares[name])) / float(tensor.std())
            for name, tensor in moved.items() if squares[name] and tensor.std() > 0}
    return {name: float(f"{FIRST_STEP[name] / size[name]:.0e}") for name in size if 0 < size[name] < math.inf}


def measured(config: DistillConfig, dataset: Dataset, buffer: Buffer, first: DistilledSet, segments: Sequence[int],
             steps: Sequence[int], rates: Sequence[float], starts: Sequence[int]) -> Losses:
    """Trains on the initial set from each start epoch at each rate, and measures the losses to all targets.

    Args:
        first: the initial set; its own rate is not used.

    Raises:
        UserError: no loss is finite.
    """
    device = dataset.device
    first = first.to(device)
    config = replace(config, syn_steps=max(steps), batch_syn=min(config.batch_syn or len(first), BATCH),
                     min_start_epoch=0)
    distillation, samples = Distillation(config, dataset, buffer, first), first.samples()
    values = np.full((len(segments), len(steps), len(rates), len(starts), DRAWS), math.nan)
    with Progress(len(starts) * DRAWS * len(rates), "measuring", quiet=config.quiet) as bar:
        for number, (at, draw) in enumerate(itertools.product(range(len(starts)), range(DRAWS))):
            start = starts[at]
            inside = [each for each, epochs in enumerate(segments) if start + epochs <= buffer.epochs]
            segment = distillation.segment(draw % len(buffer), 1, generator(config.seed, "suggest", start, draw))
            theta, *targets = (buffer.snapshot(segment.expert, start + epochs).to(device)
                               for epochs in (0, *(segments[each] for each in inside)))
            # One training for all targets, or with `labels: target` one for each, as the labels differ.
            together = [[target] for target in targets] if config.labels == "target" else [targets]
            trained = [partial(losses_on_the_way, distillation.student, theta, some, samples,
                               distillation.labels_for(first.labels, samples, some[0]), augment=segment.augment,
                               part=distillation.part) for some in together]
            if not number:  # a warm-up that allocates and compiles, so that the first training is timed correctly
                trained[0](lr=torch.tensor(rates[0], device=device), batches=segment.batches[-1:],
                           augment=segment.augment[-1:], steps=[1])
                bar.pace.reached(0)
            values[inside, ..., at, draw] = math.inf
            for place, rate in enumerate(rates):
                losses = torch.cat([each(lr=torch.tensor(rate, device=device), batches=segment.batches, steps=steps)
                                    for each in trained]).nan_to_num(math.inf, math.inf)
                # All ranks must decide alike even if machines differ in the last bit.
                known = ranks.from_first_rank(losses.cpu().numpy)
                values[inside, :, place, at, draw] = known
                bar.update()
                if known.min() > DIVERGED_LOSS:
                    break
            bar.reach((number + 1) * len(rates))
    if not np.isfinite(values).any():
        raise UserError(f"no matching loss of the experts in {buffer.folder} is finite: they diverged; train them "
                        "again with a smaller --lr_teacher")
    return Losses(segments, steps, rates, starts, values.mean(-1))


def proposed(losses: Losses) -> dict[str, Any]:
    """Chooses options from these losses.

    The gain of a start epoch is how far its loss is below 1, the loss of a training that gets no closer to the target;
    gains are summed over the first half of the trajectory. First M, then T is the smallest that reaches the share
    `GAIN_SHARES[0]` of the largest sum. α is the largest that reaches `GAIN_SHARES[1]` of the best for this M and T.

    The window begins at the first start epoch with a loss below 1 that real images do not teach already (`EASY_LOSS`).
    It ends after the best start epoch from there on, at the first one that gains less than `END_GAIN_SHARE` of what the
    best one does. Losses between the measured start epochs are interpolated.
    """
    gains = _gains(losses.values)
    half = [number for number, start in enumerate(losses.starts) if 2 * start <= losses.starts[-1]]
    of_all = gains[..., half].sum(-1)  # [segments, steps, rates]
    enough = of_all.max(-1) >= GAIN_SHARES[0] * of_all.max()
    segment = int(enough.any(1).argmax())
    step = int(enough[segment].argmax())
    rate = _largest(of_all[segment, step])
    chosen = losses.values[segment, step, rate]
    known = np.flatnonzero(~np.isnan(chosen))
    epochs = np.arange(losses.starts[known[-1]] + 1)
    loss = np.interp(epochs, np.array(losses.starts)[known], np.minimum(chosen[known], DIVERGED_LOSS))
    gain = _gains(loss)
    begin = int(((loss >= EASY_LOSS) & (loss < 1)).argmax())
    best = begin + int(gain[begin:].argmax())
    little = np.flatnonzero(gain[best:] < END_GAIN_SHARE * gain[best])
    end = best + int(little[0]) if len(little) else len(gain)
    return {"lr_teacher": losses.rates[rate], "syn_steps": losses.steps[step],
            "expert_epochs": losses.segments[segment], "min_start_epoch": begin, "max_start_epoch": end,
            "threshold": round(max(1.0, THRESHOLD_FACTOR * float(loss[begin:end].max())), 1)}


def doubts(losses: Losses, config: DistillConfig) -> list[str]:
    """What a user should know before following these options, which are among those that were measured."""
    rate = config.lr_teacher
    chosen = losses.values[losses.segments.index(config.expert_epochs), losses.steps.index(config.syn_steps),
                           losses.rates.index(rate)]
    least = float(np.nanmin(chosen))
    notes = []
    if least > HARD_LOSS:
        notes.append("training on the initial set barely approaches the experts (its smallest loss is "
                     f"{least:.3f}); experts trained with a smaller --lr_teacher{' or' * (not config.zca)}"
                     f"{',' * config.zca} for fewer epochs{' or without --zca' * config.zca} can be easier")
    if len(losses.rates) > 1 and rate in (losses.rates[0], losses.rates[-1]):
        most, more = ("largest", "larger") if rate == losses.rates[-1] else ("smallest", "smaller")
        notes.append(f"--lr_teacher {rate:g} is the {most} rate that was measured; a {more} one may fit better")
    return notes


def with_fitting_rate(config: DistillConfig, dataset: Dataset, buffer: Buffer,
                      first: DistilledSet) -> tuple[DistilledSet, list[str]]:
    """`--lr_teacher auto`: the initial set with the rate that `proposed` would choose for this T, M and window, and
    notes for the user. A saved set keeps its own rate.

    Raises:
        UserError: no loss is finite, whatever the rate.
    """
    if not math.isnan(first.lr):
        return first, ["--lr_teacher auto measured nothing, since the set of --pix_init has its own rate, "
                       f"{float(first.lr):g}"]
    starts = thinned(range(config.min_start_epoch, config.max_start_epoch), MOST_STARTS)
    losses = measured(config, dataset, buffer, first, [config.expert_epochs], [config.syn_steps], RATES, starts)
    gains = _gains(losses.values).mean(-1)[0, 0]
    rate = RATES[_largest(gains)]
    said = ", ".join(f"{gain:.2g} at {each:g}" for each, gain in zip(RATES, gains) if gain > 0.001)
    return first.at(rate), [
        f"--lr_teacher auto is {rate:g}, the largest that has {GAIN_SHARES[1]:g} of the best gain (how far the first "
        f"set's matching loss is below 1, over the window): {said}" if said else
        f"--lr_teacher auto is {rate:g}; at none of the rates {', '.join(f'{each:g}' for each in RATES)} does training "
        "on the first set come closer to the experts, over the window",
        *doubts(losses, replace(config, lr_teacher=rate))]


def _gains(losses: np.ndarray) -> np.ndarray:
    """How far each loss is below 1, the loss of a training that gets no closer to the target. Above 1, a tiny positive
    number that is larger for smaller losses."""
    return np.nan_to_num(np.clip(1 - losses, 0, None) + 1e-9 / losses)


def _largest(gains: np.ndarray) -> int:
    """The index of the largest rate that gains nearly as much as the best one."""
    return int(np.flatnonzero(gains >= GAIN_SHARES[1] * gains.max())[-1])


def _batch(images: int, steps: int) -> int | None:
    """The batch size at which T steps see each image twice, but at least `BATCH`; None: the whole set."""
    batch = max(BATCH, -(-2 * images // steps))
    return batch if batch < images else None


def _cell(loss: float) -> str:
    return "-" if math.isnan(loss) else f"{loss:.3f}" if loss < 10 else "> 10"
