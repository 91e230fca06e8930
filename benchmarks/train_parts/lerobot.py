"""One pass of LeRobot's loss and of ours at gemma_2b's widths with few layers: forward and backward.

The optimizer is left out: both use torch's fused AdamW, and moments of 1.2 billion parameters do not fit
beside the pass on a small machine.
"""

import time
from typing import Any

import torch
from gpu_parts.speed import CAMERAS, FULL, camera_features, config, cut_layers, random_batch, random_values
from harness import as_in_lerobot_, default_device
from lerobot.configs import FeatureType

from craft_ds.memory_planner.shapes import meta_policy_without_tokenizers
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.token_loss import token_loss
from craft_ds.policies.weights import unique_tensors


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Return the least seconds of a pass for each number of cameras."""
    torch.set_num_threads(case["threads"])
    policy = meta_policy_without_tokenizers(config(False, 3, torch.float32)).train()
    cut_layers(policy, case["layers"])
    if case["system"] == "lerobot":
        as_in_lerobot_(policy)
    materialize_(policy, default_device())
    with torch.no_grad():
        for name, tensor in unique_tensors(policy).items():
            tensor.copy_(random_values(name, 0, tensor.numel()).view_as(tensor))
    others = {
        key: value
        for key, value in policy.config.input_features.items()
        if value.type is not FeatureType.VISUAL
    }
    found = {}
    for name, (cameras, present) in CAMERAS.items():
        policy.config.input_features = camera_features(cameras, FULL.side) | others
        batch = {key: values[: case["batch_size"]] for key, values in random_batch(False, present, 1).items()}
        times = []
        for _ in range(case["repeats"]):
            policy.zero_grad()
            started = time.perf_counter()
            loss = (
                policy.forward(batch)[0] if case["system"] == "lerobot" else token_loss(policy, batch).total
            )
            loss.backward()
            times.append(time.perf_counter() - started)
        found[name] = min(times)
    return found
