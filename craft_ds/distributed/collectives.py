"""Collective helpers: set up the process group, exchange objects, fail on all ranks at once."""

from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist

from craft_ds.distributed.env import RANK_TIMEOUT_S, read_launch
from craft_ds.distributed.rendezvous import connecting, meet
from craft_ds.errors import UserError


def init_process_group(rank_timeout: float = RANK_TIMEOUT_S) -> None:
    """Create the process group that the launcher describes, or one of a single process.

    Selects this rank's accelerator first: objects exchanged before the model is built would otherwise all go
    through the first accelerator. Does nothing if a process group exists. Collective: call on all ranks.

    Args:
        rank_timeout: Seconds to wait for all ranks to join; collectives wait for `group_timeout`.

    Raises:
        RankLost: Ranks have not joined in time.
        UserError: The launch, its network or its accelerators are wrong; names the variable.
    """
    if dist.is_initialized():
        return
    launch = read_launch()
    backend = "gloo"
    if torch.cuda.is_available():
        if launch.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={launch.local_rank}, but this rank sees {torch.cuda.device_count()} "
                "accelerators: start at most one rank per accelerator, and let each see all of its machine"
            )
        torch.cuda.set_device(launch.local_rank)
        # gloo carries CPU gradients, CPU master weights and exchanged objects.
        backend = "cpu:gloo,cuda:nccl"
    timeout = group_timeout(rank_timeout)
    if not launch.by_launcher:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store, hosts = meet(launch, rank_timeout)
    store.set_timeout(timeout)
    with connecting(launch, hosts, rank_timeout):
        dist.init_process_group(
            backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )


def group_timeout(rank_timeout: float) -> timedelta:
    """Return the timeout of the process group: torch's default for gloo, and longer than the watchdog's."""
    return max(timedelta(minutes=30), timedelta(seconds=2 * rank_timeout))


def process_group_is_initialized() -> bool:
    """Return True if this process is in a process group."""
    return dist.is_initialized()


def destroy_process_group() -> None:
    """Destroy the process group, if there is one. Collective: call on all ranks."""
    if dist.is_initialized():
        dist.barrier()  # with gloo, the last rank fails if the first has already destroyed its group
        dist.destroy_process_group()


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Return every rank's value, in rank order. Collective: call on all ranks.

    Args:
        value: Anything that pickles.
        group: A group of all ranks, for calls outside the main thread; None: the default group.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def fail_together[**P, R](function: Callable[P, R], group: dist.ProcessGroup | None = None) -> Callable[P, R]:
    """Make a function collective: if it raises on one rank, it raises on all, so that no rank waits forever.

    The result is collective: call it on all ranks. Each rank gets its own return value.

    Args:
        function: The function that each rank runs.
        group: A group of all ranks, for calls outside the main thread; None: the default group.

    Raises:
        UserError: By the result: what the first failing rank raised.
        RuntimeError: By the result: another rank raised anything else; that rank raises the error itself.
    """

    @wraps(function)
    def collective(*args: P.args, **kwargs: P.kwargs) -> R:
        result: Any = None
        error: Exception | None = None
        try:
            result = function(*args, **kwargs)
        except Exception as caught:
            error = caught
        failure = error and (isinstance(error, UserError), type(error).__name__, str(error))
        failures = gather_objects(failure, group)
        if error is not None and not isinstance(error, UserError):
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                bad_input, kind, message = failure
                if bad_input:
                    raise UserError(message)
                raise RuntimeError(f"rank {rank} failed: {kind}: {message}")
        return result

    return collective


def rank0_first[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Make a function collective: rank 0 runs it first (it may download), then the others do."""

    @wraps(function)
    def collective(*args: P.args, **kwargs: P.kwargs) -> R:
        def run() -> R:
            return function(*args, **kwargs)

        is_main = not dist.is_initialized() or dist.get_rank() == 0
        result: Any = fail_together(run if is_main else _nothing)()
        return fail_together((lambda: result) if is_main else run)()

    return collective


def rank0_only[**P, R](function: Callable[P, R], group: dist.ProcessGroup | None = None) -> Callable[P, R]:
    """Make a function collective: rank 0 runs it while the others wait, and all get its return value.

    Args:
        function: The function; its return value must pickle.
        group: A group of all ranks, for calls outside the main thread; None: the default group.
    """

    @wraps(function)
    def collective(*args: P.args, **kwargs: P.kwargs) -> R:
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        action: Callable[[], Any] = (lambda: function(*args, **kwargs)) if is_main else _nothing
        return gather_objects(fail_together(action, group)(), group)[0]

    return collective


def _nothing() -> None:
    pass
