"""Samples of a data set, checked as they are read: a bad one is named by data set, episode and frame.

Interface for everything that reads samples (training, evaluation, anchors, export), complete and stable:
`NamedSamples` wraps a LeRobot data set, `sample_loader` replaces `DataLoader` over it. Both raise
`BadSample`, a `UserError` of one line, in the process that asked for the sample, also with workers.
"""

import errno
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, default_collate

from craft_ds.data.value_limits import ValueLimits, column, rows_of
from craft_ds.errors import UserError, one_line

# Errors of the machine, not of the data: a restart can help, so they are not a property of the sample.
_TRANSIENT = {
    errno.EAGAIN,
    errno.EINTR,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


class BadSample(UserError):
    """A sample that cannot be read, or whose state or action cannot be trained on.

    Attributes:
        dataset: Hub id or name of the data set.
        episode: Index of the episode.
        frame: Index, in its episode, of the frame at fault; of a sample with an action chunk it may be a
            later frame than the sample's own.
        reason: Description of the fault, on one line.
    """

    def __init__(self, dataset: str, episode: int, frame: int, reason: str):
        super().__init__(f"data set {dataset}, episode {episode}, frame {frame}: {reason}")
        self.dataset, self.episode, self.frame, self.reason = dataset, episode, frame, reason

    def __reduce__(self) -> tuple[type["BadSample"], tuple[str, int, int, str]]:
        return type(self), (self.dataset, self.episode, self.frame, self.reason)


class NamedSamples(Dataset[dict[str, Any]]):
    """A LeRobot data set whose samples are checked as they are read.

    Vectors of one entry keep their axis: LeRobot returns scalars for features of shape (1,).

    Args:
        dataset: The data set.
        limits: Limits of state and action; None: only non-finite values are bad.
        vectors: Names, in the data set, of the vectors that the policy uses; others may hold anything.

    Example:
        >>> samples = NamedSamples(dataset)  # doctest: +SKIP
        >>> samples[3]  # doctest: +SKIP
        Traceback (most recent call last):
        BadSample: data set me/press, episode 0, frame 3: observation.state[1] is nan
    """

    def __init__(
        self,
        dataset: LeRobotDataset,
        limits: ValueLimits | None = None,
        vectors: Collection[str] = (OBS_STATE, ACTION),
    ):
        self.dataset, self._limits = dataset, limits
        features = dataset.meta.features
        self._steps = {
            key: [round(seconds * dataset.meta.fps) for seconds in deltas]
            for key, deltas in (dataset.delta_timestamps or {}).items()
        }
        self._images = {key: image_shape(features[key]) for key in dataset.meta.camera_keys}
        self._sizes: dict[str, tuple[int, ...]] = {}
        self._vectors = {
            key: int(feature["shape"][0])
            for key, feature in features.items()
            if key in vectors and key not in self._images and len(feature["shape"]) == 1
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample.

        Raises:
            BadSample: It cannot be read, has a picture of another size than the data set's, or a state or
                action that is non-finite or beyond the limits.
            OSError: The machine failed, not the data (too many open files, an I/O error, …).
        """
        try:
            sample = self.dataset[index]
        except MemoryError:
            raise
        except Exception as error:  # decoders of images and videos raise errors of many types
            if isinstance(error, OSError) and error.errno in _TRANSIENT:
                raise
            raise self._unreadable(index, error) from error
        for key, width in self._vectors.items():
            if key not in sample:
                continue
            if width == 1 and sample[key].ndim < 1 + (key in self._steps):
                sample[key] = sample[key].unsqueeze(-1)
            self._check_vector(index, key, width, sample[key])
        for key, shape in self._images.items():
            if sample.get(key) is None:
                raise self._bad(index, f"{key} is missing")
            found = tuple(sample[key].shape[-3:])
            if found != self._transformed(key, shape):
                raise self._bad(
                    index,
                    f"{key} is a picture of {_described(found)}, not of {_described(shape)} as in info.json",
                )
        return sample

    def _transformed(self, key: str, shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Return the shape of a camera's pictures after the image transforms, which may resize."""
        transforms = self.dataset.image_transforms
        if transforms is None or key in self.dataset.meta.depth_keys:
            return shape
        if key not in self._sizes:
            with torch.random.fork_rng(devices=[]):
                self._sizes[key] = tuple(transforms(torch.zeros(shape, dtype=torch.uint8)).shape[-3:])
        return self._sizes[key]

    def bad_values(self) -> tuple[list[BadSample], int]:
        """Find all frames whose state or action is bad, in the columns at once.

        Returns:
            The errors of the first frames, at most 100, and the number of bad frames.
        """
        bad = np.zeros(len(self), dtype=bool)
        for key in self._vectors:
            bad |= ~self._good(key, torch.from_numpy(column(self.dataset, key))).all(dim=1).numpy()
        indices = np.flatnonzero(bad)
        return [self._bad_frame(int(index)) for index in indices[:100]], len(indices)

    def _bad_frame(self, index: int) -> BadSample:
        row = self.dataset.hf_dataset.data.slice(index, 1)
        for key, width in self._vectors.items():
            try:
                self._check_vector(index, key, width, torch.from_numpy(rows_of(row.column(key)))[0])
            except BadSample as error:
                return error
        raise AssertionError(f"frame {index} is good")

    def place(self, index: int) -> tuple[int, int]:
        """Return the episode of a sample, and its frame within the episode."""
        columns = self.dataset.hf_dataset.data
        episode, frame = (columns.column(name)[index].as_py() for name in ("episode_index", "frame_index"))
        return int(episode), int(frame)

    def _bad(self, index: int, reason: str, later: int = 0) -> BadSample:
        """Return the error of a sample whose fault is some frames later, in its action chunk."""
        episode, frame = self.place(index)
        if later:
            reason += f"; the sample of frame {frame} includes it"
        return BadSample(self.dataset.repo_id, episode, max(frame + later, 0), reason)

    def _unreadable(self, index: int, error: Exception) -> BadSample:
        """Find the row at fault: LeRobot reads all rows of a chunk with their pictures."""
        episode = self.place(index)[0]
        for later in sorted({0, *(step for steps in self._steps.values() for step in steps)}, key=abs):
            row = index + later
            if not 0 <= row < len(self) or self.place(row)[0] != episode:
                continue
            try:
                self.dataset.hf_dataset[row]
            except Exception as found:
                return self._bad(index, _reading_failed(found), later)
        return self._bad(index, _reading_failed(error))

    def _good(self, key: str, value: Tensor) -> Tensor:
        """Return True for every entry that is finite and within the limits."""
        good = torch.isfinite(value)
        return good if self._limits is None else good & self._limits.contain(key, value)

    def _check_vector(self, index: int, key: str, width: int, value: Tensor) -> None:
        """Check a vector, shape (entries), or a chunk of vectors, shape (steps, entries)."""
        if value.shape[-1] != width:
            raise self._bad(index, f"{key} has {value.shape[-1]} entries, not {width}")
        good = self._good(key, value)
        if good.all():
            return
        *step, entry = (~good).nonzero()[0].tolist()
        found = value[(*step, entry)]
        reason = f"{key}[{entry}] is {float(found):.6g}"
        if torch.isfinite(found) and self._limits is not None:
            reason += f", far outside of {self._limits.describe(key, entry)}"
        raise self._bad(index, reason, self._steps[key][step[0]] if step and key in self._steps else 0)


Samples = NamedSamples | ConcatDataset[dict[str, Any]]
"""Samples of one data set, or of several, one after the other."""


def joined(samples: Sequence[NamedSamples]) -> Samples:
    """Return the samples of several data sets, one after the other."""
    return samples[0] if len(samples) == 1 else ConcatDataset(samples)


class _Caught(Dataset[Any]):
    """Returns errors instead of raising them: a worker of `DataLoader` would turn them into a traceback."""

    def __init__(self, dataset: Dataset[Any]):
        self._dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        try:
            return self._dataset[index]
        except BadSample as error:
            return error


@dataclass(frozen=True)
class _Collate:
    """Collates samples, or returns the first error among them or that of collating."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, samples: list[Any]) -> Any:
        bad = next((sample for sample in samples if isinstance(sample, BadSample)), None)
        try:
            return self.collate(samples) if bad is None else bad
        except UserError as error:
            return error


def sample_loader(
    dataset: Dataset[Any],
    batch_sampler: Any,
    *,
    collate_fn: Callable[[list[Any]], Any] = default_collate,
    **options: Any,
) -> Iterator[Any]:
    """Iterate over collated batches of `NamedSamples`, or of a data set made from them.

    Args:
        dataset: Its items may raise `BadSample`.
        batch_sampler: Iterable of the indices of each batch.
        collate_fn: Makes a batch of samples.
        **options: Further arguments of `DataLoader`, such as `num_workers`.

    Raises:
        BadSample: In this process, when the batch with the first bad sample is due.
        UserError: As `collate_fn` does, when its batch is due; or the workers' shared memory is full.
    """
    loader = DataLoader(
        _Caught(dataset), batch_sampler=batch_sampler, collate_fn=_Collate(collate_fn), **options
    )
    return _raising(iter(loader))  # workers start now, not with the first batch


# What torch reports if /dev/shm is full: in a container it has 64 MB unless more is asked for.
_NO_SHARED_MEMORY = re.compile(
    r"Bus error|unable to allocate shared memory|torch_\S+: No space left on device"
)


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if not _NO_SHARED_MEMORY.search(str(error)):
            raise
        raise UserError(
            f"/dev/shm, by which data-loader workers pass samples on, is full ({_size_of('/dev/shm')}): "
            "start the container with --ipc=host or --shm-size=8g, or use --num_workers=0"
        ) from None
    finally:
        # Ends the workers. A traceback would keep them, and Python would wait for them at exit.
        del batches


def _size_of(directory: str) -> str:
    try:
        return f"{shutil.disk_usage(directory).total / 2**20:.0f} MiB"
    except OSError:
        return "unknown size"


def _reading_failed(error: Exception) -> str:
    file = getattr(error, "filename", None)
    text = one_line(error, 160)
    if isinstance(error, FileNotFoundError) and file:
        return f"{file} is missing"
    return f"it cannot be read ({type(error).__name__}: {text})"


def image_shape(feature: dict[str, Any]) -> tuple[int, int, int]:
    """Return channels, height and width of a camera's feature, which LeRobot has in either order of axes."""
    shape, names = tuple(feature["shape"]), list(feature.get("names") or [])
    unnamed = not names and shape[0] in (1, 3) and shape[2] not in (1, 3)
    if unnamed or (names and str(names[0]).startswith("channel")):
        return shape[0], shape[1], shape[2]
    return shape[2], shape[0], shape[1]


def _described(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{height}×{width}×{channels} (height × width × channels)"
