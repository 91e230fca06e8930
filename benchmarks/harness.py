"""Shared parts of the benchmarks: policies, engines, and ranks of this machine that measure one case.

A benchmark calls `serve_case(measure)` first and `run_case(case, world_size)` for each case: `run_case`
starts the same script again as ranks, in which `serve_case` runs `measure(case)` and exits.
"""

import argparse
import faulthandler
import json
import os
import platform
import signal
import sys
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi_gemma import PiGemmaModel
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaAttention, GemmaMLP

from craft_ds.cli import exit_without_teardown
from craft_ds.config.configs import FsdpConfig
from craft_ds.config.craft_config import CraftConfig
from craft_ds.distributed.collectives import init_process_group
from craft_ds.engines.base import Batch, Engine, ReadRange
from craft_ds.engines.compact_adam import compact
from craft_ds.engines.deepspeed_config import read_ds_config, resolve_ds_config
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.policies.directory import WEIGHTS
from craft_ds.policies.feed_forward import LeanGemmaMLP
from craft_ds.policies.last_layer import LastAttention
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.policies.meta_init import build_on_meta
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.weights import WeightReader, unique_tensors
from craft_ds.tensor_io.tensor_file import TensorFile, TensorSpec, create_tensor_file
from craft_ds.testing.launch_ranks import run_ranks
from craft_ds.testing.policies import random_batch
from craft_ds.worlds import teacher_directory

ROOT = Path(__file__).resolve().parents[1]
TEACHER = teacher_directory("metaworld")
OUTPUTS = ROOT / "outputs" / "bench"
PIECE = 1 << 22
CRAFT = CraftConfig(enabled=True, conflict_threshold=1.0)  # every step projects: the most expensive case
_RESULT = "CRAFT_BENCH_RESULT"
_CASE = "CRAFT_BENCH_CASE"
STEADY_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""Makes glibc return freed memory at once, so that resident memory is memory in use."""


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help shows the description as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def serve_case(measure: Callable[[dict[str, Any]], Any]) -> None:
    """Measure the case and exit in a rank that `run_case` started; do nothing in the script itself."""
    if _CASE not in os.environ:
        return
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    case, result = json.loads(os.environ[_CASE]), Path(os.environ[_RESULT], f"{os.environ['RANK']}.json")
    exit_without_teardown(lambda: result.write_text(json.dumps(measure(case))))


def run_case(
    case: dict[str, Any],
    world_size: int,
    *,
    timeout: float = 600,
    environment: Mapping[str, str] = STEADY_ALLOCATOR,
) -> list[Any]:
    """Run the calling script as ranks that measure one case (`serve_case`).

    Args:
        case: The argument of the function that measures; anything that JSON represents.
        world_size: Number of ranks.
        timeout: Seconds after which the ranks are killed.
        environment: Additional environment variables of the ranks.

    Returns:
        The result of each rank.

    Raises:
        UserError: A rank failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = {**environment, _RESULT: directory, _CASE: json.dumps(case)}
        ends = run_ranks([sys.executable, sys.argv[0]], world_size, timeout=timeout, environment=environment)
        failed = [end for end in ends if end.status]
        if failed:
            raise UserError(f"a rank failed with status {failed[0].status}:\n{failed[0].output[-3000:]}")
        return [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(world_size)]


def memory_bytes(field: str) -> int:
    """Return a field of this process's `/proc/self/status`: `VmRSS`, `VmHWM` (its peak) or `RssAnon`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


def reset_peak() -> None:
    """Reset the peak of resident memory (Linux, `proc(5)`: 5 into `clear_refs`)."""
    Path("/proc/self/clear_refs").write_text("5")


def mid_size_config() -> TinyPI0FastConfig:
    """Return the configuration of a pi0_fast of 119 M parameters."""
    features = {
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 112, 112)),
        "observation.state": PolicyFeature(FeatureType.STATE, (8,)),
    }
    return TinyPI0FastConfig(
        input_features=features,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        device="cpu",
        push_to_hub=False,
        vocab_size=16_384,
        text_width=768,
        text_depth=8,
        text_mlp_dim=3072,
        text_heads=8,
        vision_width=512,
        vision_depth=8,
        vision_mlp_dim=2048,
        vision_heads=8,
        image_resolution=(112, 112),
        vision_patch=14,
        max_action_tokens=48,
    )


def as_in_lerobot_(policy: PreTrainedPolicy) -> None:
    """Undo what `build_on_meta` changes beside the parameters' device."""
    for module in policy.modules():
        if isinstance(module, LeanGemmaMLP):
            module.__class__ = GemmaMLP
        if isinstance(module, LastAttention):
            module.__class__ = GemmaAttention
        if isinstance(module, PiGemmaModel):
            layer = module.layers[-1]
            layer.__class__ = type(layer).__base__


