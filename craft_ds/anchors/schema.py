"""Schema of the metadata of an anchor cache.

The checksum shows that nothing changed since the file was written, but not who wrote it.
"""

import math
import re
from collections.abc import Iterable
from typing import Any

import torch
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)

from craft_ds.anchors.preprocessing import STATISTICS
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES, TOP
from craft_ds.policies.pi0_fast.vision import features_key
from craft_ds.tensor_io.safe_json import is_count

TOKEN_FIELDS = (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK, ACTION_TOKENS, ACTION_TOKEN_MASK)
ORIGIN_FIELDS = ("task", "episode", "frame")
DTYPES = {
    "uint8": torch.uint8,
    "int32": torch.int32,
    "bool": torch.bool,
    "float16": torch.float16,
    "float32": torch.float32,
}
TARGETS = tuple(name for name, loss in RETENTION_LOSSES.items() if loss.targets is not None)
"""Targets of the teacher that a cache may hold, named as the retention losses that need them."""
_SHA256 = re.compile("[0-9a-f]{64}")
_MAX_SIZE = 1 << 31  # anchors, and entries of one field of an anchor


def check_metadata(metadata: dict[str, Any]) -> None:
    """Check type, bounds and consistency of every entry that is read to open a cache.

    Args:
        metadata: Content of `metadata.json`.

    Raises:
        ValueError: An entry has a value that no build writes.
        KeyError, TypeError, AttributeError: An entry is missing or of another type.
    """
    tasks, cameras = metadata["dataset"]["tasks"], metadata["cameras"]
    _check(_are_texts(tasks) and tasks, "dataset.tasks")
    _check(_are_texts(cameras) and len({*cameras}) == len(cameras), "cameras")
    heldout = metadata["dataset"]["episodes"]["heldout"]
    _check(isinstance(heldout, list) and all(is_count(episode) for episode in heldout), "dataset.episodes")
    _check(isinstance(metadata["teacher"]["path"], str), "teacher.path")
    _check(isinstance(metadata["tokenizer"], str), "tokenizer")
    _check(metadata["request"]["image_size"] in ("dataset", "model"), "request.image_size")
    features = metadata.get("vision_features")
    _check(features is None or isinstance(features["fingerprint"], str), "vision_features")
    missing = metadata.get("missing_cameras")
    _check(missing is None or (_are_texts(missing) and not {*missing} & {*cameras}), "missing_cameras")
    chunk_size = metadata.get("chunk_size")
    _check(chunk_size is None or is_count(chunk_size, 1), "chunk_size")
    _check_origin(metadata["dataset"])
    processors = metadata.get("processors")
    _check(processors is None or isinstance(processors, dict), "processors")
    if metadata.get("preprocessing") is not None:
        _check_preprocessing(metadata["preprocessing"])
    targets = metadata.get("targets") or {}
    _check(isinstance(targets, dict) and {*targets} <= {*TARGETS}, "targets")
    _check_fields(metadata["fields"], cameras, features is not None, targets)
    _check_shards(metadata["shards"], metadata["num_samples"], metadata["request"]["shard_size"])
    for name, losses in {**targets, "teacher_loss": metadata["teacher_loss"]}.items():
        for split in ("train", "heldout", "all"):
            overall = losses[split]["overall"]
            _check(overall is None or _is_loss(overall), f"{name}.{split}")
            _check(is_count(losses[split]["tokens"], overall is not None), f"{name}.{split}")
            _check(all(map(_is_loss, losses[split]["by_task"].values())), f"{name}.{split}")
            _check({*losses[split]["by_task"]} <= {*tasks}, f"{name}.{split}")


def target_fields(target: str, action_length: int, width: int) -> dict[str, tuple[str, list[int]]]:
    """Return dtype and shape of an anchor's fields for a target.

    Args:
        target: One of `TARGETS`.
        action_length: Action tokens of an anchor, padding included.
        width: Width of the decoder's output.
    """
    shapes = {
        "teacher_tokens": (("int32", [action_length]), ("bool", [action_length])),
        "teacher_kl": (("int32", [action_length - 1, TOP]), ("float32", [action_length - 1, TOP])),
        "hidden": (("float32", [width]),),
    }
    return dict(zip(RETENTION_LOSSES[target].fields, shapes[target], strict=True))


