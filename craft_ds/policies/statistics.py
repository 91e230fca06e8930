"""Statistics of a policy's normalisers: which are needed, and whether they are there."""

from collections.abc import Iterator, Mapping
from typing import Any

from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature, PreTrainedConfig
from lerobot.processor import (
    NormalizerProcessorStep,
    PolicyProcessorPipeline,
    UnnormalizerProcessorStep,
)
from lerobot.utils.constants import ACTION, OBS_STATE

from craft_ds.errors import UserError

NEEDED = {
    NormalizationMode.MEAN_STD: ("mean", "std"),
    NormalizationMode.MIN_MAX: ("min", "max"),
    NormalizationMode.QUANTILES: ("q01", "q99"),
    NormalizationMode.QUANTILE10: ("q10", "q90"),
}
"""Statistics that each mode of normalisation reads."""

_ADVICE = "train with --normalization=dataset, or write a policy with statistics by `craft-ds statistics`"


def check_statistics(
    path: object,
    config: PreTrainedConfig,
    preprocessor: PolicyProcessorPipeline,
    postprocessor: PolicyProcessorPipeline,
) -> None:
    """Check that a policy's processors have the statistics of everything that they normalise.

    LeRobot's normaliser returns values unchanged where it has none, as in base policies on the hub.

    Args:
        path: The policy, for the error message.
        config: Its configuration.
        preprocessor: The policy's preprocessor.
        postprocessor: The policy's postprocessor.

    Raises:
        UserError: Statistics are missing or have another width than the feature.
    """
    for step in (*preprocessor.steps, *postprocessor.steps):
        if not isinstance(step, (NormalizerProcessorStep, UnnormalizerProcessorStep)):
            continue
        found = step.state_dict()
        for name, feature, mode in _normalised(step):
            missing = [entry for entry in NEEDED[mode] if f"{name}.{entry}" not in found]
            if missing:
                raise UserError(
                    f"policy {path} has no statistics ({', '.join(missing)}) of {name}, which it normalises "
                    f"by {mode.value}: {_ADVICE}"
                )
            width, wanted = found[f"{name}.{NEEDED[mode][0]}"].numel(), feature.shape[0]
            if feature.type is not FeatureType.VISUAL and not _fits(config, name, width, wanted):
                raise UserError(
                    f"policy {path} has statistics of {width} entries for {name}, which has {wanted}: "
                    f"{_ADVICE}"
                )


def _fits(config: PreTrainedConfig, name: str, width: int, wanted: int) -> bool:
    """Return True if statistics of one width fit a feature of another: some features are wider by padding."""
    limit = getattr(config, "max_action_dim" if name == ACTION else "max_state_dim", None)
    decoded = name == ACTION and hasattr(config, "action_tokenizer_name")
    return width in (1, wanted) or (wanted == limit and width < wanted and not decoded)


def _normalised(
    step: NormalizerProcessorStep | UnnormalizerProcessorStep,
) -> Iterator[tuple[str, PolicyFeature, NormalizationMode]]:
    features = step.features
    if isinstance(step, UnnormalizerProcessorStep):  # it is given actions alone
        features = {name: feature for name, feature in features.items() if name == ACTION}
    for name, feature in features.items():
        mode = step.norm_map.get(feature.type, NormalizationMode.IDENTITY)
        if mode is not NormalizationMode.IDENTITY and ".empty_camera_" not in name:
            yield name, feature, mode


def check_needed(config: PreTrainedConfig, statistics: Mapping[str, Mapping[str, Any]], source: str) -> None:
    """Check that a data set's statistics are those that a policy's modes of normalisation read.

    Args:
        config: The policy's configuration.
        statistics: Statistics by feature and name.
        source: The data set, for the error message.

    Raises:
        UserError: A statistic is missing.
    """
    for name, feature in {**(config.input_features or {}), **(config.output_features or {})}.items():
        mode = config.normalization_mapping.get(feature.type.value, NormalizationMode.IDENTITY)
        if mode is NormalizationMode.IDENTITY or name not in statistics:
            continue
        missing = [entry for entry in NEEDED[mode] if entry not in statistics[name]]
        if missing:
            raise UserError(
                f"{source} has no statistics {', '.join(missing)} of {name}, which {mode.value} needs: add "
                "them by `python -m lerobot.scripts.augment_dataset_quantile_stats`, or set "
                "--policy.normalization_mapping"
            )


def adopt_widths(config: PreTrainedConfig, features: Mapping[str, PolicyFeature]) -> None:
    """Give a configuration the widths of a data set's state and action, as LeRobot does for actions.

    Policies that pad vectors (`max_action_dim`, `max_state_dim`) take any width up to that; in others the
    weights determine it, and nothing is changed.

    Args:
        config: The policy's configuration; changed.
        features: Features of the data set, by the policy's names.
    """
    for name, own, limit in (
        (ACTION, config.output_features, "max_action_dim"),
        (OBS_STATE, config.input_features, "max_state_dim"),
    ):
        if own and name in own and name in features and hasattr(config, limit):
            own[name] = PolicyFeature(type=own[name].type, shape=tuple(features[name].shape))
