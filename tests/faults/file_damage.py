"""Damage to files of a checkpoint or an anchor cache, and forgery with matching checksums."""

import hashlib
import json
import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from craft_ds.checkpoints import read_manifest, verify_checkpoint
from craft_ds.checkpoints.manifest import MANIFEST, hash_files
from craft_ds.errors import UserError

__all__ = [
    "DEEP",
    "MANIFEST",
    "Damage",
    "damaged",
    "damages",
    "files_of",
    "not_a_file",
    "read_manifest",
    "read_or_refused",
    "refused",
    "seal",
    "verify_checkpoint",
    "within",
]

DEEP = "[" * 100_000 + "]" * 100_000


# These contain a checksum of themselves, which does not cover trailing blanks.
_SELF_CHECKED = (MANIFEST, "metadata.json")
_NUMBER = re.compile(rb'(?<=": )\d|(?<=":)\d|^ +\d', re.MULTILINE)


class Damage(NamedTuple):
    """One damaged file.

    Attributes:
        how: The kind of damage.
        file: Name of the file in its directory.
        content: Its new content; None: it is removed.
    """

    how: str
    file: str
    content: bytes | None


def refused(read: Callable[[], Any]) -> str:
    """Return the one-line message of the `UserError` that a read must raise."""
    message = ""
    try:
        read()
    except UserError as error:
        message = str(error)
    assert message, "it was read without an error"
    assert "\n" not in message
    return message


def read_or_refused(read: Callable[[], Any], error: type[Exception] = UserError) -> Any:
    """Return the result of a read; None if it raises the expected error with one line."""
    try:
        return read()
    except error as refusal:
        message = str(refusal)
    assert message
    assert "\n" not in message
    return None


def files_of(directory: Path) -> list[str]:
    """Return the names of all files below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def damages(directory: Path, other: Path, seed: int) -> Iterator[Damage]:
    """Yield every damage to every file: cut, a flipped bit, replaced, removed.

    Args:
        directory: A checkpoint or a cache.
        other: The same of another run, whose files replace those that differ.
        seed: Seed of the positions of flipped bits.
    """
    for name in files_of(directory):
        content = (directory / name).read_bytes()
        chosen = random.Random(f"{seed} {name}")
        kept = content.rstrip() if name in _SELF_CHECKED else content
        if content:
            yield Damage("cut to nothing", name, b"")
            yield Damage("cut by a byte", name, kept[:-1])
        for place in _places(name, content, chosen):
            bit = 0 if content[place : place + 1].isdigit() else chosen.randrange(8)
            flipped = bytes([content[place] ^ 1 << bit])
            yield Damage(
                f"bit {bit} of byte {place} flipped", name, content[:place] + flipped + content[place + 1 :]
            )
        theirs = other / name
        if theirs.is_file() and theirs.read_bytes() != content:
            yield Damage("another run's", name, theirs.read_bytes())
        yield Damage("removed", name, None)


def _places(name: str, content: bytes, chosen: random.Random) -> list[int]:
    """Return the bytes to flip: random ones, in JSON also digits, where the file stays valid."""
    places = {chosen.randrange(len(content)) for _ in range(2)} if content else set()
    if name.endswith(".json"):
        numbers = [match.end() - 1 for match in _NUMBER.finditer(content)]
        places |= set(chosen.sample(numbers, min(3, len(numbers))))
    elif content:
        places.add(chosen.randrange(min(len(content), 64)))  # headers
    return sorted(places)


@contextmanager
def damaged(directory: Path, damage: Damage) -> Iterator[None]:
    """Damage a file, and restore it afterwards."""
    path = directory / damage.file
    before = path.read_bytes()
    if damage.content is None:
        path.unlink()
    else:
        path.write_bytes(damage.content)
    try:
        yield
    finally:
        path.write_bytes(before)


def seal(checkpoint: Path, **changes: object) -> None:
    """Rewrite the manifest of a checkpoint to match its files, as a forger would.

    Args:
        checkpoint: Its directory.
        **changes: Entries of the manifest to set.
    """
    path = checkpoint / MANIFEST
    manifest = json.loads(path.read_text()) | {"files": hash_files(checkpoint, 0, 1)} | changes
    manifest.pop("sha256", None)
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest, indent=1) + "\n")


def not_a_file(path: Path, kind: str) -> Path:
    """Replace a file by something else: a directory, a link to itself, a pipe or an empty file."""
    path.unlink(missing_ok=True)
    match kind:
        case "directory":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "pipe":
            os.mkfifo(path)
        case "empty":
            path.touch()
    return path


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Interrupt the block after a time, as opening a pipe would block forever."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
