"""Files of tensors, read without running code and written atomically."""

import json
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
        advice: what to do about a file that is damaged or refused; None: write it again.
        instead: what to give instead of a path without a file, or of a file of another kind.

    Raises:
        UserError: the file is missing, truncated, not a torch file, or holds more than tensors of real numbers.
    """
    path = Path(path)
    check_is_file(path, what, instead or "the path of a file")
    check_kind(path, what, "torch", advice or (f"give {instead}" if instead else "write or copy it again"))
    with (reading(f"{what} {path}", advice or "write or copy it again",
                  "cannot be read (truncated, or not a torch file)"), warnings.catch_warnings()):
        warnings.simplefilter("ignore")  # problems of foreign files are reported here
        try:
            # Torch's older, non-zip format cannot be memory-mapped and is read whole.
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
    """What is unusable about a tensor in nested containers (sparse, meta, quantized, complex), in words, or None."""
    waiting, seen = [value], set()
    while waiting:
        each = waiting.pop()
        if isinstance(each, Tensor):
            kinds = {"a sparse tensor": each.layout != torch.strided, "a tensor without values": each.is_meta,
                     "a quantized tensor": each.is_quantized, "complex numbers": each.is_complex()}
            if odd := next((kind for kind, it_is in kinds.items() if it_is), None):
                return odd
        elif isinstance(each, dict | list | tuple) and id(each) not in seen:  # it may occur many times
            seen.add(id(each))
            waiting += each.values() if isinstance(each, dict) else each
    return None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata that `save_tensors` wrote."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        if odd := _odd_tensor(tensors):
            raise ValueError(f"it holds {odd}")
        return tensors, file.metadata() or {}


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata that `save_tensors` wrote, without reading the tensors."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def save(value: object, path: str | os.PathLike) -> None:
    """`torch.save`, atomically."""
    # Through a handle: given a path, torch writes its name into the file, so equal tensors would give unequal files.
    with atomic_write(path) as aside, aside.open("wb") as file:
        torch.save(value, file)


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file, which holds data only, never code; equal contents give equal bytes."""
    with atomic_write(path) as aside:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, aside, metadata)
        with aside.open("r+b") as file:  # its metadata are in random order, in a JSON header after an 8-byte length
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
            written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
            assert len(written) == length
            file.seek(8)
            file.write(written)
