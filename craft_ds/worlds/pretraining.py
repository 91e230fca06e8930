"""Pretrain a teacher: the embedded policy, trained from scratch on demonstrations of the old tasks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import trange

from craft_ds.policies.directory import WEIGHTS, save_policy_directory
from craft_ds.policies.tiny_pi0_fast.policy import build_tiny_policy
from craft_ds.policies.tiny_pi0_fast.tokenizers import (
    ACTION_TOKENIZER,
    TEXT_TOKENIZER,
    build_text_tokenizer,
    fit_action_tokenizer,
)
from craft_ds.policies.token_loss import token_loss
from craft_ds.worlds.base import ACTION, CAMERA, STATE, World
from craft_ds.worlds.demonstrations import open_demonstrations

# Chunks of tasks that the action tokenizer was not fitted on take more tokens: with the policy's default of
# 24, one in twelve chunks of Meta-World's new task would be truncated.
_MAX_ACTION_TOKENS = 32


@dataclass(frozen=True)
class PretrainingPlan:
    """Data, steps and sizes with which a teacher learns a world's old tasks.

    Attributes:
        episodes_per_task: Demonstrations of each task.
        steps: Optimizer steps.
        sizes: Fields of the policy's configuration that differ from its defaults.
        drift: See `craft_ds.worlds.recording.Recipe`.
        batch_size: Samples per step.
        learning_rate: The peak learning rate.
        numbers: Integers of the prompt below this are single tokens.
    """

    episodes_per_task: int
    steps: int
    sizes: dict[str, int] = field(default_factory=dict)
    drift: float = 0.0
    batch_size: int = 32
    learning_rate: float = 1e-3
    numbers: int = 0


PLANS = {
    "metaworld": PretrainingPlan(episodes_per_task=40, steps=2000),
    "blocks": PretrainingPlan(
        episodes_per_task=200,
        steps=1500,
        sizes={
            "text_width": 96,
            "text_depth": 2,
            "text_mlp_dim": 256,
            "vision_width": 64,
            "vision_mlp_dim": 128,
        },
    ),
    # One token per number and 4 tokens per image instead of 16: the positions are in the state.
    "cw10": PretrainingPlan(
        episodes_per_task=60,
        steps=6000,
        sizes={"vision_patch": 32},
        drift=1.5,
        batch_size=16,
        learning_rate=2e-3,
        numbers=256,
    ),
}

Bounds = dict[str, dict[str, Tensor]]


def robot_bounds(world: World) -> Bounds:
    """Return normalisation statistics from the robot's ranges instead of a data set's.

    A new task may move outside the range of the old ones, whose bounds would clip its states and actions.
    """
    return {
        key: {"min": torch.tensor(low), "max": torch.tensor(high)}
        for key, (low, high) in ((STATE, world.state_range), (ACTION, world.action_range))
    }


def pretrain(
    world: World,
    data_root: Path,
    output_dir: Path,
    *,
    steps: int,
    seed: int,
) -> None:
    """Train a teacher on one data set and write its policy directory, with the weights in fp16.

    AdamW with 50 warm-up steps, then cosine decay to zero; sizes, batch size and learning rate are those of
    the world's plan.

    Args:
        world: The world that the data set shows.
        data_root: A LeRobot data set.
        output_dir: The policy directory to write; it may exist.
        steps: Optimizer steps.
        seed: Seed of the initial weights and of the batches.
    """
    plan = PLANS[world.name]
    data_set = open_demonstrations(data_root, world.chunk_size)
    samples = _read_into_memory(data_set)
    bounds = robot_bounds(world)
    low, high = bounds[ACTION]["min"], bounds[ACTION]["max"]
    build_text_tokenizer(world.texts(), output_dir / TEXT_TOKENIZER, numbers=plan.numbers)
    fit_action_tokenizer(
        (2 * (samples[ACTION] - low) / (high - low) - 1).numpy(), output_dir / ACTION_TOKENIZER
    )
    policy, preprocessor, postprocessor = build_tiny_policy(
        data_set.meta,
        bounds,
        output_dir / TEXT_TOKENIZER,
        output_dir / ACTION_TOKENIZER,
        seed,
        max_action_tokens=_MAX_ACTION_TOKENS,
        max_decoding_steps=_MAX_ACTION_TOKENS,
        **plan.sizes,
    )
    inputs = _preprocess_once(samples, preprocessor)
    _optimize(policy, inputs, steps, seed, plan.batch_size, plan.learning_rate)
    save_policy_directory(policy, preprocessor, postprocessor, output_dir)
    weights = load_file(output_dir / WEIGHTS)
    save_file({name: value.half() for name, value in weights.items()}, output_dir / WEIGHTS, {"format": "pt"})


def _read_into_memory(data_set: LeRobotDataset) -> dict:
    """Read a data set into memory: images as uint8 (N, C, H, W), states, action chunks, task texts."""
    parts: dict[str, list] = {CAMERA: [], STATE: [], ACTION: [], "task": []}
    for sample in DataLoader(data_set, batch_size=256):
        parts[CAMERA].append((sample[CAMERA] * 255).round().to(torch.uint8))
        parts[STATE].append(sample[STATE])
        parts[ACTION].append(sample[ACTION])
        parts["task"] += sample["task"]
    return {key: value if key == "task" else torch.cat(value) for key, value in parts.items()}


def _preprocess_once(samples: dict, preprocessor: PolicyProcessorPipeline) -> dict[str, Tensor]:
    """Tokenize every sample once instead of once per epoch; images stay uint8."""
    images = samples[CAMERA]
    # The processors do not change images, so an empty placeholder can pass through them.
    inputs = preprocessor({**samples, CAMERA: images.new_zeros(len(images), 3, 0, 0)})
    tensors = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and len(value)}
    return {**tensors, CAMERA: images}


def _optimize(
    policy: PreTrainedPolicy,
    inputs: dict[str, Tensor],
    steps: int,
    seed: int,
    batch_size: int,
    learning_rate: float,
) -> None:
    warm_up = 50
    optimizer = torch.optim.AdamW(policy.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    batches = _batches(inputs, batch_size, torch.Generator().manual_seed(seed))
    policy.train()
    for step in (bar := trange(steps, desc="pretraining")):
        loss = token_loss(policy, next(batches))
        mean = loss.total / loss.count
        optimizer.zero_grad()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{mean.item():.3f}")
    policy.eval()


def _batches(
    inputs: dict[str, Tensor], batch_size: int, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """Yield random batches forever, each sample once per epoch."""
    while True:
        order = torch.randperm(len(inputs[CAMERA]), generator=generator)
        for chosen in order.split(batch_size)[: max(len(order) // batch_size, 1)]:
            batch = {key: value[chosen] for key, value in inputs.items()}
            yield {**batch, CAMERA: batch[CAMERA].float() / 255}
