"""Errors that end a run with one line instead of a traceback, and the exit statuses of the commands.

0    finished
1    training diverged (`TrainingDiverged`), or an unexpected error, with its traceback
2    bad input, or an output that cannot be written (`UserError`)
69   another rank failed, died or hangs (`RankLost`)
75   preempted: the run was asked to stop and has saved its state; start it again (`Preempted`)
130  interrupted from the keyboard
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input: a flag, a file or a combination of them.

    The message is one line that names the flag or file and says what to do. Entry points print it as
    ``error: <message>``, once per node, and every rank exits with status 2, without a traceback.
    """


class TrainingDiverged(RuntimeError):
    """Too many consecutive steps had a non-finite loss or gradient."""


class Preempted(RuntimeError):
    """A run was asked to stop early and has stopped with its state saved."""


LOST_RANK_STATUS = 69
"""Exit status of a rank that stops because another rank failed, died or hangs."""


PREEMPTED_STATUS = 75
"""Exit status of a preempted run that has saved its state (`EX_TEMPFAIL`)."""


class RankLost(RuntimeError):
    """Another rank failed, died or hangs. The message is one line that names it.

    Attributes:
        prints: True on the one rank per node that prints the message.
    """

    def __init__(self, message: str, *, prints: bool):
        super().__init__(message)
        self.prints = prints


def one_line(error: BaseException | str, limit: int | None = 300) -> str:
    """Return the message of an error on one line; its type if the message is empty.

    Args:
        error: The error, or its message.
        limit: Maximum number of characters; None: unlimited.
    """
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:limit]


@contextlib.contextmanager
def exits_as_user_error() -> Iterator[None]:
    """Raise `UserError` where a library would print an error and exit the process.

    argparse prints several screens of usage before the error, and LeRobot's parser prints on every rank;
    both then call `sys.exit`.

    Raises:
        UserError: With the library's error message.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as exiting:
        if not exiting.code:
            raise
        message = re.split(r"^(?:\S+: )?error: ", printed.getvalue(), maxsplit=1, flags=re.MULTILINE)[-1]
        raise UserError(one_line(message, limit=None)) from None
    else:
        sys.stderr.write(printed.getvalue())
