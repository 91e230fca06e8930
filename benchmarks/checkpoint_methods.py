"""Methods of writing a checkpoint that `bench_checkpoint.py` compares: each saves and loads."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lerobot.configs.default import DatasetConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from safetensors.torch import save_file

from craft_ds.checkpoints import BackgroundSaver, load_optimizer, prepare_checkpoint
from craft_ds.checkpoints.save import PendingCheckpoint
from craft_ds.config.configs import CheckpointConfig
from craft_ds.config.train_config import TrainConfig
from craft_ds.distributed.collectives import rank0_only
from craft_ds.engines.base import Engine
from craft_ds.policies.directory import WEIGHTS
from craft_ds.tensor_io.per_rank_file import open_tensors
from craft_ds.tensor_io.tensor_file import TensorFile

OTHERS = ("craft_background", "craft_pieces", "dcp", "dcp_async", "dcp_file", "deepspeed", "deepspeed_file")
TAG = "saved"
Wait = Callable[[], object]


class Method(NamedTuple):
    """A method of writing a checkpoint.

    Attributes:
        label: Name in the table.
        save: Writes into a directory that does not exist yet. Returns when training can continue; if it
            still writes in the background, returns a function that waits for the end. Collective.
        load: Sets parameters and optimizer state from the directory. Collective.
    """

    label: str
    save: Callable[[Path], Wait | None]
    load: Callable[[Path], object]


def methods(engine: Engine, policy: PreTrainedPolicy, policy_dir: Path) -> dict[str, Method]:
    """Return all methods of saving an engine, by name; `craft` is the default of craft-ds.

    Args:
        engine: An engine that has taken a step.
        policy: The policy that it trains.
        policy_dir: Directory that the policy was loaded from.
    """
    others = (
        _dcp(engine, policy) if hasattr(engine.module, "set_requires_gradient_sync") else _deepspeed(engine)
    )
    return _craft(engine, policy, policy_dir) | others


def _craft(engine: Engine, policy: PreTrainedPolicy, policy_dir: Path) -> dict[str, Method]:
    saver = BackgroundSaver()

    def prepare(directory: Path, layout: str) -> PendingCheckpoint:
        return prepare_checkpoint(
            directory,
            engine=engine,
            config=TrainConfig(
                dataset=DatasetConfig(repo_id="none"),
                policy=policy.config,
                checkpoint=CheckpointConfig(layout=layout),
            ),
            policy_dir=policy_dir,
            scheduler_state=None,
            craft_state={"multiplier": 1.0},
            step=1,
        )

    def save_in_background(directory: Path) -> Wait:
        saver.start(prepare(directory, "consolidated"))
        return saver.wait

    def load(directory: Path) -> None:
        with open_tensors(directory / WEIGHTS) as weights:
            engine.load_parameters(weights.read)
        load_optimizer(directory, engine)

    return {
        "craft": Method("craft-ds", lambda directory: prepare(directory, "consolidated").write(), load),
        "craft_background": Method("craft-ds, background", save_in_background, load),
        "craft_pieces": Method("craft-ds, per_rank", lambda d: prepare(d, "per_rank").write(), load),
    }


def _dcp(engine: Engine, policy: PreTrainedPolicy) -> dict[str, Method]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )

    def state() -> dict[str, Any]:
        model, optimizer = get_state_dict(engine.module, engine.optimizer)
        return {"model": model, "optimizer": optimizer}

    def save(directory: Path) -> None:
        dcp.save(state(), checkpoint_id=directory)

    def save_async(directory: Path) -> Wait:
        future = dcp.async_save(state(), checkpoint_id=directory)
        assert isinstance(future, Future)
        return future.result

    def save_and_gather(directory: Path) -> None:
        save(directory)
        # PyTorch's way to write one file: every rank gathers, and rank 0 receives everything.
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        gathered: dict[str, Any] = get_model_state_dict(policy, options=options)
        rank0_only(save_file)(gathered, directory / WEIGHTS, metadata={"format": "pt"})

    def load(directory: Path) -> None:
        values = state()
        dcp.load(values, checkpoint_id=directory)
        set_state_dict(
            engine.module,
            engine.optimizer,
            model_state_dict=values["model"],
            optim_state_dict=values["optimizer"],
        )

    return {
        "dcp": Method("DCP save", save, load),
        "dcp_async": Method("DCP async_save", save_async, load),
        "dcp_file": Method("DCP save + gathered file", save_and_gather, load),
    }


def _deepspeed(engine: Engine) -> dict[str, Method]:
    from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_state_dict

    inner = engine._engine  # type: ignore[attr-defined]

    def save(directory: Path) -> None:
        inner.save_checkpoint(str(directory), tag=TAG)

    def save_and_convert(directory: Path) -> None:
        save(directory)
        dist.barrier()
        rank0_only(convert_zero_checkpoint_to_state_dict)(
            str(directory), str(directory), max_shard_size=None, safe_serialization=True, tag=TAG
        )

    def load(directory: Path) -> None:
        found, _ = inner.load_checkpoint(str(directory), tag=TAG)
        assert found is not None

    return {
        "deepspeed": Method("DeepSpeed save_checkpoint", save, load),
        "deepspeed_file": Method("DeepSpeed + zero_to_fp32", save_and_convert, load),
    }


def is_consolidated(directory: Path, policy: PreTrainedPolicy) -> bool:
    """Return whether one `model.safetensors` holds every parameter of the policy in its full shape."""
    if not (directory / WEIGHTS).is_file():
        return False
    with TensorFile(directory / WEIGHTS) as file:
        # DeepSpeed uses the names of its module, the policy with its loss.
        stored = {spec.name.removeprefix("policy."): tuple(spec.shape) for spec in file.specs()}
    shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in policy.named_parameters()}
    return shapes.items() <= stored.items()


def overwrite(engine: Engine) -> None:
    """Overwrite parameters and moments, so that a load must restore all of them. Collective."""
    engine.load_parameters(lambda name, start, stop: torch.full((stop - start,), -1.0))
    for shard in engine.shards(frozen=False):
        for values in shard.state.values():
            values.fill_(-1.0)
