"""Read untrusted JSON files within limits, and resolve the file names in them inside one directory."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

# The weight index of a policy with a hundred thousand tensors has 10 MB.
_MOST_BYTES = 1 << 26


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.

    Raises:
        ValueError: It is not a regular file, too large, nested too deeply, not JSON, not an object, or
            repeats a name.
        OSError: The file does not exist or cannot be read.
    """
    if not path.is_file():
        if path.exists():
            raise ValueError("it is not a regular file")
        raise FileNotFoundError(f"{path} is missing")
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(f"it has {size} bytes, more than {_MOST_BYTES}")
    return parse_object(path.read_bytes())


def parse_object(text: bytes) -> dict[str, Any]:
    """Return the object in a JSON text.

    Raises:
        ValueError: As `read_object`.
    """
    try:
        content = json.loads(text.decode(), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        # Two readers could choose different values.
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {max(names, key=names.count)[:100]!r} twice")
    return content


def path_inside(directory: Path, name: object) -> Path:
    """Return the path of a file in a directory that an untrusted file names.

    Args:
        directory: The directory.
        name: The untrusted value, expected to be a relative path below the directory.

    Raises:
        ValueError: It is not a string, or points outside the directory.
    """
    if not isinstance(name, str):
        raise ValueError(f"{str(name)[:100]!r} is not a file name")
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(f"{name[:100]!r} is not a file in this directory")
    return directory / path


def is_count(value: object, least: int = 0) -> bool:
    """Return whether a value is an integer in [least, 2**62), as counts and sizes in files are."""
    return type(value) is int and least <= value < 1 << 62
