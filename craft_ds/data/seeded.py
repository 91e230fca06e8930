"""Random numbers as a function of a name, for what runs in any process and in any order."""

import contextlib
import zlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def seeded(name: str) -> Iterator[None]:
    """Seed torch's CPU generator by a name inside the context; the state before it comes back after it.

    Generators of accelerators are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        # A CPU generator uses 32 bits of its seed. torch.manual_seed would also seed accelerators.
        torch.random.default_generator.manual_seed(zlib.crc32(name.encode()))
        yield
