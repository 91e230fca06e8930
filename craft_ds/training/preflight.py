"""Check the inputs of a run before data and model are loaded."""

from pathlib import Path
from typing import NamedTuple

from craft_ds.anchors.augmentation import AnchorAugmentation
from craft_ds.anchors.cache_list import Anchors, open_caches
from craft_ds.anchors.coverage import check_coverage, check_task_constraints
from craft_ds.anchors.vision import check_vision_features
from craft_ds.checkpoints import complete_checkpoints, read_manifest
from craft_ds.config.train_config import TrainConfig
from craft_ds.distributed.collectives import fail_together
from craft_ds.distributed.env import is_local_rank0, launched_rank, launched_world_size
from craft_ds.errors import UserError
from craft_ds.lora.adapters import AdapterPlan, has_adapters, plan_adapters
from craft_ds.policies.loading import resolve_policy_path
from craft_ds.policies.support import check_craft_policy, check_packages
from craft_ds.training.trackers import check_trackers
from craft_ds.training.world_eval import check_world


class PreflightResult(NamedTuple):
    """Inputs of a run.

    Attributes:
        cache: The anchors; None for the baseline, unless a penalty reads them.
        policy_dir: Directory with the policy's configuration and processors, and its weights or adapters.
        plan: The adapters to train; None: the policy's own weights train.
    """

    cache: Anchors | None
    policy_dir: Path
    plan: AdapterPlan | None

    @property
    def weights_dir(self) -> Path:
        """Directory of the policy's full weights; with adapters, that of their base policy."""
        return self.plan.base if self.plan else self.policy_dir


@fail_together
def check_inputs(config: TrainConfig) -> PreflightResult:
    """Locate the inputs and check that they fit together. Collective: call on all ranks.

    One rank per node verifies checksums.

    Args:
        config: A validated configuration.

    Raises:
        UserError: An input is missing or does not fit; names the flag or file and the fix.
    """
    assert config.policy is not None  # checked by `TrainConfig.validate`
    assert config.policy.pretrained_path is not None
    check_packages(config.policy)
    if config.craft.enabled:
        check_craft_policy(config.policy, "--craft.enabled=true")
    elif config.penalty.name == "ewc":
        check_craft_policy(config.policy, "--penalty.name=ewc")
    policy_dir = resolve_policy_path(config.policy.pretrained_path)
    check_world(config.world, config.policy)
    if launched_rank() == 0:  # which alone logs
        check_trackers(config.trackers)
    if config.resume:
        _check_resumable(config)
    inputs = PreflightResult(None, policy_dir, plan_adapters(config.lora, config.policy, policy_dir))
    if not config.craft.enabled and config.penalty.name != "ewc":
        return inputs
    cache = open_caches(config.craft.anchor_caches, verify=is_local_rank0())
    open_augmentation(config)
    cache.check_policy(config.policy)
    if not config.craft.enabled:
        return inputs._replace(cache=cache)
    cache.loss_of(config.craft.retention_loss)
    check_coverage(cache, config.craft.constraint_split, launched_world_size())
    if config.save_best and not cache.splits["heldout"]:
        raise UserError(
            f"--save_best=true measures retention on held-out anchors, and {cache.path} has none: build a "
            "cache of tasks with at least two episodes by `craft-ds anchors --heldout_fraction=0.2`"
        )
    check_task_constraints(cache, config.craft)
    if config.craft.vision_features and is_local_rank0():
        check_vision_features(cache, inputs.weights_dir, config.policy)
    return inputs._replace(cache=cache)


def open_augmentation(config: TrainConfig) -> AnchorAugmentation | None:
    """Return the augmentation of anchors that the flags describe; None: there is none.

    Raises:
        UserError: Its transforms cannot be used.
    """
    if config.craft.anchor_augmentation == "none":
        return None
    return AnchorAugmentation(config.dataset.image_transforms, config.seed or 0)


def _check_resumable(config: TrainConfig) -> None:
    step = read_manifest(config.checkpoint_path)["step"]
    if config.lora.enabled and not has_adapters(config.checkpoint_path):
        raise UserError(
            f"--lora.enabled=true, but {config.checkpoint_path} is a checkpoint of full training: leave "
            "--lora.* out, or start a new run with --policy.path instead of --resume"
        )
    if step >= config.steps:
        raise UserError(
            f"{config.checkpoint_path} has done {step} of --steps={config.steps}: raise --steps to continue"
        )
    complete, _ = complete_checkpoints(Path(config.output_dir))
    later = [path for number, path in complete if number > step]
    if later:
        raise UserError(
            f"resuming at step {step} would overwrite {min(later)}: resume from the last checkpoint, move "
            "it away, or give another --output_dir"
        )