def random_values(name: str, start: int, stop: int) -> Tensor:
    """Return random weights of a policy, as a `ReadRange`: small values, and 1 for scales of layer norms."""
    if "layer_norm" in name or "layernorm" in name:
        # Gemma's norms add one to their weight.
        one = name.endswith("weight") and "vision_tower" in name
        return torch.full((stop - start,), float(one))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {start}".encode()))
    return torch.randn(stop - start, generator=generator) * 0.02


def write_random_weights(policy: PreTrainedPolicy, directory: Path, dtype: torch.dtype) -> None:
    """Write a policy's `model.safetensors` in pieces; no tensor is completely in memory."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = unique_tensors(policy)
    path = directory / WEIGHTS
    create_tensor_file(path, [TensorSpec(name, tuple(t.shape), dtype) for name, t in tensors.items()])
    with TensorFile(path, writable=True) as file:
        for name, tensor in tensors.items():
            for start in range(0, tensor.numel(), PIECE):
                stop = min(start + PIECE, tensor.numel())
                file.write(name, start, random_values(name, start, stop))


def default_device() -> torch.device:
    """Return this rank's accelerator, or the CPU without one."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def init_ranks(kind: str) -> None:
    """Initialize the process group that an engine needs. Collective: call on all ranks."""
    if kind.startswith("zero"):
        from craft_ds.engines.deepspeed import init_distributed

        init_distributed()
    elif kind.startswith("fsdp"):
        init_process_group()


def make_engine(
    kind: str,
    policy: PreTrainedPolicy,
    read: ReadRange,
    dtype: torch.dtype = torch.float32,
    build_optimizer: Callable[[], torch.optim.Optimizer] | None = None,
    optimizer_state: str = "fp32",
    **ds_options: Any,
) -> Engine:
    """Return an engine around a policy without weights. Collective: call on all ranks.

    Args:
        kind: `single`, `fsdp`, `fsdp_offload`, or the name of a file in `ds_configs/`.
        policy: From `build_on_meta`.
        read: Reads its weights.
        dtype: Dtype of forward and backward.
        build_optimizer: By default AdamW on all trainable parameters.
        optimizer_state: Format of the moments of the default.
        **ds_options: Keys of the DeepSpeed file's `zero_optimization` to set.
    """
    module = PolicyWithLoss(policy)

    def adamw() -> torch.optim.Optimizer:
        trainable = [p for p in policy.parameters() if p.requires_grad]
        return compact(torch.optim.AdamW(trainable, lr=1e-4), optimizer_state)

    build_optimizer = build_optimizer or adamw
    if kind == "single":
        return SingleEngine(module, read, build_optimizer, default_device(), dtype)
    if kind.startswith("fsdp"):
        from craft_ds.engines.fsdp import FsdpEngine

        return FsdpEngine(
            module, read, build_optimizer, FsdpConfig(cpu_offload=kind.endswith("offload")), dtype
        )
    from craft_ds.engines.deepspeed import DeepSpeedEngine

    file = ROOT / "ds_configs" / f"{kind}.json"
    config = resolve_ds_config(
        read_ds_config(file),
        path=str(file),
        batch_size=1,
        gradient_accumulation_steps=1,
        grad_clip_norm=1.0,
        bf16=dtype == torch.bfloat16,
        world_size=int(os.environ["WORLD_SIZE"]),
        optimizer_state=optimizer_state,
    )
    config["zero_optimization"] |= ds_options
    return DeepSpeedEngine(module, read, build_optimizer, config)


def build_engine() -> Engine:
    """Return the shipped teacher in fp32, on one process or on ZeRO-3 ranks. Collective."""
    kind = "single" if int(os.environ["WORLD_SIZE"]) == 1 else "zero3"
    init_ranks(kind)
    policy = build_on_meta(load_policy_config(TEACHER))
    with WeightReader(TEACHER, policy) as weights:
        return make_engine(kind, policy, weights.read)


def teacher_engine(learning_rate: float, optimizer_state: str = "fp32") -> Engine:
    """Return the shipped teacher in one process, in fp32, with AdamW."""
    policy = build_policy(load_policy_config(TEACHER), TEACHER)
    with WeightReader(TEACHER, policy) as weights:
        engine = make_engine("single", policy, weights.read, optimizer_state=optimizer_state)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    return engine


def batches(engine: Engine, batch_size: int, seed: int) -> list[Batch]:
    """Return one micro-batch of this rank, with random images and tokens."""
    batch = random_batch(load_policy_config(TEACHER), batch_size, seed * engine.world_size + engine.rank)
    return [{key: value.to(engine.device) for key, value in batch.items()}]


def shard_sizes(engine: Engine) -> list[int]:
    """Return the elements per rank of each trainable parameter, with the padding of ZeRO-3."""
    parameters = [p for p in engine.module.parameters() if p.requires_grad]
    return [-(-getattr(p, "ds_numel", p.numel()) // engine.world_size) for p in parameters]


def hardware() -> str:
    """Return a line on the hardware and software of the measurement."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return (
        f"{os.cpu_count()} x {model}, one thread per rank, gloo, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write `outputs/bench/<name>.json` and print its path."""
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    path = OUTPUTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written {path.relative_to(ROOT)}")
