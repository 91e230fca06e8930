"""Build a run: check and build everything, cheap and likely failures first."""

import contextlib
import copy
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy

from craft_ds.anchors.cache_list import Anchors
from craft_ds.anchors.coverage import coverage_warnings, trained_tasks
from craft_ds.anchors.stream import AnchorStream
from craft_ds.anchors.vision import check_frozen_tower
from craft_ds.checkpoints import (
    BackgroundSaver,
    load_optimizer,
    verify_checkpoint,
)
from craft_ds.checkpoints.run_directory import complete_checkpoints
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.batch_partition import partition_step
from craft_ds.data.mixture import MixtureSampler, mixture_weights
from craft_ds.data.policy_input import PolicyInput
from craft_ds.data.read_ahead import read_ahead
from craft_ds.data.replacement import RawBatch
from craft_ds.data.task_data import (
    StepSampler,
    check_processors,
    training_batches,
)
from craft_ds.distributed.collectives import fail_together, rank0_only
from craft_ds.distributed.env import launched_rank, launched_world_size, settle_environment
from craft_ds.distributed.launcher_watch import end_with_launcher
from craft_ds.distributed.preemption import Preemption, parse_duration
from craft_ds.distributed.watchdog import RankWatchdog
from craft_ds.engines import build_engine, check_engine, init_engine_process_group
from craft_ds.engines.activation_checkpointing import checkpoint_activations
from craft_ds.engines.base import Batch, Engine
from craft_ds.engines.batch_norm import batch_norm_warning
from craft_ds.engines.compiled_layers import compile_layers_
from craft_ds.engines.fsdp_wrapping import gathered_dtype
from craft_ds.errors import Preempted, UserError
from craft_ds.lora.adapters import AdapterPlan, Adapters, add_adapters
from craft_ds.lora.weights import AdaptedWeights, open_weights
from craft_ds.policies.changes import policy_edits
from craft_ds.policies.loading import build_policy
from craft_ds.policies.token_loss import PolicyWithLoss
from craft_ds.policies.weights import WeightReader, weights_sha256
from craft_ds.policies.wrapping import wrapping_warning
from craft_ds.tensor_io.move_aside import move_aside
from craft_ds.training.bad_samples import BadSampleLog
from craft_ds.training.checkpointer import Checkpointer
from craft_ds.training.evaluator import Evaluator
from craft_ds.training.exclusive_run import exclusive_run
from craft_ds.training.metrics import MetricsLogger
from craft_ds.training.open_data import OpenedData, load_run_processors, open_data
from craft_ds.training.penalty import build_penalty, fisher_samples, penalty_line
from craft_ds.training.preflight import check_inputs, open_augmentation
from craft_ds.training.restore import build_state, read_saved, resolve_changed_flags, restore_scheduler
from craft_ds.training.run import Run
from craft_ds.training.start_policy import resolve_start
from craft_ds.training.start_report import (
    anchor_line,
    dataset_lines,
    epsilon_lines,
    heldout_lines,
    precision_lines,
    size_lines,
)
from craft_ds.training.step_profiler import open_profiler
from craft_ds.training.task_stream import TaskStream
from craft_ds.training.trackers import open_trackers
from craft_ds.training.train_state import Progress, TrainState
from craft_ds.training.weight_average import build_average


