"""Saving: all ranks write at once, consolidated from the start, and what is not whole is not there.

Each rank writes its own ranges of `model.safetensors` and `optimizer.safetensors` under a temporary name;
nothing is gathered. While what they wrote goes to the disk the ranks read it back and hash it; once both are
done the main rank writes the manifest and renames the directory.
"""

import io
import math
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from craft_ds.checkpoints.manifest import hash_files, write_manifest
from craft_ds.checkpoints.run_directory import (
    UNFINISHED,
    complete_checkpoints,
    point_last_at,
    prune,
    remove_unfinished,
)
from craft_ds.checkpoints.shard_plan import ShardPlan, plan_shards
from craft_ds.config.train_config import TrainConfig
from craft_ds.distributed.collectives import fail_together, rank0_only
from craft_ds.engines.base import Engine
from craft_ds.errors import UserError
from craft_ds.lora.adapters import ADAPTER_WEIGHTS, Adapters
from craft_ds.lora.peft_config import write_adapter_config
from craft_ds.lora.weights import BASE_SHA256
from craft_ds.policies.directory import WEIGHTS, copy_policy_files
from craft_ds.tensor_io.filesystem import fsync
from craft_ds.tensor_io.per_rank_file import Part, create_piece, piece_path
from craft_ds.tensor_io.tensor_file import TensorFile, TensorSpec, create_tensor_file

OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.pt"
CRAFT_STATE = "craft_state.pt"


