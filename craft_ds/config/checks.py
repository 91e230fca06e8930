"""Checks of single values of a configuration."""

from typing import get_args

from craft_ds.errors import UserError


def check_choice(flag: str, value: str, choices: object) -> None:
    """Check a value that was set from Python or a file; the parser checks values of flags."""
    allowed = get_args(choices)
    if value not in allowed:
        raise UserError(f"{flag}={value}: choose one of {', '.join(allowed)}")


def require(condition: bool, message: str) -> None:
    """Raise UserError with a message unless the condition holds."""
    if not condition:
        raise UserError(message)
