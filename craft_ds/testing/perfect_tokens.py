"""The actions that a sample's own supervised tokens stand for, by a saved policy."""

from collections.abc import Sequence
from pathlib import Path

import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.constants import ACTION, ACTION_TOKEN_MASK, ACTION_TOKENS
from torch import Tensor
from torch.utils.data import default_collate

from craft_ds.data.policy_input import images_to_float
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors


def decode_perfect_tokens(
    policy_dir: Path, data_root: Path, rows: Sequence[int] = (0, 9), repo_id: str = "craft-ds/test"
) -> tuple[Tensor, Tensor]:
    """Encode samples by a policy's preprocessor, and decode their action tokens by the same policy.

    Args:
        policy_dir: A pi0_fast.
        data_root: A data set.
        rows: Samples.
        repo_id: Name of the data set.

    Returns:
        The decoded actions and the recorded ones, (samples, chunk, width) each.
    """
    config = load_policy_config(policy_dir)
    preprocessor, postprocessor = load_processors(config, policy_dir)
    dataset = LeRobotDataset(repo_id, root=data_root, video_backend="pyav")
    fps, width = dataset.meta.fps, dataset.meta.features[ACTION]["shape"][0]
    chunk = {ACTION: [step / fps for step in range(config.chunk_size)]}
    dataset = LeRobotDataset(repo_id, root=data_root, delta_timestamps=chunk, video_backend="pyav")
    raw = default_collate([dataset[row] for row in rows])
    batch = preprocessor(images_to_float(dict(raw)))
    tokens = torch.where(batch[ACTION_TOKEN_MASK], batch[ACTION_TOKENS], 0)[:, 1:]  # without the first <bos>
    policy = load_policy(config, policy_dir)
    return postprocessor(policy.detokenize_actions(tokens, config.n_action_steps, width)), raw[ACTION]
