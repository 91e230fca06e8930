"""Samples on which a merged policy is compared: those of its training run, or synthetic ones."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.utils.collate import lerobot_collate_fn
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    HF_LEROBOT_HOME,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from transformers import AutoTokenizer

from craft_ds.anchors.cache_list import open_caches
from craft_ds.anchors.sampler import to_policy_batch
from craft_ds.config.craft_config import split_directories
from craft_ds.data.checked_samples import NamedSamples
from craft_ds.data.lerobot_dataset import open_dataset
from craft_ds.data.policy_input import images_to_float
from craft_ds.errors import UserError, one_line
from craft_ds.policies.changes import policy_changes
from craft_ds.policies.loading import load_processors, policy_cameras
from craft_ds.policies.token_loss import Batch

SAMPLES = 32
MICRO_BATCH = 8


class _Source(NamedTuple):
    """A set of samples and a function that reads some of them."""

    name: str
    size: int
    read: Callable[[list[int]], Batch]


class Samples(NamedTuple):
    """Policy batches on the CPU.

    Attributes:
        batches: At most `MICRO_BATCH` samples each.
        origin: Number of samples from each source, for the log.
    """

    batches: list[Batch]
    origin: str


def draw_samples(checkpoint: Path, config: PreTrainedConfig) -> Samples:
    """Draw at most `SAMPLES` samples: equally many training frames and anchors, or else synthetic ones.

    The frames come first: there the adapters change the outputs most, and on the anchors least. Both are
    spread evenly over their source. A data set that is not on this machine is not downloaded.

    Args:
        checkpoint: Its `train_config.json` names the run's data set and anchors.
        config: Configuration of the checkpoint's policy, a pi0_fast.
    """
    run = json.loads((checkpoint / TRAIN_CONFIG_NAME).read_text())
    sources = []
    for open_source in (_frames, _anchors):
        with suppress(UserError):
            sources.append(open_source(run, checkpoint, config))
    sources = sources or [_synthetic(config)]
    batches, origins = [], []
    for source in sources:
        count = min(SAMPLES // len(sources), source.size)
        indices = [index * source.size // count for index in range(count)]
        for start in range(0, count, MICRO_BATCH):
            batches.append(source.read(indices[start : start + MICRO_BATCH]))
        origins.append(f"{count} {source.name}")
    return Samples(batches, " and ".join(origins))


def _anchors(run: dict[str, Any], _: Path, config: PreTrainedConfig) -> _Source:
    path = run["craft"]["anchor_cache_dir"]
    if not path:
        raise UserError("the run had no anchors")
    cache = open_caches(split_directories(path), verify=False)
    cache.check_policy(config)
    return _Source(f"anchors of {path}", len(cache), lambda rows: to_policy_batch(cache.read(rows), "cpu"))


def open_frames(
    run: dict[str, Any],
    checkpoint: Path,
    config: PreTrainedConfig,
    repo_id: str,
    root: str | None,
    device: str = "cpu",
) -> tuple[NamedSamples, Callable[[list[int]], Batch]]:
    """Open a data set for a checkpoint's policy.

    Args:
        run: Content of the checkpoint's `train_config.json`: names and missing cameras of its data set.
        checkpoint: Holds the processors.
        config: Configuration of the policy.
        repo_id: The data set.
        root: Its local directory; None: LeRobot's cache, then the hub.
        device: Device of the batches.

    Returns:
        The samples, and a function that reads some of them as a batch of the policy.

    Raises:
        UserError: The data set cannot be opened, or does not fit the policy.
    """
    changes = policy_changes(config, config, rename_map=run["rename_map"])  # older checkpoints lack it
    preprocessor, _ = load_processors(config, checkpoint, device, changes)
    masked = run.get("allow_missing_cameras", False)
    samples = NamedSamples(open_dataset(repo_id, root, config, preprocessor, masked))

    def read(rows: list[int]) -> Batch:
        return preprocessor(images_to_float(lerobot_collate_fn([samples[row] for row in rows])))

    return samples, read


def _frames(run: dict[str, Any], checkpoint: Path, config: PreTrainedConfig) -> _Source:
    source = (run.get("datasets") or [run["dataset"]])[0]  # of a mixture, the first
    repo_id, root = source["repo_id"], source["root"]
    if not Path(root or HF_LEROBOT_HOME / repo_id).is_dir():
        raise UserError(f"data set {repo_id} is not on this machine")
    dataset, read = open_frames(run, checkpoint, config, repo_id, root)
    try:
        read([0])
    except Exception as error:  # any error of the processors or the video decoder
        raise UserError(f"data set {repo_id} cannot be read: {one_line(error)}") from error
    return _Source(f"frames of {repo_id}", len(dataset), read)


def _synthetic(config: PreTrainedConfig) -> _Source:
    """Return samples of noise images, random words and random action tokens."""
    rng = torch.Generator().manual_seed(0)
    words = AutoTokenizer.from_pretrained(config.text_tokenizer_name).vocab_size

    def read(rows: list[int]) -> Batch:
        batch: Batch = {
            camera: torch.rand(len(rows), *config.input_features[camera].shape, generator=rng)
            for camera in policy_cameras(config)
        }
        for tokens, mask, longest in (
            (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK, config.tokenizer_max_length),
            (ACTION_TOKENS, ACTION_TOKEN_MASK, config.max_action_tokens),
        ):
            lengths = torch.randint(longest // 2, longest + 1, (len(rows), 1), generator=rng)
            batch[tokens] = torch.randint(words, (len(rows), longest), generator=rng)
            batch[mask] = torch.arange(longest) < lengths
        return batch

    return _Source("synthetic samples (the run's data set and anchors cannot be opened)", SAMPLES, read)
