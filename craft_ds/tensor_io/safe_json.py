"""Files that others may have made: read within bounds, and never beyond their own directory."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

# The index of a policy of a hundred thousand tensors has 10 MB.
_MOST_BYTES = 1 << 26


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.

    Raises:
        ValueError: What is there is no regular file, too large, nested too deep, no JSON, no object, or has
            a name twice.
        OSError: The file is not there, or cannot be read.
    """
    if not path.is_file():
        if path.exists():
            raise ValueError("it is no regular file")
        raise FileNotFoundError(f"{path} is missing")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size} bytes, more than {_MOST_BYTES}")
    return parse_object(path.read_bytes())


def parse_object(text: bytes) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
        ValueError: As `read_object`.
    """
    try:
        content = json.loads(text.decode(), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    return content


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        # Two readers of such a file could take different ones.
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {max(names, key=names.count)[:100]!r} twice")
    return content


def path_inside(directory: Path, name: object) -> Path:
    """The path of a file that something in a directory names.

    Args:
        directory: The directory.
        name: What was found where the name of a file in it should be.

    Raises:
        ValueError: It is no name, or one that leaves the directory.
    """
    if not isinstance(name, str):
        raise ValueError(f"{str(name)[:100]!r} is no name of a file")
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name[:100]!r} is no file of this directory")
    return directory / path


def is_count(value: object, least: int = 0) -> bool:
    """Whether a value is a whole number that could count or measure something in a file."""
    return type(value) is int and least <= value < 1 << 62
