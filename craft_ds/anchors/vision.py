"""Vision features in an anchor cache: computing them, and checking that training may use them.

They replace the images of the anchors, so the vision tower of the trained policy must have the same weights
and stay frozen.
"""

from pathlib import Path
from typing import NamedTuple

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from craft_ds.anchors.cache_list import Anchors
from craft_ds.errors import UserError
from craft_ds.policies.loading import build_policy
from craft_ds.policies.pi0_fast.vision import (
    feature_shape,
    tower_trains,
    vision_features,
    vision_fingerprint,
)
from craft_ds.policies.token_loss import Batch
from craft_ds.policies.weights import WeightReader


class VisionTower(NamedTuple):
    """Identity and output shape of the vision tower of a policy directory.

    Attributes:
        fingerprint: From `craft_ds.policies.pi0_fast.vision.vision_fingerprint`.
        shape: Patches per image, and the width of their features.
    """

    fingerprint: str
    shape: tuple[int, int]


def read_vision_tower(config: PreTrainedConfig, directory: Path) -> VisionTower:
    """Fingerprint the vision tower of a policy directory, reading it piece by piece.

    Args:
        config: From `load_policy_config`.
        directory: The policy's local folder; with adapters, the folder of the base policy.

    Raises:
        UserError: The policy is not a pi0_fast, or its weight files do not fit it.
    """
    # A separate policy, since adapters rename the parameters of the trained one.
    policy = build_policy(config, directory)
    shape = feature_shape(policy)
    with WeightReader(directory, policy) as weights:
        return VisionTower(vision_fingerprint(policy, weights), shape)


def fp16_vision_features(policy: PI0FastPolicy, batch: Batch) -> dict[str, Tensor]:
    """Compute the vision features of a batch as they are stored: fp16, on the CPU.

    Raises:
        UserError: A value is non-finite in fp16.
    """
    stored = {}
    for name, features in vision_features(policy, batch).items():
        stored[name] = features.half().cpu()
        if not stored[name].isfinite().all():
            raise UserError(
                f"--vision_features: {name} reaches {features.abs().max().item():.3g}, which float16 cannot "
                "hold; build the cache without --vision_features"
            )
    return stored


def check_vision_features(anchors: Anchors, directory: Path, config: PreTrainedConfig) -> None:
    """Check that the vision features of anchors are from a policy's own tower, which is read completely.

    Args:
        anchors: The anchors.
        directory: The policy's local folder; with adapters, the folder of the base policy.
        config: From `load_policy_config`.

    Raises:
        UserError: A cache holds none or those of another tower, or the policy is not a pi0_fast.
    """
    for cache in anchors.parts:
        if cache.vision_fingerprint is None:
            raise UserError(
                f"--craft.vision_features=true: anchor cache {cache.path} holds no vision features; build "
                "one with `craft-ds anchors --vision_features`, or omit the flag"
            )
    fingerprint = read_vision_tower(config, directory).fingerprint
    for cache in anchors.parts:
        if fingerprint != cache.vision_fingerprint:
            raise UserError(
                f"--craft.vision_features=true: the vision features of anchor cache {cache.path} are of "
                f"another vision tower ({str(cache.vision_fingerprint)[:12]}) than that of {directory} "
                f"({fingerprint[:12]}); build one for this policy with `craft-ds anchors --vision_features`, "
                "or omit the flag"
            )


def check_frozen_tower(policy: PreTrainedPolicy) -> None:
    """Check that no parameter of a policy's vision tower trains.

    Raises:
        UserError: One trains, so stored features would be stale after the first step.
    """
    if tower_trains(policy):
        raise UserError(
            "--craft.vision_features=true: the vision tower trains in this run, so its features change; "
            "omit the flag, or freeze the tower"
        )
