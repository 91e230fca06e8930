"""Temporary replacement of a function of a library."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replace_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of a class or module, and restore it at the end.

    Args:
        owner: The class or module that defines the attribute itself.
        name: Its name.
        value: The replacement.

    Raises:
        AttributeError: The owner does not define the attribute.
    """
    try:
        original = vars(owner)[name]  # not getattr, which would bind a classmethod
    except KeyError:
        raise AttributeError(f"{owner.__name__} does not define {name}") from None
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)
