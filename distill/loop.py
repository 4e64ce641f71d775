"""The distillation on one page: check · load · build · check · start or resume · iterate · conclude."""

from buffer.manifests import experts_in_words
from distill import checks, estimate, plan, suggest
from distill.conclusion import conclude, say_finished, show_so_far
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.initialize import initial_set
from distill.load import Inputs, read_inputs, saved_state, settle_threads
from distill.result_files import tested_in_words
from distill.run_folder import RunFolder, run_folder
from distill.run_state import DistillView, RunState
from utils.config import AUTO, DistillConfig
from utils.derivatives.engine import describe_engine
from utils.errors import note
from utils.program import interrupt, ranks
from utils.program.device import announce
from utils.program.locks import kept_to_this_run


def distill(config: DistillConfig) -> None:
    """A config in, a run folder out: all of `distill/DATM.py` except `option_checks`.

    Raises:
        UserError: config, data and experts do not fit together.
    """
    # Load the data and open the experts; refuse what does not fit together.
    inputs = read_inputs(config)

    # Identify the run by its options and the checksums of everything it reads.
    path = run_folder(config, inputs.checksums)

    # A dry run ends here, with an estimate of time and memory and the settings that fit the experts.
    if config.dry_run:
        estimate.dry_run(config, inputs, path)
        return

    # Lock the run's folder.
    with kept_to_this_run(path, "give another --run_name"):
        folder = RunFolder(path, config)

        # A finished run is not repeated; if its pictures or page are missing, they are made.
        if folder.is_done:
            ranks.from_first_rank(lambda: say_finished(config, inputs, folder))
            return

        # Refuse what cannot fit in memory.
        checks.check_memory(config, inputs.dataset, inputs.buffer.model)

        # Distil, from the start or from the checkpoint.
        run = start_or_resume(config, inputs, folder)
        with interrupt.deferred():
            iterate(run)
        conclude(run)


def start_or_resume(config: DistillConfig, inputs: Inputs, folder: RunFolder) -> RunState:
    """The distillation in its folder, at its first iteration or where it was saved.

    Raises:
        UserError: the checkpoint is damaged, or was made with other data.
    """
    dataset, buffer = inputs.dataset, inputs.buffer
    saved = saved_state(config, inputs.checksums, folder)
    if saved is None and ranks.first():
        checks.note_others(config, folder)
    settle_threads(config, dataset, buffer, saved)

    # The initial set: as in the checkpoint, or made now.
    if saved:
        start, notes = DistilledSet(**saved["start"]).to(dataset.device), []
        if "derivatives" in saved:  # else of an earlier version
            buffer.model.restore(saved["derivatives"])
    else:
        start, notes = ranks.from_first_rank(lambda: initial_set(config, dataset, inputs.labellers))
        start = start.to(dataset.device)
        notes += checks.few_images(config, dataset)
        if config.lr_teacher == AUTO:
            start, said = suggest.with_fitting_rate(config, dataset, buffer, start)
            notes += said

    # Prepare the folder, and print the header.
    folder.start(saved)
    engine = describe_engine(buffer.model.engine, plan.share_of_batch(config, dataset))
    announce(config, start.images.device, engine + plan.kept_in_words(config, dataset, buffer.model),
             f"{config.dataset}, {config.model}, {plan.set_in_words(config, dataset)} · "
             f"{experts_in_words(len(buffer), buffer.epochs)} · {plan.gradient_in_words(config)}, "
             f"M {config.expert_epochs} · tested on {tested_in_words(config.val_fraction, len(dataset.test_labels))}")
    for each in notes:
        note(each)

    # The state, new or as it was saved.
    distillation = Distillation(config, dataset, buffer, start)
    return RunState(config, inputs, distillation, start, folder, saved)


def iterate(run: RunState) -> None:
    """Runs the remaining iterations.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    config, distillation = run.config, run.distillation
    with DistillView(run) as view:
        for iteration in range(run.iteration, config.Iteration + 1):
            # Save if it is due, and stop if a signal asked for it.
            stop = ranks.any_of(interrupt.requested())
            if stop or run.folder.save_due():
                run.save()
            if stop:
                ranks.barrier()  # a rank that ends may take the one that saves along
                interrupt.stop()

            # Evaluate the set, unless that was done before the run was resumed here; keep the best.
            if plan.is_evaluated(config, iteration) and not run.evaluated:
                run.evaluate(view)
                show_so_far(run, view)

            # Write the set, whatever it scores.
            if plan.is_written(config, iteration):
                run.write_current()

            # An update after the last evaluation would be of no use.
            if iteration == config.Iteration:
                break

            # One iteration: draw a segment of an expert's trajectory, match it, and update images, labels and α.
            segment = distillation.draw(iteration)
            match = distillation.match(segment)
            record = distillation.learn(iteration, segment, match)

            run.record(record)
            view.stepped(record)
