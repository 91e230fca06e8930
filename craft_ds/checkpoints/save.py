"""Write a checkpoint from all ranks in parallel; the directory appears atomically.

Each rank writes its own ranges of `model.safetensors` and `optimizer.safetensors` in a temporary directory;
nothing is gathered. While the data is flushed to the disk, the ranks read it back and hash it. Once both are
done, rank 0 writes the manifest and renames the directory.
"""

import io
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from craft_ds.algorithm.model_selection import EvalRecord
from craft_ds.checkpoints.best_link import update_best_link
from craft_ds.checkpoints.manifest import hash_files, read_manifest, write_manifest
from craft_ds.checkpoints.run_directory import (
    FINAL,
    complete_checkpoints,
    point_last_at,
    prune,
    remove_unfinished,
    set_old_final_aside,
)
from craft_ds.checkpoints.shard_plan import ShardPlan, plan_shards
from craft_ds.config.train_config import TrainConfig
from craft_ds.distributed.collectives import fail_together, rank0_only
from craft_ds.engines.base import Engine
from craft_ds.errors import UserError
from craft_ds.lora.adapters import ADAPTER_WEIGHTS, Adapters
from craft_ds.lora.peft_config import write_adapter_config
from craft_ds.lora.weights import BASE_SHA256
from craft_ds.policies.directory import NO_EDITS, WEIGHTS, PolicyEdits, copy_policy_files
from craft_ds.tensor_io.filesystem import fsync, publish_directory, remove_node, unfinished_path
from craft_ds.tensor_io.per_rank_file import Part, create_piece, piece_path
from craft_ds.tensor_io.tensor_file import TensorFile, TensorSpec, create_tensor_file

OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.pt"
CRAFT_STATE = "craft_state.pt"


