"""How good a policy is: success in closed loop, and its loss on demonstrations."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from torch.utils.data import DataLoader, Subset

from craft_ds.policies.adapter import token_loss
from craft_ds.world.base import CAMERA, STATE, Observation, World, scene_seed
from craft_ds.world.demonstrations import open_demonstrations


@torch.no_grad()
def evaluate(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
    world: World,
    tasks: Iterable[str],
    episodes: int,
    seed: int,
) -> dict[str, float]:
    """Run a policy in closed loop.

    The episodes of a task run in lockstep: one call of the policy gives all of them their next chunk.
    The scenes depend on ``seed`` alone and are none of those that demonstrations show.

    Args:
        policy: The policy; it is put into evaluation mode.
        preprocessor: From observations to the policy's input.
        postprocessor: From the policy's output to actions.
        world: Where to run.
        tasks: The world's tasks to run.
        episodes: Episodes a task.
        seed: Seed of the scenes.

    Returns:
        The share of episodes that succeed within the world's horizon, by task.
    """
    success = {}
    with _lenient(policy):
        for task in tasks:
            running = [world.fork() for _ in range(episodes)]
            for episode, one in enumerate(running):
                one.reset(task, scene_seed(seed, episode, evaluation=True))
            for start in range(0, world.horizon, world.chunk_size):
                batch = _batch([one.observe() for one in running], world.task_text(task))
                chunks = postprocessor(policy.predict_action_chunk(preprocessor(batch))).numpy()
                steps = min(world.chunk_size, world.horizon - start)
                for one, chunk in zip(running, chunks[:, :steps], strict=True):
                    _run(one, chunk)
                running = [one for one in running if not one.success]
                if not running:
                    break
            success[task] = 1.0 - len(running) / episodes
    return success


@torch.no_grad()
def demonstration_loss(
    policy: PreTrainedPolicy,
    preprocessor: PolicyProcessorPipeline,
    root: str | Path,
    batch_size: int = 64,
) -> dict[str, float]:
    """Return the mean loss a token on the demonstrations in ``root``, by task text.

    Args:
        policy: The policy; it is put into evaluation mode.
        preprocessor: From data set samples to the policy's input.
        root: A LeRobot data set.
        batch_size: Samples a forward pass.
    """
    policy.eval()
    data_set = open_demonstrations(root, policy.config.chunk_size)
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
        losses[text] = total / count
    return losses


@contextmanager
def _lenient(policy: PreTrainedPolicy) -> Iterator[None]:
    """Let a policy that forgot how to begin an action fail its episode; pi0_fast would raise."""
    policy.eval()
    strict = getattr(policy.config, "validate_action_token_prefix", None)
    if strict:
        policy.config.validate_action_token_prefix = False
    try:
        yield
    finally:
        if strict:
            policy.config.validate_action_token_prefix = True


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
