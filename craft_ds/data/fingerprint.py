"""Fingerprint of a data set's files: a folder recorded anew under the same name is another data set."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

_COMPLETE, _ENDS = 64 << 20, 1 << 20


def dataset_fingerprint(root: str | Path) -> dict[str, str]:
    """Return a SHA-256 of each part of a data set, independent of where it lies.

    Parquet files of more than 64 MiB are read at both ends only; the end has the file's statistics. Of videos
    only names and sizes count.

    Args:
        root: The data set's folder.

    Returns:
        The hashes by the name of the part: `meta`, `data`, `videos`.
    """
    root = Path(root)
    meta = [*root.glob("meta/*.json"), *root.glob("meta/**/*.parquet")]
    return {
        "meta": _hash(root, meta, contents=True),
        "data": _hash(root, root.glob("data/**/*.parquet"), contents=True),
        "videos": _hash(root, root.glob("videos/**/*.mp4"), contents=False),
    }


def changed_parts(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names of the parts that differ."""
    return [part for part in sorted(before.keys() | now.keys()) if before.get(part) != now.get(part)]


def _hash(root: Path, files: "list[Path] | Iterator[Path]", *, contents: bool) -> str:
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
