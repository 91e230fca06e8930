"""`craft-ds`: dispatch to the subcommands; errors become one line per node and an exit code on every rank."""

import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from craft_ds.config.arguments import expand_home
from craft_ds.config.secret_scan import redact, refuse_secret_arguments
from craft_ds.distributed.env import is_local_rank0, settle_environment
from craft_ds.distributed.launcher_watch import end_with_launcher
from craft_ds.errors import (
    LOST_RANK_STATUS,
    PREEMPTED_STATUS,
    Preempted,
    RankLost,
    TrainingDiverged,
    UserError,
)

COMMANDS = {
    "train": ("train", "fine-tune a policy, with or without the retention constraint"),
    "anchors": ("anchors", "build the anchor cache: samples of the old tasks"),
    "export": ("export", "export a checkpoint as a policy directory that stock LeRobot loads"),
    "statistics": ("statistics", "write a policy with the statistics of data sets"),
    "data-report": ("data_report", "report how data sets fit a policy, before training"),
    "plan": ("plan", "plan the memory of a run per rank, without allocating anything"),
    "eval": ("evaluate", "evaluate a policy in an embedded world"),
    "sequence": ("sequence", "learn tasks one after the other, and evaluate all of them after each"),
    "demo": ("demo", "fine-tune the embedded policy with and without CRaFT, and evaluate both"),
    "worlds": (
        "worlds",
        "list the embedded worlds, record demonstrations, or pretrain a teacher",
    ),
    "doctor": ("doctor", "check this machine and say how to fix what will not work"),
    "version": ("version", "print the version of craft-ds and of the packages it was tested with"),
}
"""Name of each subcommand, its module in `craft_ds.commands`, and its line in `craft-ds --help`."""


def run_main(action: Callable[[], object]) -> None:
    """Run a command; expected errors print one line on stderr and exit with a status of `craft_ds.errors`."""
    try:
        settle_environment()
        end_with_launcher()
        action()
    except UserError as error:
        _exit(f"error: {error}", 2)
    except TrainingDiverged as error:
        _exit(f"error: {error}", 1)
    except Preempted as notice:
        _exit(str(notice), PREEMPTED_STATUS)
    except RankLost as error:
        _exit(f"error: {error}", LOST_RANK_STATUS, prints=error.prints)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def _exit(line: str, status: int, *, prints: bool | None = None) -> NoReturn:
    if is_local_rank0() if prints is None else prints:
        print(redact(line), file=sys.stderr, flush=True)
    raise SystemExit(status) from None


def exit_without_teardown(command: Callable[[], None]) -> NoReturn:
    """Run a command and end the process with its status, without the interpreter's own teardown.

    Everything is written and closed by then. Threads of gloo and of the autograd engine still hold tensors;
    if one frees them while the interpreter is torn down, the process aborts, and a launcher would report a
    finished run as failed.
    """
    status: Any = 0
    try:
        command()
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        if _stdout_is_closed():  # as in `craft-ds train --help | head`
            os._exit(128 + signal.SIGPIPE)
        sys.stderr.write(redact(traceback.format_exc()))
        status = 1
    if _stdout_is_closed():
        os._exit(128 + signal.SIGPIPE)
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else bool(status))


def _stdout_is_closed() -> bool:
    """Flush stdout; return True if its reader has gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    # A failed write drops its text, so that a later flush succeeds.
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Run a subcommand in this process; raises `SystemExit` as `run_main` does."""
    module, _ = COMMANDS[name]
    given = expand_home(arguments)

    def run() -> None:
        refuse_secret_arguments(given)
        import_module(f"craft_ds.commands.{module}").main(given)

    run_main(run)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run `craft-ds` with these arguments (default: those of the process), then end the process."""
    arguments = sys.argv[1:] if arguments is None else arguments
    exit_without_teardown(lambda: _dispatch(arguments))


def _dispatch(arguments: Sequence[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name in ("--help", "-h", "help"):
        print("usage: craft-ds COMMAND ...\n\ncommands:")
        for command, (_, line) in COMMANDS.items():
            print(f"  {command:<13}{line}")
        print("\n`craft-ds COMMAND --help` lists the flags of a command.")
    elif name == "--version":
        run_command("version", [])
    elif name in COMMANDS:
        run_command(name, arguments[1:])
    else:
        run_main(lambda: _refuse(name))


def _refuse(name: str) -> NoReturn:
    nearest = get_close_matches(name, COMMANDS, n=1)
    meant = f"did you mean {nearest[0]}? The" if nearest else "the"
    raise UserError(f"craft-ds {name}: no such command; {meant} commands are {', '.join(COMMANDS)}")