@contextlib.contextmanager
def open_run(config: TrainConfig) -> Iterator[Run]:
    """Check the inputs, build the run, and close it at the end. Collective: call on all ranks.

    Raises:
        KeyboardInterrupt: SIGINT before the first step, or where nothing is saved.
        RankLost: Another rank has failed, died or hangs.
        UserError: On all ranks, before anything is written, and before the model is built where that
            is possible.
    """
    settle_environment()
    end_with_launcher()
    preemption = Preemption(parse_duration("--max_runtime", config.max_runtime))
    config.validate()
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    torch.backends.cudnn.benchmark = not config.cudnn_deterministic
    torch.backends.cuda.matmul.allow_tf32 = config.engine.tf32
    torch.backends.cudnn.allow_tf32 = config.engine.tf32
    ds_config = check_engine(config, launched_world_size())
    owns_process_group = init_engine_process_group(config)
    # A launcher that lost a rank signals the others, which must first report the lost rank.
    stacks = Path(config.output_dir) if config.output_dir else None
    with (
        preemption.listening(),
        RankWatchdog(config.rank_timeout, output_dir=stacks) as watchdog,
        exclusive_run(Path(config.output_dir)),
    ):
        rank0_only(config.check_output_dir)()  # another run may just have ended
        run = _build(config, ds_config, preemption, watchdog, owns_process_group)
        try:
            with preemption.deferring_interrupts():
                yield run
        except Preempted:
            run.close()
            if preemption.interrupted and not config.save_checkpoint:
                raise KeyboardInterrupt from None
            raise
        except BaseException:
            # The other ranks may be in the middle of a step: a collective here could wait forever.
            run.close_alone()
            raise
        run.close()


def _build(
    config: TrainConfig,
    ds_config: dict[str, Any] | None,
    preemption: Preemption,
    watchdog: RankWatchdog,
    owns_process_group: bool,
) -> Run:
    """Build the parts of a run, cheap and likely failures first. Collective: call on all ranks."""
    world_size = launched_world_size()
    if config.resume and config.verified_checkpoint != config.checkpoint_path:
        verify_checkpoint(config.checkpoint_path, launched_rank(), world_size)
    saved = read_saved(config) if config.resume else None
    messages = resolve_changed_flags(config, saved) if saved else []
    inputs = check_inputs(config)
    data = open_data(config, inputs, world_size)
    messages += data.messages
    old_tasks = trained_tasks(inputs.cache) if inputs.cache and config.craft.enabled else []
    state = build_state(config, saved, len(data.samples), data.fingerprint, world_size, old_tasks)
    if config.penalty.name != "none":
        state.start = rank0_only(resolve_start)(config, state.start, inputs.policy_dir)

    policy = fail_together(build_fp32_policy)(config.policy, inputs.weights_dir)
    base_sha256 = rank0_only(weights_sha256)(inputs.weights_dir) if inputs.plan else ""
    adapters = fail_together(add_adapters)(policy, inputs.plan.config, base_sha256) if inputs.plan else None
    weights = fail_together(open_weights)(policy, inputs.policy_dir, inputs.plan, adapters, config.seed or 0)
    start = _open_start(config, state, policy, inputs.plan, adapters)
    if config.craft.enabled and config.craft.vision_features:
        fail_together(check_frozen_tower)(policy)
    description = _describe_policy(config, policy, adapters)
    if warning := _wrapping_warning(config, policy):
        messages.append(f"warning: {warning}")
    if warning := batch_norm_warning(policy, world_size):
        messages.append(f"warning: {warning}")
    if config.engine.compile:
        compile_layers_(policy)
    if config.activation_checkpointing == "full":
        checkpoint_activations(policy)
    with weights, start as start_weights:
        engine = build_engine(
            config,
            PolicyWithLoss(policy),
            weights.read,
            lambda: config.optimizer.build(policy.get_optim_params()),
            ds_config,
        )
        penalty = build_penalty(
            config.penalty,
            engine,
            _fisher_samples(config, inputs.cache, engine, watchdog),
            start=start_weights.read if start_weights else None,
            current=weights.read,
        )
        resumed = config.checkpoint_path if saved is not None else None
        average = build_average(config.ema_decay, engine, weights.read, resumed, adapters)

    device = str(engine.device)
    preprocessor, postprocessor = load_run_processors(config, inputs.policy_dir, data.changes, device)
    task_input, *_ = [
        fail_together(check_processors)(part.config, part.samples, data.preprocessor) for part in data.parts
    ]
    anchors = _open_anchors(config, inputs.cache, engine, state.progress)
    scheduler = config.scheduler.build(engine.optimizer, config.steps) if config.scheduler else None
    if saved is not None:
        fail_together(load_optimizer)(config.checkpoint_path, engine, adapters)
        applied = state.progress.step - state.progress.skipped
        restore_scheduler(config.checkpoint_path, saved.scheduler, scheduler, applied)
    tasks = _open_tasks(config, data, task_input, engine, state.progress)
    background = BackgroundSaver() if config.checkpoint.background and config.save_checkpoint else None

    engine.barrier()  # no rank creates the output directory before all have found it free
    messages += rank0_only(_move_incomplete_aside)(config)
    logger = _open_logger(config, engine, state)
    state.tracker_run_ids |= logger.tracker_run_ids
    for line in dataset_lines(config, [(part.train, part.heldout) for part in data.parts]):
        logger.say(line)
    logger.say(f"✓ policy: {description}, {_describe_engine(config, engine)}")
    teacher_loss = None
    if penalty is not None:
        logger.say(penalty_line(config.penalty, inputs.cache))
    if inputs.cache is not None and config.craft.enabled:
        logger.say(anchor_line(inputs.cache, config.craft))
        losses = inputs.cache.loss_of(config.craft.retention_loss)
        teacher_loss = losses[config.craft.constraint_split]["overall"]
        messages += epsilon_lines(config.craft, teacher_loss)
        messages += coverage_warnings(inputs.cache, config.craft.constraint_split)
    for part in data.parts:
        if part.heldout is not None:
            episodes = (part.train.num_episodes, part.heldout.num_episodes)
            messages += heldout_lines(config.dataset.eval_split, *episodes)
    messages += precision_lines(config.engine.dtype, engine.device.type)
    for message in (*size_lines(config, state.progress, len(data.samples), engine.world_size), *messages):
        logger.say(message)
    checkpointer = Checkpointer(
        config=config,
        engine=engine,
        state=state,
        scheduler=scheduler,
        adapters=adapters,
        average=average,
        policy_dir=inputs.policy_dir,
        edits=policy_edits(data.changes, preprocessor, postprocessor),
        logger=logger,
        watchdog=watchdog,
        teacher_loss=teacher_loss,
        background=background,
    )
    if config.resume:
        checkpointer.repair_best_link()
    bad_samples = BadSampleLog(
        config.on_bad_sample, logger.say, lambda: checkpointer.report_finished_saves(wait=True)
    )
    output_dir, done = Path(config.output_dir), state.progress.step
    profiler = open_profiler(config.profile, engine, output_dir, done, config.steps, logger.say)
    return Run(
        config=config,
        engine=engine,
        state=state,
        tasks=tasks,
        anchors=anchors,
        penalty=penalty,
        average=average,
        scheduler=scheduler,
        logger=logger,
        evaluator=Evaluator(
            config,
            engine,
            watchdog,
            task_input,
            preprocessor,
            postprocessor,
            data.heldout_samples,
            anchors,
            bad_samples,
        ),
        checkpointer=checkpointer,
        preemption=preemption,
        watchdog=watchdog,
        bad_samples=bad_samples,
        profiler=profiler,
        owns_process_group=owns_process_group,
    )


