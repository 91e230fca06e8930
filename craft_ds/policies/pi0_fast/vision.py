"""What pi0_fast sees: from images, or from what its vision tower made of them before.

A tower of which no parameter trains is a fixed function of the images. No graph is kept for it, and what it
makes of an anchor may be computed once and stored; `vision_fingerprint` says of which tower it is.
"""

import hashlib
import json
from typing import Any

import torch
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from craft_ds.errors import UserError
from craft_ds.policies.lerobot_internals import apply_checkpoint, preprocess_images
from craft_ds.policies.token_loss import Batch
from craft_ds.policies.weights import WeightReader, unique_tensors

_PIECE = 1 << 22
# What a tower computes depends on these too, and the shapes of its weights do not show them.
_SETTINGS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")


def features_key(camera: str) -> str:
    """The batch key of a camera's features, which stand for its images."""
    return f"{camera}.vision_features"


def vision_tower(policy: PreTrainedPolicy) -> nn.Module:
    """The part of a policy that turns images into features, before they are projected to token width.

    Raises:
        UserError: The policy is not a pi0_fast.
    """
    if not isinstance(policy, PI0FastPolicy):
        raise UserError(
            f"vision features are known of pi0_fast only, not of {type(policy).__name__}: leave "
            "--vision_features (in training --craft.vision_features) out"
        )
    return policy.model.paligemma_with_expert.paligemma.model.vision_tower


def tower_trains(policy: PreTrainedPolicy) -> bool:
    """Whether any parameter of the vision tower requires a gradient."""
    return any(parameter.requires_grad for parameter in vision_tower(policy).parameters())


def feature_shape(policy: PreTrainedPolicy) -> tuple[int, int]:
    """Patches an image, and the width of their features; the policy's weights are not needed."""
    config: Any = vision_tower(policy).config
    return (config.image_size // config.patch_size) ** 2, config.hidden_size


def image_tokens(policy: PI0FastPolicy, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """What the decoder reads of all cameras, from one call of the vision tower, or from stored features.

    Equals LeRobot's `embed_image` of every camera. Cameras of the policy that are not in the batch come last
    and are masked.

    Args:
        policy: A pi0_fast of any size.
        batch: For each camera images (B, C, H, W) in [0, 1], or under `features_key` the tower's output for
            them, (B, patches, tower width). Where there are features, the tower is not called.

    Returns:
        Image tokens (B, cameras * patches, width) in fp32, and the mask (B,) of each camera.
    """
    stored = _stored_features(policy, batch)
    if stored is None:
        images, masks = preprocess_images(policy, batch)
        features = _run_tower(policy, torch.cat(images))
    else:
        features, masks = stored
    paligemma = policy.model.paligemma_with_expert.paligemma.model
    tokens = apply_checkpoint(policy.model, paligemma.multi_modal_projector, features)
    scale = 2048**0.5
    # As in LeRobot, to the bit: a division and a multiplication that round.
    tokens = (tokens / scale * scale).float()
    cameras = len(masks)
    return tokens.unflatten(0, (cameras, -1)).transpose(0, 1).flatten(1, 2), masks


@torch.no_grad()
def vision_features(policy: PI0FastPolicy, batch: Batch) -> Batch:
    """What the vision tower makes of the images of a batch, under the keys where `image_tokens` looks.

    Args:
        policy: A pi0_fast of any size.
        batch: Images (B, C, H, W) in [0, 1] of some cameras of the policy.

    Returns:
        (B, patches, tower width) a camera, in the dtype that the tower computes.
    """
    cameras = [camera for camera in policy.config.image_features if camera in batch]
    images, _ = preprocess_images(policy, batch)
    features = _run_tower(policy, torch.cat(images[: len(cameras)])).chunk(len(cameras))
    return {features_key(camera): part for camera, part in zip(cameras, features, strict=True)}


def vision_fingerprint(policy: PreTrainedPolicy, weights: WeightReader) -> str:
    """A SHA-256 over the vision tower as it is stored, and over what else decides its features.

    Values count as fp32, so that a tower stored in bf16 is the one that an fp32 checkpoint keeps of it.

    Args:
        policy: The policy on any device, without adapters: names and shapes are read from it, no values.
        weights: Reads its weights; a few of them at a time are in memory.
    """
    tower = vision_tower(policy)
    prefix = next(name for name, module in policy.named_modules() if module is tower) + "."
    settings = {name: getattr(tower.config, name) for name in _SETTINGS}
    settings["image_resolution"] = list(policy.config.image_resolution)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(unique_tensors(policy).items()):
        if name.startswith(prefix):
            digest.update(f"{name.removeprefix(prefix)} {list(tensor.shape)}\n".encode())
            for start in range(0, tensor.numel(), _PIECE):
                piece = weights.read(name, start, min(start + _PIECE, tensor.numel()))
                digest.update(piece.float().numpy().data)
    return digest.hexdigest()


def _run_tower(policy: PI0FastPolicy, images: Tensor) -> Tensor:
    """The tower's last hidden state for images in [-1, 1]; with a graph only where the tower trains."""
    # Called, not asked for its weights: sharded parameters are there while their modules run.
    tower = vision_tower(policy)
    if tower_trains(policy):
        return apply_checkpoint(policy.model, lambda pixels: tower(pixels).last_hidden_state, images)
    with torch.no_grad():
        return tower(images).last_hidden_state


def _stored_features(policy: PI0FastPolicy, batch: Batch) -> tuple[Tensor, list[Tensor]] | None:
    """The features that a batch holds, camera after camera, and the masks; None where it holds none.

    Raises:
        ValueError: A camera has images and no features, while another has features.
    """
    cameras = policy.config.image_features
    stored = [features_key(camera) for camera in cameras if features_key(camera) in batch]
    if not stored:
        return None
    seen = [camera for camera in cameras if camera in batch and features_key(camera) not in batch]
    if seen:
        raise ValueError(f"the batch has features of some cameras, but images of {', '.join(seen)}")
    # The projector's own dtype: fp32 where autocast casts, else that of the gathered weights.
    dtype = next(policy.model.paligemma_with_expert.paligemma.model.multi_modal_projector.parameters()).dtype
    device = next(policy.parameters()).device
    features = [batch[key].to(device, dtype) for key in stored]
    present = torch.ones(len(features[0]), dtype=torch.bool, device=device)
    absent = len(cameras) - len(stored)
    features += [torch.zeros_like(features[0])] * absent
    return torch.cat(features), [present] * len(stored) + [~present] * absent
