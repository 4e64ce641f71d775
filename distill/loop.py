"""The distillation on one page: refuse · load · build · refuse · begin or go on · iterate · conclude."""

from dataclasses import replace
from typing import Any

import torch

from buffer.manifests import buffer_folder, check_same_images, in_words
from buffer.trajectories import Buffer
from distill import checks, estimate, plan, suggest
from distill.conclusion import conclude, say_finished, show_so_far
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.finished import run_folder
from distill.initialize import checksums, initial_set, labellers_of
from distill.report.names import PICTURES, SHOWN
from distill.result_files import EVALUATION, METRICS, RESULT, VERSIONS
from distill.run_state import DistillView, RunState
from distill.set_files import WHOLE
from utils.config import AUTO, DistillConfig
from utils.data.datasets import Dataset
from utils.derivatives.engine import describe_engine
from utils.parameters import FlatModel
from utils.program import interrupt, ranks, threads
from utils.program.console import announce, note, say
from utils.program.prepare import begin, flat_model, network_for
from utils.program.run_folder import RunFolder, kept_to_this_run

# What a run puts into its folder beside its log and its result, and what of that shows it.
MADE = [*VERSIONS, *(f"{name}.unfinished" for name in VERSIONS)]
SHOWS = [*SHOWN, PICTURES, *(f"{name}/{WHOLE}" for name in VERSIONS)]


def distill(config: DistillConfig) -> None:
    """A config in, a run folder out: all of `distill/DATM.py` but for `option_checks`.

    Raises:
        UserError: whatever in the config, the data or the experts does not fit together.
    """
    # Load the data and open the experts; refuse a difficulty window that does not fit them.
    dataset, buffer = opened(config)
    checks.check_window(config, buffer)

    # Know the run by its options and by the checksums of all that it reads.
    labellers = labellers_of(config, dataset, buffer)
    data = ranks.from_first_rank(lambda: checksums(config, dataset, buffer, labellers))

    # A dry run ends here, with what a run would take and which settings fit the experts.
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
        print("\nnothing was distilled; leave --dry_run out to begin, and add what is proposed if you want it")
        return

    # Take the run's folder.
    with kept_to_this_run(path, "give another --run_name"):
        folder = RunFolder(path, config, METRICS, RESULT)

        # A run that is done is not run again; what shows it is made, if it was stopped before that.
        if folder.is_done:
            say_finished(config, dataset, buffer, folder)
            return

        # Refuse what cannot fit the memory.
        checks.check_memory(config, dataset, buffer.model)

        # Distil, from the beginning or from where the run was saved.
        run = begin_or_go_on(config, dataset, buffer, labellers, data, folder)
        with interrupt.deferred():
            iterate(run)
        conclude(run)


def opened(config: DistillConfig) -> tuple[Dataset, Buffer]:
    """The data and the experts of a distillation, with the student that it matches.

    Raises:
        UserError: whatever in the options, the data or the experts does not fit together, but for the window.
    """
    # Refuse a saved set to start from that is of other data; load the data.
    checks.check_start(config)
    _, dataset = begin(config)

    # Build the student.
    checks.check_networks(config, dataset)
    student = student_of(config, dataset)

    # Open the experts; refuse those of other data.
    buffer = Buffer(buffer_folder(config), student, config.max_files, config.max_experts)
    check_same_images(buffer.folder, dataset)
    return dataset, buffer


def student_of(config: DistillConfig, dataset: Dataset) -> FlatModel:
    """The network that is matched, with the engine that the config asks for."""
    network = network_for(config.model, dataset).to(dataset.device)
    if config.matching == "unroll":  # which is autograd's own affair
        return FlatModel(network, "plain")
    # A rank's share of a batch changes in every step, and compiled code is for one size.
    if ranks.size() > 1 and config.backend == "auto":
        config = replace(config, backend="eager")
    return flat_model(config, network, plan.work_of(config, dataset), config.micro_batch)


def settle_threads(config: DistillConfig, dataset: Dataset, buffer: Buffer, saved: dict[str, Any] | None) -> None:
    """As many threads as help, or as a saved run had; the student's engine is chosen again, which depends on it."""
    before = torch.get_num_threads()
    known = saved and saved.get("threads", before)  # a run of an earlier version had all
    threads.settle(config, buffer.model.network, plan.batch_size(config, dataset), plan.work_of(config, dataset), known)
    if torch.get_num_threads() != before:
        buffer.model = student_of(config, dataset)


def begin_or_go_on(config: DistillConfig, dataset: Dataset, buffer: Buffer, labellers: Buffer, data: dict[str, str],
                   folder: RunFolder) -> RunState:
    """The distillation in its folder, at its first iteration or at the one at which it was saved.

    Args:
        data: checksums of all that it reads.

    Raises:
        UserError: what was saved is damaged, or was made of other data.
    """
    # What was saved, if it was made of the same data; None at the beginning.
    saved = ranks.from_first_rank(lambda: folder.saved_state if config.resume == "auto" else None)
    checks.check_same_run(config, saved, data, folder)
    settle_threads(config, dataset, buffer, saved)

    # The set to start from: real images, and what experts say of them; or a saved set.
    if saved:
        start, notes = DistilledSet(**saved["start"]), saved["notes"]
    else:
        start, notes = ranks.from_first_rank(lambda: initial_set(config, dataset, labellers))
    start = start.to(dataset.device)
    if config.lr_teacher == AUTO and not saved:
        start, said = suggest.with_fitting_rate(config, dataset, buffer, start)
        notes = [*notes, *said]

    # The folder, and the first lines.
    folder.start(saved, MADE, SHOWS, [EVALUATION])
    engine = describe_engine(buffer.model.engine, plan.batch_size(config, dataset))
    announce(config, start.images.device, engine + plan.kept_in_words(config, dataset, buffer.model),
             f"{config.dataset}, {config.model}, {plan.set_in_words(config, dataset)} · "
             f"{in_words(len(buffer), buffer.epochs)} · {plan.gradient_in_words(config)}, M {config.expert_epochs}")
    for each in notes:
        note(f"note: {each}")

    # The state, as it begins or as it was saved.
    distillation = Distillation(config, dataset, buffer, start)
    run = RunState(config, dataset, distillation, start, notes, engine, data, folder)
    if saved:
        run.restore(saved)
    run.track(saved)
    return run


def iterate(run: RunState) -> None:
    """Runs all iterations that are left.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    config, distillation = run.config, run.distillation
    with DistillView(run) as view:
        for iteration in range(run.iteration, config.Iteration + 1):
            # Save when it is time to, and stop where a signal asks for it.
            stop, due = ranks.any_of(interrupt.requested(), run.folder.save_due())
            if stop or due:
                distillation.merge()
                run.save()
            if stop:
                interrupt.stop()

            # Evaluate the set, unless that was done before the run was stopped here; keep the best.
            if plan.is_evaluated(config, iteration) and not run.evaluated:
                scores = run.evaluate(view)
                run.keep_best(scores, view)
                show_so_far(run, view)

            # Publish the set, whatever it scores.
            if plan.is_published(config, iteration):
                run.publish()

            # Nobody would see an update after the last evaluation.
            if iteration == config.Iteration:
                run.save()
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
