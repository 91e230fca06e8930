"""Keep a second run out of the output directory of a run."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from craft_ds.distributed.collectives import rank0_only
from craft_ds.tensor_io.output_lock import NotWritableError, locked_output

WAIT_S = 5.0
"""Seconds to wait for the former process of a restarted run to end."""


@contextlib.contextmanager
def exclusive_run(output_dir: Path, *, to_write: bool = True) -> Iterator[None]:
    """Hold the lock of a run's directory, on rank 0. Collective: enter on all ranks.

    Args:
        output_dir: The run's directory; it need not exist.
        to_write: False: the directory may be read-only, as that of a finished run; it then has no lock.

    Raises:
        UserError: On all ranks: another process holds the lock, or the directory is not writable.
    """
    with contextlib.ExitStack() as stack:

        def enter() -> None:
            with contextlib.nullcontext() if to_write else contextlib.suppress(NotWritableError):
                stack.enter_context(locked_output(output_dir, inside=True, wait_s=WAIT_S))

        rank0_only(enter)()
        yield
