"""Opening a run: everything is checked and built in the order in which it can fail."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.configs.train import TRAIN_CONFIG_NAME
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import RenameObservationsProcessorStep
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from craft_ds.algorithm.multiplier import DualState
from craft_ds.anchors.cache import AnchorCache
from craft_ds.anchors.stream import AnchorStream
from craft_ds.anchors.vision import check_frozen_tower
from craft_ds.checkpoints import BackgroundSaver, load_optimizer, read_states, verify_checkpoint
from craft_ds.checkpoints.load import damaged_state
from craft_ds.checkpoints.run_directory import complete_checkpoints, move_aside
from craft_ds.checkpoints.save import CRAFT_STATE, SCHEDULER
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.batch_partition import partition_step
from craft_ds.data.task_data import StepSampler, check_processors, load_datasets, training_batches
from craft_ds.distributed.collectives import fail_together, rank0_first, rank0_only
from craft_ds.distributed.env import launched_rank, launched_world_size
from craft_ds.distributed.preemption import Preemption, parse_duration
from craft_ds.distributed.watchdog import RankWatchdog
from craft_ds.engines import build_engine, check_engine, check_step, init_engine_process_group
from craft_ds.engines.activation_checkpointing import checkpoint_activations
from craft_ds.engines.base import Engine
from craft_ds.engines.fsdp_wrapping import gathered_dtype
from craft_ds.errors import Preempted, UserError
from craft_ds.lora.adapters import Adapters, add_adapters
from craft_ds.lora.weights import open_weights
from craft_ds.policies.loading import build_policy, load_processors, policy_cameras
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.weights import weights_sha256
from craft_ds.policies.wrapping import wrapping_warning
from craft_ds.tensor_io.safe_json import read_object
from craft_ds.training.metrics import MetricsLogger
from craft_ds.training.preflight import check_inputs
from craft_ds.training.resume import changed_flags
from craft_ds.training.run import Run
from craft_ds.training.train_state import Progress


@contextlib.contextmanager
def open_run(config: TrainConfig) -> Iterator[Run]:
    """Check everything, then build everything; close it in the end. Collective: call on all ranks.

    Raises:
        RankLost: Another rank has failed, died or hangs.
        UserError: On all ranks alike, before anything is written, and before the model is built
            wherever that can be known.
    """
    preemption = Preemption(parse_duration("--max_runtime", config.max_runtime))
    config.validate()
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    torch.backends.cudnn.benchmark = not config.cudnn_deterministic
    ds_config = check_engine(config, launched_world_size())
    owns_process_group = init_engine_process_group(config)
    # A launcher that has lost a rank signals the others, which are to say first who it was.
    with preemption.listening(), RankWatchdog(config.rank_timeout) as watchdog:
        run = _build(config, ds_config, preemption, watchdog, owns_process_group)
        try:
            yield run
        except Preempted:
            run.close()
            raise
        except BaseException:
            # The other ranks may be in the middle of a step: to meet them here could take for ever.
            run.logger.close()
            raise
        run.close()


def _build(
    config: TrainConfig,
    ds_config: dict[str, Any] | None,
    preemption: Preemption,
    watchdog: RankWatchdog,
    owns_process_group: bool,
) -> Run:
    """In the order in which it can fail."""
    world_size = launched_world_size()
    if config.resume and config.verified_checkpoint != config.checkpoint_path:
        verify_checkpoint(config.checkpoint_path, launched_rank(), world_size)
    kept = fail_together(_read_kept)(config)
    inputs = fail_together(check_inputs)(config)
    cameras = policy_cameras(config.policy)
    train, heldout = rank0_first(load_datasets)(config, cameras, world_size)
    progress = fail_together(_settle_progress)(config, kept, len(train), world_size)

    policy = fail_together(build_fp32_policy)(config.policy, inputs.weights_dir)
    base_sha256 = rank0_only(weights_sha256)(inputs.weights_dir) if inputs.plan else ""
    adapters = fail_together(add_adapters)(policy, inputs.plan.config, base_sha256) if inputs.plan else None
    weights = fail_together(open_weights)(policy, inputs.policy_dir, inputs.plan, adapters, config.seed or 0)
    if config.craft.enabled and config.craft.vision_features:
        fail_together(check_frozen_tower)(policy)
    size = _describe_size(policy, adapters)
    warning = _wrapping_warning(config, policy)
    if config.activation_checkpointing == "full":
        checkpoint_activations(policy)
    with weights:
        engine = build_engine(
            config,
            PolicyWithLoss(policy),
            weights.read,
            lambda: config.optimizer.build(policy.get_optim_params()),
            ds_config,
        )
    preprocessor, postprocessor = fail_together(load_processors)(
        config.policy, inputs.policy_dir, str(engine.device)
    )
    for processor in preprocessor.steps:
        if config.rename_map and isinstance(processor, RenameObservationsProcessorStep):
            processor.rename_map = config.rename_map
    fail_together(check_processors)(config, train, preprocessor)
    scheduler = config.scheduler.build(engine.optimizer, config.steps) if config.scheduler else None
    anchors = fail_together(_open_anchors)(config, inputs.cache, engine, progress)
    dual = DualState(config.craft)
    if config.resume:
        fail_together(load_optimizer)(config.checkpoint_path, engine, adapters)
        fail_together(_restore)(config.checkpoint_path, kept, dual, scheduler)
    share = partition_step(progress.samples_per_step, engine.world_size, config.batch_size, "task samples")
    sampler = StepSampler(len(train), share, engine.rank, config.seed or 0, progress.samples_seen)
    batches = fail_together(training_batches)(config, train, sampler)
    saver = BackgroundSaver() if config.checkpoint.background and config.save_checkpoint else None
    engine.barrier()  # nobody makes the output directory before everybody has seen that it is free
    moved = rank0_only(_move_incomplete_aside)(config)
    logger = fail_together(_open_logger)(config, engine, progress.step)
    logger.say(f"✓ data set: {train.num_episodes} episodes, {len(train)} samples")
    logger.say(f"✓ policy: {config.policy.type}, {size}, {_describe(engine, config)}")
    for line in (*kept.get("changed", ()), *moved, *([f"warning: {warning}"] if warning else [])):
        logger.say(line)
    return Run(
        config=config,
        engine=engine,
        dual=dual,
        anchors=anchors,
        progress=progress,
        preemption=preemption,
        watchdog=watchdog,
        output_dir=Path(config.output_dir),
        owns_process_group=owns_process_group,
        adapters=adapters,
        policy_dir=inputs.policy_dir,
        preprocessor=preprocessor,
        postprocessor=postprocessor,
        heldout=heldout,
        scheduler=scheduler,
        logger=logger,
        batches=batches,
        share=share,
        sampler=sampler,
        saver=saver,
    )


def _read_kept(config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint keeps besides tensors, and what flags say otherwise; nothing where the run begins."""
    if not config.resume:
        return {}
    directory = config.checkpoint_path
    scheduler_state, craft_state = read_states(directory)
    try:
        saved = read_object(directory / TRAIN_CONFIG_NAME)
    except (OSError, ValueError) as error:
        raise UserError(f"{directory / TRAIN_CONFIG_NAME} is damaged ({error})") from error
    changed = changed_flags(saved, config.to_dict())
    if config.use_policy_training_preset and any(
        flag.startswith(("--policy.optimizer_", "--policy.scheduler_")) for flag in changed
    ):
        # As at a run's beginning, where the policy's own flags make the preset.
        config.optimizer = config.policy.get_optimizer_preset()
        config.scheduler = config.policy.get_scheduler_preset()
    if config.wandb.run_id is None:
        config.wandb.run_id = craft_state.get("wandb_run_id")
    said = [f"changed since {directory}: {', '.join(changed)}"] if changed else []
    return {"scheduler": scheduler_state, "craft": craft_state, "changed": said}


