"""The types of options: what a value may be, beyond its Python type."""

import errno
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field


def _possible_path(value: str) -> str:
    """Refuses a path that no system call accepts: one with a null character, or too long."""
    try:
        os.lstat(value)
    except ValueError:
        raise ValueError("it must not hold a null character") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError("it is longer than a path can be; give a shorter one") from None
    return value


# Made absolute when the config is parsed. A file path may be empty, a folder path may not.
FilePath = Annotated[str, "path", AfterValidator(_possible_path)]
FolderPath = Annotated[str, "path", Field(min_length=1), AfterValidator(_possible_path)]
STARTS = ("samples_predicted_correctly", "real", "noise")


def _start(value: str) -> str:
    if value not in STARTS and not value.endswith(".safetensors"):
        raise ValueError(f"it must be {', '.join(STARTS)}, or the path of a distilled.safetensors")
    return _possible_path(value)


Start = Annotated[str, "path or name", AfterValidator(_start)]
Device = Annotated[list[int] | str, BeforeValidator(lambda value: [int(value)] if _is_digits(value) else value)]
"""`auto`, `cpu`, `cuda`, `cuda:1`, or a list of GPU indices such as `[0, 1]`."""


def _is_digits(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.isdecimal() and len(value) < 10)


def _folder_name(value: str) -> str:
    _possible_path(value)
    if "/" in value or "\\" in value or not value.strip("."):
        raise ValueError("it must be the name of a folder: without /, and not of dots alone")
    return value


FolderName = Annotated[str, AfterValidator(_folder_name)]  # cannot lead out of its parent folder
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
# These bounds fit float32, and so does a RateOfRate over the square of a LearningRate, which `lr_param: log` computes.
LearningRate = Annotated[float, Field(ge=1e-10, le=3e38, allow_inf_nan=False)]
AUTO = "auto"


def _number_or_auto(value: Any) -> Any:
    """Refuses any other word with one message for both types."""
    if isinstance(value, str) and value != AUTO and not _is_number(value):
        raise ValueError("it must be a number, or auto")
    return value


PROTOCOLS = ("datm", "mtt", "dc")


def _protocols(value: str) -> str:
    names = value.split(",")
    if not set(names) <= set(PROTOCOLS) or len(names) > len(set(names)):
        raise ValueError(f"it must be one of {', '.join(PROTOCOLS)}, or several different ones, such as dc,datm")
    return value


Protocols = Annotated[str, AfterValidator(_protocols)]
Threads = Annotated[Annotated[int, Field(ge=1, le=1024)] | Literal["auto"], BeforeValidator(_number_or_auto)]
AutoRate = Annotated[LearningRate | Literal["auto"], BeforeValidator(_number_or_auto)]
Rate = Annotated[float, Field(ge=0, le=3e38, allow_inf_nan=False)]
RateOfRate = Annotated[float, Field(ge=0, le=1e18, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def _sides(value: Any) -> Any:
    """Normalises `HxW`; a square becomes its side."""
    if not isinstance(value, str) or _is_number(value):
        return value
    sides = re.fullmatch(r"\s*0*([1-9]\d{0,8})\s*[x×]\s*0*([1-9]\d{0,8})\s*", value, re.IGNORECASE | re.ASCII)
    if not sides:
        raise ValueError("it must be a number of pixels, or height and width, such as 32x48")
    return int(sides[1]) if sides[1] == sides[2] else "x".join(sides.groups())


Resolution = Annotated[Count | Annotated[str, Field(pattern=r"^\d+x\d+$")] | None, BeforeValidator(_sides)]
"""The side of a square, or `HxW`."""
