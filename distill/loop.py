"""The distillation on one page: check · load · build · check · start or resume · iterate · conclude."""

from dataclasses import replace
from typing import Any

import torch

from buffer.manifests import buffer_folder, check_same_images, expert_files, in_words, manifest_path
from buffer.trajectories import Buffer
from distill import checks, estimate, plan, suggest
from distill.conclusion import conclude, say_finished, show_so_far
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.initialize import checksums, initial_set, labellers_of
from distill.report.names import PICTURES, SHOWN
from distill.result_files import EVALUATION, METRICS, RESULT, VERSIONS, run_folder
from distill.run_state import DistillView, RunState
from distill.set_files import WHOLE
from utils.config import AUTO, DistillConfig
from utils.data.datasets import Dataset
from utils.derivatives.engine import describe_engine
from utils.parameters import FlatModel
from utils.program import interrupt, ranks, threads
from utils.program.console import announce, note, say, shown
from utils.program.locks import locked
from utils.program.prepare import begin, flat_model, network_for
from utils.program.run_folder import RunFolder

# A run's outputs besides its log and result: its sets and unfinished evaluations; pictures, page and final sets.
MADE = [*VERSIONS, *(f"{name}.unfinished*" for name in VERSIONS)]
SHOWS = [*SHOWN, PICTURES, *(f"{name}/{WHOLE}" for name in VERSIONS)]


def distill(config: DistillConfig) -> None:
    """A config in, a run folder out: all of `distill/DATM.py` except `option_checks`.

    Raises:
        UserError: config, data and experts do not fit together.
    """
    # Load the data and open the experts; refuse a difficulty window that does not fit them.
    dataset, buffer = opened(config)
    checks.check_window(config, buffer)

    # Identify the run by its options and the checksums of everything it reads.
    labellers = labellers_of(config, dataset, buffer)
    data = ranks.from_first_rank(lambda: checksums(config, dataset, buffer, labellers))

    # A dry run ends here, with an estimate of time and memory and the settings that fit the experts.
    path = run_folder(config, data)
    if config.dry_run:
        folder, saved = RunFolder(path, config, METRICS, RESULT), None
        if not folder.is_done:
            saved = folder.saved_state if config.resume == "auto" else None
            checks.check_same_run(config, saved, data, folder)
            folder.check(saved, [*MADE, *SHOWS])
        settle_threads(config, dataset, buffer, saved)
        checks.check_memory(config, dataset, buffer.model)
        estimate.report(config, dataset, buffer.model)
        say(config, "which settings fit the experts (Ctrl-C, if the estimate is enough):")
        print(suggest.suggestion(config, dataset, buffer, labellers))
        print("\nnothing was distilled; " + (f"{shown(path)} is finished already" if folder.is_done else
              "leave --dry_run out to begin, and add what is proposed if you want it"))
        return

    # Lock the run's folder.
    with locked(path, "give another --run_name"):
        folder = RunFolder(path, config, METRICS, RESULT)

        # A finished run is not repeated; if its pictures or page are missing, they are made.
        if folder.is_done:
            say_finished(config, dataset, buffer, folder, data)
            return

        # Refuse what cannot fit in memory.
        checks.check_memory(config, dataset, buffer.model)

        # Distil, from the start or from the checkpoint.
        run = begin_or_go_on(config, dataset, buffer, labellers, data, folder)
        with interrupt.deferred():
            iterate(run)
        conclude(run)


def opened(config: DistillConfig) -> tuple[Dataset, Buffer]:
    """The data and the experts of a distillation, with the student that it trains.

    Raises:
        UserError: options, data and experts do not fit together; the difficulty window is not checked.
    """
    # Refuse a --pix_init set of other data; load the data.
    checks.check_start(config)
    dataset = begin(config)

    # Build the student.
    checks.check_networks(config, dataset)
    student = student_of(config, dataset)

    # Open the experts; refuse those trained on other data.
    buffer = Buffer(buffer_folder(config), student, config.max_files, config.max_experts)
    check_same_images(buffer.folder, dataset)
    if config.val_fraction and ranks.first() and not all(
            manifest_path(path).exists() for path in expert_files(buffer.folder)):
        note(f"note: experts in {shown(buffer.folder)} have no manifest, as published ones, which were trained on the "
             "held-out images too")
    return dataset, buffer


