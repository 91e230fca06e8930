"""Read-ahead: a background thread makes the next item while the current one is used."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

_END: Any = object()


@dataclass(frozen=True)
class Counted[T]:
    """An iterator whose length is known before it is read.

    Attributes:
        count: Number of items.
        items: Yields them once.
    """

    count: int
    items: Iterator[T]

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[T]:
        return self.items


def read_ahead[T](items: Iterator[T], device: torch.device) -> Generator[T]:
    """Iterate in a background thread, one item ahead.

    Order, items and errors are those of `items`: an error is raised here where its item is due. The thread
    starts with the first item. It ends with the last one or an error, or when this generator is closed or
    collected: then the item in work is read and dropped.

    Args:
        items: Must not draw from torch's global generators, which are those of the training thread, and must
            not be used elsewhere.
        device: Current device of the thread: each thread has its own.
    """
    pool = ThreadPoolExecutor(1, "read-ahead", _select, (device,))
    ahead = pool.submit(next, items, _END)
    try:
        while (item := ahead.result()) is not _END:
            ahead = pool.submit(next, items, _END)
            yield item
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        del ahead, items  # of an error's traceback, which would keep the error and what `items` hold


def _select(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
