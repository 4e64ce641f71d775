"""How a set changed during a run: a few of its images at some evaluations, as bytes and as an animation."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from distill.distilled_set import DistilledSet
from distill.report.pixels import clip_outliers, scaled_bytes
from utils.data.datasets import Dataset

MOST_FRAMES, MOST_IMAGES, MOST_SIDE = 20, 10, 64  # larger images are scaled down to MOST_SIDE
FRAME_BYTES = 1_000_000  # all frames together, in a run's state and on its page
WIDTH = 320  # least width of the animation, in pixels
SECONDS, LAST_SECONDS = 0.3, 2.0  # how long a frame, and the last one, is shown


@dataclass
class Frames:
    """A few of the set's images over the run; bounded in size."""

    iterations: list[int] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)  # at each iteration, [n, C, h, w] uint8
    which: list[int] = field(default_factory=list)  # positions of these images in the set

    def add(self, iteration: int, distilled: DistilledSet, dataset: Dataset) -> None:
        """Adds the set as it is now; of too many frames, drops the one that leaves the others most evenly spaced."""
        shape = _small(dataset.image_size)
        image_bytes = dataset.channels * shape[0] * shape[1]
        room = max(1, min(MOST_IMAGES, FRAME_BYTES // (MOST_FRAMES * image_bytes)))
        self.which = positions(dataset.num_classes, len(distilled.images) // dataset.num_classes, room)
        pixels = clip_outliers(dataset.space.to_pixels(distilled.images[self.which]))
        self.iterations.append(iteration)
        self.images.append(scaled_bytes(torch.nn.functional.interpolate(pixels, shape, mode="area")).cpu())
        if len(self.iterations) > MOST_FRAMES:
            gaps = [self.iterations[at + 1] - self.iterations[at - 1] for at in range(1, MOST_FRAMES)]
            goes = 1 + gaps.index(min(gaps))
            del self.iterations[goes], self.images[goes]


def positions(num_classes: int, ipc: int, room: int) -> list[int]:
    """Positions of at most `room` images to show: the first few of every class, or of evenly spaced classes if not
    every class fits."""
    classes = min(room, num_classes)
    per_class = min(ipc, room // classes)
    return [number * num_classes // classes * ipc + each for number in range(classes) for each in range(per_class)]


def _small(size: Sequence[int]) -> tuple[int, int]:
    scale = min(1.0, MOST_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def strip(frames: Tensor) -> list[Tensor]:
    """Each of the frames [F, n, C, h, w] as a column of its images, with transparent gaps: [C + 1, H, w] uint8."""
    solid = torch.full_like(frames[:, :, :1], 255)
    apart = torch.nn.functional.pad(torch.cat([frames, solid], dim=2), (0, 0, 0, 1))
    return list(apart.transpose(1, 2).flatten(2, 3)[:, :, :-1])


def animation(frames: Tensor) -> tuple[bytes, Tensor]:
    """A WebP of frames [F, n, C, h, w] uint8, and its last picture [3, H, W]: images side by side above a progress
    bar."""
    count, images, _, height, width = frames.shape
    columns = min(images, 5)
    times = max(1, -(-WIDTH // (columns * (width + 1))))
    pictures = []
    for number, frame in enumerate(frames):
        tiles = torch.zeros(-(-images // columns) * columns, 3, height + 1, width + 1, dtype=torch.uint8)
        tiles[:images, :, :height, :width] = frame
        rows = tiles.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()
        picture = rows.repeat(times, 0).repeat(times, 1)
        bar = np.full((6, picture.shape[1], 3), 128, dtype=np.uint8)
        bar[:, :max(1, round(picture.shape[1] * (number + 1) / count))] = (0, 114, 178)
        pictures.append(Image.fromarray(np.concatenate([picture, bar])))
    stay = [round(1000 * SECONDS)] * (count - 1) + [round(1000 * LAST_SECONDS)]
    file = io.BytesIO()
    pictures[0].save(file, "webp", lossless=True, method=0, loop=0, save_all=True, append_images=pictures[1:],
                     duration=stay)
    return file.getvalue(), torch.from_numpy(np.array(pictures[-1])).permute(2, 0, 1)
