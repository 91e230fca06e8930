"""Open the data of a run, and check that data, processors and anchors fit, before a policy is built."""

from pathlib import Path
from typing import NamedTuple

from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.feature_utils import dataset_to_policy_features

from craft_ds.config.train_config import TrainConfig
from craft_ds.data.checked_samples import NamedSamples
from craft_ds.data.fingerprint import dataset_fingerprint
from craft_ds.data.lerobot_dataset import check_features
from craft_ds.data.task_data import check_samples, load_datasets
from craft_ds.distributed.collectives import fail_together, rank0_first, rank0_only
from craft_ds.policies.changes import PolicyChanges, policy_changes
from craft_ds.policies.loading import load_policy_config, load_processors
from craft_ds.policies.statistics import adopt_widths, check_needed, check_statistics
from craft_ds.training.data_check import check_data
from craft_ds.training.preflight import PreflightResult


class OpenedData(NamedTuple):
    """The data of a run.

    Attributes:
        train: Data set of the new task.
        heldout: Its held-out episodes; None: there are none.
        samples: Samples of `train`, checked as they are read.
        heldout_samples: Those of `heldout`.
        fingerprint: Hashes of the data set's files.
        changes: What the flags change in the policy and its processors.
        messages: Lines for the log.
    """

    train: LeRobotDataset
    heldout: LeRobotDataset | None
    samples: NamedSamples
    heldout_samples: NamedSamples | None
    fingerprint: dict[str, str]
    changes: PolicyChanges
    messages: list[str]


def open_data(config: TrainConfig, inputs: PreflightResult, world_size: int) -> OpenedData:
    """Open and check the data of a run. Collective: call on all ranks.

    With `--normalization=dataset`, the policy's configuration adopts the widths of the data.

    Raises:
        UserError: On all ranks: data, processors or anchors do not fit together, or a sample is bad.
    """
    train, heldout = rank0_first(load_datasets)(config, world_size)
    changes = fail_together(_policy_changes)(config, inputs.policy_dir, train.meta)
    processors = load_run_processors(config, inputs.policy_dir, changes)
    fail_together(check_features)(
        train.meta,
        config.policy,
        processors[0],
        config.allow_missing_cameras,
        f"--dataset.repo_id={config.dataset.repo_id}",
    )
    if inputs.cache is not None:
        fail_together(inputs.cache.check_preprocessor)(processors[0], inputs.policy_dir)
    samples, heldout_samples, messages = fail_together(check_samples)(config, train, heldout)
    report = rank0_only(check_data)(config, train, processors, inputs.cache)
    fingerprint = rank0_only(dataset_fingerprint)(*(part for part in (train, heldout) if part is not None))
    return OpenedData(train, heldout, samples, heldout_samples, fingerprint, changes, [*messages, *report])


def _policy_changes(config: TrainConfig, policy_dir: Path, dataset: LeRobotDatasetMetadata) -> PolicyChanges:
    """Determine what flags change in the policy; with `--normalization=dataset`, adopt the data's widths."""
    assert config.policy is not None
    source, statistics = load_policy_config(policy_dir), None
    if config.normalization == "dataset" and not config.resume:
        renamed = {config.rename_map.get(name, name): name for name in dataset.features}
        features = dataset_to_policy_features(dataset.features)
        adopt_widths(config.policy, {name: features[key] for name, key in renamed.items() if key in features})
        statistics = {name: dataset.stats[key] for name, key in renamed.items() if key in dataset.stats}
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
