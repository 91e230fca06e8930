"""Parity: the same steps by one process on the CPU and by each engine on the device, one rank."""

import math
from typing import Any

import torch
from harness import CRAFT, TEACHER, init_ranks, make_engine

from craft_ds.algorithm.multiplier import DualState, RetentionRecord
from craft_ds.engines.base import Batch, Engine
from craft_ds.engines.single import SingleEngine
from craft_ds.policies.loading import load_policy_config
from craft_ds.policies.meta_init import build_on_meta
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.weights import WeightReader
from craft_ds.testing.policies import random_batch
from craft_ds.training.train_step import retention_step, task_step

ENGINES = {"single": "single", "fsdp": "fsdp", "zero2": "zero2", "zero3": "zero3"}
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}
"""Largest relative difference of losses, retention losses and λ from fp32 on the CPU."""
STEPS = 6


def run(small: bool) -> dict[str, Any]:
    """Take task and retention steps in turn with every engine and dtype; return differences."""
    torch.backends.cuda.matmul.allow_tf32 = False
    init_ranks("zero3")
    reference = _train("cpu", torch.float32)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ENGINES:
            name = str(dtype).removeprefix("torch.")
            try:
                found = _train(kind, dtype)
                row = _difference(found, reference)
            except Exception as error:  # one engine must not hide the others
                row = {"error": f"{type(error).__name__}: {error}"[:300], "largest": math.inf}
            rows.append({"engine": kind, "dtype": name, "limit": LIMITS[name], **row})
    return {"steps": STEPS, "rows": rows, "ok": all(row["largest"] <= row["limit"] for row in rows)}


def _engine(kind: str, dtype: torch.dtype) -> Engine:
    policy = build_on_meta(load_policy_config(TEACHER))
    with WeightReader(TEACHER, policy) as weights:
        if kind == "cpu":
            return SingleEngine(
                PolicyWithLoss(policy),
                weights.read,
                lambda: torch.optim.AdamW(policy.parameters(), lr=1e-4),
                torch.device("cpu"),
            )
        return make_engine(kind, policy, weights.read, dtype)


def _train(kind: str, dtype: torch.dtype) -> dict[str, Any]:
    engine = _engine(kind, dtype)
    config, dual = load_policy_config(TEACHER), DualState(CRAFT)

    def batches(seed: int) -> list[Batch]:
        batch = random_batch(config, 4, seed)
        return [{key: value.to(engine.device) for key, value in batch.items()}]

    rows = []
    for step in range(STEPS):
        if step % 2:
            result = task_step(engine, batches(step), 1.0)
            rows.append({"loss": result.loss, "norm": result.grad_norm})
            continue
        result = retention_step(
            engine,
            task=batches(step),
            anchors=batches(100 + step),
            constraint=batches(200 + step),
            multiplier=dual.multiplier,
            craft=CRAFT,
            max_norm=1.0,
        )
        assert result.triple is not None
        assert result.merged is not None
        assert result.retention_loss is not None
        merged, triple = result.merged, result.triple
        loss = result.retention_loss
        dual.ascend(
            RetentionRecord(
                step, dual.multiplier, 1.0, loss, merged.conflict, merged.cosine, merged.b, triple.tr
            )
        )
        rows.append(
            {
                "loss": result.loss,
                "norm": result.grad_norm,
                "retention_loss": loss,
                "lambda": dual.multiplier,
                "cosine": triple.cosine,
            }
        )
    weights = {shard.name: shard.master.detach().float().cpu().clone() for shard in engine.shards()}
    if kind != "cpu":
        engine.close()
    return {"rows": rows, "weights": weights}


def _difference(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for row, expected in zip(found["rows"], reference["rows"], strict=True):
        for key, value in expected.items():
            scale = 1.0 if key == "cosine" else abs(value)
            largest[key] = max(largest.get(key, 0.0), abs(row[key] - value) / scale)
    weights = reference["weights"]
    assert found["weights"].keys() == weights.keys()
    moved = sum((found["weights"][name] - values).square().sum().item() for name, values in weights.items())
    total = sum(values.square().sum().item() for values in weights.values())
    decisive = max(largest[key] for key in ("loss", "retention_loss", "lambda"))
    return {**largest, "weights": math.sqrt(moved / total), "largest": decisive}


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        f"Parity with one fp32 process on the CPU, {result['steps']} steps; largest relative differences",
        "",
        "| engine, one rank | dtype | loss | retention loss | λ | gradient norm | weights | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        names = ("loss", "retention_loss", "lambda", "norm", "weights")
        values = " | ".join(f"{row[name]:.1e}" if name in row else row["error"][:40] for name in names)
        lines.append(f"| {row['engine']} | {row['dtype']} | {values} | {row['limit']:.0e} |")
    return lines