def _move_incomplete_aside(config: TrainConfig) -> list[str]:
    """Rename directories without a complete checkpoint that this run would otherwise overwrite."""
    if not (config.resume and config.save_checkpoint):
        return []
    _, broken = complete_checkpoints(Path(config.output_dir))
    try:
        return [f"{reason}: renamed {path} to {move_aside(path)}" for path, reason in broken.items()]
    except OSError as error:
        raise UserError(f"--output_dir={config.output_dir} cannot be written: {error}") from error


@fail_together
def _open_tasks(
    config: TrainConfig,
    data: OpenedData,
    task_input: PolicyInput,
    engine: Engine,
    progress: Progress,
) -> TaskStream:
    partition = partition_step(
        progress.samples_per_step, engine.world_size, config.batch_size, "task samples"
    )
    sizes = [len(part.samples) for part in data.parts]
    place = (partition, engine.rank, config.seed or 0, progress.samples_seen)
    weights = mixture_weights(config)
    sampler = MixtureSampler(sizes, weights, *place) if weights else StepSampler(sum(sizes), *place)
    batches: Generator[RawBatch] = (
        batch._replace(samples=task_input.to_device(batch.samples, engine.device))
        for batch in training_batches(config, data.samples, sampler, task_input.process)
    )
    if config.num_workers > 0:  # else reading seeds torch's generator, which the training thread uses
        batches = read_ahead(batches, engine.device)
    return TaskStream(batches, partition, sampler)


