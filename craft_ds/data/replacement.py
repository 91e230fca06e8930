"""Replacement of bad samples, the same for any number of ranks and workers and in a resumed run."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, default_collate

from craft_ds.data.checked_samples import BadSample, Samples
from craft_ds.data.inline_tensors import with_inline_tensors
from craft_ds.data.seeded import seeded

PROBES = 100
"""Samples tried instead of a bad one; if all of them are bad, the data set is not usable."""


class RawBatch(NamedTuple):
    """A collated micro-batch, as a worker returns it.

    Attributes:
        samples: Collated values by feature, through the processors that the loader was given. A worker passes
            on small tensors inline (`craft_ds.data.inline_tensors`).
        replaced: Number of samples among them that stand for bad ones.
        bad: Errors of the samples that are not there.
    """

    samples: dict[str, Any]
    replaced: int
    bad: list[BadSample]


class Drawn(NamedTuple):
    """A good sample, its position in the stream, and the bad ones that were drawn before it."""

    sample: dict[str, Any]
    position: int
    bad: tuple[BadSample, ...] = ()


class ReplacingSamples(Dataset[Drawn]):
    """Samples by their position in a stream; a good one stands for a bad one.

    Both the replacement and the random state depend on seed and position alone: samples and image transforms
    are the same for any number of workers and ranks, and in a run that was interrupted.

    Args:
        samples: The data set.
        seed: Seed of the run.
        index_at: Index of the sample at a position; None: the position itself.
    """

    def __init__(self, samples: Samples, seed: int, index_at: Callable[[int], int] | None = None) -> None:
        self._samples, self._seed, self._index_at = samples, seed, index_at

    def __getitem__(self, position: int) -> Drawn:
        """Return the sample at a position, or its replacement.

        Raises:
            BadSample: Neither the sample nor any of `PROBES` others is good.
        """
        bad: list[BadSample] = []
        for index in self.candidates(position):
            with seeded(f"{self._seed} {position}"):
                try:
                    return Drawn(self._samples[index], position, tuple(bad))
                except BadSample as error:
                    bad.append(error)
        first = bad[0]
        reason = f"{first.reason} (and {PROBES} samples drawn instead of it are bad too)"
        raise BadSample(first.dataset, first.episode, first.frame, reason)

    def candidates(self, position: int) -> Iterator[int]:
        """Yield the index of the sample at a position, then those of its replacements."""
        yield position if self._index_at is None else self._index_at(position)
        generator = torch.Generator().manual_seed(zlib.crc32(f"replace {self._seed} {position}".encode()))
        for _ in range(PROBES):
            yield int(torch.randint(len(self._samples), (), generator=generator))


@dataclass(frozen=True)
class CollateDrawn:
    """Collates drawn samples, lists what they replace, and applies the policy's processors.

    The random numbers of the processors depend on the seed and the first position alone.

    Attributes:
        process: From collated samples to the policy's input.
        seed: Seed of the run.
    """

    process: Callable[[dict[str, Any]], dict[str, Any]]
    seed: int

    def __call__(self, drawn: list[Drawn]) -> RawBatch:
        """Return the micro-batch of these samples."""
        collated = default_collate([one.sample for one in drawn])
        with seeded(f"process {self.seed} {drawn[0].position}"):
            samples = with_inline_tensors(self.process(collated))
        return RawBatch(
            samples, sum(bool(one.bad) for one in drawn), [error for one in drawn for error in one.bad]
        )
