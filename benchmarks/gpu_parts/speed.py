"""Seconds and bytes of a step: LeRobot's `update_policy` and craft-ds on the same policy and batches.

The policy has gemma_2b's widths, all its layers where the memory allows, and random weights. A batch is 8
samples; prompts have 80 tokens of 200, actions 100 of 256. LeRobot's `train` sets TF32, so both have it in
fp32. The planner's prediction stands beside the measured peak of a retention step.
"""

import gc
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from harness import CRAFT, as_in_lerobot_, default_device, init_ranks, make_engine
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)

from craft_ds.config.configs import LoraConfig, OptimizerState
from craft_ds.engines.base import Batch
from craft_ds.engines.compact_adam import compact
from craft_ds.lora.adapters import add_adapters
from craft_ds.lora.peft_config import make_peft_config
from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.plan import plan_memory
from craft_ds.memory_planner.shapes import Workload, meta_policy_without_tokenizers
from craft_ds.memory_planner.simulate import simulate_pass
from craft_ds.policies.device_copies import copy_to_device
from craft_ds.policies.last_layer import skip_unread_outputs_
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.tiny_pi0_fast.policy import TinyPI0FastConfig
from craft_ds.policies.weights import unique_tensors
from craft_ds.training.train_step import retention_step, task_step
from gpu_parts.timing import allocated_bytes, launches, peak_bytes, seconds

SYSTEMS = {
    "lerobot_bf16": "LeRobot `update_policy`, bf16 weights and moments",
    "fsdp_bf16": "craft-ds FSDP2, bf16, fp32 masters and moments",
    "fsdp_int8": "craft-ds FSDP2, bf16, fp32 masters, 8-bit moments",
    "lora_bf16": "craft-ds FSDP2, LoRA, bf16",
    "lerobot_fp32": "LeRobot `update_policy`, fp32 with TF32",
    "fsdp_fp32": "craft-ds FSDP2, fp32 with TF32",
    "zero3_bf16": "craft-ds ZeRO-3, bf16, fp32 masters and moments",
}
CAMERAS = {"1 of 1": (1, 1), "3 of 3": (3, 3), "1 of 3": (3, 1)}
"""Cameras of the policy, and in the batch."""
LORA = LoraConfig(enabled=True)


class Sizes(NamedTuple):
    """Sizes of a measurement: samples, side of an image, real and padded lengths of prompts and actions."""

    batch: int
    side: int
    prompt: int
    prompt_padded: int
    action: int
    action_padded: int
    repeats: int


FULL = Sizes(8, 224, 80, 200, 100, 256, repeats=3)
SMALL = Sizes(2, 64, 12, 20, 8, 16, repeats=1)


def config(small: bool, cameras: int, dtype: torch.dtype) -> PI0FastConfig:
    """Return the configuration of the policy: gemma_2b with 257,152 tokens, or a tiny one."""
    kind, sizes = (TinyPI0FastConfig, SMALL) if small else (PI0FastConfig, FULL)
    extra: dict[str, Any] = {"image_resolution": (sizes.side, sizes.side)} if small else {}
    return kind(
        dtype=str(dtype).removeprefix("torch."),
        device=default_device().type,
        push_to_hub=False,
        tokenizer_max_length=sizes.prompt_padded,
        max_action_tokens=sizes.action_padded,
        input_features=camera_features(cameras, sizes.side)
        | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (7,))},
        **extra,
    )


def camera_features(cameras: int, side: int) -> dict[str, PolicyFeature]:
    return {
        f"observation.images.camera{index}": PolicyFeature(FeatureType.VISUAL, (3, side, side))
        for index in range(cameras)
    }


def random_values(name: str, start: int, stop: int) -> torch.Tensor:
    """Return random weights as a `ReadRange`, made on the device: billions of them take a second."""
    if "norm" in name:
        one = float(name.endswith("weight") and "vision_tower" in name)
        return torch.full((stop - start,), one, device=default_device())
    return torch.empty(stop - start, device=default_device()).normal_(std=0.02)


