"""Makes a run's pictures and page from the files in its folder, so they can be made again at any time."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from distill.report.frames import animation
from distill.report.matplotlib_figures import save_curves, save_images
from distill.report.names import ANIMATION, CURVES, IMAGES_PNG, PAGE, SHOWN
from distill.report.page import page
from distill.report.read_run import SavedRun
from distill.result_files import images_tested
from utils.errors import note, reason
from utils.files import atomic_write, write_text
from utils.program.console import shown


def _make(run: SavedRun, name: str, path: Path) -> None:
    """Makes one of SHOWN, unless what it shows was never saved."""
    pictures = run.pictures
    if name == IMAGES_PNG and pictures is not None:
        save_images(path, pictures)
    elif name == CURVES:
        save_curves(path, run.metrics, run.config.get("threshold"), images_tested(run.result.chosen_on))
    elif name == ANIMATION and pictures is not None and pictures.frames is not None:
        with atomic_write(path) as aside:
            aside.write_bytes(animation(pictures.frames)[0])
    elif name == PAGE:
        write_text(path, page(run))


def show(run: SavedRun, names: Sequence[str] = SHOWN) -> None:
    """Makes these files of SHOWN in a run's folder; a failure is noted, and the others are still made."""
    for name in (name for name in SHOWN if name in names):
        with noting_failure(run.path, name):
            _make(run, name, run.path / name)


@contextlib.contextmanager
def noting_failure(folder: Path, name: str) -> Iterator[None]:
    """Turns any error inside into a note, as a picture must not stop a run."""
    try:
        yield
    except Exception as error:  # drawing libraries raise errors of all kinds
        note(f"{shown(folder / name)} could not be made ({type(error).__name__}: {reason(error)}); the same command "
             "makes it again")
