"""The anchor cache on disk: format, integrity checks, and random reads.

A cache is a directory of `metadata.json` and `shard_00000.safetensors`, `shard_00001.safetensors`, …
Anchor i is row `i % shard_size` of shard `i // shard_size`. Each shard holds, for its n anchors:

- one uint8 tensor (n, C, H, W) per camera, named as the policy names the camera;
- if the cache was built with them, one float16 tensor (n, patches, width) per camera,
  named `<camera>.vision_features`: the output of the teacher's vision tower for those images;
- if the cache was built with them, the teacher's targets of a retention loss, named `teacher.…`
  (`craft_ds.policies.pi0_fast.retention`);
- the prompt and the action tokens of the teacher's own processors, int32 (n, length), and their masks, bool;
- `task`, `episode` and `frame`: int32 (n,), the origin of the anchor.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import ACTION_TOKENS, OBS_LANGUAGE_TOKENS
from safetensors import SafetensorError, safe_open
from torch import Tensor

from craft_ds.anchors.preprocessing import describe_preprocessor, first_difference, processor_sha256
from craft_ds.anchors.schema import DTYPES, check_metadata
from craft_ds.errors import UserError, one_line
from craft_ds.policies.directory import PREPROCESSOR
from craft_ds.policies.loading import (
    load_policy_config,
    load_processors,
    policy_cameras,
    tokenizer_fingerprint,
)
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES
from craft_ds.policies.pi0_fast.vision import features_key
from craft_ds.tensor_io.filesystem import file_sha256
from craft_ds.tensor_io.safe_json import read_object
from craft_ds.tensor_io.tensor_file import TensorFile

FORMAT = "craft-ds anchor cache"
VERSION = 1
METADATA_FILE = "metadata.json"
SPLITS = ("train", "heldout")
_CODES = {"uint8": "U8", "int32": "I32", "bool": "BOOL", "float16": "F16", "float32": "F32"}


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard_{number:05d}.safetensors"


def partial_directory(path: Path) -> Path:
    """Return the sibling of a cache that holds its unfinished build."""
    return path.with_name(f".{path.name}.partial")


def metadata_sha256(metadata: dict[str, Any]) -> str:
    """Return the SHA-256 of the metadata, without its own `sha256` entry, as canonical JSON."""
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


class AnchorCache:
    """A finished anchor cache, opened for reading by `open`.

    Attributes:
        path: The directory.
        metadata: Content of `metadata.json`.
        tasks: The tasks' texts; `task` of an anchor is an index into it.
        cameras: Names of the image fields.
        splits: Anchor indices of "train" and "heldout". The two share no episode.
        task: Task of each anchor, int32 (N,).
        episode: Episode of each anchor in the old data set, int32 (N,).
        teacher_loss: L0, the teacher's own mean loss per action token, by split ("train", "heldout" and
            "all"): `{"overall": float, "by_task": {text: float}, "tokens": int}`. See `loss_of`.
        targets: The targets that the anchors hold, by retention loss, with L0 in the same form.
        task_frames: Frames of each task in the old data set.
        parts: The cache itself: `craft_ds.anchors.cache_list.AnchorCaches` has several.
        vision_fingerprint: Fingerprint of the vision tower that made its features (see
            `craft_ds.policies.pi0_fast.vision.vision_fingerprint`); None without features.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], handles: list[Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.tasks: list[str] = metadata["dataset"]["tasks"]
        self.cameras: list[str] = metadata["cameras"]
        self.task_frames: list[int] = metadata["dataset"].get("task_frames") or [1] * len(self.tasks)
        self.parts: list[AnchorCache] = [self]
        self.teacher_loss: dict[str, dict[str, Any]] = metadata["teacher_loss"]
        self.targets: dict[str, dict[str, Any]] = metadata.get("targets") or {}
        self.vision_fingerprint: str | None = metadata.get("vision_features", {}).get("fingerprint")
        settings = metadata["teacher"].get("config")
        recorded = settings.get("chunk_size") if isinstance(settings, dict) else None
        self._chunk_size: int | None = metadata.get("chunk_size", recorded)
        self._shard_size: int = metadata["request"]["shard_size"]
        self._fields: dict[str, dict[str, Any]] = metadata["fields"]
        self._slices = [{name: handle.get_slice(name) for name in self._fields} for handle in handles]
        self.task = self._column("task")
        self.episode = self._column("episode")
        heldout = torch.isin(self.episode, torch.tensor(metadata["dataset"]["episodes"]["heldout"]))
        self.splits: dict[str, list[int]] = {
            "train": torch.nonzero(~heldout).flatten().tolist(),
            "heldout": torch.nonzero(heldout).flatten().tolist(),
        }
        self._check_columns()

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "AnchorCache":
        """Check a cache and open it.

        Presence, size, types and sample count of every shard are always checked. Files are memory-mapped and
        kept open.

        Args:
            path: The cache's directory.
            verify: Also compare SHA-256 checksums, which reads every byte. One process per machine is
                enough: with many ranks, pass True on local rank 0 only.

        Raises:
            UserError: There is no cache, its build was interrupted, its format version is unknown, or a shard
                is missing or damaged.
        """
        path = Path(path)
        metadata = read_metadata(path)
        handles = []
        for number, shard in enumerate(metadata["shards"]):
            handles.append(_open_shard(path / shard_name(number), shard, metadata["fields"], verify))
        return cls(path, metadata, handles)

    def __len__(self) -> int:
        return self.metadata["num_samples"]

    def count(self, text: str, split: str) -> int:
        """Return the number of a task's anchors in "train", "heldout" or "all"."""
        members = self.task[self.splits[split]] if split in self.splits else self.task
        return int((members == self.tasks.index(text)).sum())

    def episodes(self, split: str) -> list[int]:
        """Return the episodes of the old data set that gave a split its anchors."""
        return self.episode[self.splits[split]].unique().tolist()

    def loss_of(self, retention_loss: str) -> dict[str, Any]:
        """Return L0, the teacher's own mean of a retention loss, in the form of `teacher_loss`.

        Raises:
            UserError: The cache holds no targets for it.
        """
        if RETENTION_LOSSES[retention_loss].targets is None:
            return self.teacher_loss
        if retention_loss not in self.targets:
            raise UserError(
                f"--craft.retention_loss={retention_loss}: anchor cache {self.path} holds no such targets; "
                f"build one with `craft-ds anchors --targets {retention_loss}`"
            )
        return self.targets[retention_loss]

    def check_policy(self, config: PreTrainedConfig) -> None:
        """Check that this policy reads the anchors as the teacher did; see also `check_preprocessor`.

        Cameras that the build recorded as missing may be missing: the policy masks them.

        Args:
            config: The policy's configuration, as `craft_ds.policies.loading.load_policy_config` gives it.

        Raises:
            UserError: The tokenizers, cameras, image shapes, chunk or token lengths differ.
        """
        cameras = policy_cameras(config)
        missing = self.metadata.get("missing_cameras") or []
        if {*cameras} - {*missing} != {*self.cameras}:
            self._mismatch("cameras", sorted(self.cameras), sorted(cameras))
        # n_action_steps only acts at inference: anchors hold complete chunks.
        wanted = getattr(config, "chunk_size", None)
        if None not in (self._chunk_size, wanted) and self._chunk_size != wanted:
            self._mismatch("chunk_size", self._chunk_size, wanted)
        for name in self.cameras:
            self._check_image_shape(name, config)
        for field, option in (
            (OBS_LANGUAGE_TOKENS, "tokenizer_max_length"),
            (ACTION_TOKENS, "max_action_tokens"),
        ):
            length = self._fields[field]["shape"][0]
            if getattr(config, option, length) != length:
                self._mismatch(option, length, getattr(config, option))
        fingerprint = tokenizer_fingerprint(config)
        if fingerprint != self.metadata["tokenizer"]:
            self._mismatch("tokenizers", self.metadata["tokenizer"][:12], fingerprint[:12])

    def check_preprocessor(self, preprocessor: PolicyProcessorPipeline, directory: Path) -> None:
        """Check that this preprocessor does to state and action what the teacher's did.

        Args:
            preprocessor: The preprocessor of the trained policy as it is used, with the statistics in effect.
            directory: The policy's folder. Caches of craft-ds 0.1 hold only hashes of the teacher's
                processors, whose statistics are then read from this folder or the teacher's, whichever has
                files with these hashes.

        Raises:
            UserError: The statistics, a normalisation mode or another setting that decides tokens differ; the
                message names the first difference.
        """
        recorded = self.metadata.get("preprocessing")
        if recorded is None:
            recorded = self._find_preprocessing((directory, Path(self.metadata["teacher"]["path"])))
        difference = first_difference(recorded, describe_preprocessor(preprocessor), self._dimension_names())
        if difference is not None:
            self._mismatch(
                *difference,
                advice="train with the teacher's processors, or build anchors by a teacher with the policy's",
            )

    def _find_preprocessing(self, directories: Sequence[Path]) -> list[dict[str, Any]]:
        """Describe the preprocessor of the first directory whose files have the recorded hashes."""
        prefix = PREPROCESSOR.removesuffix(".json")
        recorded = self.metadata.get("processors") or {}
        wanted = {name: recorded[name] for name in recorded if name.startswith(prefix)}
        for directory in directories:
            files = sorted(directory.glob(f"{prefix}*"))
            if wanted and wanted == {file.name: processor_sha256(file) for file in files}:
                return describe_preprocessor(load_processors(load_policy_config(directory), directory)[0])
        raise UserError(
            f"anchor cache {self.path} is of an earlier craft-ds and holds no statistics, only hashes, and "
            f"neither the policy's processors in {directories[0]} nor those of the teacher {directories[1]} "
            "have them: build it again with `craft-ds anchors`"
        )

    def _dimension_names(self) -> dict[str, list[str]]:
        """Return the names of the dimensions of state and action, where the old data set has them."""
        features = self.metadata["dataset"].get("features") or {}
        named = {}
        for key, feature in features.items():
            names = feature["names"]
            if isinstance(names, dict):  # as in {"motors": [...]}
                names = next(iter(names.values()), None)
            if isinstance(names, list):
                named[key] = [str(name) for name in names]
        return named

    def read(
        self, indices: Sequence[int], vision_features: bool = False, retention_loss: str = "token_ce"
    ) -> dict[str, Tensor]:
        """Read anchors, with the fields as they are stored.

        Args:
            indices: Anchor indices in [0, len(self)), in any order, repeats allowed; B of them.
            vision_features: Read the vision tower's features instead of the images. The cache must hold them
                (`vision_fingerprint`).
            retention_loss: Also read its targets. The cache must hold them (`loss_of`).

        Returns:
            uint8 images (B, C, H, W) or float16 features (B, patches, width) per camera, int32 tokens and
            bool masks (B, length), int32 `task`, `episode` and `frame` (B,), and the targets.
        """
        batch = {}
        places = [divmod(index, self._shard_size) for index in indices]
        features = [features_key(camera) for camera in self.cameras]
        unused = [field for target in self.targets for field in RETENTION_LOSSES[target].fields]
        skipped = {*(self.cameras if vision_features else features), *unused}
        wanted = [name for name in self._fields if name not in skipped]
        wanted += RETENTION_LOSSES[retention_loss].fields
        if vision_features and not set(features) <= set(wanted):
            raise KeyError(f"anchor cache {self.path} holds no vision features")
        for name in wanted:
            field = self._fields[name]
            out = torch.empty((len(places), *field["shape"]), dtype=DTYPES[field["dtype"]])
            for position, (shard, row) in enumerate(places):
                out[position] = self._slices[shard][name][row : row + 1][0]
            batch[name] = out
        return batch

    def term_counts(self, retention_loss: str) -> Tensor:
        """Return the number of terms of each anchor in a retention loss: int64 (len(self),)."""
        mask = RETENTION_LOSSES[retention_loss].mask
        if mask is None:
            return torch.ones(len(self), dtype=torch.int64)
        return self._column(mask)[:, 1:].sum(dim=1)

    def _column(self, name: str) -> Tensor:
        return torch.cat([slices[name][:] for slices in self._slices])

    def _check_columns(self) -> None:
        """Check the columns of the shards against the metadata."""
        known = 0 <= int(self.task.min()) <= int(self.task.max()) < len(self.tasks)
        measured = all(
            self.teacher_loss[split]["overall"] is not None
            for split, members in self.splits.items()
            if members
        )
        if not (known and measured):
            missing = "teacher's loss on" if known else "task of"
            raise UserError(
                f"{self.path / METADATA_FILE} lacks the {missing} some anchors; build the anchor cache again"
            )

    def _check_image_shape(self, name: str, config: PreTrainedConfig) -> None:
        channels, *size = self._fields[name]["shape"]
        expected = list(config.input_features[name].shape)
        resolution = getattr(config, "image_resolution", None)
        if resolution is None:
            # This policy takes images of any size.
            wanted = expected[1:]
        elif self.metadata["request"]["image_size"] == "model":
            # The images are resized already: for another size they would be resized and padded twice.
            wanted = list(resolution)
        else:
            wanted = size
        if [channels, *size] != [expected[0], *wanted]:
            self._mismatch(f"image shape of {name}", [channels, *size], [expected[0], *wanted])

    def _mismatch(
        self,
        what: str,
        cached: Any,
        wanted: Any,
        advice: str = "build one for this policy with `craft-ds anchors`",
    ) -> NoReturn:
        teacher = self.metadata["teacher"]["path"]
        raise UserError(
            f"anchor cache {self.path} (teacher {teacher}) does not fit the policy: {what} {cached} in the "
            f"cache, {wanted} in the policy; {advice}"
        )


def read_metadata(path: Path) -> dict[str, Any]:
    """Read `metadata.json` of a cache and check its format.

    Raises:
        UserError: As `AnchorCache.open`.
    """
    file = path / METADATA_FILE
    if not file.is_file():
        if not path.exists() and partial_directory(path).exists():
            raise UserError(
                f"the build of anchor cache {path} was interrupted: run the same `craft-ds "
                "anchors` command again to finish it"
            )
        what = (
            f"no anchor cache at {path}"
            if not path.exists()
            else f"{path} is not an anchor cache: {METADATA_FILE} is missing"
        )
        raise UserError(f"{what}; build one with `craft-ds anchors --output_dir={path}`")
    try:
        metadata = read_object(file)
        name, version = metadata["format"], metadata["version"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} is damaged ({one_line(error)}); build the anchor cache again") from error
    if (name, version) != (FORMAT, VERSION):
        raise UserError(
            f"{file}: format {name!r} version {version}, but this craft-ds reads {FORMAT!r} "
            f"version {VERSION}; build the anchor cache again"
        )
    if metadata.pop("sha256", None) != metadata_sha256(metadata):
        raise UserError(
            f"{file} is damaged (its SHA-256 differs from the recorded one); build the anchor cache again"
        )
    try:
        check_metadata(metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} has an invalid entry ({type(error).__name__}: {one_line(error)}); build the "
            "anchor cache again"
        ) from error
    return metadata


def _open_shard(path: Path, shard: dict[str, Any], fields: dict[str, Any], verify: bool) -> Any:
    """Open one shard after checking it against its entry in the metadata."""

    def damaged(why: str) -> UserError:
        return UserError(f"anchor shard {path} is damaged ({why}); build the anchor cache again")

    if not path.is_file():
        raise UserError(f"anchor shard {path} is missing; build the anchor cache again")
    size = path.stat().st_size
    if size != shard["bytes"]:
        raise damaged(f"{size} bytes instead of {shard['bytes']}")
    if verify and file_sha256(path) != shard["sha256"]:
        raise damaged("its SHA-256 differs from the recorded one")
    try:
        with TensorFile(path):  # checks the header within limits
            pass
        handle = safe_open(path, framework="pt")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        found = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(one_line(error)) from error
    wanted = {
        name: (_CODES[field["dtype"]], [shard["samples"], *field["shape"]]) for name, field in fields.items()
    }
    if found != wanted:
        raise damaged("its fields, their types or their sample counts differ from the recorded ones")
    return handle
