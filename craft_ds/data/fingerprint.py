"""Fingerprint of a data set's files: a folder recorded anew under the same name is another data set."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from lerobot.datasets.lerobot_dataset import LeRobotDataset

_COMPLETE, _ENDS = 64 << 20, 1 << 20


def dataset_fingerprint(*parts: LeRobotDataset) -> dict[str, str]:
    """Return a SHA-256 of each kind of file that a data set uses, independent of where it lies.

    `meta/stats.json` does not count: the statistics that train are those of the policy's processors.
    Parquet files of more than 64 MiB are read at both ends only; the end has the file's statistics. Of videos
    only names and sizes count.

    Args:
        *parts: The data set, opened for different episodes.

    Returns:
        The hashes by the name of the kind: `meta`, `data`, `videos`.
    """
    root = Path(parts[0].root)
    meta = {*root.glob("meta/*.json"), *root.glob("meta/**/*.parquet")} - {root / "meta" / "stats.json"}
    used = [root / file for part in parts for file in part.reader.get_episodes_file_paths()]
    tables = [file for file in used if file.suffix == ".parquet"]
    return {
        "meta": _hash(root, meta, contents=True),
        "data": _hash(root, tables, contents=True),
        "videos": _hash(root, set(used) - set(tables), contents=False),
    }


def changed_parts(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the kinds of files that differ."""
    return [part for part in sorted(before.keys() | now.keys()) if before.get(part) != now.get(part)]


def _hash(root: Path, files: Iterable[Path], *, contents: bool) -> str:
    digest = hashlib.sha256()
    for file in sorted(set(files)):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root).as_posix()}\0{size}\0".encode())
        if contents:
            with open(file, "rb") as stream:
                if size <= _COMPLETE:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
                else:
                    digest.update(stream.read(_ENDS))
                    stream.seek(-_ENDS, 2)
                    digest.update(stream.read())
    return digest.hexdigest()
