"""Measure a policy: success in closed loop, and loss on demonstrations."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from torch.utils.data import DataLoader, Subset

from craft_ds.distributed.collectives import gather_objects
from craft_ds.policies.token_loss import token_loss
from craft_ds.worlds.base import CAMERA, STATE, Observation, World, scene_seed
from craft_ds.worlds.demonstrations import open_demonstrations

Act = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Function from a batch to action chunks, (B, steps, action dimensions), before the postprocessor."""


@dataclass(frozen=True)
class ClosedLoopPolicy:
    """A policy with its processors.

    Attributes:
        act: The policy, for example `partial(action_chunk, policy)` or an engine's `act`.
        preprocessor: Maps observations to the policy's input.
        postprocessor: Maps the policy's output to actions.
    """

    act: Act
    preprocessor: PolicyProcessorPipeline
    postprocessor: PolicyProcessorPipeline

    def __call__(self, observations: list[Observation], text: str) -> np.ndarray:
        """Return the action chunks for observations of one task, (B, steps, action dimensions)."""
        return self.postprocessor(self.act(self.preprocessor(_batch(observations, text)))).cpu().numpy()


def evaluate(
    policy: ClosedLoopPolicy,
    world: World,
    tasks: Iterable[str],
    *,
    episodes: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """Run a policy in closed loop. Collective: call on all ranks.

    The episodes of a task are distributed over the ranks, and those of a rank run in lockstep: one call of
    the policy returns the next chunk of all of them. Every rank calls the policy equally often, as a sharded
    policy requires: a rank whose episodes have ended keeps calling until those of all ranks have.

    The scenes depend only on `seed` and the index of the episode, not on the number of ranks. No
    demonstration shows one of them.

    Args:
        policy: The policy and its processors.
        world: The world to run in.
        tasks: Tasks of the world to run.
        episodes: Episodes per task, over all ranks.
        seed: Seed of the scenes.
        rank: Rank of this process.
        world_size: Number of ranks that share the episodes.

    Returns:
        Share of episodes that succeed within the world's horizon, by task; the same on all ranks.
    """
    # A rank without an episode runs the first one and does not count it.
    own = range(rank, episodes, world_size)
    success = {}
    for task in tasks:
        running = [world.fork() for _ in own or [0]]
        for episode, one in zip(own or [0], running, strict=True):
            one.reset(task, scene_seed(seed, episode, evaluation=True))
        for start in range(0, world.horizon, world.chunk_size):
            if not any(gather_objects(bool(running))):
                break
            if running:
                observations = [one.observe() for one in running]
            chunks = policy(observations, world.task_text(task))
            steps = min(world.chunk_size, world.horizon - start)
            for one, chunk in zip(running, chunks[: len(running), :steps], strict=True):
                _run(one, chunk)
            running = [one for one in running if not one.success]
        succeeded = len(own) - len(running) if own else 0
        success[task] = sum(gather_objects(succeeded)) / episodes
    return success


def demonstration_loss(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    root: str | Path,
    batch_size: int = 64,
) -> dict[str, float]:
    """Return the mean loss per token on the demonstrations in `root`, by task text.

    Args:
        policy: The policy; it is set to evaluation mode.
        preprocessor: Maps samples of the data set to the policy's input.
        root: A LeRobot data set.
        batch_size: Samples per forward pass.
    """
    data_set = open_demonstrations(root, policy.config.chunk_size)
    losses = dataset_loss(policy, preprocessor, data_set, batch_size)
    return {text: total / count for text, (total, count) in losses.items()}


@torch.no_grad()
def dataset_loss(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    data_set: LeRobotDataset,
    batch_size: int = 64,
) -> dict[str, tuple[float, float]]:
    """Return the sum of the loss over supervised tokens and their number, by task text.

    Args:
        policy: The policy; it is set to evaluation mode.
        preprocessor: Maps samples of the data set to the policy's input.
        data_set: A data set whose frames carry their action chunks.
        batch_size: Samples per forward pass.
    """
    policy.eval()
    frames = defaultdict(list)
    for index, task in enumerate(data_set.hf_dataset["task_index"]):
        frames[int(task)].append(index)
    losses = {}
    for indices in frames.values():
        total, count, text = 0.0, 0.0, ""
        for sample in DataLoader(Subset(data_set, indices), batch_size=batch_size):
            text = sample["task"][0]
            loss = token_loss(policy, preprocessor(sample))
            total, count = total + float(loss.total), count + float(loss.count)
        losses[text] = total, count
    return losses


def _batch(observations: list[Observation], text: str) -> dict[str, torch.Tensor | list[str]]:
    images = torch.from_numpy(np.stack([observation.image for observation in observations]))
    return {
        CAMERA: images.permute(0, 3, 1, 2).float() / 255,
        STATE: torch.from_numpy(np.stack([observation.state for observation in observations])),
        "task": [text] * len(observations),
    }


def _run(world: World, chunk: np.ndarray) -> None:
    for action in chunk:
        world.step(action)
        if world.success:
            return
