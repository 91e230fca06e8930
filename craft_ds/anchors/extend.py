"""Extension of an anchor cache by new tasks: one directory of complete caches.

    NAME/caches.json     SHA-256 of the metadata of each cache
    NAME/00000/          the caches of the old directory, linked or copied
    NAME/00001/          the new one

Each cache keeps its own teacher, L0, targets and checksums. The new one is built in the hidden sibling
`.NAME.new`, so that an interrupted build is continued by the same command.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from craft_ds.anchors.build import build_anchor_cache
from craft_ds.anchors.build_plan import BuildOptions
from craft_ds.anchors.cache import METADATA_FILE, AnchorCache
from craft_ds.anchors.cache_list import (
    CACHES_FILE,
    CACHES_FORMAT,
    AnchorCaches,
    cache_directories,
    open_caches,
    part_name,
)
from craft_ds.errors import UserError
from craft_ds.policies.loading import load_policy_config, load_processors, resolve_policy_path
from craft_ds.tensor_io.filesystem import atomic_directory, file_sha256
from craft_ds.tensor_io.output_lock import locked_output


def extend_anchor_cache(options: BuildOptions, old: str | Path) -> bool:
    """Build a cache and put it into one directory with the caches of another one, which is not changed.

    Args:
        options: Options of the new cache; `output_dir` is the directory of all.
        old: An anchor cache, or an extended one.

    Returns:
        True if anything was built, False if the directory was complete already.

    Raises:
        UserError: As `build_anchor_cache`; or `old` is not an anchor cache, the new cache does not fit it, or
            the output directory holds other files.
    """
    output = Path(options.output_dir)
    existing = open_caches([str(old)], verify=False)
    sources = [part.path for part in existing.parts]
    added = output.with_name(f".{output.name}.new")
    with locked_output(output):
        if output.exists():
            *copies, newest = cache_directories(output)
            if _fingerprints(copies) != _fingerprints(sources):
                raise UserError(
                    f"--output_dir={output} exists and does not extend {old}: choose another directory"
                )
            shutil.rmtree(added, ignore_errors=True)  # of a run that was killed at its end
            return build_anchor_cache(replace(options, output_dir=str(newest)))
        _check_teacher(options, existing)
        build_anchor_cache(replace(options, output_dir=str(added)))
        AnchorCaches([*existing.parts, AnchorCache.open(added, verify=False)])  # checks that they fit
        with atomic_directory(output) as temporary:
            for number, source in enumerate([*sources, added]):
                shutil.copytree(source, temporary / part_name(number), copy_function=_link)
            listed = {"format": CACHES_FORMAT, "version": 1, "caches": _fingerprints([*sources, added])}
            (temporary / CACHES_FILE).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(added)
    return True


def _check_teacher(options: BuildOptions, existing: AnchorCache | AnchorCaches) -> None:
    """Check that the teacher's processors are those of the existing anchors, before anything is built."""
    directory = resolve_policy_path(options.policy_path)
    config = load_policy_config(directory)
    existing.check_policy(config)
    existing.check_preprocessor(load_processors(config, directory)[0], directory)


def _fingerprints(directories: list[Path]) -> list[str]:
    return [file_sha256(directory / METADATA_FILE) for directory in directories]


def _link(source: str, target: str) -> None:
    """Link a file, or copy it where the file system cannot."""
    try:
        os.link(os.path.realpath(source), target)  # not a link to a link, as in a hub's snapshot
    except OSError:
        shutil.copyfile(source, target)
