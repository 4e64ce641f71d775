"""The one way to read an image file: of any depth, transparency, orientation and shape → bytes of one size."""

import contextlib
import errno
import functools
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.errors import UserError
from utils.memory import available

# What Pillow decodes itself. Not EPS, for which it starts Ghostscript, nor what needs another program in other ways.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "SGI", "SUN",
           "QOI", "ICO", "XBM", "XPM")
GREY = ("1", "L", "LA", "La", "I", "F")  # Pillow's modes of one channel; those that begin with I;16 are too
LARGE = 2**26  # pixels from which a picture is held against the memory, and none is read beside it
ORDINARY = 2**24  # pixels to which a picture may be resized whole, or 16 times those that are kept of it

BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), start=2))

# What a user may not expect of an image.
TRANSPARENT = "transparent, laid over white"
TURNED = "turned as the EXIF says"
DEEP = "of 16 bits or floats, made 8 bits"
DARK = "of 16 bits that use less than 12 of them, and so nearly black"
FIRST = "the first picture of a file with several"

_one_large = threading.Lock()


class Picture(NamedTuple):
    """An image file as read."""

    pixels: Tensor  # [C, H, W] uint8
    remarks: tuple[str, ...] = ()  # some of the above


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """Of the files that `read_image` reads, as Pillow knows them: .jpg, .jfif, .png, …"""
    # MPO, several JPEGs in one file, is opened as the first of them.
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*formats(), "MPO"))


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Without Pillow's warnings, and without its limit of pixels: `read_image` looks at the memory instead."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def is_grey(path: Path) -> bool:
    """Whether an image file has one channel, as its header says.

    Raises:
        UserError, OSError: see `read_image`.
    """
    with _opened(path) as image:
        return image.mode in GREY or image.mode.startswith("I;16")


def read_image(path: Path, size: tuple[int, int], channels: int = 3, resize: bool = True) -> Picture:
    """An image file → [channels, *size] uint8, the smallest that covers `size` (H, W), and of that the centre; for
    squares, what torchvision's Resize and CenterCrop make of it.

    Raises:
        UserError: not an image; values without a meaning as one; too large for the memory; of another size where
            `resize` is off.
        OSError: the system does not let it be read.
    """
    with _opened(path) as opened, _memory_for(opened, path):
        image, remarks = _as_seen(opened, path)
        mode = "L" if channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if image.size != size[::-1]:
            if not resize:
                raise UserError(f"{path} has {image.width}×{image.height} pixels, expected {size[1]}×{size[0]}; fetch "
                                "the original images, or use dataset ImageFolder, which resizes")
            image = _resized(image, *size)
        return Picture(torch.from_numpy(np.array(image)).view(*size, channels).permute(2, 0, 1), tuple(remarks))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=formats()) as image:
            yield image
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path} does not fit the memory; make it smaller") from error
    except Exception as error:  # decoders meet damage with exceptions of every kind
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # the system's, not the file's: a permission, the disk
        raise UserError(f"{path} is not a readable image ({error}); fetch it again, save it as PNG, or "
                        "delete it") from error


@contextlib.contextmanager
def _memory_for(image: Image.Image, path: Path) -> Iterator[None]:
    if image.width * image.height < LARGE:
        yield
        return
    copies = 2 if image.mode in ("L", "RGB") else 5  # converted, its alpha, white below it
    need = 4 * copies * image.width * image.height + 24 * image.height  # and pointers to each row
    with _one_large:
        free = available()
        if need > free:
            raise UserError(f"{path} has {image.width}×{image.height} pixels and needs {need / 2**30:.1f} GiB of "
                            f"memory to be read, {free / 2**30:.1f} GiB is available; make it smaller")
        yield


def _as_seen(image: Image.Image, path: Path) -> tuple[Image.Image, list[str]]:
    """Upright, opaque and of 8 bits, and the remarks on it."""
    remarks = []
    several, orientation = False, 1
    with contextlib.suppress(Exception):  # what follows the first picture may be damaged
        several = getattr(image, "is_animated", False) and image.format != "MPO"  # a phone's: depth, a smaller copy
    tags = getattr(image, "tag_v2", {})
    image.load()
    with contextlib.suppress(Exception):  # or its EXIF
        orientation = image.getexif().get(ORIENTATION)
    if orientation in TURNS:
        image = image.transpose(TURNS[orientation])
        remarks.append(TURNED)
    if image.mode.startswith(("I", "F")):
        image, alpha, high = _of_8_bits(image, path, tags)
        remarks += [DEEP] + [DARK] * (1 < high < 2**12)
    else:
        image = image.convert("RGBA") if image.has_transparency_data else image
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if alpha is not None and alpha.getextrema()[0] < 255:
        white = Image.new(image.mode, image.size, "white")
        white.paste(image, mask=alpha)
        image = white
        remarks.append(TRANSPARENT)
    return image, remarks + [FIRST] * several


def _of_8_bits(image: Image.Image, path: Path, tags: Mapping) -> tuple[Image.Image, Image.Image | None, float]:
    """Of modes I, I;16 and F → the image, its alpha if a value stands for transparent, and its largest value."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 2**12 - 1 if tags.get(BITS_PER_SAMPLE) == (12,) else 2**16 - 1
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= top:  # nor NaN
        raise UserError(f"{path} has values from {low:g} to {high:g} (Pillow's mode {image.mode}); an image has 8 "
                        "bits, 16 bits (0 to 65535) or floats in [0, 1]: write it as one of these")
    pixels = np.rint(values * np.float32(255) / np.float32(top)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow sees to in 8 bits only
        pixels = 255 - pixels
    clear = image.info.get("transparency")
    alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(pixels), alpha, high if top == 2**16 - 1 else 2**16


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    # The shape of the whole as torchvision rounds it.
    if image.width * height >= image.height * width:
        across, down = int(height * image.width / image.height), height
    else:
        across, down = width, int(width * image.height / image.width)
    left, top = round((across - width) / 2), round((down - height) / 2)
    if across * down <= max(ORDINARY, 16 * width * height):
        whole = image.resize((across, down), Image.Resampling.BILINEAR)
        return whole.crop((left, top, left + width, top + height))
    # Of a strip whose length would become huge, only the centre is.
    x, y = image.width / across, image.height / down
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return image.resize((width, height), Image.Resampling.BILINEAR, box)
