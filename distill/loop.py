"""The distillation: draw a segment of an expert's trajectory, match it, update images, labels and α; repeat."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from buffer.trajectories import Buffer, buffer_folder, check_same_data, check_same_images, made_by, require_experts
from distill import estimate
from distill.distilled_set import DistilledSet
from distill.evaluate import Known, Score, check_evaluation, check_pool, digest, epochs_to_come, evaluate
from distill.initialize import check_ipc, expert_logits, initial_set
from distill.matching import Match, Part, deep_part, far_part, match_trajectory, matching_loss
from distill.schedule import start_epoch_bound
from distill.shared_model import SharedModel
from utils import augment, commands, figures, interrupt, parallel, record, report
from utils.config import DistillConfig, as_dict
from utils.datasets import Dataset
from utils.engine import activation_bytes, describe_engine
from utils.errors import UserError
from utils.files import write_text
from utils.memory import available
from utils.metrics import percent
from utils.networks import has_batch_norm
from utils.parameters import FlatModel
from utils.program.prepare import load_configured, network_for
from utils.progress import Progress, note, wrapped
from utils.run import (
    RunFolder,
    announce,
    config_name,
    dsa_groups,
    environment,
    finite,
    flat_model,
    generator,
    influential,
    kept_to_this_run,
    say,
    shown,
    spread,
    start_device,
)
from utils.tracking import Tracker

MOMENTUM = 0.5  # of images and α, as published
VERSIONS = ("Normal", "EMA")  # the folders of the sets, as published, and of those with averaged images
SAVE_INTERVAL = 1000  # an iteration divisible by this is always saved, as published
MOST_LOST = 100  # losses in a row that are not finite, after which a run stops
MOST_HELD = 100  # updates in a row that would make α useless, after which a run stops
FIXED_SEGMENTS = 16  # segments on which the loss before and after is compared


@dataclass(frozen=True)
class Segment:
    """What one iteration matches: M epochs of an expert, and the inner loop's batches and augmentation."""

    expert: int
    start_epoch: int
    batches: Sequence[Tensor]
    augment: Sequence[augment.Draw | None]

    def own(self) -> "Segment":
        """What is left of it for this rank: of each batch the samples that it owns."""
        rows = [parallel.own_rows(batch) for batch in self.batches]
        return replace(self, batches=[batch[mine] for batch, mine in zip(self.batches, rows)],
                       augment=[draw and draw.of(mine) for draw, mine in zip(self.augment, rows)])


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

    groups = dsa_groups(config, inner_loop=True)
    draws = [augment.draw(groups, len(batch), image_size, random) for batch in batches]
    segment = Segment(expert, start, batches, draws)
    if parallel.size() > 1:
        segment = segment.own()
    return replace(segment, batches=[batch.to(device) for batch in segment.batches],
                   augment=[draw and draw.to(device) for draw in segment.augment])


