"""Engines: how a model is sharded, behind one small protocol (`craft_ds.engines.base`)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lerobot.optim.optimizers import AdamConfig, AdamWConfig, XVLAAdamWConfig

from craft_ds.config.train_config import TrainConfig
from craft_ds.distributed.collectives import init_process_group
from craft_ds.engines.base import Engine, ReadRange
from craft_ds.engines.compact_adam import compact
from craft_ds.engines.compiled_layers import check_compile, refuse_zero3
from craft_ds.engines.deepspeed_config import check_step_size, read_ds_config, resolve_ds_config
from craft_ds.engines.fsdp import FsdpEngine, mesh_shape
from craft_ds.engines.single import SingleEngine
from craft_ds.errors import UserError
from craft_ds.policies.token_loss import PolicyWithLoss


def check_engine(config: TrainConfig, world_size: int) -> dict[str, Any] | None:
    """Check the engine's flags against the launcher and the DeepSpeed file.

    Args:
        config: A validated configuration.
        world_size: Number of processes that were launched.

    Returns:
        The DeepSpeed configuration to run with, where DeepSpeed is the engine.

    Raises:
        UserError: Names the flags that contradict one another.
    """
    if config.engine.name == "single" and world_size > 1:
        raise UserError(
            f"{world_size} processes were launched, but --engine=single runs in one: leave it out, or add "
            "--engine=fsdp or --ds_config zero3"
        )
    state, optimizer = config.engine.optimizer_state, config.optimizer
    if state != "fp32" and not isinstance(optimizer, AdamConfig | AdamWConfig | XVLAAdamWConfig):
        raise UserError(
            f"--engine.optimizer_state={state} is for Adam and AdamW, not for {type(optimizer).__name__}: "
            "omit it, or set --optimizer.type=adamw with --use_policy_training_preset=false"
        )
    buffer = f"--craft.gradient_buffer={config.craft.gradient_buffer}"
    if config.engine.name == "fsdp":
        mesh_shape(config.engine.fsdp, world_size)
        if config.engine.fsdp.cpu_offload and config.craft.gradient_buffer == "cpu":
            raise UserError(f"{buffer}: --engine.fsdp.cpu_offload=true has gradients there already; omit it")
    assert config.policy is not None
    if config.engine.compile:
        check_compile(config.policy)
    if config.engine.name != "zero":
        return None
    assert config.engine.ds_config is not None  # EngineConfig.validate has seen to it
    assert config.optimizer is not None
    resolved = resolve_ds_config(
        read_ds_config(config.engine.ds_config),
        path=config.engine.ds_config,
        batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        grad_clip_norm=config.optimizer.grad_clip_norm,
        bf16=config.engine.dtype == "bfloat16",
        world_size=world_size,
        optimizer_state=config.engine.optimizer_state,
    )
    if config.engine.compile:
        refuse_zero3(resolved)
    offload = resolved["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    if config.craft.gradient_buffer != "device" and offload != "none":
        raise UserError(f"{buffer}: with offload_optimizer DeepSpeed has room for g_t on the CPU; omit it")
    return resolved


def check_step(config: TrainConfig, samples_per_step: int) -> None:
    """Check the DeepSpeed file against what a step takes, which a resumed run has from its checkpoint.

    Raises:
        UserError: It says otherwise.
    """
    if config.engine.name != "zero":
        return
    assert config.engine.ds_config is not None
    batch_size, accumulation = config.batch_size, config.gradient_accumulation_steps
    ranks = samples_per_step // (batch_size * accumulation)  # those that the run began with
    check_step_size(
        read_ds_config(config.engine.ds_config),
        path=config.engine.ds_config,
        samples_per_step=samples_per_step,
        flags=f"--batch_size={batch_size} with --gradient_accumulation_steps={accumulation} on {ranks} ranks",
    )


def init_engine_process_group(config: TrainConfig) -> bool:
    """Form the process group that the engine needs. Collective: call on all ranks.

    Returns:
        Whether one was formed: who forms it leaves it. False where the caller had formed one already.

    Raises:
        UserError: DeepSpeed is not installed.
    """
    formed_by_caller = dist.is_initialized()
    if config.engine.name == "fsdp":
        init_process_group(config.rank_timeout)
    if config.engine.name == "zero":
        try:
            # Imported here: the other engines run without DeepSpeed.
            from craft_ds.engines.deepspeed import init_distributed
        except ImportError as error:
            raise UserError(
                f"--ds_config needs DeepSpeed ({error}): pip install 'craft-ds[deepspeed]'"
            ) from error
        init_distributed(config.rank_timeout)
    return dist.is_initialized() and not formed_by_caller


def build_engine(
    config: TrainConfig,
    module: PolicyWithLoss,
    read: ReadRange,
    build_optimizer: Callable[[], torch.optim.Optimizer],
    ds_config: dict[str, Any] | None,
) -> Engine:
    """Shard a policy and read its weights. Collective: call on all ranks.

    Args:
        config: A validated configuration.
        module: The policy with its loss, without weights.
        read: Reads its parameters and persistent buffers by range.
        build_optimizer: Makes the optimizer of the policy's (sharded) parameters.
        ds_config: What `check_engine` returned.
    """
    dtype = getattr(torch, config.engine.dtype)

    def build_compact() -> torch.optim.Optimizer:
        return compact(build_optimizer(), config.engine.optimizer_state)

    if config.engine.name == "fsdp":
        return FsdpEngine(module, read, build_compact, config.engine.fsdp, dtype)
    if config.engine.name == "zero":
        from craft_ds.engines.deepspeed import DeepSpeedEngine

        assert ds_config is not None
        return DeepSpeedEngine(module, read, build_compact, ds_config)
    assert config.policy is not None
    return SingleEngine(module, read, build_compact, torch.device(config.policy.device or "cpu"), dtype)