@dataclass(frozen=True)
class PendingCheckpoint:
    """Everything one rank needs to write its part of one checkpoint.

    Attributes:
        directory: The checkpoint's final path, `step_001000` or `final`.
        contents: Parameters and optimizer state.
        config: The configuration of the run.
        policy_dir: The policy the run started from; its config, processors and tokenizers are copied.
        edits: What the run changes in them.
        states: Contents of further files by name.
        step: Optimizer steps done.
        rank: This rank.
        world_size: Number of ranks.
        extra: Writes further files into the directory it is given (rank 0 only).
        progress: Called after each piece of work.
        evaluations: Evaluations by which the link `best` is chosen; empty: it is left alone.
    """

    directory: Path
    contents: ShardPlan
    config: TrainConfig
    policy_dir: Path
    edits: PolicyEdits
    states: dict[str, bytes]
    step: int
    rank: int
    world_size: int
    extra: Callable[[Path], None] | None
    progress: Callable[[], None]
    evaluations: Sequence[EvalRecord]

    @property
    def temporary(self) -> Path:
        """Path of the directory until it is complete."""
        return unfinished_path(self.directory)

    def write(self, group: dist.ProcessGroup | None = None) -> None:
        """Write the checkpoint. Collective: call on all ranks.

        Args:
            group: As for `gather_objects`.

        Raises:
            UserError: On all ranks: the directory exists, or the disk is full or not writable.
        """
        try:
            rank0_only(self._as_user_error, group)(self._prepare)
            fail_together(self._as_user_error, group)(self._write_shards)
            # Flushing waits for the disk, hashing for the processor: run both at the same time.
            with ThreadPoolExecutor(max_workers=1) as executor:
                synced = executor.submit(self._sync_shards)
                files = hash_files(self.temporary, self.rank, self.world_size, group)
                fail_together(self._as_user_error, group)(synced.result)
            rank0_only(self._as_user_error, group)(lambda: self._commit(files))
        except UserError:
            if self.rank == 0:  # free the space on a full disk
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise

    def _as_user_error(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            # `copytree` collects a tuple (source, destination, reason) per file.
            reason = error.args[0][0][2] if isinstance(error, shutil.Error) else error
            raise UserError(f"checkpoint {self.directory} cannot be written: {reason}") from error

    def _prepare(self) -> None:
        # An extended run replaces its own `final`, in `_commit`.
        is_old_final = self.directory.name == FINAL and self.directory.is_dir()
        if os.path.lexists(self.directory) and (self.directory.is_symlink() or not is_old_final):
            raise UserError(
                f"checkpoint {self.directory} exists already: move it away or choose another --output_dir"
            )
        remove_unfinished(self.directory.parent)
        self.temporary.mkdir(parents=True)
        copy_policy_files(self._policy_source(), self.temporary, self.directory, self.edits)
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
        """Return the directory to copy policy files from: a run may delete the checkpoint it resumed from."""
        if self.policy_dir.is_dir():
            return self.policy_dir
        complete, _ = complete_checkpoints(self.directory.parent)
        return complete[0][1] if complete else self.policy_dir

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
        """Return the files for this rank's weights and moments: the consolidated ones, or its own pieces."""
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
            self._fill(weights, optimizer, consolidated=True)
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
        self._fill(weights, optimizer, consolidated=False)

    def _fill(self, weights_path: Path, optimizer_path: Path, *, consolidated: bool) -> None:
        """Write this rank's values, at their offsets in a consolidated file or from the start of a piece."""
        with (
            TensorFile(weights_path, writable=True) as weights,
            TensorFile(optimizer_path, writable=True) as moments,
        ):
            for name, values in self.contents.buffers.items():
                weights.write(name, 0, values.reshape(-1))
            for shard in self.contents.shards():
                self.progress()
                stored = self.contents.layout[shard.name]
                start = shard.start if consolidated else 0
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
        self._verify()
        old_final = None
        if self.directory.name == FINAL:
            old_final = set_old_final_aside(self.directory.parent)
            self._update_best_link()  # it may name the old final
        publish_directory(self.temporary, self.directory)
        point_last_at(self.directory)
        if old_final is not None:
            remove_node(old_final)
        best = self._update_best_link()
        prune(self.directory.parent, self.config.save_total_limit, self.config.keep_period, best)

    def _update_best_link(self) -> Path | None:
        return update_best_link(self.directory.parent, self.evaluations) if self.evaluations else None

    def _verify(self) -> None:
        """Check that every file is there, before the directory gets its name and older ones are deleted."""
        try:
            read_manifest(self.temporary)
        except UserError as error:
            raise UserError(f"checkpoint {self.directory} cannot be verified: {error}") from error


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
    edits: PolicyEdits = NO_EDITS,
    adapters: Adapters | None = None,
    extra: Callable[[Path], None] | None = None,
    progress: Callable[[], None] = lambda: None,
    evaluations: Sequence[EvalRecord] = (),
    average: Mapping[str, Tensor] | None = None,
) -> PendingCheckpoint:
    """Collect the contents of a checkpoint as views of the engine's tensors. Collective: call on all ranks.

    Args:
        directory: The checkpoint's final path, `step_001000` or `final`; must not exist.
        engine: Holds parameters and optimizer state.
        config: The configuration of the run.
        policy_dir: The policy the run started from; its config, processors and tokenizers are copied.
        scheduler_state: State of the learning-rate scheduler, if there is one.
        craft_state: λ, its history and the progress of the run; plain Python values.
        step: Optimizer steps done.
        edits: What the run changes in the policy's configuration and processors.
        adapters: The trained adapters, which alone are written; None for full training.
        extra: Writes further files into the directory it is given (rank 0 only).
        progress: Called after each piece of work, in the thread that does it.
        evaluations: Evaluations by which the link `best` is chosen; empty: it is left alone.
        average: As for `plan_shards`; None: there is none.
    """
    return PendingCheckpoint(
        directory=directory,
        contents=plan_shards(engine, adapters, average or {}),
        config=config,
        policy_dir=policy_dir,
        edits=edits,
        states={SCHEDULER: _as_bytes(scheduler_state), CRAFT_STATE: _as_bytes(craft_state)},
        step=step,
        rank=engine.rank,
        world_size=engine.world_size,
        extra=extra,
        progress=progress,
        evaluations=evaluations,
    )


def save_checkpoint(directory: Path, **kept: Any) -> None:
    """Write one checkpoint and wait for it. Collective: call on all ranks.

    Takes the arguments of `prepare_checkpoint`.

    Raises:
        UserError: On all ranks: the directory exists, or the disk is full or not writable.
    """
    prepare_checkpoint(directory, **kept).write()


class BackgroundSaver:
    """Writer of checkpoints in a background thread, from a copy of each rank's shards in host memory.

    At most one save runs at a time. The threads of the ranks use a process group of their own, so that their
    collectives cannot interleave with those of training.

    Collective: create and call it on all ranks.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self._memory: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._directory: Path | None = None
        self._error: BaseException | None = None

    def start(self, save: PendingCheckpoint) -> None:
        """Copy the contents to host memory and write them in the background. Call `wait` before the next."""
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
        """True if no save is running on this rank."""
        return self._thread is None or not self._thread.is_alive()

    def wait(self) -> Path | None:
        """Wait for the running save.

        Returns:
            The checkpoint's directory; None if no save was running.

        Raises:
            UserError: On all ranks: the checkpoint could not be written.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._directory
