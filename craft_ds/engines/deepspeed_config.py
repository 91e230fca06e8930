"""DeepSpeed's configuration file: read it, fill in the trainer's values, refuse contradictions.

Only keys are accepted that leave gradients and master weights where this trainer reads them; those that
affect how gradients are reduced were tested against a single process. All others are refused: DeepSpeed's
other features were not made for two backward passes per step and master weights read by range.
`craft_ds.engines.deepspeed_keys` lists them with their values, `craft_ds/ds_configs/README.md` describes
them.
"""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from craft_ds.config.shipped_files import resolve_shipped, shipped_names
from craft_ds.engines.deepspeed_keys import check_keys
from craft_ds.errors import UserError, one_line
from craft_ds.tensor_io.safe_json import read_object

# DeepSpeed creates master weights from parameters one sub-group at a time, with one more copy of it: a tenth
# of the default keeps that copy small compared with the shard.
SUB_GROUP = 100_000_000


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed configuration file (strict JSON).

    Raises:
        UserError: The file is missing, is not a JSON object or has a key twice.
    """
    try:
        return read_object(Path(resolve_shipped("--engine.ds_config", str(path))))
    except FileNotFoundError:
        shipped = ", ".join(shipped_names("--engine.ds_config"))
        raise UserError(f"--ds_config={path}: no such file; the shipped ones are {shipped}") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"--ds_config={path}: not readable as JSON ({one_line(error)})") from None


def resolve_ds_config(
    config: dict[str, Any],
    *,
    path: str,
    batch_size: int,
    gradient_accumulation_steps: int,
    grad_clip_norm: float,
    bf16: bool,
    world_size: int,
    optimizer_state: str = "fp32",
) -> dict[str, Any]:
    """Return the configuration for `deepspeed.initialize`.

    A value that the trainer sets may be absent or `"auto"` in the file, or equal to the trainer's flag; any
    other `"auto"` means DeepSpeed's default. DeepSpeed itself then neither accumulates nor clips: the
    trainer runs two backward passes per step and clips the merged gradient, whose norm it knows without a
    pass over it.

    Args:
        config: Content of the file; not changed.
        path: The file, for error messages.
        batch_size: Micro-batch per rank (`--batch_size`).
        gradient_accumulation_steps: Micro-batches per step (`--gradient_accumulation_steps`).
        grad_clip_norm: `--optimizer.grad_clip_norm`.
        bf16: True for `--engine.dtype=bfloat16`.
        world_size: Number of ranks.
        optimizer_state: `--engine.optimizer_state`.

    Raises:
        UserError: A value contradicts a flag (both are named), belongs to the trainer's flags, or is not
            supported.
    """
    file = f"--ds_config={path}"
    resolved = _without_auto(deepcopy(config))
    for section, flags in (("optimizer", "--optimizer.*"), ("scheduler", "--scheduler.*")):
        if section in resolved:
            raise UserError(
                f"{file} has a section {section!r}: remove it, {flags} and the policy's presets decide that"
            )
    check_keys(resolved, file)

    def settle(dotted: str, expected: object, flag: str) -> None:
        _settle(resolved, file, dotted, expected, flag)

    accumulation = f"--gradient_accumulation_steps={gradient_accumulation_steps}"
    settle("train_micro_batch_size_per_gpu", batch_size, f"--batch_size={batch_size}")
    settle("gradient_accumulation_steps", gradient_accumulation_steps, accumulation)
    settle("gradient_clipping", grad_clip_norm, f"--optimizer.grad_clip_norm={grad_clip_norm}")
    settle("bf16.enabled", bf16, f"--engine.dtype={'bfloat16' if bf16 else 'float32'}")
    if resolved.get("communication_data_type") == "bf16" and not bf16:
        raise UserError(
            f'{file} says communication_data_type="bf16", but --engine.dtype=float32: write "fp32", '
            "since bf16 rounds the summed gradients to 8 bits"
        )
    settle("fp16.enabled", False, "--engine.dtype (fp16 is not supported)")
    settle("data_types.grad_accum_dtype", "fp32", "the gradient merge")
    if optimizer_state != "fp32":  # DeepSpeed's own Adam has fp32 moments
        settle("zero_force_ds_cpu_optimizer", False, f"--engine.optimizer_state={optimizer_state}")

    zero = resolved["zero_optimization"]
    offload = _look_up(zero, "offload_optimizer.device", "none") != "none"
    zero.pop("offload_param", None)
    if zero["stage"] == 3:
        zero.setdefault("sub_group_size", SUB_GROUP)
    elif not offload:
        # The step knows the norm: DeepSpeed's own is another pass, which the host waits for.
        zero["compute_grad_norm"] = False
    resolved.update(
        train_micro_batch_size_per_gpu=batch_size,
        gradient_accumulation_steps=1,
        train_batch_size=batch_size * world_size,
        gradient_clipping=0.0,
        # The step has checked the gradient: DeepSpeed's check is another pass, which the host waits for.
        bf16={"check_grad_overflow": False, **resolved.get("bf16", {}), "enabled": bf16},
        data_types={"grad_accum_dtype": "fp32"},
        # LeRobot chooses the optimizer; without this, DeepSpeed refuses most of them.
        zero_allow_untested_optimizer=True,
        # As in DeepSpeed, an offloaded optimizer is DeepSpeed's own Adam unless the file says otherwise.
        zero_force_ds_cpu_optimizer=offload
        and optimizer_state == "fp32"
        and resolved.get("zero_force_ds_cpu_optimizer", True),
    )
    resolved.setdefault("steps_per_print", 1 << 31)
    return resolved


def check_step_size(config: dict[str, Any], *, path: str, samples_per_step: int, flags: str) -> None:
    """Compare `train_batch_size` of a file with the size of a step.

    A separate check, because a resumed run reads that size from its checkpoint: on another number of ranks
    its steps stay the same.

    Args:
        config: Content of the file.
        path: The file, for the error message.
        samples_per_step: Task samples per step over all ranks.
        flags: The flags that determine it.

    Raises:
        UserError: They differ.
    """
    _settle(_without_auto(config), f"--ds_config={path}", "train_batch_size", samples_per_step, flags)


def _settle(config: dict[str, Any], file: str, dotted: str, expected: object, flag: str) -> None:
    value = _look_up(config, dotted, expected)
    if value != expected:
        raise UserError(
            f"{file} says {dotted}={json.dumps(value)}, but {flag} means {json.dumps(expected)}: change "
            'one of them, or write "auto" in the file'
        )


def _without_auto(node: Any) -> Any:
    """Return the configuration without `"auto"` and null entries, which are equivalent to absent ones."""
    if not isinstance(node, dict):
        return node
    return {key: _without_auto(value) for key, value in node.items() if value not in ("auto", None)}


def _look_up(node: Any, dotted: str, default: object) -> Any:
    for key in dotted.split("."):
        node = (node or {}).get(key)
        if node is None:
            return default
    return node
