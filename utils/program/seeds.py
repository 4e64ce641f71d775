"""Seeds of random draws, derived from addresses, so that any part of a run can be repeated alone."""

import contextlib
import hashlib
from collections.abc import Iterator

import torch


def derive_seed(*address: int | str) -> int:
    """A 63-bit seed from an address such as (seed, "expert", 3, "epoch", 7); the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, address)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*address: int | str) -> torch.Generator:
    """A separate CPU generator for an address."""
    return torch.Generator().manual_seed(derive_seed(*address))


@contextlib.contextmanager
def seeded(*address: int | str) -> Iterator[None]:
    """Seeds torch's global CPU generator, from which layers are initialised, and restores it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(*address))
        yield
