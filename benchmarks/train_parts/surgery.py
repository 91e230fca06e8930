"""Surgery on two gradients: ours, the guide's procedure, and TorchJD's."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchjd.aggregation import PCGrad
from torchjd.autojac import jac_to_grad

from craft_ds.algorithm.gradient_surgery import merge
from craft_ds.algorithm.gram import gram, merge_
from craft_ds.algorithm.gram_triple import GramTriple
from craft_ds.config.craft_config import CraftConfig
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from train_parts.pairs import in_turn, ratio

CRAFT = CraftConfig(enabled=True, conflict_threshold=1.0)
MULTIPLIER = 1e-9  # g_r, into which ours merges, must not grow over the repeats
PARAMETERS, UNITS = 603, 48


def ours(g_t: list[Tensor], g_r: list[Tensor]) -> None:
    """Compute the triple, decide, and merge in place."""
    merged = merge(GramTriple(*gram(g_t, g_r).tolist()), MULTIPLIER, CRAFT)
    merge_(g_r, g_t, merged.a * 1e-3, 1.0)


def guides(g_t: list[Tensor], g_r: list[Tensor], grads: list[Tensor]) -> None:
    """Clone both gradients, take dot products by parameter, project, add and set, as the guide's loop."""
    task_grads = [t.clone() for t in g_t]
    retention_grads = [r.clone() for r in g_r]
    tt, tr, rr = (
        sum(float((x * y).sum()) for x, y in zip(a, b, strict=True))
        for a, b in (
            (task_grads, task_grads),
            (task_grads, retention_grads),
            (retention_grads, retention_grads),
        )
    )
    if tr / (tt * rr) ** 0.5 < CRAFT.conflict_threshold:
        task_grads = [t - tr / rr * r for t, r in zip(task_grads, retention_grads, strict=True)]
    final = [t + MULTIPLIER * r for t, r in zip(task_grads, retention_grads, strict=True)]
    for grad, value in zip(grads, final, strict=True):
        grad.copy_(value)


def torchjds(parameters: list[Tensor], aggregator: PCGrad) -> None:
    """Aggregate the Jacobians, which are there already, into `.grad`."""
    for parameter in parameters:
        parameter.grad = None
    jac_to_grad(parameters, aggregator, retain_jac=True, optimize_gramian_computation=True)


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Return times and largest extra memory, on a flat shard, on units and on separate tensors."""
    rows = []
    for layout, tensors in (("flat", 1), ("units", UNITS), ("parameters", PARAMETERS)):
        size = case["elements"] // tensors
        generator = torch.Generator().manual_seed(0)
        jacobians = [torch.randn(2, size, generator=generator) for _ in range(tensors)]
        parameters = [torch.zeros(size, requires_grad=True) for _ in range(tensors)]
        for parameter, jacobian in zip(parameters, jacobians, strict=True):
            parameter.jac = jacobian  # type: ignore[attr-defined]
        g_t, g_r = ([jacobian[row].clone() for jacobian in jacobians] for row in (0, 1))
        grads = [torch.zeros(size) for _ in range(tensors)]
        actions = {
            "ours": partial(ours, g_t, g_r),
            "guide": partial(guides, g_t, g_r, grads),
            "torchjd": partial(torchjds, parameters, PCGrad()),
        }
        times = in_turn(actions, case["repeats"])
        memory = {}
        for name, action in actions.items():
            with MemoryCounter() as counter:
                action()
            memory[name] = counter.peak / (4 * size * tensors)
        rows.append(
            {
                "layout": layout,
                "elements": size * tensors,
                "seconds": times,
                "guide_to_ours": ratio(times["guide"], times["ours"]),
                "torchjd_to_ours": ratio(times["torchjd"], times["ours"]),
                "extra_gradients": memory,
            }
        )
    return {"rows": rows}
