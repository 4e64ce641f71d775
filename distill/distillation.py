"""The state of a distillation and one iteration of it: draw a segment of an expert's trajectory, match it, learn.

All randomness of iteration `it` comes from a generator seeded by (seed, "iteration", it) and is drawn before any
computation, so an iteration can be repeated without the ones before it, and shared among ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from buffer.trajectories import Buffer
from distill.distilled_set import DistilledSet
from distill.initialize import expert_logits
from distill.matching import Match, Part, deep_part, far_part, match_trajectory, matching_loss
from distill.result_files import EMA, NORMAL, Iteration
from distill.schedule import start_epoch_bound
from distill.shared_model import SharedModel
from utils.config import STARTS, DistillConfig
from utils.data import augment
from utils.data.datasets import Dataset
from utils.data.tiles import cut_adjoint
from utils.errors import UserError
from utils.parameters import FlatModel, sgd_step
from utils.program import ranks
from utils.program.prepare import dsa_groups
from utils.program.seeds import generator

MOMENTUM = 0.5  # of images and α, as published
MOST_LOST = 100  # non-finite losses in a row after which a run stops
MOST_HELD = 100  # updates in a row that would make α non-positive or non-finite, after which a run stops
FIXED_SEGMENTS = 16  # segments on which the losses before and after the run are compared


@dataclass(frozen=True)
class Segment:
    """What one iteration matches: M epochs of an expert, and the inner loop's batches and augmentation."""

    expert: int
    start_epoch: int
    bound: int  # exclusive upper bound of the start epochs that could be drawn
    batches: Sequence[Tensor]
    augment: Sequence[augment.Draw]

    def own(self) -> "Segment":
        """This rank's share of each batch. It has the same size in all whole batches, since compiled and captured code
        needs a fixed shape."""
        mine = ranks.own_share()
        return replace(self, batches=[batch[mine] for batch in self.batches],
                       augment=[draw.rows(mine) for draw in self.augment])

    def to(self, device: torch.device) -> "Segment":
        """The segment on `device`, sent in one copy."""
        draws, batches = augment.to_device(self.augment, self.batches, device)
        return replace(self, batches=batches, augment=draws)