def _check_fields(
    fields: dict[str, Any], cameras: list[str], with_features: bool, targets: Iterable[str]
) -> None:
    """Check the names, types and shapes of the fields; -1 stands for any size."""
    wanted: dict[str, tuple[str, list[int]]] = {name: ("int32", []) for name in ORIGIN_FIELDS}
    wanted |= {name: ("bool" if "mask" in name else "int32", [-1]) for name in TOKEN_FIELDS}
    wanted |= {camera: ("uint8", [-1] * 3) for camera in cameras}
    if with_features:
        wanted |= {features_key(camera): ("float16", [-1] * 2) for camera in cameras}
    length = fields[ACTION_TOKENS]["shape"][0]
    for target in targets:
        wanted |= target_fields(target, length, width=-1)
    _check(fields.keys() == wanted.keys(), "fields")
    for name, (dtype, sizes) in wanted.items():
        shape = fields[name]["shape"]
        _check(fields[name]["dtype"] == dtype, f"fields: the type of {name}")
        _check(
            isinstance(shape, list)
            and len(shape) == len(sizes)
            and all(is_count(size, 1) for size in shape)
            and all(known in (-1, size) for known, size in zip(sizes, shape, strict=True))
            and math.prod(shape) < _MAX_SIZE,
            f"fields: the shape of {name}",
        )


def _check_origin(dataset: dict[str, Any]) -> None:
    """Check the entries of the old data set that caches of craft-ds 0.1 lack."""
    fps, features, frames = (dataset.get(name) for name in ("fps", "features", "task_frames"))
    _check(fps is None or (_is_number(fps) and fps > 0), "dataset.fps")
    for key, feature in ({} if features is None else features).items():
        shape, names = feature["shape"], feature["names"]
        _check(isinstance(shape, list) and all(map(is_count, shape)), f"dataset.features: the shape of {key}")
        _check(names is None or isinstance(names, list | dict), f"dataset.features: the names of {key}")
    _check(
        frames is None
        or (isinstance(frames, list) and len(frames) == len(dataset["tasks"]) and all(map(is_count, frames))),
        "dataset.task_frames",
    )


def _check_preprocessing(steps: Any) -> None:
    """Check the description of the teacher's preprocessor."""
    _check(isinstance(steps, list), "preprocessing")
    for step in steps:
        _check(isinstance(step["step"], str), "preprocessing")
        features = step["features"] if step["step"] == "normalizer" else {}
        for key, entry in features.items():
            values = [entry[name] for name in STATISTICS[entry["mode"]]]
            _check(
                _is_number(entry["eps"])
                and all(isinstance(value, list) and all(map(_is_number, value)) for value in values)
                and len(values[0]) == len(values[1]),
                f"preprocessing: the statistics of {key}",
            )


def _check_shards(shards: list[Any], samples: Any, shard_size: Any) -> None:
    """Check that every shard but the last is full, and that together they have all samples."""
    _check(is_count(samples, 1) and samples < _MAX_SIZE, "num_samples")
    _check(is_count(shard_size, 1), "request.shard_size")
    _check(isinstance(shards, list) and len(shards) == -(-samples // shard_size), "shards")
    for number, shard in enumerate(shards):
        size = min(shard_size, samples - number * shard_size)
        _check(is_count(shard["samples"]) and shard["samples"] == size, f"shards: sample counts of {number}")
        _check(is_count(shard["bytes"]), f"shards: the size of {number}")
        _check(_SHA256.fullmatch(shard["sha256"]), f"shards: the SHA-256 of {number}")


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_loss(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _check(sound: object, what: str) -> None:
    if not sound:
        raise ValueError(f"its {what[:200]}")
