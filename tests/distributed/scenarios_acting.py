"""A sharded policy acts between training steps."""

from pathlib import Path

import torch
from lab import Lab, Output, masters
from toy import deal

import craft_ds.worlds
from craft_ds.engines.base import Batch, Engine
from craft_ds.policies.loading import load_policy_config
from craft_ds.testing.policies import random_batch
from craft_ds.training.train_step import task_step

# A trained policy ends its actions, each at its own length; one with random weights would never end.
TEACHER = Path(craft_ds.worlds.__file__).parent / "assets" / "metaworld_teacher"
# Seeds of batches whose samples all end, on most ranks at other lengths than on rank 0.
SCENES = (0, 5, 4)
SAMPLES = 6


def scene(seed: int) -> Batch:
    """Return observations for all ranks together."""
    return random_batch(load_policy_config(TEACHER), SAMPLES, seed)


def acting(lab: Lab) -> Output:
    """Act, train, act twice, train; and the same training without any acting."""
    output = Output()
    for acts in (True, False):
        engine = lab.pi0_engine(TEACHER, lr=1e-4, persistence=0)
        for step, seeds in enumerate((SCENES[:1], SCENES[1:])):
            if acts:
                for seed in seeds:
                    _act(lab, engine, seed, output)
            result = task_step(
                engine, list(deal(scene(20 + step), 1, lab.rank, lab.world_size)), max_norm=1.0
            )
            assert result.applied
        output.add("acted" if acts else "only trained", masters(engine))
        engine.close()
    return output


def _act(lab: Lab, engine: Engine, seed: int, output: Output) -> None:
    """The chunks of this rank's samples, and how many tokens it decoded for them."""
    gemma, tokens = engine.module.policy.model.paligemma_with_expert.paligemma, []
    hook = gemma.lm_head.register_forward_pre_hook(lambda *_: tokens.append(1))
    (own,) = deal(scene(seed), 1, lab.rank, lab.world_size)
    chunks = engine.act(own)
    hook.remove()
    assert not chunks.requires_grad
    assert chunks.dtype == torch.float32
    samples = range(lab.rank, SAMPLES, lab.world_size)
    output.add(
        "chunks", ((f"{seed}-{sample}", 0, c.flatten()) for sample, c in zip(samples, chunks, strict=True))
    )
    output.values[f"tokens{seed}"] = len(tokens)
