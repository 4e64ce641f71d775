"""Makes the three data sets: crops of the sample photographs of scikit-image and scikit-learn.

    pip install scikit-image scikit-learn; python results/own_images/make.py FOLDER

A photograph is cut into tiles, a third of which are for tests; a crop lies in tiles of one kind only, so that no
training crop shares a pixel with a test crop.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SKIMAGE, SKLEARN = (Path(find_spec(package).origin).parent for package in ("skimage", "sklearn"))
PHOTOGRAPHS = {name: SKIMAGE / "data" / file for name, file in {
    "coffee": "coffee.png", "cat": "chelsea.png", "astronaut": "astronaut.png", "motorcycle": "motorcycle_left.png",
    "rocket": "rocket.jpg"}.items()} | {
    name: SKLEARN / "datasets" / "images" / file for name, file in {
        "temple": "china.jpg", "flower": "flower.jpg"}.items()}
# side of an image, training and test images per class, classes, side of a crop in a photograph of 640 pixels
SETS = {"photos5": (32, 300, 100, ["temple", "coffee", "astronaut", "motorcycle", "cat"], 64),
        "photos3": (64, 100, 60, ["temple", "motorcycle", "astronaut"], 80),
        "photos4": (32, 30, 60, ["rocket", "flower", "coffee", "astronaut"], 64)}

random = np.random.default_rng(0)
for name, (side, train, test, classes, crop) in SETS.items():
    for each in classes:
        photograph = Image.open(PHOTOGRAPHS[each]).convert("RGB")
        scale = 640 / max(photograph.size)
        photograph = photograph.resize((int(photograph.width * scale), int(photograph.height * scale)))
        width, height = photograph.size
        for_tests = random.random((height // crop + 1, width // crop + 1)) < 1 / 3
        left = {"train": train, "test": test}
        for _ in range(200_000):
            x, y = int(random.integers(0, width - crop)), int(random.integers(0, height - crop))
            kinds = {bool(for_tests[b // crop, a // crop]) for a in (x, x + crop - 1) for b in (y, y + crop - 1)}
            split = "test" if kinds == {True} else "train"
            if len(kinds) > 1 or not left[split]:
                continue
            left[split] -= 1
            folder = Path(sys.argv[1]) / name / split / each
            folder.mkdir(parents=True, exist_ok=True)
            number = {"train": train, "test": test}[split] - left[split] - 1
            photograph.crop((x, y, x + crop, y + crop)).resize((side, side)).save(folder / f"{number:03d}.png")
