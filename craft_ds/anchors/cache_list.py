"""Several anchor caches as one: tasks of several teachers, or of one that learns task after task."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor

from craft_ds.anchors.cache import METADATA_FILE, SPLITS, AnchorCache
from craft_ds.anchors.preprocessing import first_difference
from craft_ds.errors import UserError, one_line
from craft_ds.tensor_io.filesystem import file_sha256
from craft_ds.tensor_io.safe_json import read_object

CACHES_FILE = "caches.json"
CACHES_FORMAT = "craft-ds anchor caches"


class AnchorCaches:
    """Several caches behind the interface of one `AnchorCache`.

    Anchors are numbered cache after cache. A task text that several caches have is one task, so that it is
    drawn as often as any other. Targets and losses of a task are those of its own cache and teacher.

    Args:
        parts: The caches, at least one.

    Attributes:
        path: All directories, for messages.
        parts: The caches.
        tasks: The tasks' texts, each once.
        cameras: Names of the image fields.
        task: Task of each anchor, int32 (N,).
        task_frames: Frames of each task in the data sets.
        splits: Anchors of "train" and "heldout".
        teacher_loss: L0, as `loss_of` returns it for the recorded actions.

    Raises:
        UserError: A cache is named twice, two do not fit one policy, or an episode that one holds out gives
            anchors to train in another.
    """

    def __init__(self, parts: Sequence[AnchorCache]) -> None:
        self.parts = list(parts)
        self.path = ", ".join(str(part.path) for part in parts)
        for one, other in combinations(parts, 2):
            _check_distinct(one, other)
            _check_alike(one, other)
        self.tasks = list(dict.fromkeys(text for part in parts for text in part.tasks))
        self.cameras = self.parts[0].cameras
        numbers = [torch.tensor([self.tasks.index(text) for text in part.tasks]).int() for part in parts]
        self.task = torch.cat([own[part.task] for own, part in zip(numbers, parts, strict=True)])
        frames = np.zeros(len(self.tasks), dtype=np.int64)
        for own, part in zip(numbers, parts, strict=True):
            np.add.at(frames, own.numpy(), part.task_frames)
        self.task_frames: list[int] = frames.tolist()
        self._starts = [0, *accumulate(map(len, parts))]
        self.splits: dict[str, list[int]] = {split: [] for split in SPLITS}
        for first, part in zip(self._starts, parts, strict=False):
            for split, members in part.splits.items():
                self.splits[split] += [first + index for index in members]
        self.teacher_loss = self.loss_of("token_ce")

    def __len__(self) -> int:
        return self._starts[-1]

    def loss_of(self, retention_loss: str) -> dict[str, Any]:
        """Return L0 of all caches, in the form of `AnchorCache.teacher_loss`.

        A split's is the mean over the tokens of all caches. That of a task which several caches have is the
        mean of theirs, weighted by their anchors.

        Raises:
            UserError: A cache holds no targets for this loss.
        """
        losses = [part.loss_of(retention_loss) for part in self.parts]
        return {
            split: self._joint_loss(split, [loss[split] for loss in losses]) for split in (*SPLITS, "all")
        }

    def _joint_loss(self, split: str, losses: list[dict[str, Any]]) -> dict[str, Any]:
        tokens = sum(loss["tokens"] for loss in losses)
        total = sum(loss["overall"] * loss["tokens"] for loss in losses if loss["overall"] is not None)
        by_task = {}
        for text in self.tasks:
            known = [
                (loss["by_task"][text], count)
                for loss, part in zip(losses, self.parts, strict=True)
                if text in loss["by_task"] and (count := part.count(text, split))
            ]
            if known:
                values, weights = zip(*known, strict=True)
                by_task[text] = float(np.average(values, weights=weights))
        return {"overall": total / tokens if tokens else None, "by_task": by_task, "tokens": tokens}

    def check_policy(self, config: PreTrainedConfig) -> None:
        """Check every cache, as `AnchorCache.check_policy`."""
        for part in self.parts:
            part.check_policy(config)

    def check_preprocessor(self, preprocessor: PolicyProcessorPipeline, directory: Path) -> None:
        """Check every cache, as `AnchorCache.check_preprocessor`."""
        for part in self.parts:
            part.check_preprocessor(preprocessor, directory)

    def read(
        self, indices: Sequence[int], vision_features: bool = False, retention_loss: str = "token_ce"
    ) -> dict[str, Tensor]:
        """Read anchors, as `AnchorCache.read`; `episode` and `frame` are those of their own data sets."""
        wanted = np.asarray(indices)
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        batch: dict[str, Tensor] = {}
        for number in np.unique(owner):
            rows = np.flatnonzero(owner == number)
            own = (wanted[rows] - self._starts[number]).tolist()
            for name, values in self.parts[number].read(own, vision_features, retention_loss).items():
                if name not in batch:
                    batch[name] = values.new_empty(len(wanted), *values.shape[1:])
                batch[name][rows] = values
        batch["task"] = self.task[wanted]
        return batch

    def term_counts(self, retention_loss: str) -> Tensor:
        """Return the number of terms of each anchor, as `AnchorCache.term_counts`."""
        return torch.cat([part.term_counts(retention_loss) for part in self.parts])


Anchors = AnchorCache | AnchorCaches


def part_name(number: int) -> str:
    """Return the name of a cache within an extended one."""
    return f"{number:05d}"


def cache_directories(path: Path) -> list[Path]:
    """Return the caches of an extended cache (`craft_ds.anchors.extend`); any other directory is one cache.

    Raises:
        UserError: The list of an extended cache is damaged, or a cache is not the listed one.
    """
    file = path / CACHES_FILE
    if not file.is_file():
        return [path]
    try:
        content = read_object(file)
        known = (content["format"], content["version"]) == (CACHES_FORMAT, 1)
        listed = content["caches"]
        if not known or not isinstance(listed, list) or not listed:
            raise ValueError("another format, or no caches")
        directories = [path / part_name(number) for number in range(len(listed))]
        for directory, sha256 in zip(directories, listed, strict=True):
            if file_sha256(directory / METADATA_FILE) != sha256:
                raise ValueError(f"{directory.name} is another cache than the listed one")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}); extend the anchor cache again") from error
    return directories


def open_caches(paths: Sequence[str], verify: bool = True) -> Anchors:
    """Open one cache, or several as one.

    Args:
        paths: Directories of caches or of extended ones.
        verify: As for `AnchorCache.open`.

    Raises:
        UserError: As `AnchorCache.open`, `AnchorCaches` and `cache_directories`.
    """
    directories = [directory for path in paths for directory in cache_directories(Path(path))]
    parts = [AnchorCache.open(directory, verify) for directory in directories]
    return parts[0] if len(parts) == 1 else AnchorCaches(parts)


def _check_distinct(one: AnchorCache, other: AnchorCache) -> None:
    """Check that two caches are not the same, and that none trains on episodes that the other holds out."""
    if one.path.resolve() == other.path.resolve():
        raise UserError(f"--craft.anchor_cache_dir names {one.path} twice: remove one")
    origins = [part.metadata["dataset"].get("meta_sha256") for part in (one, other)]
    if origins[0] is None or origins[0] != origins[1]:
        return
    for held, trained in ((one, other), (other, one)):
        both = {*held.episodes("heldout")} & {*trained.episodes("train")}
        if both:
            raise UserError(
                f"anchor caches {held.path} and {trained.path} are of one data set, and its episode "
                f"{min(both)} is held out in the first and trained in the second: build them with the same "
                "--seed and --heldout_fraction"
            )


def _check_alike(one: AnchorCache, other: AnchorCache) -> None:
    """Check that the anchors of two caches can be in one batch of one policy."""
    for what, mine, its in _settings(one, other):
        if mine != its:
            raise UserError(
                f"anchor caches {one.path} and {other.path} do not fit one policy: {what} {mine} in the "
                f"first, {its} in the second; build both with the same processors and the same flags"
            )


def _settings(one: AnchorCache, other: AnchorCache) -> Iterator[tuple[str, Any, Any]]:
    """Yield the names and values of what must be equal in two caches."""
    first, second = one.metadata, other.metadata
    yield "cameras", sorted(one.cameras), sorted(other.cameras)
    yield "tokenizer", first["tokenizer"][:12], second["tokenizer"][:12]
    if None not in (first.get("chunk_size"), second.get("chunk_size")):
        yield "chunk_size", first["chunk_size"], second["chunk_size"]
    for name in first["fields"].keys() & second["fields"].keys():
        yield f"shape of {name}", first["fields"][name]["shape"], second["fields"][name]["shape"]
    if None not in (first.get("preprocessing"), second.get("preprocessing")):
        difference = first_difference(first["preprocessing"], second["preprocessing"])
        yield difference or ("preprocessing", None, None)
