"""Steps that are non-finite on one rank only: no rank takes them, and later steps are unaffected."""

import math

import torch
from lab import Lab, Output, craft_config, masters, moments

from craft_ds.engines.base import Batch, Engine
from craft_ds.training.train_step import StepResult, retention_step, task_step


def non_finite(lab: Lab) -> Output:
    """Non-finite task batches, anchors and constraints of the last rank alone; then two sound steps."""
    engine, output = lab.pi0_engine(), Output()
    output.add("before", masters(engine))
    task, anchors, constraint = (lab.pi0_batches(step, 2) for step in range(3))
    cases = {
        "task": lambda: task_step(engine, _spoilt(lab, task), 1.0),
        "retention: task": lambda: _retention(engine, _spoilt(lab, task), anchors, constraint),
        "retention: anchors": lambda: _retention(engine, task, _spoilt(lab, anchors), constraint),
        "retention: constraint": lambda: _retention(engine, task, anchors, _spoilt(lab, constraint)),
    }
    for name, step in cases.items():
        result = step()
        output.values[name] = [result.applied, math.isfinite(result.loss + result.grad_norm)]
    output.add("skipped", masters(engine))
    sound = [_retention(engine, task, anchors, constraint), task_step(engine, task, 1.0)]
    output.values["sound"] = [result.applied for result in sound]
    output.add("after", masters(engine))
    output.add("after", moments(engine))
    engine.close()
    return output


def _retention(engine: Engine, *batches: list[Batch]) -> StepResult:
    task, anchors, constraint = batches
    return retention_step(
        engine,
        task=task,
        anchors=anchors,
        constraint=constraint,
        multiplier=1.0,
        craft=craft_config(),
        max_norm=1.0,
    )


def _spoilt(lab: Lab, batches: list[Batch]) -> list[Batch]:
    """The batches; on the last rank with one NaN pixel in the last of them."""
    if lab.rank < lab.world_size - 1:
        return batches
    *rest, last = batches
    images = {key: value.clone() for key, value in last.items() if value.dtype == torch.float32}
    for value in images.values():
        value.view(-1)[0] = torch.nan
    return [*rest, {**last, **images}]
