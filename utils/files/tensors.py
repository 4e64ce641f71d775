"""Files of tensors, read without running code and written whole."""

import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.files.reading import check_is_file, check_kind, reading
from utils.files.writing import atomic_write


def load(path: str | os.PathLike, what: str = "file", mmap: bool = False, advice: str | None = None,
         instead: str | Path | None = None):
    """`torch.load` of tensors and plain containers on the CPU; code in the file is never run.

    Args:
        what: what the file should be, for the message ("image file", "buffer", …).
        mmap: leave the tensors' bytes on disk until they are touched.
        advice: what to do about one that is damaged or refused; None: write it again.
        instead: what may have been meant by a path that is none, or by a file of another kind.

    Raises:
        UserError: missing, truncated, not a torch file, or holding more than tensors.
    """
    path = Path(path)
    check_is_file(path, what, instead or "the path of a file")
    check_kind(path, what, "torch", advice or (f"give {instead}" if instead else "write or copy it again"))
    with (reading(f"{what} {path}", advice or "write or copy it again",
                  "cannot be read (truncated, or not a torch file)"), warnings.catch_warnings()):
        warnings.simplefilter("ignore")  # what torch has to say about foreign files is said here
        try:
            # A file of torch's older, non-zip form cannot be memory-mapped; it is read whole.
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            if "Weights only load failed" in str(error) and "GLOBAL" in str(error):
                raise UserError(f"{what} {path} holds more than tensors (it would run code when loaded) and was "
                                f"refused; {advice or 'save plain tensors with torch.save'}") from error
            raise UserError(f"{what} {path} is damaged or not a torch file; {advice or 'write it again'}") from error
    odd = _odd_tensor(value)
    if odd:
        raise UserError(f"{what} {path} holds {odd}; {advice or 'save plain tensors of real numbers'}")
    return value


def _odd_tensor(value: object) -> str | None:
    """A tensor in nested containers that arithmetic does not take as it takes others, in words."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            kinds = {"a sparse tensor": each.layout != torch.strided, "a tensor without values": each.is_meta,
                     "a quantized tensor": each.is_quantized, "complex numbers": each.is_complex()}
            if odd := next((kind for kind, it_is in kinds.items() if it_is), None):
                return odd
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:  # one may hold another many times
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each
    return None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote: the tensors, and the metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if odd := _odd_tensor(tensors):
            raise ValueError(f"it holds {odd}")
        return tensors, file.metadata() or {}


def save(value: object, path: str | os.PathLike) -> None:
    """`torch.save`, whole or not at all."""
    # Through a handle, for given a path torch writes its name into the file, and equal tensors make unequal files.
    with atomic_write(path) as aside, aside.open("wb") as file:
        torch.save(value, file)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, which holds data only, never code."""
    with atomic_write(path) as aside:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata)
