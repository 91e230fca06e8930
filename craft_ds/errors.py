"""How a run ends that cannot go on: one clear line, and no traceback."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Bad input: a flag, a file or a combination of them.

    The message is one line that names the flag or file and the mend. Entry points print it as
    ``error: <message>``, once a node, and every rank leaves with status 2, without a traceback.
    """


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or a gradient that was not finite."""


class Preempted(RuntimeError):
    """A run was asked to leave before its end, and has left everything in order."""


LOST_RANK_STATUS = 69
"""Exit status of a rank that ends because another one has failed, died or hangs."""


class RankLost(RuntimeError):
    """Another rank has failed, died or hangs. The message is one line that names it.

    Attributes:
        speaks: Whether this rank is the one of its machine that says so.
    """

    def __init__(self, message: str, *, speaks: bool):
        super().__init__(message)
        self.speaks = speaks


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 300 characters; its type where it says nothing."""
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]


@contextlib.contextmanager
def exits_as_user_error() -> Iterator[None]:
    """Raise `UserError` where a library would print what is wrong and leave the process.

    argparse prints several screens of usage before the one line that matters, and LeRobot's parser prints
    on every rank; both then call `sys.exit`.

    Raises:
        UserError: With the line that matters.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as leaving:
        if not leaving.code:
            raise
        message = re.split(r"^(?:\S+: )?error: ", printed.getvalue(), maxsplit=1, flags=re.MULTILINE)[-1]
        raise UserError(" ".join(message.split())) from None
    else:
        sys.stderr.write(printed.getvalue())
