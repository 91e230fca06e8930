"""Methods of continual learning, as flags of `craft-ds train` and `craft-ds anchors`.

All take the same number of optimizer steps with the same batches, see the same stored samples, and make one
backward pass on the task and one on anchors in every step, but for those that are named otherwise.
"""

from dataclasses import dataclass, field, replace
from typing import Any

Flags = dict[str, Any]


@dataclass(frozen=True)
class Method:
    """A method of the benchmark.

    Attributes:
        train: Flags of `craft-ds train`.
        anchors: Flags of `craft-ds anchors`.
        stores: The method stores samples: it has a cell for each budget.
        observes: It has no old data, but anchors: observations of the new task under the old instructions.
        replays: It trains on the stored samples.
        family: Methods of a family are one method with several settings, of which tuning chooses one.
    """

    train: Flags = field(default_factory=dict)
    anchors: Flags = field(default_factory=dict)
    stores: bool = True
    observes: bool = False
    replays: bool = True
    family: str = ""


def _replay(weight: float) -> Method:
    return Method({"craft.preset": "replay", "craft.initial_lambda": weight}, family="replay")


def _kl(weight: float, **more: Any) -> Method:
    flags = {"craft.preset": "kl", "craft.initial_lambda": weight}
    flags |= {f"craft.{name}": value for name, value in more.items()}
    return Method(flags, {"targets": ["teacher_kl"]}, family="kl")


METHODS = {
    "sequential": Method({"craft.preset": "sequential"}, stores=False),
    "joint": Method({"craft.preset": "sequential"}, stores=False),
    "l2": Method({"craft.preset": "l2"}, stores=False),
    "ewc": Method({"craft.preset": "ewc"}, replays=False),
    "agem": Method({"craft.preset": "agem"}),
    "replay_0.1": _replay(0.1),
    "replay_0.3": _replay(0.3),
    "replay_1": _replay(1.0),
    "guide": Method(
        {
            "craft.preset": "guide",
            "craft.retention_freq": 1,
            "craft.epsilon_relative": True,
            "craft.epsilon_start": 1.4,
            "craft.epsilon_end": 1.4,
            "craft.lambda_lr": 0.1,
        }
    ),
    "kl_0.3": _kl(0.3),
    "kl_1": _kl(1.0),
    "kl_3": _kl(3.0),
    "kl_adaptive": Method(
        {
            "craft.preset": "kl",
            "craft.multiplier": "nupi",
            "craft.initial_lambda": 0.3,
            "craft.lambda_lr": 0.1,
            "craft.epsilon_start": 0.05,
            "craft.epsilon_end": 0.05,
        },
        {"targets": ["teacher_kl"]},
    ),
    "kl_tasks": Method(
        {
            "craft.preset": "kl",
            "craft.multiplier": "nupi",
            "craft.multiplier_scope": "task",
            "craft.initial_lambda": 0.3,
            "craft.lambda_lr": 0.1,
            "craft.epsilon_start": 0.05,
            "craft.epsilon_end": 0.05,
        },
        {"targets": ["teacher_kl"]},
    ),
    # A fifth of the backward passes on anchors.
    "kl_every_5": replace(_kl(1.0, retention_freq=5, retention_scale="freq"), family=""),
    # Anchors of equal shares of motion phases.
    "kl_phases": replace(_kl(1.0), anchors={"targets": ["teacher_kl"], "selection": "phases"}, family=""),
    # No old data.
    "kl_observations_1": replace(_kl(1.0), stores=False, observes=True, family="kl_observations"),
    "kl_observations_3": replace(_kl(3.0), stores=False, observes=True, family="kl_observations"),
}
"""The methods by name. `joint` is one stage that learns all tasks at once: the upper bound."""
