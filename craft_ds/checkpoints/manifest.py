"""The manifest of a checkpoint: sizes and checksums of its files.

`manifest.json` is written last. It is the complete list of the directory: it has every other file with its
size and the XXH3 checksum (128 bits, https://xxhash.com) of each segment, and contains a SHA-256 of itself. A
directory without a matching manifest is never loaded, nor one with a file that the manifest does not list.
The checksums detect damage, not forgery: anyone who can write the files can write the manifest, so the
contents of all files are still validated as untrusted input.
"""

import hashlib
import json
import math
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash

from craft_ds.distributed.collectives import fail_together, gather_objects
from craft_ds.errors import UserError
from craft_ds.tensor_io.per_rank_file import piece_path
from craft_ds.tensor_io.safe_json import is_count, path_inside, read_object

MANIFEST = "manifest.json"
FORMAT_VERSION = 2
# Ranks hash different segments of a file in parallel.
SEGMENT = 1 << 28
CHECKSUMS = "xxh3_128"
_CHECKSUM = re.compile("[0-9a-f]{32}")
_REQUIRED = (
    "config.json",
    "train_config.json",
    "policy_preprocessor.json",
    "policy_postprocessor.json",
    "scheduler.pt",
    "craft_state.pt",
)
_TENSORS = ("model", "adapter_model", "optimizer")
# Notes that nothing reads, such as the model card that an upload adds.
_NEVER_READ = (".md",)


