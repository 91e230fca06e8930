"""Pretrain a vision tower to locate objects, before the policy learns to act.

A tower that starts from scratch learns positions slowly from action tokens. Here it regresses them
from the image: the simulator knows them. That takes minutes, and no policy reads the positions.
"""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import torch
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from torch import Tensor, nn
from torch.nn.functional import huber_loss
from tqdm import trange

from craft_ds.policies.pi0_fast.vision import image_tokens
from craft_ds.worlds import make_world
from craft_ds.worlds.base import CAMERA, scene_seed
from craft_ds.worlds.recording import disturbances

_UNIT = 0.1  # m: positions are regressed in this unit
_STEPS_BETWEEN_SCENES = 8
_NOISE, _DRIFT = 0.3, 1.5
_BATCH_SIZE = 64


class Scenes(NamedTuple):
    """Images with the positions in them: uint8 (N, H, W, 3) and float32 (N, K, 3) in m, NaN where absent."""

    images: np.ndarray
    positions: np.ndarray


def record_scenes(world: str, tasks: Sequence[str], *, count: int, seed: int, processes: int) -> list[Scenes]:
    """Return `count` scenes of each task, from episodes of the disturbed expert.

    Args:
        world: Name of a world with `World.positions`.
        tasks: Tasks of the world.
        count: Scenes of each task.
        seed: Seed of the episodes.
        processes: Processes that simulate and render; the scenes do not depend on them.
    """
    record = partial(_record_task, world, count, seed)
    if processes == 1:
        return list(map(record, tasks))
    # Spawned, not forked: a GL context does not survive a fork.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(record, tasks))


def _record_task(name: str, count: int, seed: int, task: str) -> Scenes:
    world = make_world(name)
    images: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    episode = 0
    while len(images) < count:
        scene = scene_seed(seed, episode, evaluation=False)
        world.reset(task, scene)
        pushes = disturbances(world, np.random.default_rng(scene), _NOISE, _DRIFT)
        for step in range(world.horizon):
            if step % _STEPS_BETWEEN_SCENES == 0:
                images.append(world.observe().image)
                positions.append(world.positions())
            world.step(world.expert() + next(pushes))
            if world.success or len(images) == count:
                break
        episode += 1
    return Scenes(np.stack(images), np.stack(positions))


def pretrain_vision(
    policy: PI0FastPolicy, scenes: Sequence[Scenes], *, steps: int, seed: int, learning_rate: float = 2e-3
) -> None:
    """Train the vision tower and the projector to show positions in the mean image token.

    A linear readout per task, which is thrown away, regresses them with a Huber loss. AdamW with 100 warm-up
    steps, then cosine decay to zero.

    Args:
        policy: Policy to train in place; its decoder does not change.
        scenes: Scenes of each task.
        steps: Optimizer steps of 64 scenes.
        seed: Seed of the readouts and of the batches.
        learning_rate: The peak learning rate.
    """
    images = torch.from_numpy(np.concatenate([part.images for part in scenes])).permute(0, 3, 1, 2)
    targets = torch.from_numpy(np.concatenate([part.positions for part in scenes])) / _UNIT
    tasks = torch.arange(len(scenes)).repeat_interleave(torch.tensor([len(part.images) for part in scenes]))
    known = ~targets.isnan()
    targets = targets.nan_to_num()
    model = policy.model.paligemma_with_expert.paligemma.model
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        readout = nn.Linear(policy.config.text_width, len(scenes) * targets[0].numel())
    parameters = [
        *model.vision_tower.parameters(),
        *model.multi_modal_projector.parameters(),
        *readout.parameters(),
    ]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + np.cos(np.pi * step / steps)))
    )
    policy.train()
    for _ in (bar := trange(steps, desc="pretraining the vision tower")):
        chosen = torch.randint(len(images), (_BATCH_SIZE,), generator=generator)
        predicted = _predict(policy, readout, images[chosen], tasks[chosen], targets.shape[1:])
        errors = huber_loss(predicted, targets[chosen], reduction="none", delta=0.3) * known[chosen]
        loss = errors.sum() / known[chosen].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    policy.eval()


def _predict(
    policy: PI0FastPolicy, readout: nn.Linear, images: Tensor, tasks: Tensor, shape: torch.Size
) -> Tensor:
    """Return the positions that each image's task's readout gives, (B, K, 3)."""
    tokens, _ = image_tokens(policy, {CAMERA: images.float() / 255})
    positions = readout(tokens.mean(dim=1)).unflatten(1, (-1, *shape))
    return positions[torch.arange(len(tasks)), tasks]
