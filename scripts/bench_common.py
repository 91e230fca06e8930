"""What the benchmarks share: the shipped tiny pi0_fast on some ranks of this machine, and their spawning."""

import faulthandler
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lerobot.policies.pretrained import PreTrainedPolicy

from craft_ds.config import CraftConfig, FsdpConfig
from craft_ds.engines.base import Batch, Engine, ReadRange
from craft_ds.engines.ds_config import read_ds_config, resolve_ds_config
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.local_ranks import run_ranks
from craft_ds.policies.adapter import PolicyWithLoss
from craft_ds.policies.loading import load_policy_config
from craft_ds.policies.skeleton import build_skeleton
from craft_ds.policies.testing import random_batch
from craft_ds.policies.weights import WeightReader

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "craft_ds" / "world" / "assets" / "metaworld_teacher"
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


def join_ranks(kind: str) -> None:
    """Join the process group that an engine needs. Collective: call on all ranks."""
    if kind.startswith("zero"):
        from craft_ds.engines.zero import init_distributed

        init_distributed()
    elif kind.startswith("fsdp"):
        from craft_ds.engines import fsdp

        fsdp.init_distributed()


def make_engine(
    kind: str,
    policy: PreTrainedPolicy,
    read: ReadRange,
    dtype: torch.dtype = torch.float32,
    build_optimizer: Callable[[], torch.optim.Optimizer] | None = None,
    **ds_options: Any,
) -> Engine:
    """An engine of a kind around a policy without weights. Collective: call on all ranks.

    Args:
        kind: `single`, `fsdp`, `fsdp_offload`, or the name of a file in `ds_configs/`.
        policy: From `build_skeleton`.
        read: Reads its weights.
        dtype: Of forward and backward.
        build_optimizer: By default AdamW on all parameters that train.
        **ds_options: Keys of the DeepSpeed file's `zero_optimization` to set.
    """
    module = PolicyWithLoss(policy)

    def adamw() -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-4)

    build_optimizer = build_optimizer or adamw
    if kind == "single":
        return SingleEngine(module, read, build_optimizer, torch.device("cpu"), dtype)
    if kind.startswith("fsdp"):
        from craft_ds.engines.fsdp import FsdpEngine

        return FsdpEngine(module, read, build_optimizer, FsdpConfig(cpu_offload=kind.endswith("offload")), dtype)
    from craft_ds.engines.zero import ZeroEngine

    file = ROOT / "ds_configs" / f"{kind}.json"
    config = resolve_ds_config(
        read_ds_config(file),
        path=str(file),
        batch_size=1,
        gradient_accumulation_steps=1,
        grad_clip_norm=1.0,
        bf16=dtype == torch.bfloat16,
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    config["zero_optimization"] |= ds_options
    return ZeroEngine(module, read, build_optimizer, config)


def build_engine() -> Engine:
    """The shipped teacher in fp32 on the launched number of ranks: one process, or ZeRO-3. Collective."""
    kind = "single" if int(os.environ["WORLD_SIZE"]) == 1 else "zero3"
    join_ranks(kind)
    policy = build_skeleton(load_policy_config(TEACHER))
    with WeightReader(TEACHER, policy) as weights:
        return make_engine(kind, policy, weights.read)


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
