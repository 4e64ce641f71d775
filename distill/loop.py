"""The distillation on one page: refuse · load · build · begin or go on · iterate · conclude."""

import sys
from dataclasses import replace

from buffer.trajectories import Buffer, buffer_folder, check_same_images
from distill import checks, estimate, plan
from distill.conclusion import conclude, say_finished
from distill.distillation import Distillation
from distill.distilled_set import DistilledSet
from distill.evaluate.networks import check_pool
from distill.initialize import initial_set
from distill.progression import Progression, View, rounding
from distill.report.tracking import Tracker
from distill.results import METRICS, RESULT, VERSIONS
from utils.config import DistillConfig, as_dict
from utils.data.datasets import Dataset
from utils.derivatives.engine import describe_engine
from utils.parameters import FlatModel
from utils.program import interrupt, ranks
from utils.program.console import announce, say
from utils.program.prepare import begin, flat_model, network_for
from utils.program.run_folder import RunFolder, kept_to_this_run


def distill(config: DistillConfig) -> None:
    """The whole of `distill/DATM.py`: a config in, a run folder out.

    Raises:
        UserError: whatever in the config, the data or the experts does not fit together.
    """
    # Refuse what the options alone show.
    checks.check_options(config)

    # Load the data.
    device, dataset = begin(config)

    # Build the student.
    check_pool(config, dataset)
    network = network_for(config.model, dataset).to(device)
    checks.check_ranks(config, network)
    student = (FlatModel(network, "plain") if config.matching == "unroll" else
               flat_model(config if ranks.size() == 1 else replace(config, backend="eager"), network,
                          plan.work_of(config, dataset), config.micro_batch))
    if config.dry_run:
        checks.check_images(config, dataset)
        estimate.report(config, dataset, student)
        return

    # Open the experts.
    buffer = Buffer(buffer_folder(config), student, config.max_files, config.max_experts)
    check_same_images(buffer.folder, dataset)
    checks.check_window(config, buffer)

    # Take the run's folder; a finished run is not run again.
    path = plan.run_folder(config)
    with kept_to_this_run(path, "give another --run_name"):
        folder = RunFolder(path, config, METRICS, RESULT)
        if folder.finished:
            say_finished(folder)
            return
        checks.check_memory(config, dataset, student)

        # Distil, from the beginning or from where the run was saved.
        progression = begin_or_go_on(config, dataset, buffer, folder)
        with interrupt.deferred():
            iterate(progression)
        conclude(progression)


def begin_or_go_on(config: DistillConfig, dataset: Dataset, buffer: Buffer, folder: RunFolder) -> Progression:
    """The distillation in its folder, at its first iteration or at the one at which it was saved.

    Raises:
        UserError: what was saved is damaged, or was made of other images or experts.
    """
    device = dataset.train_images.device

    # What was saved, if it was made of these images and experts.
    saved = ranks.from_first_rank(lambda: folder.unfinished if config.resume == "auto" else None)
    data = ranks.from_first_rank(lambda: {"images": dataset.fingerprint, **buffer.verify()})
    if saved:
        checks.check_same_run(saved["data"], data, folder.path, buffer.folder)

    # The set to start from: real images, and what experts say of them.
    if saved:
        start, notes = DistilledSet(**saved["start"]), saved["notes"]
    else:
        start, notes = ranks.from_first_rank(lambda: initial_set(config, dataset, buffer))
    start = start.to(device)

    # The folder, and the first lines.
    folder.start(saved["log_bytes"] if saved else None, [*VERSIONS, *(f"{name}.unfinished" for name in VERSIONS)])
    engine = describe_engine(buffer.model.engine, plan.batch_size(config, dataset))
    announce(config, device, engine,
             f"{config.dataset}, {config.model}, ipc {config.ipc} · {len(buffer)} experts of {buffer.epochs} epochs · "
             f"{config.matching} gradient, T {config.syn_steps}, M {config.expert_epochs}")
    for note in notes:
        say(config, f"note: {note}")

    # The state, as it begins or as it was.
    tracker = Tracker(config.wandb if ranks.first() else "disabled", config.project, folder.path.name,
                      as_dict(config), folder.path, saved["tracker"] if saved else None, config.quiet)
    progression = Progression(config, dataset, Distillation(config, dataset, buffer, start), start, notes, engine, data,
                              folder, tracker)
    if saved:
        progression.restore(saved)
        say(config, f"going on at iteration {progression.iteration}, where the run was saved")
        if saved["engine"] != engine or saved["environment"] != rounding(device):
            print(f"note: it was last on {saved['engine']} on {', '.join(saved['environment'].values())}; what "
                  "follows may be rounded otherwise", file=sys.stderr)
    return progression


def iterate(progression: Progression) -> None:
    """Runs all iterations that are left.

    Raises:
        Stopped: a signal came; the state is saved.
    """
    config, distillation, folder = progression.config, progression.distillation, progression.folder
    with View(progression) as view:
        for iteration in range(progression.iteration, config.Iteration + 1):
            # Save when it is time to, and stop where a signal asks for it.
            stop, due = ranks.any_of(interrupt.requested(), folder.save_due())
            if stop or due:
                distillation.merge()
                progression.save()
            if stop:
                interrupt.stop()

            # Evaluate the set; keep the best.
            if plan.is_evaluated(config, iteration) and not progression.evaluated:
                progression.evaluate(view)

            # Publish the set, whatever it scores.
            if plan.is_published(config, iteration):
                progression.publish()

            # Nobody would see an update after the last evaluation.
            if iteration == config.Iteration:
                progression.save()
                break

            # One iteration: draw a segment of an expert's trajectory, match it, and update images, labels and α.
            segment = distillation.draw(iteration)
            match = distillation.match(segment)
            record = distillation.learn(iteration, segment, match)

            # Record it.
            progression.advance(record)
            view.stepped(record)
