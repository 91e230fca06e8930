"""Checkpoints that tests modify on purpose."""

import json
from pathlib import Path

from craft_ds.checkpoints.manifest import MANIFEST, hash_files, write_manifest


def renew_manifest(directory: Path, **changes: object) -> None:
    """Rewrite the manifest of a checkpoint to match its files.

    Args:
        directory: The checkpoint.
        changes: New values of `step`, `world_size` or `engine`.
    """
    old = json.loads((directory / MANIFEST).read_text())
    kept = {name: old[name] for name in ("step", "world_size", "engine")} | changes
    write_manifest(directory, files=hash_files(directory, 0, 1), **kept)
