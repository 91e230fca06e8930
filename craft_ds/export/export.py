"""Export of a checkpoint as a policy directory that stock LeRobot loads.

A checkpoint is already consolidated, so this copies it without the training state, in the requested dtype, a
few megabytes at a time: no model is in memory and no GPU is needed. Adapters are exported alone, or merged
into the weights of their base policy in the same way; a model is built only to compare the merged policy with
the adapters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from craft_ds.checkpoints import verify_checkpoint
from craft_ds.checkpoints.load import open_average
from craft_ds.errors import UserError, one_line
from craft_ds.export.alpha_search import AlphaSearch, search_alpha
from craft_ds.export.interpolate import interpolated
from craft_ds.export.lora_merge import MergedWeights
from craft_ds.export.verify_merge import check_comparable, verify_merge
from craft_ds.lora.adapters import (
    ADAPTER_WEIGHTS,
    AdapterPlan,
    add_adapters,
    has_adapters,
    plan_stored_adapters,
)
from craft_ds.lora.peft_config import read_adapter_config, remove_adapter_config, write_adapter_config
from craft_ds.lora.weights import open_weights
from craft_ds.policies.directory import WEIGHTS, copy_policy_files
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.policies.weights import WeightReader, finite
from craft_ds.tensor_io.filesystem import atomic_directory
from craft_ds.tensor_io.per_rank_file import open_tensors
from craft_ds.tensor_io.tensor_file import ReadRange, TensorSpec, write_tensor_file

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_ALPHA = 0.5


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    dtype: str = "float32",
    *,
    merge_lora: bool = False,
    base_path: str = "",
    max_token_difference: float | None = None,
    device: str = "cpu",
    merge_with: str = "",
    alpha: float | AlphaSearch | None = None,
    ema: bool = False,
) -> str:
    """Write a checkpoint's policy to a new directory.

    Args:
        checkpoint: `outputs/run/step_001000` or `outputs/run/final`.
        output: The directory to create; must not exist.
        dtype: Dtype of the floating-point weights in the file: `float32` (as trained), `bfloat16` or
            `float16`. LeRobot casts them to the dtype of the policy's config when it loads them.
        merge_lora: Merge the adapters into their base policy, and compare the result with them. Otherwise
            adapters are exported alone.
        base_path: New path of the adapters' base policy, if it was moved.
        max_token_difference: Fraction of action tokens that the merged policy may choose differently; None:
            the bound for the dtype in `craft_ds.export.verify_merge`.
        device: Device on which merged policy and adapters are compared.
        merge_with: A policy, such as the teacher, with whose weights to interpolate; empty: none.
        alpha: Share of `merge_with` in the weights, in [0, 1]; None: a half. A search chooses it by losses on
            held-out data, and writes them to `report_path(output)`.
        ema: Write the moving average of the weights (`--ema_decay`) in their place.

    Returns:
        A description of the export, for the log.

    Raises:
        UserError: The checkpoint is incomplete or damaged, the output exists, or a flag does not apply to
            this checkpoint; the base policy is missing or different; the merged policy differs too much.
    """
    if output.exists():
        raise UserError(f"--output={output} exists already: choose another or move it away")
    verify_checkpoint(checkpoint, rank=0, world_size=1)
    _check_flags(checkpoint, merge_lora, base_path, max_token_difference)
    if merge_lora and merge_with:
        raise UserError(
            "--merge_with does not apply with --merge_lora: export with --merge_lora first, and interpolate "
            "the export"
        )
    if ema and (merge_lora or merge_with):
        flag = "--merge_lora" if merge_lora else "--merge_with"
        raise UserError(f"{flag} does not apply with --ema: export with --ema first, and use the export")
    if alpha is not None and not merge_with:
        given = "auto" if isinstance(alpha, AlphaSearch) else alpha
        raise UserError(f"--alpha={given} applies only with --merge_with: remove the flag")
    _check_device(device)
    try:
        found = ""
        if isinstance(alpha, AlphaSearch):
            alpha, found = search_alpha(alpha, checkpoint, merge_with, report_path(output), device)
        alpha = DEFAULT_ALPHA if alpha is None else alpha
        if not 0 <= alpha <= 1:
            raise UserError(f"--alpha={alpha} must lie in [0, 1]")
        with atomic_directory(output, flag="--output") as temporary:
            copy_policy_files(checkpoint, temporary, output)
            if merge_lora:
                _merge(checkpoint, temporary, dtype, base_path)
                return verify_merge(
                    checkpoint,
                    temporary,
                    dtype=dtype,
                    max_token_difference=max_token_difference,
                    base_path=base_path,
                    device=device,
                )
            if has_adapters(checkpoint) and not merge_with:
                return _export_adapters(checkpoint, temporary, dtype, base_path, ema)
            with (
                _weights(checkpoint, merge_with, alpha) as weights,
                _averaged(checkpoint, checkpoint / WEIGHTS, weights, ema) as read,
            ):
                _write(checkpoint / WEIGHTS, temporary / WEIGHTS, DTYPES[dtype], read)
            if merge_with:
                shares = f"{1 - alpha:g} of its weights and {alpha:g} of those of {merge_with}"
                return f"{shares}; {found}" if found else shares
            return "the complete policy" + ", with the moving average of its weights" * ema
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from error


def report_path(output: Path) -> Path:
    """Return the file, beside an export, with the losses by which a search chose α."""
    return output.with_name(f"{output.name}_alphas.json")


def _check_flags(
    checkpoint: Path, merge_lora: bool, base_path: str, max_token_difference: float | None
) -> None:
    if not has_adapters(checkpoint):
        for flag, given in (("--merge_lora", merge_lora), ("--base_path", base_path)):
            if given:
                raise UserError(
                    f"{flag} does not apply to {checkpoint}, a checkpoint of full training: remove the flag"
                )
    if max_token_difference is None:
        return
    if not merge_lora:
        raise UserError("--max_token_difference applies only with --merge_lora: remove the flag")
    if not 0 <= max_token_difference <= 1:
        raise UserError(f"--max_token_difference={max_token_difference} must be a fraction in [0, 1]")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device={device} is not available ({one_line(error)}): remove the flag") from error


def _merge(checkpoint: Path, target: Path, dtype: str, base_path: str) -> None:
    """Write the merged weights into a copy of the checkpoint's policy files."""
    config = load_policy_config(checkpoint)
    check_comparable(config)
    plan = _plan(checkpoint, base_path)
    with MergedWeights(build_policy(config, plan.base), plan) as merged:
        write_tensor_file(target / WEIGHTS, _cast(merged.specs, DTYPES[dtype]), merged.read, {"format": "pt"})
    remove_adapter_config(target)