def random_batch(small: bool, present: int, seed: int) -> Batch:
    """Return a batch as the trainer hands it to an engine: on the device, with masks that the host knows."""
    sizes, device = SMALL if small else FULL, default_device()
    generator = torch.Generator(device).manual_seed(seed)
    vocabulary = 256 if small else 257_152

    def tokens(length: int) -> torch.Tensor:
        return torch.randint(0, vocabulary, (sizes.batch, length), generator=generator, device=device)

    def mask(length: int, padded: int) -> torch.Tensor:
        return copy_to_device((torch.arange(padded) < length).expand(sizes.batch, -1), device)

    images = {
        name: torch.rand(sizes.batch, *feature.shape, generator=generator, device=device)
        for name, feature in camera_features(present, sizes.side).items()
    }
    return images | {
        OBS_LANGUAGE_TOKENS: tokens(sizes.prompt_padded),
        OBS_LANGUAGE_ATTENTION_MASK: mask(sizes.prompt, sizes.prompt_padded),
        ACTION_TOKENS: tokens(sizes.action_padded),
        ACTION_TOKEN_MASK: mask(sizes.action, sizes.action_padded),
    }


def run(small: bool, system: str, layers: int | None = None) -> dict[str, Any]:
    """Measure one system with each number of cameras.

    Args:
        small: A tiny policy, to try the script.
        system: One of `SYSTEMS`.
        layers: Layers of decoder and vision tower; None: all.
    """
    torch.backends.cuda.matmul.allow_tf32 = True
    dtype = _dtype(system)
    # LeRobot casts the weights where the configuration says so; craft-ds's are fp32, and the engine casts.
    policy = meta_policy_without_tokenizers(
        config(small, 3, dtype if system.startswith("lerobot") else torch.float32)
    )
    cut_layers(policy, layers)
    steps = _lerobot_steps(policy) if system.startswith("lerobot") else _craft_steps(policy, system, dtype)
    gc.collect()
    result: dict[str, Any] = {
        "system": system,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters()),
        "stored_bytes": allocated_bytes(),
        "layers": layers,
        "cameras": {},
    }
    sizes = SMALL if small else FULL
    for name, (cameras, present) in CAMERAS.items():
        policy.config.input_features = camera_features(cameras, sizes.side) | {
            key: value
            for key, value in policy.config.input_features.items()
            if value.type is not FeatureType.VISUAL
        }
        task, anchors = (random_batch(small, present, seed) for seed in (1, 2))
        row: dict[str, Any] = {}
        for kind, step in steps.items():
            action = partial(step, task, anchors)
            try:
                row[f"{kind}_s"] = seconds(action, sizes.repeats)
                row[f"{kind}_peak_bytes"] = peak_bytes(action)
                if name == "3 of 3":
                    row[f"{kind}_launches"] = launches(action)
            except torch.cuda.OutOfMemoryError as error:
                row[f"{kind}_error"] = str(error).splitlines()[0][:200]
        result["cameras"][name] = row
    return result


def _dtype(system: str) -> torch.dtype:
    """Return the dtype of forward and backward."""
    return torch.float32 if system.endswith("fp32") else torch.bfloat16


def _moments(system: str) -> OptimizerState:
    """Return the format of Adam's moments."""
    return "int8" if system.endswith("int8") else "fp32"


def cut_layers(policy: PreTrainedPolicy, layers: int | None) -> None:
    """Keep the first layers of decoder and vision tower."""
    if layers is not None:
        model = policy.model.paligemma_with_expert.paligemma.model
        decoder, encoder = model.language_model, model.vision_tower.vision_model.encoder
        decoder.layers, encoder.layers = (part.layers[:layers] for part in (decoder, encoder))
        decoder.config.num_hidden_layers = len(decoder.layers)
        skip_unread_outputs_(policy)


def _lerobot_steps(policy: PreTrainedPolicy) -> dict[str, Callable[[Batch, Batch], Any]]:
    from accelerate import Accelerator
    from lerobot.scripts.lerobot_train import update_policy

    as_in_lerobot_(policy)
    materialize_(policy, default_device())
    with torch.no_grad():
        for name, tensor in unique_tensors(policy).items():
            tensor.copy_(random_values(name, 0, tensor.numel()).view_as(tensor))
    accelerator = Accelerator(step_scheduler_with_optimizer=False, cpu=default_device().type == "cpu")
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    policy, optimizer = accelerator.prepare(policy, optimizer)
    metrics = SimpleNamespace(update_metrics=lambda values: None)

    def update(task: Batch, anchors: Batch) -> None:
        update_policy(metrics, policy, task, optimizer, 1.0, accelerator)

    return {"task": update}


