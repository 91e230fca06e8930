"""What the ranks do together beside training: exchange values, and fail all at once."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from craft_ds.errors import UserError


def init_process_group(timeout: timedelta | None = None) -> None:
    """Join the process group that the launcher described, or form one of a single process.

    Every rank takes its own accelerator first: what is exchanged before a model is built would otherwise go
    through the first one of them. Does nothing where there is a process group already. Collective: call on
    all ranks.

    Args:
        timeout: How long a collective may wait for a rank; torch's default is 30 minutes.
    """
    if dist.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # Gradients and masters that are kept on the CPU, and exchanged objects, go by gloo.
        backend = "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout or default_pg_timeout))
        # torchrun's static rendezvous keeps one store over all restarts, with the addresses of dead ranks.
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def process_group_is_initialized() -> bool:
    """Whether this process has joined a process group."""
    return dist.is_initialized()


def destroy_process_group() -> None:
    """Leave the process group, if there is one. Collective: call on all ranks."""
    if dist.is_initialized():
        dist.barrier()  # gloo fails the last to leave if the first has left
        dist.destroy_process_group()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, in rank order. Collective: call on all ranks.

    Args:
        value: Anything that pickles.
        group: A group of all ranks, for calls beside the main thread; None: the default group.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def fail_together(action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Run an action on every rank; if it fails on one, it fails on all, so that no rank waits for ever.

    Collective: call on all ranks.

    Raises:
        UserError: What the first failing rank raised.
        RuntimeError: Another rank raised anything else; that rank raises the error itself.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = action()
    except Exception as caught:
        error = caught
    failure = error and (isinstance(error, UserError), type(error).__name__, str(error))
    failures = gather_objects(failure, group)
    if error is not None and not isinstance(error, UserError):
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            bad_input, kind, message = failure
            raise UserError(message) if bad_input else RuntimeError(f"rank {rank} failed: {kind}: {message}")
    return result


def rank0_first(action: Callable[[], Any]) -> Any:
    """Run an action on rank 0 first (it may download), then on the others. Collective."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    result = fail_together(lambda: action() if is_main else None)
    return fail_together(lambda: result if is_main else action())


def rank0_only(action: Callable[[], Any], group: dist.ProcessGroup | None = None) -> Any:
    """Run an action on rank 0 alone while the others wait. Collective: call on all ranks.

    Returns:
        What it returned there, on all ranks.
    """
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    return gather_objects(fail_together(action if is_main else lambda: None, group), group)[0]