def _export_adapters(checkpoint: Path, target: Path, dtype: str, base_path: str, ema: bool) -> str:
    config = read_adapter_config(checkpoint)
    if base_path:
        plan = _plan(checkpoint, base_path)
        config = plan.config
        # Opening the weights checks that the adapters were trained on this base.
        policy = build_policy(load_policy_config(checkpoint), plan.base)
        with open_weights(policy, plan.base, plan, add_adapters(policy, config)):
            pass
    write_adapter_config(target, config)
    with open_tensors(checkpoint / ADAPTER_WEIGHTS) as reader:

        def read(name: str, start: int, stop: int) -> torch.Tensor:
            return finite(reader.read(name, start, stop), name, checkpoint)

        with _averaged(checkpoint, checkpoint / ADAPTER_WEIGHTS, read, ema) as values:
            _write(checkpoint / ADAPTER_WEIGHTS, target / ADAPTER_WEIGHTS, DTYPES[dtype], values)
    what = "the moving average of the LoRA adapters" if ema else "the LoRA adapters"
    return (
        f"only {what}, which PEFT and LeRobot load on {config.base_model_name_or_path}; --merge_lora exports "
        "a complete policy"
    )


def _plan(checkpoint: Path, base_path: str) -> AdapterPlan:
    return plan_stored_adapters(checkpoint, base_path, flag="--base_path")


@contextmanager
def _weights(checkpoint: Path, merge_with: str, alpha: float) -> Iterator[ReadRange]:
    """Yield a reader of the policy's weights, whose names and shapes were checked."""
    if merge_with:
        with interpolated(checkpoint, merge_with, alpha) as read:
            yield read
        return
    with WeightReader(checkpoint, build_policy(load_policy_config(checkpoint), checkpoint)) as weights:
        yield weights.read


@contextmanager
def _averaged(checkpoint: Path, source: Path, weights: ReadRange, ema: bool) -> Iterator[ReadRange]:
    """Yield a reader of the weights, or with `ema` of their moving average, by their names in `source`."""
    if not ema:
        yield weights
        return
    with open_tensors(source) as reader:
        shapes = {spec.name: tuple(spec.shape) for spec in reader.specs()}
    with open_average(checkpoint, weights, shapes, stored={}, all_trained=False) as read:
        if read is None:
            raise UserError(f"--ema: {checkpoint} is of a run without --ema_decay: remove the flag")
        yield read


def _write(source: Path, target: Path, dtype: torch.dtype, read: ReadRange) -> None:
    """Write the tensors of a file in another dtype, with other values."""
    with open_tensors(source) as reader:
        write_tensor_file(target, _cast(reader.specs(), dtype), read, reader.metadata)


def _cast(specs: list[TensorSpec], dtype: torch.dtype) -> list[TensorSpec]:
    return [spec._replace(dtype=dtype) if spec.dtype.is_floating_point else spec for spec in specs]
