"""Distinction between what a machine does not permit, for which a test is skipped, and any other failure."""

_NOT_PERMITTED = (
    "not permitted",
    "permission denied",
    "must be superuser",
    "not supported",
    "unknown device type",
    "no space left on device",  # the limit of namespaces is 0
)


def is_not_permitted(message: str) -> bool:
    """Return True if the message of a system tool says that this machine does not permit the operation."""
    return any(words in message.lower() for words in _NOT_PERMITTED)