def _settle_progress(config: TrainConfig, kept: dict[str, Any], samples: int, world_size: int) -> Progress:
    """Where the run stands, and what its steps take on so many ranks."""
    progress = Progress()
    if kept:
        path = config.checkpoint_path
        try:
            progress = Progress.from_state_dict(kept["craft"]["progress"])
            had = int(kept["craft"]["dataset_samples"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_state(path / CRAFT_STATE, error) from error
        if had != samples:
            raise UserError(
                f"--dataset.repo_id={config.dataset.repo_id} has {samples} training samples, but {path} was "
                f"trained on {had}: give the same data set and --dataset.eval_split, or begin a new run with "
                "--policy.path instead of --resume"
            )
    anchors = config.craft.anchor_batch_size if config.craft.enabled else 0
    progress.share(config.batch_size, config.gradient_accumulation_steps, anchors, world_size)
    check_step(config, progress.samples_per_step)
    return progress


def _restore(directory: Path, kept: dict[str, Any], dual: DualState, scheduler: LRScheduler | None) -> None:
    """λ, its history and the place in the schedule. The schedule's own rates are those of the flags."""
    try:
        dual.load_state_dict(kept["craft"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged_state(directory / CRAFT_STATE, error) from error
    try:
        if scheduler is None or kept["scheduler"] is None:
            return
        state = dict(kept["scheduler"])
        if isinstance(scheduler, LambdaLR):
            del state["base_lrs"]
            scheduler.load_state_dict(state)
            rates = [
                base * rate(scheduler.last_epoch)
                for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            ]
        else:
            scheduler.load_state_dict(state)
            rates = scheduler.get_last_lr()
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged_state(directory / SCHEDULER, error) from error


def _move_incomplete_aside(config: TrainConfig) -> list[str]:
    """Move what is no whole checkpoint from where this run will write one."""
    if not (config.resume and config.save_checkpoint):
        return []
    _, broken = complete_checkpoints(Path(config.output_dir))
    return [f"{reason}: {path} is {move_aside(path)} now" for path, reason in broken.items()]


def build_fp32_policy(config: PreTrainedConfig, policy_dir: Path) -> PreTrainedPolicy:
    """The policy without weights, whose parameters will be fp32 whatever dtype its configuration names.

    `dtype=bfloat16`, as hub policies have it, would round the master weights before the first step and
    mix dtypes within a layer. The engine casts for forward and backward (`--engine.dtype`). Nor does the
    policy checkpoint its own activations: `--activation_checkpointing` does, in every engine.
    """
    config = copy.copy(config)
    if hasattr(config, "dtype"):
        config.dtype = "float32"
    if hasattr(config, "gradient_checkpointing"):
        config.gradient_checkpointing = False
    return build_policy(config, policy_dir)


def _open_anchors(
    config: TrainConfig, cache: AnchorCache | None, engine: Engine, progress: Progress
) -> AnchorStream | None:
    if cache is None:
        return None
    share = partition_step(progress.anchors_per_step, engine.world_size, config.batch_size, "anchors")
    return AnchorStream(
        cache, config.craft, share, device=engine.device, rank=engine.rank, seed=config.seed or 0
    )


def _open_logger(config: TrainConfig, engine: Engine, start_step: int) -> MetricsLogger:
    try:
        return MetricsLogger(
            Path(config.output_dir),
            config.steps,
            config.wandb,
            config.to_dict(),
            is_main=engine.rank == 0,
            resume_step=start_step if config.resume else None,
        )
    except OSError as error:
        raise UserError(f"--output_dir={config.output_dir} cannot be written: {error}") from error


def _wrapping_warning(config: TrainConfig, policy: PreTrainedPolicy) -> str | None:
    """FSDP2 gathers a unit at once; DeepSpeed gathers layer by layer, whatever the policy."""
    if config.engine.name != "fsdp":
        return None
    return wrapping_warning(policy, gathered_dtype(config.engine.fsdp, getattr(torch, config.engine.dtype)))


def _describe_size(policy: PreTrainedPolicy, adapters: Adapters | None) -> str:
    count = sum(parameter.numel() for parameter in policy.parameters())
    trainable = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    described = f"{count / 1e6:.2f} M parameters"
    if adapters is not None:
        described += f", {trainable / 1e6:.2f} M of them train ({adapters.describe()})"
    return described


def _describe(engine: Engine, config: TrainConfig) -> str:
    ranks = f"{engine.world_size} rank{'s' if engine.world_size > 1 else ''}"
    return f"{config.engine.name} engine on {ranks} ({engine.device.type}, {config.engine.dtype})"