class Distillation:
    """The state of a distillation and its two moves: `step` and `fixed_loss`.

    Several ranks share the work: each one's rows of images and labels are its own, and up to date there only, until
    `merge`; α is the same on all.

    Everything random in iteration `it` comes from a generator addressed (seed, "iteration", it), so an iteration
    can be repeated without the ones before it.
    """

    _COUNTS = ("skipped", "held", "held_in_a_row", "lost_in_a_row")

    def __init__(self, config: DistillConfig, dataset: Dataset, buffer: Buffer, start: DistilledSet):
        self.config, self.buffer, self.image_size = config, buffer, dataset.image_size
        self.device = start.images.device
        self.set = start.detach()
        self.ema = self.set.images.clone() if config.ema else None
        self.part = matched_part(config)
        self.skipped = self.held = self.held_in_a_row = self.lost_in_a_row = 0
        # What SGD moves in α's stead: α itself, or log α.
        log = config.lr_param == "log"
        self.rate = self.set.lr.log() if log else self.set.lr
        # A step of log α moves α by α² times what a step of α does; the scale makes the first steps agree.
        scale = 1 / config.lr_teacher**2 if log else 1.0
        self.optimiser = torch.optim.SGD([
            {"params": [self.set.images], "lr": config.lr_img, "momentum": MOMENTUM},
            {"params": [self.rate], "lr": config.lr_lr * scale, "momentum": MOMENTUM}])
        if config.labels == "learned":
            self.optimiser.add_param_group({"params": [self.set.labels], "lr": config.lr_y,
                                            "momentum": config.Momentum_y})

    @property
    def model(self) -> FlatModel | SharedModel:
        """The student."""
        return self.buffer.model if parallel.size() == 1 else SharedModel(self.buffer.model)

    def step(self, iteration: int) -> dict[str, Any]:
        """One iteration; returns what to record of it.

        An α that would become zero, negative or NaN stays where it was, since nothing can be trained with it.

        Raises:
            UserError: that happened `MOST_HELD` times in a row, or `MOST_LOST` losses in a row were not finite.
        """
        config = self.config
        bound = start_epoch_bound(iteration, config.max_start_epoch, config.current_max_start_epoch,
                                  config.expansion_end_epoch, config.Sequential_Generation)
        segment = draw_segment(config, self.buffer, self.image_size, len(self.set), self.device,
                               None if config.load_all else self._walk(iteration), bound,
                               generator(config.seed, "iteration", iteration))
        theta_start, theta_target = self._ends(segment)
        if config.labels == "target":
            self.set.labels.copy_(self._labels(self.set, theta_target))
        match = match_trajectory(self.model, theta_start, theta_target, self.set.images, self.set.labels, self.set.lr,
                                 segment.batches, segment.augment, config.matching, self.part)

        # Waits for the device. Where machines differ in the last bit, all ranks must still decide alike.
        loss, lr = parallel.from_first(lambda: (float(match.loss), float(self.set.lr)))
        update = math.isfinite(loss) and loss <= config.threshold
        held = False
        if update:
            self.update(match)
            held = not 0 < float(self.set.lr) < math.inf
        else:
            self.skipped += 1
        self.lost_in_a_row = 0 if math.isfinite(loss) else self.lost_in_a_row + 1
        if self.lost_in_a_row == MOST_LOST:
            raise UserError(f"the matching loss was not finite {MOST_LOST} times in a row, the last time at iteration "
                            f"{iteration}, start epoch {segment.start_epoch}; lower --lr_img (now {config.lr_img:g}), "
                            f"--lr_y (now {config.lr_y:g}) or --lr_teacher, or give a smaller --threshold")
        self.held_in_a_row = self.held_in_a_row + 1 if held else 0
        self.held += held
        if held:
            self._hold_rate(lr)
        if self.held_in_a_row == MOST_HELD:
            raise UserError(f"the learning rate α would have left the positive numbers {MOST_HELD} times in a row, the "
                            f"last time at iteration {iteration}; lower --lr_lr (now {config.lr_lr:g}) or give "
                            "--lr_param log")
        return {"iteration": iteration, "loss": finite(loss), "updated": update, "held": held,
                "lr": float(self.set.lr), "start_epoch": segment.start_epoch, "bound": bound, "expert": segment.expert}

    def update(self, match: Match) -> None:
        """One step of SGD on images, α and, if they are learned, labels; each with its own rate, as published."""
        log = self.config.lr_param == "log"
        self.set.images.grad = match.grad_images
        self.set.labels.grad = match.grad_labels
        self.rate.grad = match.grad_lr * self.set.lr if log else match.grad_lr  # ∂/∂log α = α ∂/∂α
        self.optimiser.step()
        if log:
            self.set.lr.copy_(self.rate.exp())
        if self.ema is not None:
            self.ema.lerp_(self.set.images, 1 - self.config.ema_decay)

    def _hold_rate(self, lr: float) -> None:
        """Puts α back and forgets its momentum, which would only push it over again."""
        self.set.lr.fill_(lr)
        self.rate.copy_(self.set.lr.log() if self.config.lr_param == "log" else self.set.lr)
        self.optimiser.state[self.rate].pop("momentum_buffer", None)

    def merge(self) -> None:
        """Brings every rank's rows to all of them."""
        momenta = [self.optimiser.state.get(tensor, {}).get("momentum_buffer")
                   for tensor in (self.set.images, self.set.labels)]
        for tensor in (self.set.images, self.set.labels, self.ema, *momenta):
            if tensor is not None:
                parallel.merge_rows(tensor)

    def state(self) -> dict[str, Any]:
        """What the next steps depend on, beside the config; for `restore`. Of several ranks, after `merge`."""
        return {"images": self.set.images, "labels": self.set.labels, "lr": self.set.lr, "rate": self.rate,
                "ema": self.ema, "optimiser": self.optimiser.state_dict(),
                "counts": {name: getattr(self, name) for name in self._COUNTS}}

    def restore(self, state: dict[str, Any]) -> None:
        for own, saved in ((self.set.images, "images"), (self.set.labels, "labels"), (self.set.lr, "lr"),
                           (self.rate, "rate"), (self.ema, "ema")):
            if own is not None:
                own.copy_(state[saved])
        self.optimiser.load_state_dict(state["optimiser"])
        for name, count in state["counts"].items():
            setattr(self, name, count)

    def versions(self) -> dict[str, DistilledSet]:
        """What is evaluated and saved, by the name of its folder: the set, and the one of averaged images."""
        now = self.set.detach()
        normal, averaged = VERSIONS
        return {normal: now} | ({} if self.ema is None else {averaged: replace(now, images=self.ema.clone())})

    def fixed_loss(self, distilled: DistilledSet) -> float:
        """The mean matching loss over segments that are the same whenever it is called with the same config."""
        config, total = self.config, torch.zeros((), device=self.device)
        for number in range(FIXED_SEGMENTS):
            segment = draw_segment(config, self.buffer, self.image_size, len(distilled), self.device, None,
                                   config.max_start_epoch, generator(config.seed, "fixed segment", number))
            theta_start, theta_target = self._ends(segment)
            total += matching_loss(self.model, theta_start, theta_target, distilled.images,
                                   self._labels(distilled, theta_target), distilled.lr, segment.batches,
                                   segment.augment, self.part)
        return float(total) / FIXED_SEGMENTS

    def _labels(self, distilled: DistilledSet, theta_target: Tensor) -> Tensor:
        """The labels of one segment: the set's own, or with `labels: target` what the target expert says."""
        if self.config.labels == "target":
            labels = distilled.labels.clone()
            mine = parallel.own_rows(torch.arange(len(labels), device=labels.device))
            if mine.any():
                labels[mine] = expert_logits(self.buffer.model, theta_target, distilled.images[mine])
            return labels
        return distilled.labels

    def _walk(self, iteration: int) -> int:
        """Every expert once a round, in an order of the round's own."""
        round_, position = divmod(iteration, len(self.buffer))
        return self.buffer.walk_order(generator(self.config.seed, "walk", round_))[position]

    def _ends(self, segment: Segment) -> tuple[Tensor, Tensor]:
        epochs = segment.start_epoch, segment.start_epoch + self.config.expert_epochs
        theta_start, theta_target = (self.buffer.snapshot(segment.expert, epoch).to(self.device) for epoch in epochs)
        return theta_start, theta_target


