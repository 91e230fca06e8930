"""Checkpoints that tests have changed on purpose."""

import json
from pathlib import Path

from craft_ds.checkpoints.manifest import MANIFEST, hash_files, write_manifest


def renew_manifest(directory: Path, **changes: object) -> None:
    """Let the manifest of a checkpoint fit the files as they are now.

    Args:
        directory: The checkpoint.
        changes: Other values of `step`, `world_size` or `engine`.
    """
    old = json.loads((directory / MANIFEST).read_text())
    kept = {name: old[name] for name in ("step", "world_size", "engine")} | changes
    write_manifest(directory, files=hash_files(directory, 0, 1), **kept)
