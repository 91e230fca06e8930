"""DeepSpeed's configuration file: read it, fill in what the trainer decides, refuse what contradicts it."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from craft_ds.errors import UserError


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration file (strict JSON).

    Raises:
        UserError: The file is missing or is not a JSON object.
    """
    try:
        config = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"--ds_config={path}: no such file; the project's own lie in ds_configs/") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--ds_config={path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"--ds_config={path}: must be a JSON object")
    return config


def resolve_ds_config(
    config: dict[str, Any],
    *,
    path: str,
    batch_size: int,
    gradient_accumulation_steps: int,
    grad_clip_norm: float,
    bf16: bool,
    world_size: int,
) -> dict[str, Any]:
    """The configuration handed to `deepspeed.initialize`.

    A value that the trainer decides may be absent or `"auto"` in the file, or equal to the trainer's
    flag. DeepSpeed itself then neither accumulates nor clips: the trainer runs two backward passes a
    step and clips the merged gradient, whose norm it knows without a pass over it.

    Args:
        config: What the file holds; not changed.
        path: The file, for messages.
        batch_size: Micro-batch a rank (`--batch_size`).
        gradient_accumulation_steps: Micro-batches a step (`--gradient_accumulation_steps`).
        grad_clip_norm: `--optimizer.grad_clip_norm`.
        bf16: Whether `--engine.dtype=bfloat16`.
        world_size: Number of ranks.

    Raises:
        UserError: A value contradicts a flag (both are named), or belongs to the trainer's flags.
    """
    resolved = deepcopy(config)
    for section in ("zero_optimization", "bf16", "fp16", "data_types"):
        if not isinstance(resolved.get(section, {}), dict):
            raise UserError(f"--ds_config={path}: {section} must be a JSON object")

    def settle(keys: tuple[str, ...], expected: object, flag: str) -> None:
        node: Any = resolved
        for key in keys[:-1]:
            node = node.get(key, {})
        value = node.get(keys[-1], "auto")
        if value not in ("auto", expected):
            raise UserError(
                f"--ds_config={path} says {'.'.join(keys)}={json.dumps(value)}, but {flag} means "
                f'{json.dumps(expected)}: change one of them, or write "auto" in the file'
            )

    for section, flags in (("optimizer", "--optimizer.*"), ("scheduler", "--scheduler.*")):
        if section in resolved:
            raise UserError(
                f"--ds_config={path} has a section {section!r}: remove it, {flags} and the policy's "
                "presets decide that"
            )
    settle(("train_micro_batch_size_per_gpu",), batch_size, f"--batch_size={batch_size}")
    accumulation = f"--gradient_accumulation_steps={gradient_accumulation_steps}"
    settle(("gradient_accumulation_steps",), gradient_accumulation_steps, accumulation)
    settle(
        ("train_batch_size",),
        batch_size * gradient_accumulation_steps * world_size,
        f"--batch_size={batch_size} with {accumulation} on {world_size} ranks",
    )
    settle(("gradient_clipping",), grad_clip_norm, f"--optimizer.grad_clip_norm={grad_clip_norm}")
    settle(("bf16", "enabled"), bf16, f"--engine.dtype={'bfloat16' if bf16 else 'float32'}")
    settle(("fp16", "enabled"), False, "--engine.dtype (fp16 is not supported)")
    settle(("data_types", "grad_accum_dtype"), "fp32", "the gradient merge")
    stage = resolved.get("zero_optimization", {}).get("stage")
    if stage != 3:
        raise UserError(f"--ds_config={path} says zero_optimization.stage={stage}: this version needs 3")
    for key in ("offload_optimizer", "offload_param"):
        if (resolved["zero_optimization"].get(key) or {}).get("device", "none") != "none":
            raise UserError(f"--ds_config={path}: zero_optimization.{key} is not supported, remove it")

    resolved.update(
        train_micro_batch_size_per_gpu=batch_size,
        gradient_accumulation_steps=1,
        train_batch_size=batch_size * world_size,
        gradient_clipping=0.0,
        bf16={**resolved.get("bf16", {}), "enabled": bf16},
        data_types={**resolved.get("data_types", {}), "grad_accum_dtype": "fp32"},
        # The optimizer is LeRobot's choice; DeepSpeed would refuse all but a few without this.
        zero_allow_untested_optimizer=True,
    )
    resolved.setdefault("steps_per_print", 1 << 31)
    return resolved
