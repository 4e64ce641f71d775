"""The names of the files that show a run; importable without torch."""

from pathlib import Path

PAGE, IMAGES_PNG, ANIMATION, CURVES = "report.html", "images.png", "evolution.webp", "curves.png"
PICTURES = "report.safetensors"  # the data that the others are made from
SHOWN = (IMAGES_PNG, CURVES, ANIMATION, PAGE)


def missing(folder: Path) -> list[str]:
    """Which of PICTURES and SHOWN are missing from a finished run's folder."""
    return [name for name in (PICTURES, *SHOWN) if not (folder / name).exists()]
