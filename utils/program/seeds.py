"""Every draw has an address, so that any part of a run can be repeated alone."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(*address: int | str) -> int:
    """A 63-bit seed from an address such as (seed, "expert", 3, "epoch", 7); the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, address)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*address: int | str) -> torch.Generator:
    """A CPU generator of its own for an address."""
    return torch.Generator().manual_seed(derive_seed(*address))


@contextlib.contextmanager
def seeded(*address: int | str) -> Iterator[None]:
    """torch's global CPU generator set for an address, and put back: layers initialise themselves from it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*address))
        yield
