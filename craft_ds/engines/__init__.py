"""Engines: how a model is sharded, behind one small protocol (`craft_ds.engines.base`)."""

from collections.abc import Callable
from typing import Any

import torch

from craft_ds.engines.base import Engine
from craft_ds.engines.ds_config import read_ds_config, resolve_ds_config
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.policies.adapter import PolicyWithLoss
from craft_ds.train_config import TrainConfig


def check_engine(config: TrainConfig, world_size: int) -> dict[str, Any] | None:
    """Check the engine's flags against the launcher and the DeepSpeed file.

    Args:
        config: A validated configuration.
        world_size: Number of processes that were launched.

    Returns:
        The DeepSpeed configuration to run with; None for the single-process engine.

    Raises:
        UserError: Names the flags that contradict one another.
    """
    if config.engine.name == "single":
        if world_size > 1:
            raise UserError(
                f"{world_size} processes were launched, but --engine=single runs in one: add "
                "--ds_config ds_configs/zero3.json"
            )
        return None
    assert config.engine.ds_config is not None  # EngineConfig.validate has seen to it
    assert config.optimizer is not None
    return resolve_ds_config(
        read_ds_config(config.engine.ds_config),
        path=config.engine.ds_config,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        grad_clip_norm=config.optimizer.grad_clip_norm,
        bf16=config.engine.dtype == "bfloat16",
        world_size=world_size,
    )


def join_ranks(config: TrainConfig) -> None:
    """Form the process group that the engine needs. Collective: call on all ranks.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    if config.engine.name == "zero":
        try:
            # Imported here: the single-process engine runs without DeepSpeed.
            from craft_ds.engines.zero import init_distributed
        except ImportError as error:
            raise UserError(
                f"--ds_config needs DeepSpeed ({error}): pip install 'craft-ds[deepspeed]'"
            ) from error
        init_distributed()


def build_engine(
    config: TrainConfig,
    module: PolicyWithLoss,
    build_optimizer: Callable[[], torch.optim.Optimizer],
    ds_config: dict[str, Any] | None,
) -> Engine:
    """Shard a policy. Collective: call on all ranks.

    Args:
        config: A validated configuration.
        module: The policy with its loss, on the CPU.
        build_optimizer: Makes the optimizer of the policy's parameters.
        ds_config: What `check_engine` returned.
    """
    if ds_config is None:
        assert config.policy is not None
        device = torch.device(config.policy.device or "cpu")
        return SingleEngine(module, build_optimizer, device, getattr(torch, config.engine.dtype))
    from craft_ds.engines.zero import ZeroEngine

    return ZeroEngine(module, build_optimizer, ds_config)