def check_unrolled(config: DistillConfig) -> None:
    """Refuses options of the engines for the unrolled gradient, which is autograd's and takes none.

    Raises:
        UserError
    """
    given = [f"--backend {config.backend}"] if config.backend not in ("auto", "plain") else []
    given += [f"--micro_batch {config.micro_batch}"] if config.micro_batch else []
    given += ["--precision bf16"] if config.precision == "bf16" else []
    if config.matching == "unroll" and given:
        raise UserError(f"--matching unroll {' '.join(given)}: the unrolled gradient is plain autograd, whole batches "
                        "in float32; leave that out, or give --matching exact, which has the same gradient")


def check_ranks(config: DistillConfig, network: nn.Module) -> None:
    """Refuses what several ranks cannot share.

    Raises:
        UserError
    """
    if parallel.size() == 1:
        return
    if config.matching == "unroll":
        raise UserError("--matching unroll runs in one process only; give --matching exact, which has the same "
                        "gradient")
    if config.backend in ("compile", "graph"):
        raise UserError(f"--backend {config.backend} is for batches of one size, and a rank's share of a batch changes "
                        "in every step; leave it out")
    if has_batch_norm(network):
        raise UserError(f"--model {config.model}: batch norm ties the samples of a batch together, so that ranks "
                        "cannot share one; start a single process, or take a network without batch norm")
    if next(network.parameters()).device.type == "cuda" and parallel.ranks_here() > torch.cuda.device_count():
        raise UserError(f"{parallel.ranks_here()} ranks on this machine of {torch.cuda.device_count()} GPU(s); a "
                        "distillation takes one for each rank: give torchrun --nproc_per_node="
                        f"{torch.cuda.device_count()}")


