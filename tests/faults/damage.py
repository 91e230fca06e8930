"""Damage to the files of a checkpoint or an anchor cache; and forgery, with checksums that fit."""

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


# They carry a checksum of what they say: blanks at the end are no part of it.
_OF_THEMSELVES = (MANIFEST, "metadata.json")
_NUMBER = re.compile(rb'(?<=": )\d|(?<=":)\d|^ +\d', re.MULTILINE)


class Damage(NamedTuple):
    """One file as it should not be.

    Attributes:
        how: What was done to it.
        file: Its name in its directory.
        content: What is in it now; None: it was removed.
    """

    how: str
    file: str
    content: bytes | None


def refused(read: Callable[[], Any]) -> str:
    """The one line with which something refuses what it was to read."""
    message = ""
    try:
        read()
    except UserError as error:
        message = str(error)
    assert message, "it was read without an error"
    assert "\n" not in message
    return message


def read_or_refused(read: Callable[[], Any], error: type[Exception] = UserError) -> Any:
    """What something reads; None where it refuses it with one line."""
    try:
        return read()
    except error as refusal:
        message = str(refusal)
    assert message
    assert "\n" not in message
    return None


def files_of(directory: Path) -> list[str]:
    """Names of all files of a directory and of those below it."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def damages(directory: Path, other: Path, seed: int) -> Iterator[Damage]:
    """Every damage to every file: cut, flipped by a bit, swapped, removed.

    Args:
        directory: A checkpoint or a cache.
        other: One of another run: its files take the place of those that they differ from.
        seed: Of the places of flipped bits.
    """
    for name in files_of(directory):
        content = (directory / name).read_bytes()
        chosen = random.Random(f"{seed} {name}")
        kept = content.rstrip() if name in _OF_THEMSELVES else content
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
    """Bytes to flip: some anywhere, of JSON also in numbers, where a parser sees nothing wrong."""
    places = {chosen.randrange(len(content)) for _ in range(2)} if content else set()
    if name.endswith(".json"):
        numbers = [match.end() - 1 for match in _NUMBER.finditer(content)]
        places |= set(chosen.sample(numbers, min(3, len(numbers))))
    elif content:
        places.add(chosen.randrange(min(len(content), 64)))  # headers
    return sorted(places)


@contextmanager
def damaged(directory: Path, damage: Damage) -> Iterator[None]:
    """Do a damage, and put the file back afterwards."""
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
    """Make the manifest of a checkpoint fit its files, as whoever replaced one of them would.

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
    """Put something in the place of a file."""
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
    """Interrupt what takes longer: to open a pipe would wait for ever."""

    def too_long(*_: object) -> None:
        raise TimeoutError(f"it took more than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
