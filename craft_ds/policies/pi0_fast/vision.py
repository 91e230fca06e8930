"""Image tokens of pi0_fast, from images or from stored features of its vision tower.

A tower without trainable parameters is a fixed function of the images. It needs no graph, and its features of
an anchor may be computed once and stored; `vision_fingerprint` identifies the tower.
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
# The output of a tower depends on these too, and the shapes of its weights do not show them.
_SETTINGS = ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")


def features_key(camera: str) -> str:
    """Return the batch key of a camera's features, which replace its images."""
    return f"{camera}.vision_features"


def vision_tower(policy: PreTrainedPolicy) -> nn.Module:
    """Return the module that turns images into features, before they are projected to token width.

    Raises:
        UserError: The policy is not a pi0_fast.
    """
    if not isinstance(policy, PI0FastPolicy):
        raise UserError(
            f"vision features are supported for pi0_fast only, not for {type(policy).__name__}: omit "
            "--vision_features (in training --craft.vision_features)"
        )
    return policy.model.paligemma_with_expert.paligemma.model.vision_tower


def tower_trains(policy: PreTrainedPolicy) -> bool:
    """Return True if any parameter of the vision tower requires a gradient."""
    return any(parameter.requires_grad for parameter in vision_tower(policy).parameters())


def feature_shape(policy: PreTrainedPolicy) -> tuple[int, int]:
    """Return patches per image and the width of their features; the policy's weights are not needed."""
    config: Any = vision_tower(policy).config
    return (config.image_size // config.patch_size) ** 2, config.hidden_size


def image_tokens(policy: PI0FastPolicy, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Compute the image tokens of the cameras in a batch, by one call of the vision tower or from features.

    Equals LeRobot's `embed_image` of each of them. LeRobot also embeds an empty image for every camera that
    the batch lacks and masks its tokens: nothing attends to them and positions do not count them, so that
    they are left out here.

    Args:
        policy: A pi0_fast of any size.
        batch: For each camera images (B, C, H, W) in [0, 1], or under `features_key` the tower's output for
            them, (B, patches, tower width). Where there are features, the tower is not called.

    Returns:
        Image tokens (B, cameras in the batch * patches, width) in fp32, and the mask (B,) of each camera.
    """
    stored = _stored_features(policy, batch)
    if stored is None:
        images, masks = _present_images(policy, batch)
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
    """Compute the vision tower's features of a batch, under the keys that `image_tokens` reads.

    Args:
        policy: A pi0_fast of any size.
        batch: Images (B, C, H, W) in [0, 1] of some cameras of the policy.

    Returns:
        (B, patches, tower width) per camera, in the dtype of the tower.
    """
    cameras = [camera for camera in policy.config.image_features if camera in batch]
    images, _ = _present_images(policy, batch)
    features = _run_tower(policy, torch.cat(images)).chunk(len(cameras))
    return {features_key(camera): part for camera, part in zip(cameras, features, strict=True)}


def vision_fingerprint(policy: PreTrainedPolicy, weights: WeightReader) -> str:
    """Return a SHA-256 of the stored vision tower and of all else that decides its features.

    Values are hashed as fp32, so that a tower in bf16 and its copy in an fp32 checkpoint are equal.

    Args:
        policy: The policy on any device, without adapters: only names and shapes are read from it.
        weights: Reader of its weights; few of them are in memory at a time.
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


def _present_images(policy: PI0FastPolicy, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Return the prepared images and masks of the cameras in a batch."""
    present = sum(camera in batch for camera in policy.config.image_features)
    images, masks = preprocess_images(policy, batch)
    return images[:present], masks[:present]


def _run_tower(policy: PI0FastPolicy, images: Tensor) -> Tensor:
    """Return the tower's last hidden state for images in [-1, 1], with a graph only if the tower trains."""
    # Sharded parameters are gathered only while their modules run, so the tower must be called.
    tower = vision_tower(policy)
    if tower_trains(policy):
        return apply_checkpoint(policy.model, lambda pixels: tower(pixels).last_hidden_state, images)
    with torch.no_grad():
        return tower(images).last_hidden_state


def _stored_features(policy: PI0FastPolicy, batch: Batch) -> tuple[Tensor, list[Tensor]] | None:
    """Return the features in a batch, camera by camera, and the masks; None without features.

    Raises:
        ValueError: A camera has images and no features, while another has features.
    """
    cameras = policy.config.image_features
    stored = [features_key(camera) for camera in cameras if features_key(camera) in batch]
    if not stored:
        return None
    images_only = [camera for camera in cameras if camera in batch and features_key(camera) not in batch]
    if images_only:
        raise ValueError(f"the batch has features of some cameras, but images of {', '.join(images_only)}")
    # The projector's own dtype: fp32 where autocast casts, else that of the gathered weights.
    dtype = next(policy.model.paligemma_with_expert.paligemma.model.multi_modal_projector.parameters()).dtype
    device = next(policy.parameters()).device
    features = [batch[key].to(device, dtype) for key in stored]
    present = torch.ones(len(features[0]), dtype=torch.bool, device=device)
    return torch.cat(features), [present] * len(stored)
