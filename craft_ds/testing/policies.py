"""A policy directory and policy batches small enough for unit tests."""

from pathlib import Path

import numpy as np
import torch
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from torch import nn

from craft_ds.policies.directory import save_policy_directory
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig, build_tiny_policy
from craft_ds.policies.tiny_pi0_fast.tokenizers import (
    ACTION_TOKENIZER,
    TEXT_TOKENIZER,
    build_text_tokenizer,
    fit_action_tokenizer,
)
from craft_ds.policies.weights import unique_tensors
from craft_ds.tensor_io.tensor_file import ReadRange

TASKS = ("Press a button from the top", "Push and close a drawer", "Rotate the faucet clockwise")
_BOS, _EOS = 2, 1


def smooth_chunks(count: int, seed: int, chunk: int = 8, action_dim: int = 4) -> np.ndarray:
    """Return random walks in [-1, 1], shape (count, chunk, action_dim), like a robot's action chunks."""
    steps = np.random.default_rng(seed).normal(scale=0.2, size=(count, chunk, action_dim))
    return np.clip(steps.cumsum(axis=1), -1.0, 1.0).astype(np.float32)


def features(cameras: int = 1, width: int = 4) -> dict[str, dict]:
    """Return the `features` of a LeRobot data set with 64x64 cameras, state and action of `width` entries."""
    names = ["top", *(f"side{i}" for i in range(1, cameras))]
    vector = {"dtype": "float32", "shape": (width,), "names": None}
    image = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
    return {
        **{f"observation.images.{name}": image for name in names},
        "observation.state": vector,
        "action": vector,
    }


def make_test_policy_dir(path: str | Path, seed: int = 0, cameras: int = 1, width: int = 4) -> Path:
    """Write a complete policy directory: about 90 thousand random weights, processors, tokenizers.

    Args:
        path: The folder to write.
        seed: Seeds the weights; the tokenizers and statistics are always the same.
        cameras: ``observation.images.top``, then ``observation.images.side1``, …
        width: Entries of state and action, at most 4.

    Returns:
        The folder.
    """
    path = Path(path)
    build_text_tokenizer(TASKS, path / TEXT_TOKENIZER)
    fit_action_tokenizer(smooth_chunks(200, seed=0, action_dim=width), path / ACTION_TOKENIZER)
    bounds = {
        "min": -torch.tensor([1.0, 2.0, 1.0, 0.5])[:width],
        "max": torch.tensor([1.0, 2.0, 3.0, 0.5])[:width],
    }
    policy, preprocessor, postprocessor = build_tiny_policy(
        features(cameras, width),
        {"observation.state": bounds, "action": bounds},
        path / TEXT_TOKENIZER,
        path / ACTION_TOKENIZER,
        seed,
        text_width=32,
        text_depth=2,
        text_mlp_dim=64,
        text_heads=2,
        vision_width=32,
        vision_depth=1,
        vision_mlp_dim=64,
        vision_heads=2,
    )
    save_policy_directory(policy, preprocessor, postprocessor, path)
    return path


def read_from(policy: nn.Module) -> ReadRange:
    """Return a reader of a copy of a policy's tensors, for policies that are not in a directory."""
    values = {name: tensor.detach().clone() for name, tensor in unique_tensors(policy).items()}
    return lambda name, start, stop: values[name].reshape(-1)[start:stop]


def random_batch(config: TinyPI0FastConfig, batch_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Return a policy batch of random images and tokens, as the preprocessor makes it.

    Prompt and action lengths differ between samples, from short to the configured maximum.

    Args:
        config: The policy's configuration.
        batch_size: Samples.
        seed: Seeds everything.

    Returns:
        Images (float32 multiples of 1/255), prompt tokens and mask, action tokens and mask.
    """
    rng = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int, length: int) -> torch.Tensor:
        return torch.randint(low, high, (batch_size, length), generator=rng)

    def mask(shortest: int, length: int) -> torch.Tensor:
        lengths = torch.randint(shortest, length + 1, (batch_size, 1), generator=rng)
        return torch.arange(length) < lengths

    batch: dict[str, torch.Tensor] = {}
    for key, feature in config.image_features.items():
        batch[key] = torch.randint(0, 256, (batch_size, *feature.shape), generator=rng) / 255.0
    words = config.vocab_size - 256
    prompt, prompt_mask = tokens(5, words, config.tokenizer_max_length), mask(20, config.tokenizer_max_length)
    actions, action_mask = (
        tokens(words, config.vocab_size, config.max_action_tokens),
        mask(6, config.max_action_tokens),
    )
    prompt[:, 0] = actions[:, 0] = _BOS
    actions.scatter_(1, action_mask.sum(1, keepdim=True) - 1, _EOS)
    batch[OBS_LANGUAGE_TOKENS] = prompt * prompt_mask
    batch[OBS_LANGUAGE_ATTENTION_MASK] = prompt_mask
    batch[ACTION_TOKENS] = actions * action_mask
    batch[ACTION_TOKEN_MASK] = action_mask
    return batch