def write_manifest(
    directory: Path, *, step: int, world_size: int, engine: str, files: dict[str, Any]
) -> None:
    """Write the manifest of a directory whose other files are complete.

    Args:
        directory: The checkpoint, under its temporary name.
        step: Optimizer steps done.
        world_size: Number of ranks that wrote it.
        engine: Name of their engine.
        files: From `hash_files`.

    Raises:
        OSError: The disk is full or not writable.
    """
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "engine": engine,
        "segment_bytes": SEGMENT,
        "files": files,
    }
    manifest["sha256"] = _own_sha256(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def hash_files(
    directory: Path, rank: int, world_size: int, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """Read back every file of a checkpoint; return sizes and segment hashes. Collective: call on all ranks.

    Args:
        directory: The checkpoint; no rank may write to it any more.
        rank: This rank.
        world_size: Number of ranks that share the work.
        group: As for `gather_objects`.

    Raises:
        UserError: On all ranks: a file cannot be read.
    """

    def hash_own_segments() -> tuple[dict[Path, int], dict[tuple[str, int], str]]:
        try:
            directory.stat()  # of a missing directory, `rglob` returns nothing
            paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
            sizes = {path: path.stat().st_size for path in paths}
            segments = [(path, start) for path in paths for start in range(0, max(sizes[path], 1), SEGMENT)]
            mine = {
                (str(path.relative_to(directory)), start): _hash(path, start, SEGMENT)
                for path, start in segments[rank::world_size]
            }
        except OSError as error:
            raise UserError(f"{directory} cannot be read back: {error}") from error
        return sizes, mine

    sizes, mine = fail_together(hash_own_segments, group)()
    # From here on rank 0 may rename the directory: the other ranks must not access it again.
    found = {key: value for part in gather_objects(mine, group) for key, value in part.items()}
    return {
        name: {
            "bytes": size,
            CHECKSUMS: [value for (other, _), value in sorted(found.items()) if other == name],
        }
        for path, size in sizes.items()
        for name in [str(path.relative_to(directory))]
    }


def _hash(path: Path, start: int, length: int) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        file.seek(start)
        remaining = length
        while remaining and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint and check the sizes of its files.

    Raises:
        UserError: The directory is not a checkpoint, the manifest is damaged or of another format version,
            or a file is missing or has another size.
    """
    path = directory / MANIFEST
    try:
        manifest = read_object(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{directory} is not a craft-ds checkpoint: it has no {MANIFEST}") from None
    except (OSError, ValueError):
        raise _damaged(path) from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {manifest.get('format_version')}, but this craft-ds reads version "
            f"{FORMAT_VERSION}"
        )
    if manifest.pop("sha256", None) != _own_sha256(manifest) or not _is_valid(directory, manifest):
        raise _damaged(path)
    _check_complete(path, manifest)
    for name, entry in manifest["files"].items():
        file = directory / name
        if not file.is_file() or file.stat().st_size != entry["bytes"]:
            raise UserError(f"{file} is missing or incomplete: resume from an older checkpoint")
    _check_nothing_else(directory, manifest["files"])
    return manifest


def _check_complete(path: Path, manifest: dict[str, Any]) -> None:
    """Check that a manifest lists the files of one of the two layouts, and no others of their kind."""
    names = set(manifest["files"])
    adapters = "adapter_config.json" in names
    weights = "adapter_model" if adapters else "model"
    missing = [name for name in _REQUIRED if name not in names]
    pieces = {
        piece_path(Path(f"{stem}.safetensors"), rank).name
        for stem in (weights, "optimizer")
        for rank in range(min(manifest["world_size"], len(names)))  # a forged number may be huge
    }
    joined = {f"{stem}.safetensors" for stem in (weights, "optimizer")}
    found = {name for name in names if name.endswith(".safetensors") and name.split(".")[0] in _TENSORS}
    missing += [] if found in (pieces, joined) else sorted((joined if found & joined else pieces) - found)
    if missing:
        raise UserError(f"{path} does not list {missing[0]}: resume from an older checkpoint")
    if found not in (pieces, joined):
        raise UserError(
            f"{path} lists {min(found - joined if found & joined else found - pieces)}, which does not belong"
            " to its layout: resume from an older checkpoint"
        )


def _check_nothing_else(directory: Path, listed: Container[str]) -> None:
    """Check that a directory has regular files only, and no other that something could read."""
    for file in directory.rglob("*"):
        name = str(file.relative_to(directory))
        if file.is_symlink():
            raise UserError(f"{file} is a link: replace it by the file, or resume from an older checkpoint")
        hidden = any(part.startswith(".") for part in file.relative_to(directory).parts)
        if file.is_dir() or hidden or name == MANIFEST or file.suffix in _NEVER_READ:
            continue
        if name not in listed:
            raise UserError(
                f"{file} is not a file of the checkpoint ({MANIFEST} does not list it): move it away, or "
                "resume from an older checkpoint"
            )


def _damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged: resume from an older checkpoint")


def _own_sha256(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _is_valid(directory: Path, manifest: dict[str, Any]) -> bool:
    """Return whether every entry is valid: a matching checksum does not imply valid contents."""
    counts = [manifest.get(name) for name in ("step", "world_size", "segment_bytes")]
    segment, files = counts[-1], manifest.get("files")
    return (
        all(map(is_count, counts))
        and all(counts[1:])
        and isinstance(manifest.get("engine"), str)
        and isinstance(files, dict)
        and all(_is_inside(directory, name) and _is_entry(entry, segment) for name, entry in files.items())
    )


def _is_entry(entry: Any, segment: Any) -> bool:
    if not (isinstance(entry, dict) and is_count(entry.get("bytes"))):
        return False
    hashes = entry.get(CHECKSUMS)
    return (
        isinstance(hashes, list)
        and len(hashes) == max(1, math.ceil(entry["bytes"] / segment))
        and all(isinstance(value, str) and _CHECKSUM.fullmatch(value) for value in hashes)
    )


def _is_inside(directory: Path, name: str) -> bool:
    try:
        return path_inside(directory, name) != directory / MANIFEST
    except ValueError:
        return False


def verify_checkpoint(directory: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Check every byte of a checkpoint, the ranks in parallel. Collective: call on all ranks.

    Returns:
        The manifest.

    Raises:
        UserError: On all ranks, naming the damaged file.
    """
    manifest = fail_together(read_manifest)(directory)
    length = manifest["segment_bytes"]
    segments = [
        (name, index) for name, entry in manifest["files"].items() for index in range(len(entry[CHECKSUMS]))
    ]

    def check() -> None:
        for name, index in segments[rank::world_size]:
            path = directory / name
            try:
                found = _hash(path, index * length, length)
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error}): resume from an older checkpoint") from None
            if found != manifest["files"][name][CHECKSUMS][index]:
                raise UserError(f"{path} is damaged (checksum): resume from an older checkpoint")

    fail_together(check)()
    return manifest
