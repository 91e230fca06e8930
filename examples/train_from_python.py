"""Fine-tune a policy under a retention constraint, from Python.

    python examples/train_from_python.py POLICY DATASET ANCHOR_CACHE OUTPUT_DIR

POLICY is a policy directory, DATASET the directory of a LeRobot data set of the new task, ANCHOR_CACHE the
output of `craft-ds anchors` for the old tasks.
"""

import sys

from lerobot.configs.default import DatasetConfig

from craft_ds import CraftConfig, TrainConfig, train_craft
from craft_ds.policies.loading import load_policy_config


def main(policy_dir: str, dataset_dir: str, anchor_cache: str, output_dir: str, steps: str = "10000") -> None:
    """Train, and print the directory of the final checkpoint."""
    policy = load_policy_config(policy_dir)
    policy.pretrained_path = policy_dir
    config = TrainConfig(
        dataset=DatasetConfig("me/new_task", root=dataset_dir),
        policy=policy,
        output_dir=output_dir,
        steps=int(steps),
        batch_size=4,
        num_workers=4,
    )
    final = train_craft(config, craft_config=CraftConfig(enabled=True, anchor_cache_dir=anchor_cache))
    print(f"trained: {final}")


# The data loader's workers import this file again: without this line each would start to train.
if __name__ == "__main__":
    main(*sys.argv[1:])
