"""How often the host would wait for an accelerator in every kind of step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lab import Lab, Output, craft_config

from craft_ds.algorithm.penalty import QuadraticPenalty
from craft_ds.data import policy_input
from craft_ds.engines.base import Batch
from craft_ds.policies.pi0_fast.retention import RETENTION_LOSSES, by_task
from craft_ds.policies.replace_attribute import replace_attribute
from craft_ds.testing.host_waits import HostWaits
from craft_ds.training.joint_step import joint_step
from craft_ds.training.train_step import measure, retention_step, task_step
from craft_ds.training.weight_average import WeightAverage

STEP: dict[str, Any] = {"max_norm": 1.0, "extra": [0.0, 0.0]}


def host_waits(lab: Lab) -> Output:
    """Return how often each package waits, by the kind of step; pi0_fast, two micro-batches a pass."""
    engine, output, waits = lab.pi0_engine(lr=1e-3), Output(), HostWaits()
    average = WeightAverage(0.9, engine)

    def moved(step: int, loss: str = "token_ce") -> list[Batch]:
        batches = lab.pi0_batches(step, 2, loss)
        with replace_attribute(policy_input, "copy_to_device", waits.copy_to_device):
            return [policy_input.to_device(batch, engine.device) for batch in batches]

    task = moved(0)
    broken = [{key: v * torch.nan if v.is_floating_point() else v for key, v in b.items()} for b in task]
    retention = partial(retention_step, engine, task=task, multiplier=1.0, craft=craft_config(), **STEP)
    joint = partial(joint_step, engine, task=task, anchors=moved(1), constraint=moved(2), **STEP)
    together = craft_config(use_grad_projection=False)
    actions: dict[str, Callable[[], Any]] = {
        "plain": lambda: (task_step(engine, task, **STEP), average.update()),
        "penalised": partial(
            task_step,
            engine,
            task,
            penalty=QuadraticPenalty(1.0, [master.clone() for master in engine.masters()]),
            **STEP,
        ),
        "skipped": partial(task_step, engine, broken, **STEP),
        **{
            f"retention {name}": partial(
                retention, anchors=moved(1, name), constraint=moved(2, name), anchor_loss=found.loss
            )
            for name, found in RETENTION_LOSSES.items()
        },
        "retention by layer and task": partial(
            retention,
            anchors=moved(1),
            constraint=None,
            multiplier=(1.0, 2.0),
            craft=craft_config(surgery_scope="layer"),
            anchor_loss=by_task("token_ce", 2),
        ),
        "one gradient": partial(joint, anchor_tokens=7, multiplier=1.0, craft=together),
        "one gradient by task": partial(
            joint,
            anchor_tokens=7,
            multiplier=(1.0, 2.0),
            craft=together,
            anchor_loss=by_task("token_ce", 2),
        ),
        "evaluation": partial(measure, engine, task),
    }
    actions["plain"]()  # DeepSpeed initialises in the first step
    for name, action in actions.items():
        with waits:
            action()
        output.values[name] = waits.take()
    engine.close()
    return output
