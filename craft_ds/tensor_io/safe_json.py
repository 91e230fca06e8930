"""Read untrusted JSON files within limits, and resolve the file names in them inside one directory."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

# The weight index of a policy with a hundred thousand tensors has 10 MB.
_MOST_BYTES = 1 << 26
# Python takes up to 250 bytes for a value of a few bytes: a file within the limit of bytes could take 10 GB.
# These take less than 100 MB.
_MOST_VALUES = 3 << 17


def read_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.

    Raises:
        ValueError: It is not a regular file, too large, has too many values, is nested too deeply, not JSON,
            not an object, or repeats a name.
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
    check_number_of_values(text)
    try:
        content = json.loads(text.decode(), object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def check_number_of_values(text: bytes) -> None:
    """Check that a JSON text is small once it is parsed.

    Raises:
        ValueError: It has too many values.
    """
    # An upper bound: commas and brackets within texts count too, which few have.
    values = sum(map(text.count, (b",", b"[", b"{")))
    if values > _MOST_VALUES:
        raise ValueError(f"it has about {values} values, more than {_MOST_VALUES}")


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        # Two readers could choose different values.
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {name[:100]!r} twice")
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
