"""Loading a trained policy to act or to be measured: whole weights, or adapters on a base policy."""

from pathlib import Path

from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy

from craft_ds.lora.adapters import has_adapters, plan_stored
from craft_ds.lora.weights import open_weights
from craft_ds.policies.loading import build_policy, fill_policy_, resolve_policy_path


def load_trained_policy(
    config: PreTrainedConfig, path: str | Path, device: str = "cpu", base_path: str = ""
) -> PreTrainedPolicy:
    """As `craft_ds.policies.loading.load_policy`, for directories with adapters too.

    Args:
        config: From `load_policy_config`; not changed.
        path: A policy directory or a hub id.
        device: Where the policy goes.
        base_path: Where the base policy of adapters lies now, if it was moved.

    Returns:
        The policy in evaluation mode; adapters are beside the layers, not merged into them.

    Raises:
        UserError: As `load_policy`; the adapters are damaged, or their base policy is missing or another.
    """
    directory = resolve_policy_path(path)
    plan = plan_stored(directory, base_path) if has_adapters(directory) else None
    policy = build_policy(config, plan.base if plan else directory)
    with open_weights(policy, directory, plan) as weights:
        fill_policy_(policy, weights.read, device)
    return policy.eval()
