"""Makes a run's pictures and page from the files in its folder, so they can be made again at any time."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distill.report.frames import save_animation
from distill.report.matplotlib_figures import save_curves, save_images
from distill.report.names import ANIMATION, PAGE, SHOWN
from distill.report.page import page
from distill.report.read_run import SavedRun
from utils.errors import reason
from utils.files import write_text
from utils.program.console import note, shown


def _images(run: SavedRun, path: Path) -> None:
    if run.pictures is not None:
        save_images(path, run.pictures)


def _curves(run: SavedRun, path: Path) -> None:
    save_curves(path, run.metrics, run.config.get("threshold"))


def _animation(run: SavedRun, path: Path) -> None:
    if run.pictures is not None and run.pictures.frames is not None:
        save_animation(path, run.pictures.frames)


_MAKERS: dict[str, Callable[[SavedRun, Path], None]] = {
    "images.png": _images, "curves.png": _curves, ANIMATION: _animation,
    PAGE: lambda run, path: write_text(path, page(run))}
assert tuple(_MAKERS) == SHOWN


def show(run: SavedRun, names: Sequence[str] = SHOWN) -> None:
    """Makes these files of SHOWN in a run's folder; a failure is noted, and the others are still made."""
    for name in (name for name in SHOWN if name in names):
        with noting_failure(run.path, name):
            _MAKERS[name](run, run.path / name)


@contextlib.contextmanager
def noting_failure(folder: Path, name: str) -> Iterator[None]:
    """Turns any error inside into a note, as a picture must not stop a run."""
    try:
        yield
    except Exception as error:  # drawing libraries raise errors of all kinds
        note(f"note: {shown(folder / name)} could not be made ({type(error).__name__}: {reason(error)}); the same "
             "command makes it again")