def student_of(config: DistillConfig, dataset: Dataset) -> FlatModel:
    """The network that is matched, with the engine that the config asks for."""
    network = network_for(config.model, dataset).to(dataset.device)
    if config.matching == "unroll":  # plain autograd through whole batches
        model = FlatModel(network, "plain")
        model.engine.micro_batch = None
        return model
    # A rank's share of a batch changes size in every step, but compiled code is for fixed sizes.
    if ranks.size() > 1 and config.backend == "auto":
        config = replace(config, backend="eager")
    return flat_model(config, network, plan.work_of(config, dataset), config.micro_batch)


def settle_threads(config: DistillConfig, dataset: Dataset, buffer: Buffer, saved: dict[str, Any] | None) -> None:
    """Uses as many threads as help, or as the resumed run had. If that changes their number, builds the student again,
    since its engine depends on it."""
    before = torch.get_num_threads()
    threads.settle(config, buffer.model.network, plan.batch_size(config, dataset), plan.work_of(config, dataset),
                   saved and saved["threads"])
    if torch.get_num_threads() != before:
        buffer.model = student_of(config, dataset)


def begin_or_go_on(config: DistillConfig, dataset: Dataset, buffer: Buffer, labellers: Buffer, data: dict[str, str],
                   folder: RunFolder) -> RunState:
    """The distillation in its folder, at its first iteration or where it was saved.

    Args:
        data: checksums of everything the run reads.

    Raises:
        UserError: the checkpoint is damaged, or was made with other data.
    """
    # The checkpoint, which must be of the same data; None for a new run.
    saved = ranks.from_first_rank(lambda: folder.saved_state if config.resume == "auto" else None)
    checks.check_same_run(config, saved, data, folder)
    if saved is None and ranks.first():
        checks.note_others(config, folder)
    settle_threads(config, dataset, buffer, saved)

    # The initial set: as in the checkpoint, or made now.
    if saved:
        start, notes = DistilledSet(**saved["start"]), saved["notes"]
    else:
        start, notes = ranks.from_first_rank(lambda: initial_set(config, dataset, labellers))
    start = start.to(dataset.device)
    if config.lr_teacher == AUTO and not saved:
        start, said = suggest.with_fitting_rate(config, dataset, buffer, start)
        notes = [*notes, *said]

    # Prepare the folder, and print the header.
    folder.start(saved, MADE, SHOWS, [EVALUATION])
    engine = describe_engine(buffer.model.engine, plan.batch_size(config, dataset))
    announce(config, start.images.device, engine + plan.kept_in_words(config, dataset, buffer.model),
             f"{config.dataset}, {config.model}, {plan.set_in_words(config, dataset)} · "
             f"{in_words(len(buffer), buffer.epochs)} · {plan.gradient_in_words(config)}, M {config.expert_epochs}")
    for each in notes:
        note(f"note: {each}")

    # The state, new or as it was saved.
    distillation = Distillation(config, dataset, buffer, start)
    run = RunState(config, dataset, distillation, start, notes, engine, data, folder)
    if saved:
        run.restore(saved)
    run.track(saved)
    return run


def iterate(run: RunState) -> None:
    """Runs the remaining iterations.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    config, distillation = run.config, run.distillation
    with DistillView(run) as view:
        for iteration in range(run.iteration, config.Iteration + 1):
            # Save if it is due, and stop if a signal asked for it.
            stop, due = ranks.any_of(interrupt.requested(), run.folder.save_due())
            if stop or due:
                distillation.merge()
                run.save()
            if stop:
                interrupt.stop()

            # Evaluate the set, unless that was done before the run was resumed here; keep the best.
            if plan.is_evaluated(config, iteration) and not run.evaluated:
                scores = run.evaluate(view)
                run.keep_best(scores, view)
                show_so_far(run, view)

            # Write the set, whatever it scores.
            if plan.is_published(config, iteration):
                run.publish()

            # An update after the last evaluation would be of no use.
            if iteration == config.Iteration:
                break

            # One iteration: draw a segment of an expert's trajectory, match it, and update images, labels and α.
            segment = distillation.draw(iteration)
            match = distillation.match(segment)
            record = distillation.learn(iteration, segment, match)

            # Record it.
            run.log(record)
            run.tracker.log_step(record)
            run.note_skipped(record)
            run.advance()
            view.stepped(record)