def _craft_steps(
    policy: PreTrainedPolicy, system: str, dtype: torch.dtype
) -> dict[str, Callable[[Batch, Batch], Any]]:
    kind = system if system == "zero3_bf16" else "fsdp"
    init_ranks(kind)
    if system.startswith("lora"):
        add_adapters(policy, make_peft_config(LORA, policy.config, ""), base_sha256="unknown")

    def optimizer() -> torch.optim.Optimizer:
        trainable = [p for p in policy.parameters() if p.requires_grad]
        return compact(policy.config.get_optimizer_preset().build(trainable), _moments(system))

    engine = make_engine(kind, policy, random_values, dtype, optimizer)

    def task_only(task: Batch, anchors: Batch) -> None:
        assert task_step(engine, [task], 1.0).applied

    def retention(task: Batch, anchors: Batch) -> None:
        assert retention_step(
            engine, task=[task], anchors=[anchors], constraint=None, multiplier=1.0, craft=CRAFT, max_norm=1.0
        ).applied

    return {"task": task_only, "retention": retention}


def plan(small: bool, layers: int | None = None) -> dict[str, Any]:
    """Return the planner's peak of a retention step for the systems of craft-ds, by cameras."""
    sizes = SMALL if small else FULL
    planned: dict[str, Any] = {}
    for system in SYSTEMS:
        if system.startswith("lerobot"):
            continue
        dtype = _dtype(system)
        engine = "zero3" if system.startswith("zero3") else "fsdp"
        planned[system] = {}
        for name, (cameras, _) in CAMERAS.items():
            if name == "1 of 3":
                continue
            workload = Workload(sizes.batch, sizes.prompt, sizes.action, cameras)
            trace = simulate_pass(
                config(small, cameras, torch.float32),
                workload,
                dtype=dtype,
                zero3=engine == "zero3",
                lora=LORA if system.startswith("lora") else None,
                prepare=lambda policy: cut_layers(policy, layers),
            )
            options = EngineOptions(engine, 1, compute=dtype.itemsize, optimizer_state=_moments(system))
            planned[system][name] = plan_memory(trace, options).total
    return planned


def table(result: dict[str, Any]) -> list[str]:
    """Return the lines of the tables."""
    rows = [row for row in result["rows"] if "error" not in row]
    lines = [f"- {row['system']}: {row['error']}" for row in result["rows"] if "error" in row]
    if not rows:
        return lines
    batch = (SMALL if result["small"] else FULL).batch
    lines += [
        f"{rows[0]['parameters'] / 1e9:.2f} B parameters, batch {batch}; seconds, samples/s, peak GB "
        "and the GB that `craft-ds plan` predicts for a retention step",
        "",
        "| system | cameras | task step | samples/s | peak | retention step | peak | planned |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, cells in row["cameras"].items():
            task = cells.get("task_s")
            values = [
                _cell(task, 1, ".3f"),
                _cell(batch / task if task else None, 1, ".1f"),
                _cell(cells.get("task_peak_bytes"), 1e-9, ".1f"),
                _cell(cells.get("retention_s"), 1, ".3f"),
                _cell(cells.get("retention_peak_bytes"), 1e-9, ".1f"),
                _cell(result["planned"].get(row["system"], {}).get(name), 1e-9, ".1f"),
            ]
            lines.append(f"| {SYSTEMS[row['system']]} | {name} | {' | '.join(values)} |")
    lines += [
        "",
        "| system, 3 of 3 cameras | step | kernels | copies | host waits |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for kind in ("task", "retention"):
            counts = row["cameras"]["3 of 3"].get(f"{kind}_launches")
            if counts:
                values = [str(counts[key]) for key in ("kernels", "copies", "synchronisations")]
                lines.append(f"| {SYSTEMS[row['system']]} | {kind} | {' | '.join(values)} |")
    return lines


def _cell(value: float | None, scale: float, form: str) -> str:
    return "–" if value is None else format(value * scale, form)
