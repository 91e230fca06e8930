"""The one exception that means: the user's input is wrong, and this is how to mend it."""


class UserError(ValueError):
    """Bad input: a flag, a file or a combination of them.

    The message is one line that names the flag or file and the mend. Entry points print it as
    ``error: <message>`` on every rank's exit path and leave with status 2, without a traceback.
    """
