"""Checkpoints: written by all ranks at once, consolidated from the start, whole or not there.

A checkpoint is a LeRobot policy directory with `optimizer.safetensors`, `scheduler.pt`,
`craft_state.pt`, `train_config.json` and `manifest.json`. It is written under a temporary name and
renamed when everything lies on the disk. Parameters and moments are stored by name in fp32 and whole
shape, so it resumes at any world size and in any engine. With LoRA it holds PEFT's two adapter files
instead of `model.safetensors`, and nothing of the base policy.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from craft_ds.distributed import all_ranks, gather_objects, on_main
from craft_ds.engines.base import Engine
from craft_ds.errors import UserError
from craft_ds.lora.adapters import ADAPTER_WEIGHTS, Adapters
from craft_ds.lora.directory import write_adapter_config
from craft_ds.lora.weights import BASE_SHA256
from craft_ds.policies.directory import WEIGHTS, copy_policy_files
from craft_ds.policies.weights import unique_tensors
from craft_ds.system import fsync
from craft_ds.tensor_file import ReadRange, TensorFile, TensorSpec, create_tensor_file
from craft_ds.train_config import TrainConfig

OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.pt"
CRAFT_STATE = "craft_state.pt"
MANIFEST = "manifest.json"
FORMAT_VERSION = 1
# Ranks hash different segments of a file side by side.
_SEGMENT = 1 << 28


def step_directory(output_dir: Path, step: int) -> Path:
    """Directory of the checkpoint after `step` steps."""
    return output_dir / f"step_{step:06d}"


def save_checkpoint(
    directory: Path,
    *,
    engine: Engine,
    config: TrainConfig,
    policy_dir: Path,
    scheduler_state: dict[str, Any] | None,
    craft_state: dict[str, Any],
    step: int,
    adapters: Adapters | None = None,
    extra: Callable[[Path], None] | None = None,
) -> None:
    """Write one checkpoint. Collective: call on all ranks.

    Args:
        directory: Where it will live, `step_001000` or `final`; must not exist.
        engine: Holds parameters and optimizer state.
        config: The configuration of the run.
        policy_dir: The policy that the run began with: its config, processors and tokenizers are kept.
        scheduler_state: State of the learning-rate scheduler, if there is one.
        craft_state: λ and its history.
        step: Optimizer steps done.
        adapters: What trains, if not the policy's own weights: only they are written.
        extra: Writes further files into the directory that it is given (main rank only).

    Raises:
        UserError: On all ranks: the directory exists, the disk is full or not writable.
    """
    temporary = directory.with_name(directory.name + ".tmp")
    layout = _layout(engine, adapters)

    def prepare() -> None:
        if directory.exists():
            raise UserError(
                f"checkpoint {directory} exists already: move it away or choose another --output_dir"
            )
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        copy_policy_files(policy_dir, temporary, directory)
        if adapters is not None:
            write_adapter_config(temporary, adapters.config)
        config._save_pretrained(temporary)
        torch.save(scheduler_state, temporary / SCHEDULER)
        torch.save(craft_state, temporary / CRAFT_STATE)
        _create_tensor_files(temporary, engine, layout, adapters)
        if extra is not None:
            extra(temporary)

    on_main(lambda: _write(directory, prepare))
    all_ranks(lambda: _write(directory, lambda: _write_shards(temporary, engine, layout, adapters)))
    hashes = _hash_segments(temporary, engine.rank, engine.world_size)

    def finish() -> None:
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": engine.world_size,
            "engine": config.engine.name,
            "segment_bytes": _SEGMENT,
            "files": hashes,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in temporary.rglob("*"):
            fsync(path)
        fsync(temporary)
        temporary.rename(directory)
        _point_last_at(directory)
        fsync(directory.parent)

    on_main(lambda: _write(directory, finish))


def _write(directory: Path, action: Callable[[], None]) -> None:
    try:
        action()
    except OSError as error:
        raise UserError(f"checkpoint {directory} cannot be written: {error}") from error


class _Parameter(NamedTuple):
    """What the files hold of a parameter: its name there, its global shape, names of its optimizer state."""

    stored_name: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]


_Layout = Mapping[str, _Parameter]


def _layout(engine: Engine, adapters: Adapters | None) -> _Layout:
    """Every parameter that is written, by its name in the policy. Collective: call on all ranks."""
    mine = {
        shard.name: _Parameter(
            adapters.keys[shard.name] if adapters else shard.name, shard.shape, tuple(shard.state)
        )
        for shard in engine.shards(frozen=adapters is None)
    }
    return {name: entry for part in gather_objects(mine) for name, entry in part.items()}


def _create_tensor_files(directory: Path, engine: Engine, layout: _Layout, adapters: Adapters | None) -> None:
    parameters = [TensorSpec(entry.stored_name, entry.shape, torch.float32) for entry in layout.values()]
    moments = [
        TensorSpec(f"{entry.stored_name}.{key}", entry.shape, torch.float32)
        for entry in layout.values()
        for key in entry.keys
    ]
    create_tensor_file(directory / OPTIMIZER, moments, {"steps": str(_optimizer_steps(engine))})
    if adapters is not None:
        metadata = {"format": "pt", BASE_SHA256: adapters.base_sha256}
        create_tensor_file(directory / ADAPTER_WEIGHTS, parameters, metadata)
        return
    policy = engine.module.policy
    stored = {name: tensor for name, tensor in unique_tensors(policy).items() if name not in layout}
    buffers = {name: tensor.detach().cpu() for name, tensor in stored.items()}
    specs = [TensorSpec(name, tuple(value.shape), value.dtype) for name, value in buffers.items()]
    create_tensor_file(directory / WEIGHTS, parameters + specs, {"format": "pt"})
    with TensorFile(directory / WEIGHTS, writable=True) as file:
        for name, values in buffers.items():
            file.write(name, 0, values.reshape(-1))


def _optimizer_steps(engine: Engine) -> int:
    steps = [int(state["step"]) for state in engine.optimizer.state.values() if "step" in state]
    return max(steps, default=0)


def _write_shards(directory: Path, engine: Engine, layout: _Layout, adapters: Adapters | None) -> None:
    with (
        TensorFile(directory / (ADAPTER_WEIGHTS if adapters else WEIGHTS), writable=True) as weights,
        TensorFile(directory / OPTIMIZER, writable=True) as moments,
    ):
        for shard in engine.shards(frozen=adapters is None):
            stored_name = layout[shard.name].stored_name
            weights.write(stored_name, shard.start, shard.master)
            for key, values in shard.state.items():
                moments.write(f"{stored_name}.{key}", shard.start, values)
        weights.sync()
        moments.sync()


def _hash_segments(directory: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Size and segment hashes of every file of a checkpoint. Collective: call on all ranks."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    sizes = {path: path.stat().st_size for path in paths}
    segments = [(path, start) for path in paths for start in range(0, max(sizes[path], 1), _SEGMENT)]
    mine = {
        (str(path.relative_to(directory)), start): _hash(path, start)
        for path, start in segments[rank::world_size]
    }
    # From here on the main rank may give the directory its final name: no other rank looks into it again.
    found = {key: value for part in gather_objects(mine) for key, value in part.items()}
    return {
        name: {
            "bytes": sizes[path],
            "sha256": [value for (other, _), value in sorted(found.items()) if other == name],
        }
        for path in paths
        for name in [str(path.relative_to(directory))]
    }


def _hash(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        remaining = _SEGMENT
        while remaining and (block := file.read(min(remaining, 1 << 20))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


def _point_last_at(directory: Path) -> None:
    temporary = directory.with_name("last.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(directory.name)
    temporary.rename(directory.with_name("last"))


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after a look at the sizes of its files.

    Raises:
        UserError: The directory is no checkpoint, or a file of it is missing or has another size.
    """
    try:
        manifest = dict(json.loads((directory / MANIFEST).read_text()))
    except FileNotFoundError:
        raise UserError(f"{directory} is no checkpoint of craft-ds: it has no {MANIFEST}") from None
    except (ValueError, TypeError):
        raise UserError(f"{directory / MANIFEST} is damaged: resume from an older checkpoint") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory / MANIFEST}: format version {manifest.get('format_version')}, this craft-ds reads "
            f"{FORMAT_VERSION}"
        )
    for name, entry in manifest["files"].items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path} is missing or incomplete: resume from an older checkpoint")
    return manifest


