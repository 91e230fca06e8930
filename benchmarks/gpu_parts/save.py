"""Saving: seconds of a checkpoint with fp32 masters and moments, loaded back and compared."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from checkpoint_methods import methods, overwrite
from harness import TEACHER, init_ranks, make_engine

from craft_ds.engines.base import Engine
from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers
from craft_ds.training.train_step import task_step
from gpu_parts.speed import config, cut_layers, random_batch, random_values
from gpu_parts.timing import synchronize

LAYERS = 2
"""Layers of gemma_2b and of the vision tower; the embeddings are most of such a policy."""


def run(small: bool) -> dict[str, Any]:
    """Save from FSDP2 in the foreground and in the background, overwrite everything, load and compare."""
    init_ranks("fsdp")
    policy = meta_policy_without_tokenizers(config(small, 1, torch.float32))
    cut_layers(policy, None if small else LAYERS)
    engine = make_engine("fsdp", policy, random_values, torch.bfloat16)
    assert task_step(engine, [random_batch(small, 1, 1)], 1.0).applied
    saved = _copies(engine)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name in ("craft", "craft_background"):
            method, target = methods(engine, policy, TEACHER)[name], Path(directory, name)
            synchronize()
            started = time.perf_counter()
            wait = method.save(target)
            held_up = time.perf_counter() - started
            if wait is not None:
                wait()
            done = time.perf_counter() - started
            overwrite(engine)
            started = time.perf_counter()
            method.load(target)
            synchronize()
            loaded = time.perf_counter() - started
            found = _copies(engine)
            row = {"method": method.label, "held_up_s": held_up, "done_s": done, "load_s": loaded}
            row["bytes"] = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
            row["different"] = sum(not torch.equal(found[key], values) for key, values in saved.items())
            rows.append(row)
            shutil.rmtree(target)
    engine.close()
    parameters = sum(p.numel() for p in policy.parameters())
    return {"parameters": parameters, "rows": rows, "ok": not any(row["different"] for row in rows)}


def _copies(engine: Engine) -> dict[str, torch.Tensor]:
    """Return copies of all parameters and optimizer states of this rank, in the host's memory."""
    return {
        f"{shard.name}.{key}": values.detach().to("cpu", copy=True)
        for shard in engine.shards()
        for key, values in (("", shard.master), *shard.state.items())
    }


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the table."""
    lines = [
        f"Checkpoints of {result['parameters'] / 1e9:.2f} B parameters with fp32 moments, one rank of FSDP2",
        "",
        "| method | training blocked s | on disk s | loaded s | GB |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['method']} | {row['held_up_s']:.2f} | {row['done_s']:.2f} | {row['load_s']:.2f} | "
            f"{row['bytes'] / 1e9:.1f} |"
        )
    return lines