def build_fp32_policy(config: PreTrainedConfig, policy_dir: Path) -> PreTrainedPolicy:
    """Build the policy without weights and with fp32 parameters, regardless of its configuration's dtype.

    `dtype=bfloat16`, as hub policies have it, would round the master weights before the first step and
    mix dtypes within a layer. The engine casts for forward and backward (`--engine.dtype`). The policy's own
    activation checkpointing is off: `--activation_checkpointing` works in every engine.
    """
    config = copy.copy(config)
    if hasattr(config, "dtype"):
        config.dtype = "float32"
    if hasattr(config, "gradient_checkpointing"):
        config.gradient_checkpointing = False
    return build_policy(config, policy_dir)


@fail_together
def _open_start(
    config: TrainConfig,
    state: TrainState,
    policy: PreTrainedPolicy,
    plan: AdapterPlan | None,
    adapters: Adapters | None,
) -> contextlib.AbstractContextManager[WeightReader | AdaptedWeights | None]:
    """Open the weights that training started from, which the engine of a resumed run does not hold."""
    if config.penalty.name == "none" or not config.resume:
        return contextlib.nullcontext()
    assert state.start is not None
    return state.start.open(policy, plan, adapters)


def _fisher_samples(
    config: TrainConfig, cache: Anchors | None, engine: Engine, watchdog: RankWatchdog
) -> Iterator[Batch]:
    if cache is not None:
        for sample in fisher_samples(cache, config.penalty.fisher_samples, engine.device):
            watchdog.progress()
            yield sample


@fail_together
def _open_anchors(
    config: TrainConfig, cache: Anchors | None, engine: Engine, progress: Progress
) -> AnchorStream | None:
    if cache is None or not config.craft.enabled:
        return None
    partition = partition_step(progress.anchors_per_step, engine.world_size, config.batch_size, "anchors")
    return AnchorStream(
        cache,
        config.craft,
        partition,
        device=engine.device,
        rank=engine.rank,
        seed=config.seed or 0,
        augment=open_augmentation(config),
    )


@fail_together
def _open_logger(config: TrainConfig, engine: Engine, state: TrainState) -> MetricsLogger:
    is_main = engine.rank == 0
    resume_step = state.progress.step if config.resume else None
    try:
        trackers = open_trackers(config, state.tracker_run_ids, resume_step) if is_main else []
        return MetricsLogger(
            Path(config.output_dir), config.steps, trackers, is_main=is_main, resume_step=resume_step
        )
    except OSError as error:
        raise UserError(f"--output_dir={config.output_dir} cannot be written: {error}") from error


def _wrapping_warning(config: TrainConfig, policy: PreTrainedPolicy) -> str | None:
    """Warn of large FSDP2 units, which are gathered at once; DeepSpeed gathers layer by layer."""
    if config.engine.name != "fsdp":
        return None
    return wrapping_warning(policy, gathered_dtype(config.engine.fsdp, getattr(torch, config.engine.dtype)))


def _describe_policy(config: TrainConfig, policy: PreTrainedPolicy, adapters: Adapters | None) -> str:
    count = sum(parameter.numel() for parameter in policy.parameters())
    trainable = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
    described = f"{config.policy.type}, {count / 1e6:.2f} M parameters"
    if adapters is not None:
        described += f", {trainable / 1e6:.2f} M of them train ({adapters.describe()})"
    return described


def _describe_engine(config: TrainConfig, engine: Engine) -> str:
    ranks = f"{engine.world_size} rank{'s' if engine.world_size > 1 else ''}"
    details = [engine.device.type, config.engine.dtype]
    if config.engine.optimizer_state != "fp32":
        details.append(f"moments in {config.engine.optimizer_state}")
    if config.engine.compile:
        details.append("compiled layers")
    return f"{config.engine.name} engine on {ranks} ({', '.join(details)})"
