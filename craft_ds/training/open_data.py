"""Open the data of a run, and check that data, processors and anchors fit, before a policy is built."""

from pathlib import Path
from typing import NamedTuple

from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.feature_utils import dataset_to_policy_features

from craft_ds.config.train_config import TrainConfig
from craft_ds.data.checked_samples import NamedSamples, Samples, joined
from craft_ds.data.fingerprint import dataset_fingerprint
from craft_ds.data.lerobot_dataset import check_features
from craft_ds.data.mixture import check_same_features, dataset_configs
from craft_ds.data.policy_statistics import joint_statistics
from craft_ds.data.task_data import check_samples, load_datasets
from craft_ds.distributed.collectives import fail_together, rank0_first, rank0_only
from craft_ds.policies.changes import PolicyChanges, policy_changes
from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.policies.statistics import adopt_widths, check_needed, check_statistics
from craft_ds.training.data_check import check_data, compare_datasets
from craft_ds.training.preflight import PreflightResult


class DataPart(NamedTuple):
    """One data set of a run.

    Attributes:
        config: The run's configuration, with this data set alone.
        train: Its episodes that train.
        heldout: Its held-out episodes; None: there are none.
        samples: Samples of `train`, checked as they are read.
        heldout_samples: Those of `heldout`.
    """

    config: TrainConfig
    train: LeRobotDataset
    heldout: LeRobotDataset | None
    samples: NamedSamples
    heldout_samples: NamedSamples | None


class OpenedData(NamedTuple):
    """The data of a run.

    Attributes:
        parts: The data sets: one, or those of a mixture.
        preprocessor: From samples to the policy's input, on the CPU.
        fingerprint: Hashes of their files.
        changes: What the flags change in the policy and its processors.
        messages: Lines for the log.
    """

    parts: list[DataPart]
    preprocessor: PolicyProcessorPipeline
    fingerprint: dict[str, str]
    changes: PolicyChanges
    messages: list[str]

    @property
    def samples(self) -> Samples:
        """Samples that train, those of a mixture one data set after the other."""
        return joined([part.samples for part in self.parts])

    @property
    def heldout_samples(self) -> Samples | None:
        """Held-out samples; None: there are none."""
        found = [part.heldout_samples for part in self.parts if part.heldout_samples is not None]
        return joined(found) if found else None


def open_data(config: TrainConfig, inputs: PreflightResult, world_size: int) -> OpenedData:
    """Open and check the data of a run. Collective: call on all ranks.

    With `--normalization=dataset`, the policy's configuration adopts the widths of the data.

    Raises:
        UserError: On all ranks: data, processors or anchors do not fit together, or a sample is bad.
    """
    views = dataset_configs(config)
    loaded = [rank0_first(load_datasets)(view, world_size) for view in views]
    fail_together(check_same_features)([train for train, _ in loaded])
    changes = fail_together(_policy_changes)(config, inputs.policy_dir, [train for train, _ in loaded])
    processors = load_run_processors(config, inputs.policy_dir, changes)
    for view, (train, _) in zip(views, loaded, strict=True):
        fail_together(check_features)(
            train.meta,
            view.policy,
            processors[0],
            view.allow_missing_cameras,
            f"--dataset.repo_id={view.dataset.repo_id}",
        )
    if inputs.cache is not None:
        fail_together(inputs.cache.check_preprocessor)(processors[0], inputs.policy_dir)
    parts: list[DataPart] = []
    messages: list[str] = []
    reports: list[str] = []
    fingerprint: dict[str, str] = {}
    for view, (train, heldout) in zip(views, loaded, strict=True):
        samples, heldout_samples, warnings = fail_together(check_samples)(view, train, heldout)
        parts.append(DataPart(view, train, heldout, samples, heldout_samples))
        messages += warnings
        reports += rank0_only(check_data)(view, train, processors, inputs.cache)
        hashes = rank0_only(dataset_fingerprint)(*(one for one in (train, heldout) if one is not None))
        own = f"{view.dataset.repo_id}/" if config.datasets else ""
        fingerprint |= {own + name: value for name, value in hashes.items()}
    reports += rank0_only(compare_datasets)(config, [part.train for part in parts])
    return OpenedData(parts, processors[0], fingerprint, changes, [*messages, *reports])


def _policy_changes(config: TrainConfig, policy_dir: Path, datasets: list[LeRobotDataset]) -> PolicyChanges:
    """Determine what flags change in the policy; with `--normalization=dataset`, adopt the data's widths."""
    assert config.policy is not None
    source, statistics = load_policy_config(policy_dir), None
    if config.normalization == "dataset" and not config.resume:
        meta = datasets[0].meta
        renamed = {config.rename_map.get(name, name): name for name in meta.features}
        features = dataset_to_policy_features(meta.features)
        adopt_widths(config.policy, {name: features[key] for name, key in renamed.items() if key in features})
        if len(datasets) > 1:
            statistics = joint_statistics(datasets, config.rename_map)
        else:
            statistics = {name: meta.stats[key] for name, key in renamed.items() if key in meta.stats}
        check_needed(config.policy, statistics, f"--dataset.repo_id={config.dataset.repo_id}")
    return policy_changes(config.policy, source, rename_map=config.rename_map, statistics=statistics)


@fail_together
def load_run_processors(
    config: TrainConfig, policy_dir: Path, changes: PolicyChanges, device: str = "cpu"
) -> tuple[PolicyProcessorPipeline, PolicyProcessorPipeline]:
    """Load the policy's processors with the run's changes, and check that they have all statistics.

    Collective: call on all ranks.

    Args:
        config: A validated configuration.
        policy_dir: The directory that the run starts from.
        changes: What the flags change in it.
        device: Device on which the preprocessor puts the batch.

    Raises:
        UserError: A processor cannot be loaded, or lacks statistics.
    """
    assert config.policy is not None
    processors = load_processors(config.policy, policy_dir, device, changes)
    check_statistics(config.policy.pretrained_path, config.policy, *processors)
    return processors