class Distillation:
    """The set, its SGD and its counters; `draw`, `match` and `learn` are one iteration.

    Several ranks share the batches of the inner loop. The gradients are summed over them, so that the set, its momenta
    and α are the same on all.
    """

    _COUNTS = ("skipped", "held", "held_in_a_row", "lost_in_a_row")

    def __init__(self, config: DistillConfig, dataset: Dataset, buffer: Buffer, start: DistilledSet):
        self.config, self.buffer, self.image_size = config, buffer, dataset.image_size
        self.device = start.images.device
        self.set = start.copy()
        self.ema = self.set.images.clone() if config.ema else None
        self.part = matched_part(config)
        self.skipped = self.held = self.held_in_a_row = self.lost_in_a_row = 0
        # The parameter that SGD updates: α itself or log α.
        self.learns_log = config.lr_param == "log"
        self.rate = self.set.lr.log() if self.learns_log else self.set.lr
        # A step on log α moves α by α² times as much as a step on α; the scale makes the first steps agree.
        scale = 1 / float(start.lr)**2 if self.learns_log else 1.0
        # What SGD updates: tensor, learning rate and momentum.
        self.learned = {"images": (self.set.images, config.lr_img, MOMENTUM),
                        "rate": (self.rate, config.lr_lr * scale, MOMENTUM)}
        if config.learns_labels:
            self.learned["labels"] = self.set.labels, config.lr_y, config.Momentum_y
        self.velocity = {name: torch.zeros_like(tensor) if momentum else None
                         for name, (tensor, _, momentum) in self.learned.items()}

    def draw(self, iteration: int) -> Segment:
        """The segment that this iteration matches."""
        config = self.config
        bound = start_epoch_bound(iteration, config.max_start_epoch, config.current_max_start_epoch,
                                  config.expansion_end_epoch, config.Sequential_Generation)
        expert = None  # any, drawn anew
        if not config.load_all:  # each round visits every expert once, in an order drawn for the round
            round_, position = divmod(iteration, len(self.buffer))
            expert = self.buffer.walk_order(generator(config.seed, "walk", round_))[position]
        return self.segment(expert, bound, generator(config.seed, "iteration", iteration))

    def segment(self, expert: int | None, bound: int, random: torch.Generator) -> Segment:
        """Draws everything random in one iteration; with several ranks, keeps only this rank's samples.

        Args:
            expert: its number; None: draw it.
            bound: exclusive upper bound of the start epoch.
        """
        config, count = self.config, len(self.set)
        if expert is None:
            expert = int(torch.randint(len(self.buffer), (), generator=random))
        start = int(torch.randint(config.min_start_epoch, bound, (), generator=random))

        batches: list[Tensor] = []
        chunks: list[Tensor] = []
        while len(batches) < config.syn_steps:
            if not chunks:
                chunks = list(torch.randperm(count, generator=random).split(config.batch_syn or count))
            batches.append(chunks.pop())  # from the end, as published: a short chunk comes first

        groups = dsa_groups(config, inner_loop=True)
        draws = [augment.draw(groups, len(batch), self.image_size, random) for batch in batches]
        segment = Segment(expert, start, bound, batches, draws)
        return (segment.own() if ranks.size() > 1 else segment).to(self.device)

    def match(self, segment: Segment) -> Match:
        """The matching loss of the segment and its gradients with respect to images, labels and α. With `labels:
        target` it first replaces the set's labels by those of this segment's target expert."""
        theta_start, theta_target = self._ends(segment)
        samples = self.set.samples()
        if self.config.labels == "target":
            self.set.labels.copy_(self.labels_for(self.set.labels, samples, theta_target))
        match = match_trajectory(self.student, theta_start, theta_target, samples, self.set.labels, self.set.lr,
                                 segment.batches, segment.augment, self.config.matching, self.part,
                                 self.config.adjoint_steps)
        # Those of this rank's samples, so far.
        match = match._replace(grad_images=ranks.sum_(cut_adjoint(match.grad_images, self.set.factor).contiguous()))
        if self.config.learns_labels:
            ranks.sum_(match.grad_labels)
        return match

    def learn(self, iteration: int, segment: Segment, match: Match) -> Iteration:
        """Updates the set unless the loss exceeds the threshold or is not finite; returns the iteration's record.

        If α would become zero, negative or non-finite, it keeps its value, as training needs a positive one.

        Raises:
            UserError: α was held back `MOST_HELD` times in a row, or `MOST_LOST` losses in a row were not finite.
        """
        config = self.config
        # Synchronises with the device. All ranks must decide alike even if machines differ in the last bit.
        loss, lr = ranks.from_first_rank(lambda: (float(match.loss), float(self.set.lr)))
        updated = math.isfinite(loss) and loss <= config.threshold
        held = False
        if updated:
            self.update(match)
            held = not 0 < float(self.set.lr) < math.inf
        if held:
            self._hold_rate(lr)

        self.skipped += not updated
        self.held += held
        self.held_in_a_row = self.held_in_a_row + 1 if held else 0
        self.lost_in_a_row = 0 if math.isfinite(loss) else self.lost_in_a_row + 1
        if self.lost_in_a_row == MOST_LOST:
            raise UserError(f"the matching loss was not finite {MOST_LOST} times in a row, the last time at iteration "
                            f"{iteration}, start epoch {segment.start_epoch}, α {lr:g}; lower "
                            f"{'--lr_teacher, ' * (config.pix_init in STARTS)}--lr_img (now {config.lr_img:g}), --lr_y "
                            f"(now {config.lr_y:g}) or --lr_lr (now {config.lr_lr:g})")
        if self.held_in_a_row == MOST_HELD:
            raise UserError(f"the learning rate α would have left the positive numbers {MOST_HELD} times in a row, the "
                            f"last time at iteration {iteration}; lower --lr_lr (now {config.lr_lr:g})"
                            + " or give --lr_param log" * (not self.learns_log))
        return Iteration(iteration, loss, updated, lr=float(self.set.lr), start_epoch=segment.start_epoch,
                         bound=segment.bound, held=held, expert=segment.expert)

    def update(self, match: Match) -> None:
        """One SGD step on images, α and, if learned, labels; each with its own rate, as published. Bit-identical to
        torch.optim.SGD, whose import takes seconds."""
        gradients = {"images": match.grad_images, "labels": match.grad_labels,
                     "rate": match.grad_lr * self.set.lr if self.learns_log else match.grad_lr}  # ∂/∂log α = α ∂/∂α
        for name, (tensor, lr, momentum) in self.learned.items():
            sgd_step(tensor, gradients[name], self.velocity[name], lr, momentum)
        if self.learns_log:
            self.set.lr.copy_(self.rate.exp())
        if self.ema is not None:
            self.ema.lerp_(self.set.images, 1 - self.config.ema_decay)

    def _hold_rate(self, lr: float) -> None:
        """Resets α to `lr` and drops its momentum, which would push it out of range again."""
        self.set.lr.fill_(lr)
        self.rate.copy_(self.set.lr.log() if self.learns_log else self.set.lr)
        self.velocity["rate"].zero_()

    def state(self) -> dict[str, Any]:
        """Everything later steps depend on besides the config, for `restore`."""
        return self._tensors() | {"counts": {name: getattr(self, name) for name in self._COUNTS}}

    def restore(self, state: dict[str, Any]) -> None:
        for name, tensor in self._tensors().items():
            if tensor is not None:
                tensor.copy_(state[name])
        for name, count in state["counts"].items():
            setattr(self, name, count)

    def _tensors(self) -> dict[str, Tensor | None]:
        return self.set.tensors() | {"rate": self.rate, "ema": self.ema} | {
            f"velocity of {name}": velocity for name, velocity in self.velocity.items()}

    def versions(self) -> dict[str, DistilledSet]:
        """The sets that are evaluated and saved, by folder name: the set, and with `ema` one of averaged images."""
        now = self.set.copy()
        return {NORMAL: now} | ({} if self.ema is None else {EMA: replace(now, images=self.ema.clone())})

    def fixed_loss(self, distilled: DistilledSet, advance: Callable[[float], object] = lambda count: None) -> float:
        """The mean matching loss over segments that depend only on the config.

        Args:
            advance: called with 1 after each segment.
        """
        total = torch.zeros((), device=self.device)
        for number in range(FIXED_SEGMENTS):
            total += self.loss(distilled, self.segment(None, self.config.max_start_epoch,
                                                       generator(self.config.seed, "fixed segment", number)))
            advance(1)
        return float(total) / FIXED_SEGMENTS

    def loss(self, distilled: DistilledSet, segment: Segment) -> Tensor:
        """The matching loss of a set with as many samples as `self.set`, without its gradient."""
        theta_start, theta_target = self._ends(segment)
        samples = distilled.samples()
        return matching_loss(self.student, theta_start, theta_target, samples,
                             self.labels_for(distilled.labels, samples, theta_target), distilled.lr, segment.batches,
                             segment.augment, self.part)

    def _ends(self, segment: Segment) -> tuple[Tensor, Tensor]:
        epochs = segment.start_epoch, segment.start_epoch + self.config.expert_epochs
        theta_start, theta_target = (self.buffer.snapshot(segment.expert, epoch).to(self.device) for epoch in epochs)
        return theta_start, theta_target

    def labels_for(self, labels: Tensor, samples: Tensor, theta_target: Tensor) -> Tensor:
        """The labels of one segment: those given, or with `labels: target` the target expert's logits of the samples.
        """
        if self.config.labels != "target":
            return labels
        logits, mine = torch.zeros_like(labels), ranks.own_share()
        if len(logits[mine]):
            logits[mine] = expert_logits(self.buffer.model, theta_target, samples[mine])
        return ranks.sum_(logits)

    @property
    def student(self) -> FlatModel | SharedModel:
        """The network that is trained; with several ranks, its batches are spread over them."""
        return self.buffer.model if ranks.size() == 1 else SharedModel(self.buffer.model)


def matched_part(config: DistillConfig) -> Part | None:
    """The parameters that PAD matches; None: all."""
    if config.depth_ratio:
        return deep_part(config.depth_ratio)
    return far_part(config.loss_ratio) if config.loss_ratio else None