def verify_checkpoint(directory: Path, rank: int, world_size: int) -> dict[str, Any]:
    """Check every byte of a checkpoint, the ranks side by side. Collective: call on all ranks.

    Returns:
        The manifest.

    Raises:
        UserError: On all ranks, naming the damaged file.
    """
    manifest = all_ranks(lambda: read_manifest(directory))
    segments = [
        (name, index) for name, entry in manifest["files"].items() for index in range(len(entry["sha256"]))
    ]

    def check() -> None:
        for name, index in segments[rank::world_size]:
            if _hash(directory / name, index * _SEGMENT) != manifest["files"][name]["sha256"][index]:
                raise UserError(f"{directory / name} is damaged (checksum): resume from an older checkpoint")

    all_ranks(check)
    return manifest


def load_checkpoint(
    directory: Path, engine: Engine, adapters: Adapters | None = None
) -> tuple[dict[str, Any] | None, dict[str, Any], int]:
    """Set the optimizer state from a checkpoint; the parameters came with the policy directory.

    Collective: call on all ranks.

    Args:
        directory: The checkpoint.
        engine: Holds the parameters.
        adapters: What trains, if not the policy's own weights.

    Returns:
        Scheduler state, CRaFT state and the number of steps done.

    Raises:
        UserError: The checkpoint is incomplete or damaged.
    """
    manifest = verify_checkpoint(directory, engine.rank, engine.world_size)
    with TensorFile(directory / OPTIMIZER) as moments:
        keys = sorted({name.rsplit(".", 1)[1] for name, *_ in moments.specs()})
        if keys:  # else no step was applied yet, and the optimizer makes its state at its first
            read = moments.read if adapters is None else _by_parameter_name(moments.read, adapters)
            engine.load_optimizer(read, keys, int(moments.metadata["steps"]))
    scheduler_state = torch.load(directory / SCHEDULER, weights_only=True)
    craft_state = torch.load(directory / CRAFT_STATE, weights_only=True)
    return scheduler_state, craft_state, manifest["step"]


def _by_parameter_name(read: ReadRange, adapters: Adapters) -> ReadRange:
    """Reads optimizer state of adapters, which is stored under the names of PEFT's file."""

    def by_name(name: str, start: int, stop: int) -> Tensor:
        parameter, key = name.rsplit(".", 1)
        return read(f"{adapters.keys[parameter]}.{key}", start, stop)

    return by_name
