"""Checks that a data set has the features that a policy trains on, in the policy's sizes."""

from collections.abc import Mapping
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.utils.constants import ACTION, OBS_STATE

from craft_ds.data.checked_samples import image_shape
from craft_ds.errors import UserError

# Fields of configurations whose policies resize pictures themselves.
_RESIZES = ("image_resolution", "resize_imgs_with_padding", "resize_shape")


def check_vectors(
    name: str,
    features: Mapping[str, dict[str, Any]],
    config: PreTrainedConfig,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Check that state and action are there, as vectors of the policy's widths.

    Args:
        name: The data set in the message.
        features: Features of the data set, in LeRobot's form.
        config: The policy's configuration.
        renamed: New names of features of the data set.

    Raises:
        UserError: One is missing, or of another width.
    """
    found = {(renamed or {}).get(key, key): feature for key, feature in features.items()}
    for key, wanted, widest in (
        (OBS_STATE, (config.input_features or {}).get(OBS_STATE), "max_state_dim"),
        (ACTION, (config.output_features or {}).get(ACTION), "max_action_dim"),
    ):
        if wanted is None and key == OBS_STATE:
            continue
        if key not in found:
            raise UserError(
                f"{name} has no {key}, which the policy needs (it has {', '.join(sorted(features))}): choose "
                "a data set with recorded states and actions"
            )
        shape = tuple(found[key]["shape"])
        if len(shape) != 1:
            raise UserError(f"{name}: {key} has the shape {shape}, and the policy takes vectors")
        if wanted is None or shape[0] == wanted.shape[0]:
            continue
        # A base policy is as wide as its padding, and takes any narrower robot; but action tokens are decoded
        # as actions of exactly the policy's width.
        padded = wanted.shape[0] == getattr(config, widest, None) and shape[0] < wanted.shape[0]
        if padded and not (key == ACTION and hasattr(config, "action_tokenizer_name")):
            continue
        other = ", or train with --normalization=dataset" if hasattr(config, widest) else ""
        raise UserError(
            f"{name}: {key} has {shape[0]} entries{_named(found[key])}, the policy takes {wanted.shape[0]}: "
            f"choose a data set of the policy's robot{other}"
        )


def check_pictures(
    name: str,
    features: Mapping[str, dict[str, Any]],
    config: PreTrainedConfig,
    renamed: Mapping[str, str] | None = None,
) -> None:
    """Check that pictures have the policy's channels, and its size if it does not resize them.

    ACT takes pictures of any size.

    Raises:
        UserError: A camera has other channels, or another size.
    """
    found = {(renamed or {}).get(key, key): feature for key, feature in features.items()}
    resizes = config.type == "act" or any(getattr(config, field, None) for field in _RESIZES)
    for key, wanted in config.image_features.items():
        if key not in found or found[key]["dtype"] not in ("image", "video"):
            continue
        channels, *size = image_shape(found[key])
        if channels != wanted.shape[0]:
            raise UserError(
                f"{name}: pictures of {key} have {channels} channel{'s' * (channels != 1)}, the policy takes "
                f"{wanted.shape[0]}: convert the data set"
            )
        if not resizes and tuple(size) != tuple(wanted.shape[1:]):
            raise UserError(
                f"{name}: pictures of {key} are {size[0]}×{size[1]} (height × width), the policy takes "
                f"{wanted.shape[1]}×{wanted.shape[2]} and does not resize: convert the data set"
            )


def _named(feature: dict[str, Any]) -> str:
    names = feature.get("names")
    if isinstance(names, dict):  # as in older data sets: {"motors": [...]}
        names = next(iter(names.values()), None)
    if not isinstance(names, (list, tuple)) or not names:
        return ""
    more = ", …" if len(names) > 10 else ""
    return f" ({', '.join(map(str, names[:10]))}{more})"
