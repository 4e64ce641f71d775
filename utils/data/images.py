"""Reads image files of any bit depth, transparency, orientation and shape as uint8 images of one size."""

import contextlib
import errno
import functools
import re
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

# The usual ones of those that Pillow decodes itself. Not EPS, for which it runs Ghostscript, nor others that need a
# program.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "SGI", "SUN",
           "QOI", "ICO", "XBM", "XPM")
GREY = ("1", "L", "LA", "La", "I", "F")  # Pillow's single-channel modes, besides those that begin with I;16
LARGE = 2**26  # pixels from which images are checked against available memory and read one at a time
ORDINARY = 2**24  # an image is resized whole to at most this many pixels, or to 16 times those kept if more

BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION = 258, 262, 274  # tags of TIFF and EXIF
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
                        Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
                        Image.Transpose.ROTATE_90), start=2))

# What may surprise a user about an image.
TRANSPARENT = "transparent, laid over white"
TURNED = "rotated as EXIF says"
DEEP = "16-bit or float, reduced to 8 bits"
DARK = "16-bit with fewer than 12 bits in use, so nearly black"
FIRST = "the first of several in one file"

_one_large = threading.Lock()


class Picture(NamedTuple):
    """An image file as read."""

    pixels: Tensor  # [C, H, W] uint8
    remarks: tuple[str, ...] = ()  # some of the above


@functools.cache
def formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files that `read_image` reads, as registered in Pillow: .jpg, .jfif, .png, …"""
    # MPO, several JPEGs in one file, is opened as the first of them.
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in (*formats(), "MPO"))


@contextlib.contextmanager
def unlimited() -> Iterator[None]:
    """Turns off Pillow's warnings and its pixel limit: `read_image` checks the available memory instead."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def is_grey(path: Path) -> bool:
    """Whether an image file has one channel, according to its header.

    Raises:
        UserError, OSError: see `read_image`.
    """
    with _opened(path) as image:
        return image.mode in GREY or image.mode.startswith("I;16") or _raw_mode(image).startswith("LA")


def read_image(path: Path, size: tuple[int, int], channels: int = 3, resize: bool = True) -> Picture:
    """An image file → [channels, *size] uint8, resized to the smallest that covers `size` (H, W) and centre-cropped.

    For squares, the same as torchvision's Resize and CenterCrop.

    Raises:
        UserError: not an image; values out of range; too large for the memory; another size, with `resize` off.
        OSError: the system cannot read the file.
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
    except Exception as error:  # decoders raise exceptions of every kind for damaged files
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # the system's fault, not the file's: permissions, the disk
        raise UserError(f"{path} is not a readable image ({error}); fetch it again, save it as PNG, or "
                        "delete it") from error


@contextlib.contextmanager
def _memory_for(image: Image.Image, path: Path) -> Iterator[None]:
    if image.width * image.height < LARGE:
        yield
        return
    copies = 2 if image.mode in ("L", "RGB") else 5  # besides: the converted image, its alpha, the white background
    need = 4 * copies * image.width * image.height + 24 * image.height  # and a pointer to each row
    with _one_large:
        free = available()
        if need > free:
            raise UserError(f"{path} has {image.width}×{image.height} pixels and needs {need / 2**30:.1f} GiB of "
                            f"memory to be read, {free / 2**30:.1f} GiB is available; make it smaller")
        yield


def _as_seen(image: Image.Image, path: Path) -> tuple[Image.Image, list[str]]:
    """The image made upright, opaque and 8-bit, and the remarks on it."""
    remarks = []
    several, orientation = False, 1
    with contextlib.suppress(Exception):  # what follows the first picture may be damaged
        several = getattr(image, "is_animated", False) and image.format != "MPO"  # a phone's depth or smaller copy
    tags, raw = getattr(image, "tag_v2", {}), _raw_mode(image)
    image.load()
    with contextlib.suppress(Exception):  # the EXIF may be damaged
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
        if re.search(";16[BLN]", raw):  # Pillow keeps the upper 8 bits
            high = max(band.getextrema()[1] for band in image.split()[:3])
            remarks += [DEEP] + [DARK] * (0 < high < 2**4)
    if alpha is not None and alpha.getextrema()[0] < 255:
        white = Image.new(image.mode, image.size, "white")
        white.paste(image, mask=alpha)
        image = white
        remarks.append(TRANSPARENT)
    return image, remarks + [FIRST] * several


def _raw_mode(image: Image.Image) -> str:
    """How an opened file stores its pixels, such as `RGB;16B`, before it is loaded."""
    return str(image.tile[0][3]) if image.tile else ""


def _of_8_bits(image: Image.Image, path: Path, tags: Mapping) -> tuple[Image.Image, Image.Image | None, float]:
    """Mode I, I;16 or F → the 8-bit image, its alpha if a value means transparent, and its largest 16-bit value."""
    values = np.asarray(image)
    top = 1 if image.mode == "F" else 2**12 - 1 if tags.get(BITS_PER_SAMPLE) == (12,) else 2**16 - 1
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= top:  # refuses NaN too
        raise UserError(f"{path} has values from {low:g} to {high:g} (Pillow's mode {image.mode}); an image has 8 "
                        "bits, 16 bits (0 to 65535) or floats in [0, 1]: write it as one of these")
    pixels = np.rint(values * np.float32(255) / np.float32(top)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # zero is white; Pillow handles that in 8 bits only
        pixels = 255 - pixels
    clear = image.info.get("transparency")
    alpha = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
    return Image.fromarray(pixels), alpha, high if top == 2**16 - 1 else 2**16


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    # The size of the whole image, rounded as in torchvision.
    if image.width * height >= image.height * width:
        across, down = int(height * image.width / image.height), height
    else:
        across, down = width, int(width * image.height / image.width)
    left, top = round((across - width) / 2), round((down - height) / 2)
    if across * down <= max(ORDINARY, 16 * width * height):
        whole = image.resize((across, down), Image.Resampling.BILINEAR)
        return whole.crop((left, top, left + width, top + height))
    # A long strip would become huge, so only its centre is resized.
    x, y = image.width / across, image.height / down
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return image.resize((width, height), Image.Resampling.BILINEAR, box)
