"""Saves on several ranks: in the background, per rank, and with a full disk on one rank."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from lab import Lab, Output, masters, moments
from scenarios import _continue, _train_config, load_checkpoint

from craft_ds.checkpoints import BackgroundSaver, prepare_checkpoint, save_checkpoint, verify_checkpoint
from craft_ds.config.configs import CheckpointConfig
from craft_ds.engines.base import Engine
from craft_ds.errors import UserError


def _kept(lab: Lab, engine: Engine, layout: str = "consolidated") -> dict:
    config = _train_config(lab)
    config.checkpoint = CheckpointConfig(layout=layout)
    return {
        "engine": engine,
        "config": config,
        "policy_dir": lab.policy_dir,
        "scheduler_state": None,
        "craft_state": {"multiplier": 1.5},
        "step": 2,
    }


def saving(lab: Lab) -> Output:
    """Save the same state in every way; then fail the disk of one rank, which all must report."""
    output, root = Output(), lab.scratch / f"saving_{lab.kind}_on{lab.world_size}"
    engine = lab.pi0_engine()
    _continue(lab, engine, output, "TR", 0)
    output.values["synced"] = _synced(
        lambda: save_checkpoint(root / "plain" / "step_000002", **_kept(lab, engine))
    )
    save_checkpoint(root / "pieces" / "step_000002", **_kept(lab, engine, "per_rank"))
    output.add("saved", masters(engine))
    output.add("saved", moments(engine))

    saver = BackgroundSaver()
    saver.start(prepare_checkpoint(root / "background" / "step_000002", **_kept(lab, engine)))
    _continue(lab, engine, output, "TT", 2)  # changes what is being saved
    output.values["background"] = str(saver.wait())
    output.values["idle"] = str(saver.wait())

    target = root / "plain" / "step_000004"
    output.values["failed"] = _save_onto_a_full_disk(lab, engine, target)
    engine.barrier()
    output.values["left"] = sorted(path.name for path in target.parent.iterdir())
    verify_checkpoint(root / "plain" / "step_000002", lab.rank, lab.world_size)
    save_checkpoint(target, **_kept(lab, engine) | {"step": 4})
    engine.close()

    engine = lab.pi0_engine(root / "pieces" / "step_000002")
    load_checkpoint(root / "pieces" / "step_000002", engine)
    output.add("loaded", masters(engine))
    output.add("loaded", moments(engine))
    engine.close()
    return output


def _synced(save: Callable[[], None]) -> list[str]:
    """Return the files and directories that this rank flushes to the disk in a save."""
    sync, names = os.fsync, []

    def noted(descriptor: int) -> None:
        names.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    os.fsync = noted
    try:
        save()
    finally:
        os.fsync = sync
    return names


def _save_onto_a_full_disk(lab: Lab, engine: Engine, target: Path) -> str | None:
    """Return the error of a save in which only the last rank's disk is full."""
    write = os.pwrite

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if lab.rank == lab.world_size - 1:
        os.pwrite = full
    try:
        save_checkpoint(target, **_kept(lab, engine) | {"step": 4})
    except UserError as error:
        return str(error)
    finally:
        os.pwrite = write
    return None


def holes(lab: Lab) -> Output:
    """Omit one shard on a rank: a file with a gap must not be written."""
    output, target = Output(), lab.scratch / f"holes_{lab.kind}_on{lab.world_size}" / "step_000001"
    engine = lab.pi0_engine()
    shards = engine.shards

    def fewer(**options: bool):
        found = list(shards(**options))
        return iter(found[:-1] if lab.rank == lab.world_size - 1 else found)

    engine.shards = fewer
    try:
        save_checkpoint(target, **_kept(lab, engine))
    except RuntimeError as error:
        output.values["refused"] = str(error)
    output.values["written"] = target.exists()
    engine.close()
    return output
