"""What the benchmarks share: the shipped tiny pi0_fast on some ranks of this machine, and their spawning."""

import faulthandler
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from craft_ds.config import CraftConfig
from craft_ds.engines.base import Batch, Engine
from craft_ds.engines.ds_config import read_ds_config, resolve_ds_config
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.local_ranks import run_ranks
from craft_ds.policies.adapter import PolicyWithLoss
from craft_ds.policies.loading import load_policy, load_policy_config
from craft_ds.policies.testing import random_batch

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "craft_ds" / "world" / "assets" / "metaworld_teacher"
DS_CONFIG = ROOT / "ds_configs" / "zero3.json"
OUTPUTS = ROOT / "outputs" / "bench"
CRAFT = CraftConfig(enabled=True, conflict_threshold=1.0)  # every step projects: the dearest case
_RESULT = "CRAFT_BENCH_RESULT"


def run_benchmark(measure: Callable[[], Any], world_sizes: tuple[int, ...]) -> dict[int, Any] | None:
    """Run `measure` on each number of ranks, as ranks of the calling script.

    Returns:
        What rank 0 of each measured, by world size; None in a rank itself.

    Raises:
        UserError: A rank failed.
    """
    if _RESULT in os.environ:
        faulthandler.register(signal.SIGUSR1)
        torch.set_num_threads(1)
        result = measure()
        if os.environ["RANK"] == "0":
            Path(os.environ[_RESULT]).write_text(json.dumps(result))
        return None
    results = {}
    for world_size in world_sizes:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "result.json"
            ends = run_ranks(
                [sys.executable, *sys.argv], world_size, timeout=600, environment={_RESULT: str(file)}
            )
            if any(end.status for end in ends):
                raise UserError(f"a rank failed:\n{ends[0].output[-3000:]}")
            results[world_size] = json.loads(file.read_text())
    return results


def build_engine() -> Engine:
    """The engine for the launched number of ranks, in fp32 with AdamW. Collective."""
    world_size = int(os.environ["WORLD_SIZE"])
    policy = load_policy(load_policy_config(TEACHER), TEACHER)
    build_optimizer = partial(torch.optim.AdamW, policy.parameters(), lr=1e-4)
    if world_size == 1:
        return SingleEngine(PolicyWithLoss(policy), build_optimizer, torch.device("cpu"))
    from craft_ds.engines.zero import ZeroEngine, init_distributed

    init_distributed()
    config = resolve_ds_config(
        read_ds_config(DS_CONFIG),
        path=str(DS_CONFIG),
        batch_size=1,
        gradient_accumulation_steps=1,
        grad_clip_norm=1.0,
        bf16=False,
        world_size=world_size,
    )
    return ZeroEngine(PolicyWithLoss(policy), build_optimizer, config)


def batches(engine: Engine, batch_size: int, seed: int) -> list[Batch]:
    """One micro-batch of this rank, of random images and tokens."""
    batch = random_batch(load_policy_config(TEACHER), batch_size, seed * engine.world_size + engine.rank)
    return [{key: value.to(engine.device) for key, value in batch.items()}]


def shard_sizes(engine: Engine) -> list[int]:
    """Elements of each trainable parameter's part on a rank, the padding of ZeRO-3 included."""
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    return [-(-getattr(p, "ds_numel", p.numel()) // engine.world_size) for p in parameters]


def hardware() -> str:
    """What the figures were measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return (
        f"{os.cpu_count()} x {model}, one thread a rank, gloo, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write `outputs/bench/<name>.json` and say so."""
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    path = OUTPUTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written {path.relative_to(ROOT)}")
