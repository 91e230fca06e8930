"""Restore a run from its checkpoint: configuration, counters, λ and schedule; all but tensors."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lerobot.configs.train import TRAIN_CONFIG_NAME
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from craft_ds.algorithm.task_multipliers import TaskDualState, make_dual_state
from craft_ds.anchors.coverage import named_tasks
from craft_ds.checkpoints import read_manifest, read_states
from craft_ds.checkpoints.load import damaged_state
from craft_ds.checkpoints.save import CRAFT_STATE, SCHEDULER
from craft_ds.config.train_config import TrainConfig
from craft_ds.data.fingerprint import changed_parts
from craft_ds.distributed.collectives import fail_together
from craft_ds.engines import check_step
from craft_ds.errors import UserError
from craft_ds.policies.directory import CONFIG
from craft_ds.tensor_io.safe_json import is_count, read_object
from craft_ds.training.finished import stopped_early_line
from craft_ds.training.resume import changed_flags, check_same_policy
from craft_ds.training.train_state import Progress, TrainState


class SavedRun(NamedTuple):
    """Content of a checkpoint besides tensors.

    Attributes:
        config: The configuration of the run that wrote it.
        scheduler: State of the learning-rate schedule; None: there was none.
        craft: Content of `craft_state.pt`.
        step: Steps done, of the manifest.
    """

    config: dict[str, Any]
    scheduler: dict[str, Any] | None
    craft: dict[str, Any]
    step: int


@fail_together
def read_saved(config: TrainConfig) -> SavedRun:
    """Read the checkpoint to resume from, all but tensors. Collective: call on all ranks.

    Raises:
        UserError: A file is damaged, or its policy is not the one of its run.
    """
    path = config.checkpoint_path / TRAIN_CONFIG_NAME
    scheduler, craft = read_states(config.checkpoint_path)
    try:
        saved = read_object(path)
        check_same_policy(saved["policy"], read_object(config.checkpoint_path / CONFIG))
        return SavedRun(saved, scheduler, craft, read_manifest(config.checkpoint_path)["step"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error


@fail_together
def resolve_changed_flags(config: TrainConfig, saved: SavedRun) -> list[str]:
    """Complete the configuration of a resumed run; return a message that names the changed flags.

    The policy's presets are renewed if one of their flags changed. Collective: call on all ranks.

    Args:
        config: The configuration of this run; its optimizer and scheduler may change.
        saved: The checkpoint.
    """
    changed = changed_flags(saved.config, config.to_dict())
    if config.use_policy_training_preset and any(
        flag.startswith(("--policy.optimizer_", "--policy.scheduler_")) for flag in changed
    ):
        # As in a new run, where the policy's own flags determine the preset.
        config.optimizer = config.policy.get_optimizer_preset()
        config.scheduler = config.policy.get_scheduler_preset()
    return [f"changed since {config.checkpoint_path}: {', '.join(changed)}"] if changed else []


@fail_together
def build_state(
    config: TrainConfig,
    saved: SavedRun | None,
    samples: int,
    fingerprint: dict[str, str],
    world_size: int,
    tasks: Sequence[str] = (),
) -> TrainState:
    """Build the state at the run's first step, and compute the size of a step for this number of ranks.

    Collective: call on all ranks.

    Args:
        config: The configuration of this run.
        saved: The checkpoint; None: a new run.
        samples: Samples of the data set that train.
        fingerprint: Fingerprint of the data set by part (`craft_ds.data.fingerprint`).
        world_size: Number of ranks.
        tasks: Texts of the old tasks that have anchors.

    Raises:
        UserError: The checkpoint is damaged, of another data set or of other old tasks, the run stopped
            early, or a step does not fit the ranks.
    """
    dual = make_dual_state(config.craft, tasks)
    state = TrainState(Progress(), dual, samples, dataset_fingerprint=fingerprint)
    if saved is not None:
        path = config.checkpoint_path
        try:
            craft = saved.config["craft"]
            state.load_state_dict(saved.craft, craft["lambda_max"] if craft["enabled"] else math.inf)
            if state.progress.step != saved.step:
                raise ValueError(
                    f"it is of step {state.progress.step}, but the checkpoint of step {saved.step}"
                )
        except (KeyError, TypeError, ValueError) as error:
            raise damaged_state(path / CRAFT_STATE, error) from error
        if isinstance(dual, TaskDualState) and dual.tasks != list(tasks):
            raise UserError(
                f"--craft.anchor_cache_dir={config.craft.anchor_cache_dir} has anchors of {len(tasks)} "
                f"{named_tasks(tasks)}, but {path} has λ of {len(dual.tasks)} {named_tasks(dual.tasks)}: "
                "give anchors of the same tasks in the same order, or start a new run with --policy.path "
                "instead of --resume"
            )
        if state.dataset_samples != samples:
            raise UserError(
                f"--dataset.repo_id={config.dataset.repo_id} has {samples} training samples, but {path} was "
                f"trained on {state.dataset_samples}: give the same data set and --dataset.eval_split, or "
                "start a new run with --policy.path instead of --resume"
            )
        if line := stopped_early_line(path, state.evaluations, config):
            raise UserError(f"{line}: raise --early_stop_patience, or set it to 0, to continue")
        # Checkpoints of older versions have no fingerprint.
        if changed := changed_parts(state.dataset_fingerprint or fingerprint, fingerprint):
            raise UserError(
                f"--dataset.repo_id={config.dataset.repo_id} is not the data set that {path} was trained on: "
                f"its files in {' and '.join(f'{part}/' for part in changed)} have changed; restore them, or "
                "start a new run with --policy.path instead of --resume"
            )
        state.dataset_fingerprint = fingerprint
    anchors = config.craft.anchor_batch_size if config.craft.enabled else 0
    state.progress.set_step_size(config.batch_size, config.gradient_accumulation_steps, anchors, world_size)
    check_step(config, state.progress.samples_per_step)
    return state


@fail_together
def restore_scheduler(
    directory: Path, saved: dict[str, Any] | None, scheduler: LRScheduler | None, applied: int
) -> None:
    """Restore the position in the schedule. Its base learning rates remain those of the flags. Collective.

    Args:
        directory: The checkpoint.
        saved: Its state of the schedule.
        scheduler: The schedule.
        applied: Steps that changed the policy; the schedule may have begun later.

    Raises:
        UserError: The state is not one of this schedule.
    """
    if scheduler is None or saved is None:
        return
    try:
        state = dict(saved)
        if not (is_count(state["last_epoch"]) and state["last_epoch"] <= applied):
            raise ValueError(f"last_epoch={state['last_epoch']!r} after {applied} steps")
        if not is_count(state.get("_step_count", 0)):
            raise ValueError(f"_step_count={state['_step_count']!r}")
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
