"""The files that show a run, by name; known without torch."""

from pathlib import Path

PAGE, ANIMATION = "report.html", "evolution.webp"
PICTURES = "report.safetensors"  # what the others are made of
SHOWN = ("images.png", "curves.png", ANIMATION, PAGE)


def missing(folder: Path) -> list[str]:
    """What shows a finished run and is not in its folder: PICTURES, of which the others are made, and those of
    SHOWN."""
    return [name for name in (PICTURES, *SHOWN) if not (folder / name).exists()]