def matched_part(config: DistillConfig) -> Part | None:
    """PAD's part of the parameters, or None for all.

    Raises:
        UserError: both of its rules at once.
    """
    if config.depth_ratio and config.loss_ratio:
        raise UserError(f"--depth_ratio {config.depth_ratio:g} --loss_ratio {config.loss_ratio:g}: these are two rules "
                        "for the same choice; give one of them")
    if config.depth_ratio:
        return deep_part(config.depth_ratio)
    return far_part(config.loss_ratio) if config.loss_ratio else None


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


def check_memory(config: DistillConfig, dataset: Dataset, model: FlatModel) -> None:
    """Refuses a run that cannot fit the memory: by what it must hold at the least, not by what it may take.

    Raises:
        UserError
    """
    device = dataset.train_images.device
    num_images = config.ipc * dataset.num_classes
    batch = estimate.batch_size(config, dataset)
    state = 4 * 4 * num_images * dataset.test_images[0].numel()  # images, their gradient and momentum, the start
    samples = batch * config.syn_steps if config.matching == "unroll" else min(batch, model.engine.micro_batch or batch)
    steps = 4 * model.num_parameters * (config.syn_steps + 1) + samples * activation_bytes(model.network)
    free = available(device)
    if state + steps > free:
        advice = ("give --matching exact, which has the same gradient in far less" if config.matching == "unroll" else
                  "give a smaller --micro_batch, --syn_steps or --ipc")
        raise UserError(f"this distillation needs at least {(state + steps) / 1e9:.1f} GB of memory, and "
                        f"{free / 1e9:.1f} GB are free on {device}; {advice}")


def inner_samples(config: DistillConfig, dataset: Dataset) -> int:
    """Synthetic samples that all inner steps of a run see together."""
    return config.Iteration * config.syn_steps * estimate.batch_size(config, dataset)


def run_folder(config: DistillConfig) -> Path:
    """`logged_files/<dataset>/<ipc>/<model>/<run name>`, as published; the name defaults to one made of the config."""
    name = config.run_name or f"{config.matching}_seed{config.seed}_{config_name(config)}"
    return Path(config.log_path) / config.dataset / str(config.ipc) / config.model / name


def distill(config: DistillConfig) -> None:
    """The whole of `distill/DATM.py`: a config in, a run folder out.

    Raises:
        UserError: whatever in the config, the data or the experts does not fit together.
    """
    check_evaluation(config)
    matched_part(config)
    check_unrolled(config)
    if not config.dry_run:
        require_experts(buffer_folder(config))
        check_same_data(buffer_folder(config), config)
        spread(config)
    device = start_device(config)
    dataset = parallel.first_then_others(lambda: load_configured(config, device))
    check_pool(config, dataset)
    network = network_for(config.model, dataset).to(device)
    check_ranks(config, network)
    model = (FlatModel(network, "plain") if config.matching == "unroll" else
             flat_model(config if parallel.size() == 1 else replace(config, backend="eager"), network,
                        inner_samples(config, dataset), config.micro_batch))
    if config.dry_run:
        if config.pix_init != "noise":
            check_ipc(dataset, config.ipc)
        estimate.report(config, dataset, model)
        return
    buffer = Buffer(buffer_folder(config), model, config.max_files, config.max_experts)
    check_same_images(buffer.folder, dataset)
    check_window(config, buffer)
    path = run_folder(config)
    with kept_to_this_run(path, "give another --run_name"):
        folder = RunFolder(path, config)
        if folder.result is not None:
            if parallel.first():
                folder.forget_state()  # if the run was killed between the result and this
            print(wrapped(f"{shown(path)} is finished ({folder.result['summary']}); give another --run_name or --seed "
                          "to run it again"))
            return
        check_memory(config, dataset, model)
        _run(config, dataset, buffer, folder)