@dataclass(frozen=True)
class PendingCheckpoint:
    """All that one rank needs to write its part of one checkpoint.

    Attributes:
        directory: Where it will live, `step_001000` or `final`.
        contents: Parameters and optimizer state.
        config: The configuration of the run.
        policy_dir: The policy that the run began with: its config, processors and tokenizers are kept.
        states: File name and plain Python values of what else is kept, as bytes.
        step: Optimizer steps done.
        rank: This rank.
        world_size: Number of ranks.
        extra: Writes further files into the directory that it is given (main rank only).
        progress: Called after each piece of work.
    """

    directory: Path
    contents: ShardPlan
    config: TrainConfig
    policy_dir: Path
    states: dict[str, bytes]
    step: int
    rank: int
    world_size: int
    extra: Callable[[Path], None] | None
    progress: Callable[[], None]

    @property
    def temporary(self) -> Path:
        """The directory's name until it is whole."""
        return self.directory.with_name(self.directory.name + UNFINISHED)

    def write(self, group: dist.ProcessGroup | None = None) -> None:
        """Write it. Collective: call on all ranks.

        Args:
            group: As for `gather_objects`.

        Raises:
            UserError: On all ranks: the directory exists, the disk is full or not writable.
        """
        try:
            rank0_only(self._told, group)(self._prepare)
            fail_together(self._told, group)(self._write_shards)
            # One waits for the disk and the other for the processor: together they take as long as one.
            with ThreadPoolExecutor(max_workers=1) as beside:
                synced = beside.submit(self._sync_shards)
                files = hash_files(self.temporary, self.rank, self.world_size, group)
                fail_together(self._told, group)(synced.result)
            rank0_only(self._told, group)(lambda: self._commit(files))
        except UserError:
            if self.rank == 0:  # a full disk needs the room
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _told(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            # `copytree` collects what went wrong, with both paths of each file.
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
            raise UserError(f"checkpoint {self.directory} cannot be written: {reason}") from error

    def _prepare(self) -> None:
        if self.directory.exists():
            raise UserError(
                f"checkpoint {self.directory} exists already: move it away or choose another --output_dir"
            )
        remove_unfinished(self.directory.parent)
        self.temporary.mkdir(parents=True)
        copy_policy_files(self._policy_source(), self.temporary, self.directory)
        if self.contents.adapters is not None:
            write_adapter_config(self.temporary, self.contents.adapters.config)
        self.config._save_pretrained(self.temporary)
        for name, content in self.states.items():
            (self.temporary / name).write_bytes(content)
        if self.config.checkpoint.layout == "consolidated":
            self._create_consolidated_files()
        if self.extra is not None:
            self.extra(self.temporary)

    def _policy_source(self) -> Path:
        """Where the policy's files are: a run may have deleted the checkpoint that it was resumed from."""
        if self.policy_dir.is_dir():
            return self.policy_dir
        whole, _ = complete_checkpoints(self.directory.parent)
        return whole[0][1] if whole else self.policy_dir

    @property
    def _weights(self) -> Path:
        return self.temporary / (WEIGHTS if self.contents.adapters is None else ADAPTER_WEIGHTS)

    @property
    def _weights_metadata(self) -> dict[str, str]:
        adapters = self.contents.adapters
        return {"format": "pt"} | ({BASE_SHA256: adapters.base_sha256} if adapters else {})

    @property
    def _optimizer_metadata(self) -> dict[str, str]:
        return {"steps": str(self.contents.steps)}

    def _create_consolidated_files(self) -> None:
        stored = self.contents.layout.values()
        moments = [spec for parameter in stored for spec in parameter.moments]
        create_tensor_file(self.temporary / OPTIMIZER, moments, self._optimizer_metadata)
        weights = [parameter.weight for parameter in stored] + self._buffer_specs()
        create_tensor_file(self._weights, weights, self._weights_metadata)

    def _buffer_specs(self) -> list[TensorSpec]:
        buffers = self.contents.buffers.items()
        return [TensorSpec(name, tuple(values.shape), values.dtype) for name, values in buffers]

    def _shard_files(self) -> tuple[Path, Path]:
        """Where this rank's weights and moments go: into the whole files, or into pieces of its own."""
        weights, optimizer = self._weights, self.temporary / OPTIMIZER
        if self.config.checkpoint.layout == "consolidated":
            return weights, optimizer
        return piece_path(weights, self.rank), piece_path(optimizer, self.rank)

    def _sync_shards(self) -> None:
        for path in self._shard_files():
            fsync(path)

    def _write_shards(self) -> None:
        weights, optimizer = self._shard_files()
        if self.config.checkpoint.layout == "consolidated":
            self._fill(weights, optimizer, whole=True)
            return
        layout = self.contents.layout
        shards = list(self.contents.shards())
        moments = [
            Part(spec, shard.start, shard.master.numel())
            for shard in shards
            for spec in layout[shard.name].moments
        ]
        parts = [Part(layout[shard.name].weight, shard.start, shard.master.numel()) for shard in shards]
        parts += [Part(spec, 0, math.prod(spec.shape)) for spec in self._buffer_specs()]
        create_piece(weights, parts, self._weights_metadata)
        create_piece(optimizer, moments, self._optimizer_metadata)
        self._fill(weights, optimizer, whole=False)

    def _fill(self, weights_path: Path, optimizer_path: Path, *, whole: bool) -> None:
        """Write this rank's values: in a whole file to their places, in a piece of its own from the start."""
        with (
            TensorFile(weights_path, writable=True) as weights,
            TensorFile(optimizer_path, writable=True) as moments,
        ):
            for name, values in self.contents.buffers.items():
                weights.write(name, 0, values.reshape(-1))
            for shard in self.contents.shards():
                self.progress()
                stored = self.contents.layout[shard.name]
                start = shard.start if whole else 0
                weights.write(stored.stored_name, start, shard.master)
                for key, values in shard.state.items():
                    moments.write(f"{stored.stored_name}.{key}", start, values)

    def _commit(self, files: dict[str, Any]) -> None:
        write_manifest(
            self.temporary,
            step=self.step,
            world_size=self.world_size,
            engine=self.config.engine.name,
            files=files,
        )
        for path in self.temporary.rglob("*"):
            fsync(path)
        fsync(self.temporary)
        self.temporary.rename(self.directory)
        fsync(self.directory.parent)
        point_last_at(self.directory)
        prune(self.directory.parent, self.config.save_total_limit, self.config.keep_period)


def _as_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def prepare_checkpoint(
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
    progress: Callable[[], None] = lambda: None,
) -> PendingCheckpoint:
    """Gather what a checkpoint will hold; tensors are views of the engine's. Collective: call on all ranks.

    Args:
        directory: Where it will live, `step_001000` or `final`; must not exist.
        engine: Holds parameters and optimizer state.
        config: The configuration of the run.
        policy_dir: The policy that the run began with: its config, processors and tokenizers are kept.
        scheduler_state: State of the learning-rate scheduler, if there is one.
        craft_state: λ, its history and where the run is; plain Python values.
        step: Optimizer steps done.
        adapters: What trains, if not the policy's own weights: only they are written.
        extra: Writes further files into the directory that it is given (main rank only).
        progress: Called after each piece of work, by the thread that does it.
    """
    return PendingCheckpoint(
        directory=directory,
        contents=plan_shards(engine, adapters),
        config=config,
        policy_dir=policy_dir,
        states={SCHEDULER: _as_bytes(scheduler_state), CRAFT_STATE: _as_bytes(craft_state)},
        step=step,
        rank=engine.rank,
        world_size=engine.world_size,
        extra=extra,
        progress=progress,
    )


def save_checkpoint(directory: Path, **kept: Any) -> None:
    """Write one checkpoint and wait for it. Collective: call on all ranks.

    Takes the arguments of `prepare_checkpoint`.

    Raises:
        UserError: On all ranks: the directory exists, the disk is full or not writable.
    """
    prepare_checkpoint(directory, **kept).write()


class BackgroundSaver:
    """Writes checkpoints in a thread beside training, from a copy of each rank's share in host memory.

    At most one save is under way. The ranks' threads speak to one another in a group
    of their own, so that nothing of training is held up or mixed up.

    Collective: make, call and close it on all ranks.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._directory: Path | None = None
        self._error: BaseException | None = None

    def start(self, save: PendingCheckpoint) -> None:
        """Copy what is to be saved and write it in the background, once the save before was waited for."""
        assert self._thread is None, "call `wait` first"
        self._directory = save.directory
        save = replace(save, contents=save.contents.on_host(self._memory))
        self._thread = threading.Thread(target=self._write, args=(save,), name="save", daemon=True)
        self._thread.start()

    def _write(self, save: PendingCheckpoint) -> None:
        try:
            save.write(self._group)
        except BaseException as error:
            self._error = error

    @property
    def idle(self) -> bool:
        """Whether no save is under way on this rank."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path | None:
        """Wait for the save that is under way.

        Returns:
            What was saved; None if nothing was under way.

        Raises:
            UserError: It could not be written; on all ranks.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._directory
