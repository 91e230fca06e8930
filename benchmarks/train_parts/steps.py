"""Retention steps against plain steps of the same run: one process, a pi0_fast of 119 M parameters."""

from functools import partial
from typing import Any

from harness import default_device, make_engine, mid_size_config, random_values
from lerobot.utils.constants import ACTION_TOKEN_MASK

from craft_ds.config.craft_config import CraftConfig
from craft_ds.engines.base import Batch
from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers
from craft_ds.testing.policies import random_batch
from craft_ds.training.joint_step import joint_step
from craft_ds.training.train_step import accumulate, retention_step, task_step
from train_parts.pairs import in_turn, ratio

GUIDE = CraftConfig(enabled=True, conflict_threshold=1.0)  # every step projects: the most expensive case
KL = CraftConfig(enabled=True, use_grad_projection=False)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Return ratios to a plain step, and the part of a step with projection that is not its passes."""
    config = mid_size_config()
    engine = make_engine("single", meta_policy_without_tokenizers(config), random_values)

    def batch(seed: int) -> list[Batch]:
        made = random_batch(config, case["batch_size"], seed)
        return [{name: values.to(default_device()) for name, values in made.items()}]

    task, anchors, heldout = batch(1), batch(2), batch(3)
    given = {"task": task, "anchors": anchors, "multiplier": 1.0, "max_norm": 1.0}

    def passes() -> None:
        accumulate(engine, task)
        accumulate(engine, anchors)
        engine.step()

    times = in_turn(
        {
            "plain": partial(task_step, engine, task, 1.0),
            "passes": passes,
            "projection": partial(retention_step, engine, constraint=None, craft=GUIDE, **given),
            "heldout": partial(retention_step, engine, constraint=heldout, craft=GUIDE, **given),
            "one_gradient": partial(
                joint_step, engine, constraint=None, craft=KL, anchor_tokens=_tokens(anchors), **given
            ),
        },
        case["repeats"],
    )
    plain = times["plain"]
    found = {name: ratio(times[name], plain) for name in ("projection", "heldout", "one_gradient")}
    return {
        "seconds": times,
        "to_plain": found,
        "mean_of_5": {name: (4 + each.mean) / 5 for name, each in found.items()},
        "beyond_passes": ratio(times["projection"], times["passes"]),
    }


def _tokens(batches: list[Batch]) -> int:
    return sum(int(batch[ACTION_TOKEN_MASK][:, 1:].sum()) for batch in batches)