def _run(config: DistillConfig, dataset: Dataset, buffer: Buffer, folder: RunFolder) -> None:
    """Distils, from the beginning or from where a run was stopped, into a folder that is locked."""
    device, model = dataset.train_images.device, buffer.model
    saved = parallel.from_first(lambda: folder.unfinished if config.resume == "auto" else None)
    data = parallel.from_first(lambda: {"images": dataset.fingerprint, **buffer.verify()})
    if saved:
        if saved["data"] != data:
            different = [name for name in {**saved["data"], **data} if saved["data"].get(name) != data.get(name)]
            raise UserError(f"{shown(folder.path)} was begun with other data: {', '.join(sorted(different))} differ "
                            f"(experts in {buffer.folder}); put back what it had, or give --resume never to start over")
        begun = saved
    else:
        def begin() -> dict[str, Any]:
            start, notes = initial_set(config, dataset, buffer)
            return {"start": _as_dict(start.to("cpu")), "notes": notes}
        begun = parallel.from_first(begin)
    start, notes = _as_set(begun["start"], device), begun["notes"]
    folder.start(saved["metrics_bytes"] if saved else None, [*VERSIONS, *(f"{name}.unfinished" for name in VERSIONS)])
    engine = describe_engine(model.engine, estimate.batch_size(config, dataset))
    announce(config, device, engine,
             f"{config.dataset}, {config.model}, ipc {config.ipc} · {len(buffer)} experts of {buffer.epochs} epochs · "
             f"{config.matching} gradient, T {config.syn_steps}, M {config.expert_epochs}")
    for each in notes:
        say(config, f"note: {each}")

    state = Progression(config, dataset, Distillation(config, dataset, buffer, start), start, notes, engine, data)
    if saved:
        state.restore(saved)
        say(config, f"going on at iteration {state.iteration}, where the run was saved")
        if saved["engine"] != engine or saved["environment"] != _rounding(device):
            print(f"note: it was last on {saved['engine']} on {', '.join(saved['environment'].values())}; what "
                  "follows may be rounded otherwise", file=sys.stderr)
    tracker = Tracker(config.wandb if parallel.first() else "disabled", config.project, folder.path.name,
                      as_dict(config), folder.path, saved["tracker"] if saved else None, config.quiet)
    with interrupt.deferred():
        _iterate(state, folder, tracker)
    _conclude(state, folder, tracker)


def _conclude(state: "Progression", folder: RunFolder, tracker: Tracker) -> None:
    """Writes what a finished run leaves, and says where."""
    config, dataset, best = state.config, state.dataset, state.best
    distillation, start = state.distillation, state.start
    before, after = (distillation.fixed_loss(each) for each in (start, distillation.set))
    if not parallel.first():
        return
    chosen_on = "validation" if config.val_fraction else "test"
    for name, each in best.items():
        # Once more: a run that was killed just after it wrote them may have gone on to another best set.
        each.set.save(folder.path / name, "best", dataset)
        each.set.save_whole(folder.path / name / "distilled.safetensors", dataset, influential(config))
    version, overall = max(best.items(), key=lambda each: each[1].scores[0].mean)
    figures.save_images(folder.path / "images.png", dataset.to_pixels(start.images),
                        dataset.to_pixels(overall.set.images), dataset.classes)
    figures.save_curves(folder.path / "curves.png", folder.metrics(), config.threshold)
    record.save_pictures(folder.path / record.PICTURES, dataset, (start.images, start.labels),
                         (overall.set.images, overall.set.labels), version, config.pix_init == "noise",
                         made_by(distillation.buffer.folder))
    summary = "; ".join(f"{'' if name == 'Normal' else name + ' '}best on the {chosen_on} images "
                        f"{percent(each.scores[0].mean, each.scores[0].std)} % at iteration {each.iteration}"
                        for name, each in best.items())
    folder.finish(summary=summary, best=best["Normal"].as_dict(),
                  best_ema=best["EMA"].as_dict() if "EMA" in best else None, chosen_on=chosen_on,
                  skipped=distillation.skipped, held=distillation.held, seconds=state.seconds,
                  fixed_loss={"before": finite(before), "after": finite(after), "segments": FIXED_SEGMENTS},
                  environment=environment(start.images.device))
    write_text(folder.path / report.PAGE, report.page(record.read_run(folder.path)))
    tracker.finish()
    say(config, f"matching loss over {FIXED_SEGMENTS} fixed segments: {before:.4f} before, {after:.4f} after")
    say(config, f"{distillation.skipped} of {config.Iteration} updates skipped, α held back {distillation.held} times")
    if distillation.skipped == config.Iteration > 0:
        note(f"note: every update was skipped, so nothing was learned; the matching loss stays above --threshold "
             f"{config.threshold:g}: give a larger one, or start nearer (--pix_init, --lr_teacher, --syn_steps)")
    print(wrapped(summary))
    _say_where(config, folder.path, best, version)


