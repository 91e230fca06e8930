"""Fingerprint of a data set: a folder recorded anew under the same name is another data set.

Pictures and videos do not count, so that a run that ended at a damaged one can resume after a repair. Nor
does `meta/stats.json`: the statistics that train are those of the policy's processors.
"""

import hashlib
from pathlib import Path

from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_ds.data.value_limits import column

_NUMBERS = ("float", "int", "uint", "bool")


def dataset_fingerprint(*parts: LeRobotDataset) -> dict[str, str]:
    """Return a SHA-256 of the metadata and of the numbers of a data set, independent of where it lies.

    Args:
        *parts: The data set, opened for different episodes.

    Returns:
        The hashes by the name of the folder: `meta` and `data`.
    """
    root, meta, data = Path(parts[0].root), hashlib.sha256(), hashlib.sha256()
    files = {*root.glob("meta/*.json"), *root.glob("meta/**/*.parquet")} - {root / "meta" / "stats.json"}
    for file in sorted(files):
        meta.update(f"{file.relative_to(root).as_posix()}\0".encode())
        meta.update(hashlib.sha256(file.read_bytes()).digest())
    for part in parts:
        for key, feature in sorted(part.meta.features.items()):
            if feature["dtype"].startswith(_NUMBERS) and len(feature["shape"]) == 1:
                values = column(part, key)
                data.update(f"{key}\0{values.shape}\0".encode())
                data.update(values.data)
    return {"meta": meta.hexdigest(), "data": data.hexdigest()}


def changed_parts(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names of the folders that differ."""
    return [part for part in sorted(before.keys() | now.keys()) if before.get(part) != now.get(part)]