def _say_where(config: DistillConfig, path: Path, versions: Iterable[str], best: str) -> None:
    """What lies in a finished run's folder, and what to type next."""
    print(f"in {shown(path)}{'' if config.quiet else ':'}")
    say(config, f"  {report.PAGE:<29} the run on one page, for a browser")
    for version in versions:
        say(config, f"  {version + '/distilled.safetensors':<29} the best set; beside it as images_best.pt, …")
    say(config, "  images.png, curves.png, metrics.jsonl, config.yaml, result.json")
    whole = path / best / "distilled.safetensors"
    options = commands.evaluation(influential(config), whole) | commands.device_given(config.device)
    commands.say_next(config, "next, to test the set on fresh networks, and to have its images as PNG files:",
                      commands.command("distill/evaluation.py", options),
                      commands.command("scripts/export.py", {"png": path / best / "png"}, argument=whole))


def _rounding(device: torch.device) -> dict[str, str]:
    """What, beside the engine, decides how results are rounded."""
    here = environment(device)
    return {name: here[name] for name in ("torch", "device")}


def _as_dict(distilled: DistilledSet) -> dict[str, Tensor]:
    return {"images": distilled.images, "labels": distilled.labels, "lr": distilled.lr}


def _as_set(tensors: dict[str, Tensor], device: torch.device) -> DistilledSet:
    return DistilledSet(**tensors).to(device)


class Evaluated(NamedTuple):
    """A set on the way, and how it scored; the first network of the pool decides which is the best, as published."""

    iteration: int
    set: DistilledSet
    scores: list[Score]

    def as_dict(self) -> dict[str, Any]:
        return {"iteration": self.iteration, "lr": float(self.set.lr),
                "scores": [score.as_dict() for score in self.scores]}


class Progression:
    """A distillation on its way: the iteration it is at, the best sets so far, and how long it took.

    Args:
        start: the set it began with.
        notes: what there was to say of that.
        engine: how derivatives are computed, in words.
        data: checksums of the images and the expert files.
    """

    def __init__(self, config: DistillConfig, dataset: Dataset, distillation: Distillation, start: DistilledSet,
                 notes: list[str], engine: str, data: dict[str, str]):
        self.config, self.dataset, self.distillation = config, dataset, distillation
        self.start, self.notes, self.engine, self.data = start, notes, engine, data
        self.iteration = 0
        self.evaluated = False  # whether this iteration's evaluation is done
        self.best: dict[str, Evaluated] = {}
        self._seconds_before, self._began = 0.0, perf_counter()

    @property
    def seconds(self) -> float:
        return self._seconds_before + perf_counter() - self._began

    def state(self) -> dict[str, Any]:
        """For `restore`, and to begin with; it shares its tensors, so it must be saved before the next step."""
        best = {name: {"iteration": each.iteration, "set": _as_dict(each.set),
                       "scores": [[score.network, score.accuracies] for score in each.scores]}
                for name, each in self.best.items()}
        return {"iteration": self.iteration, "evaluated": self.evaluated, "best": best, "seconds": self.seconds,
                "start": _as_dict(self.start), "notes": self.notes, "engine": self.engine,
                "data": self.data, "halved": self.distillation.buffer.model.halved,
                "environment": _rounding(self.start.images.device), "distillation": self.distillation.state()}

    def restore(self, state: dict[str, Any]) -> None:
        device = self.start.images.device
        self.iteration, self.evaluated, self._seconds_before = state["iteration"], state["evaluated"], state["seconds"]
        self.best = {name: Evaluated(each["iteration"], _as_set(each["set"], device),
                                     [Score(*score) for score in each["scores"]])
                     for name, each in state["best"].items()}
        for batch in state["halved"]:
            self.distillation.buffer.model.halve(batch)
        self.distillation.restore(state["distillation"])


class View(Progress):
    """What a distillation shows while it runs."""

    def __init__(self, progression: Progression, accuracy: float | None):
        """
        Args:
            accuracy: the last one, in [0, 1], where a run goes on.
        """
        config, dataset = progression.config, progression.dataset
        self._progression, self._accuracy = progression, accuracy
        self._evaluation: float | None = None  # seconds of the last one
        self._record: dict[str, Any] | None = None  # of the last iteration
        self._in_iterations = estimate.evaluation_in_iterations(config, dataset)
        super().__init__(config.Iteration, "distil", initial=progression.iteration, quiet=config.quiet,
                         images=config.syn_steps * estimate.batch_size(config, dataset), later=self._evaluations_left,
                         device=dataset.train_images.device)

    def evaluated(self, scores: list[Score], seconds: float) -> None:
        self._accuracy, self._evaluation = scores[0].mean, seconds
        self._show()

    def stepped(self, record: dict[str, Any]) -> None:
        self._record = record
        self._show()
        self.update()

    def _show(self) -> None:
        accuracy = [] if self._accuracy is None else [f"accuracy {100 * self._accuracy:.1f} %"]
        if self._record is None:
            return self.show(*accuracy)
        loss = math.nan if self._record["loss"] is None else self._record["loss"]
        self.show(f"loss {loss:.3f}", *accuracy, f"α {self._record['lr']:.3g}",
                  f"start epoch {self._record['start_epoch']}",
                  f"skipped {self._progression.distillation.skipped}")

    def _evaluations_left(self) -> float:
        """Seconds; before the first evaluation by the pace of the iterations."""
        progression = self._progression
        each = self._evaluation or self._in_iterations * (self.pace.seconds or 0.0)
        left = estimate.evaluations(progression.config, progression.iteration)
        if progression.evaluated and estimate.is_evaluated(progression.config, progression.iteration):
            left -= 1
        return max(0.0, left * each - self.pace.paused_for)


def _iterate(progression: Progression, folder: RunFolder, tracker: Tracker) -> None:
    """Runs all iterations that are left, evaluating and saving on the way.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    config, dataset, distillation = progression.config, progression.dataset, progression.distillation
    best = progression.best

    def write_state() -> None:
        folder.save_state(lambda: progression.state() | {"tracker": tracker.state()})

    def evaluate_all(iteration: int) -> None:
        distillation.merge()
        if parallel.size() > 1:  # a rank that waits for the others' networks cannot save when it is told to stop
            write_state()
        versions = distillation.versions()
        known = [parallel.from_first(partial(Known, folder.path / f"{name}.unfinished", digest(distilled)))
                 for name, distilled in versions.items()]
        def after_epoch() -> None:
            tick()
            interrupt.check()

        try:  # all of them before any is recorded, so that a signal finds the state as it was before
            with bar.aside("evaluating", sum(epochs_to_come(config, found) for found in known)) as tick:
                scores = [evaluate(config, dataset, distilled, "iteration", iteration, on_epoch=after_epoch,
                                   known=found) for distilled, found in zip(versions.values(), known)]
        except interrupt.Stopped as stopped:
            if stopped.waited:
                write_state()
            raise
        bar.evaluated(scores[0], max(found.seconds for found in known))
        for (name, distilled), found in zip(versions.items(), scores):
            now = Evaluated(iteration, distilled, found)
            if name not in best or now.scores[0].mean > best[name].scores[0].mean:
                best[name] = now
                save_set(name, distilled, "best", iteration)
            folder.log(iteration=iteration, set=name, scores=[score.as_dict() for score in found])
            bar.say(f"iteration {iteration}{'' if name == 'Normal' else ', ' + name}: {', '.join(map(str, found))}")
            if name == "Normal":
                tracker.log_scores(iteration, found)
                tracker.log_set(iteration, distilled.images, float(distilled.lr), dataset, config.ipc,
                                config.force_save)
        progression.evaluated = True
        write_state()
        for found in known:
            found.forget()

    def save_set(name: str, distilled: DistilledSet, *tags: str | int) -> None:
        for tag in tags if parallel.first() else ():
            distilled.save(folder.path / name, tag, dataset)

    with View(progression, _last_accuracy(folder) if parallel.first() else None) as bar:
        for iteration in range(progression.iteration, config.Iteration + 1):
            stop, due = parallel.any_of(interrupt.requested(), folder.save_due())
            if stop or due:
                distillation.merge()
                write_state()
            if stop:
                interrupt.stop()
            last = iteration == config.Iteration
            if estimate.is_evaluated(config, iteration) and not progression.evaluated:
                evaluate_all(iteration)
            if last or iteration % SAVE_INTERVAL == 0:  # saved whatever it scores
                distillation.merge()
                for name, distilled in distillation.versions().items():
                    save_set(name, distilled, iteration)
            if last:
                write_state()
                break  # nobody would see an update after the last evaluation
            record = distillation.step(iteration)
            folder.log(**record)
            progression.iteration, progression.evaluated = iteration + 1, False
            tracker.log_step(record)
            bar.stepped(record)


def _last_accuracy(folder: RunFolder) -> float | None:
    """What a run that goes on last reached, in [0, 1]."""
    found = [line["scores"][0]["mean"] for line in folder.metrics() if line.get("set") == VERSIONS[0]]
    return found[-1] if found else None
