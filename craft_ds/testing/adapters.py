"""Adapters with an effect, for tests: newly initialised ones have B = 0 and change nothing."""

import dataclasses
from pathlib import Path

import torch

from craft_ds.config.configs import LoraConfig
from craft_ds.lora.adapters import ADAPTER_WEIGHTS, AdapterPlan, add_adapters, plan_adapters
from craft_ds.lora.peft_config import write_adapter_config
from craft_ds.lora.weights import BASE_SHA256, AdaptedWeights
from craft_ds.policies.directory import copy_policy_files
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.policies.weights import weights_sha256
from craft_ds.tensor_io.tensor_file import TensorFile, TensorSpec, create_tensor_file


def make_test_adapters(base: Path, path: Path, lora: LoraConfig | None = None, seed: int = 0) -> Path:
    """Write a policy directory with random adapters, far from their initial values.

    Args:
        base: The base policy's directory.
        path: The directory to write.
        lora: Which adapters; None: the default ones of rank 4.
        seed: Seeds the values.

    Returns:
        The directory.
    """
    lora = lora or LoraConfig(enabled=True, rank=4)
    policy_config = load_policy_config(base)
    policy_config.pretrained_path = base
    plan = plan_adapters(lora, policy_config, base)
    assert isinstance(plan, AdapterPlan)
    policy, base_sha256 = build_policy(policy_config, base), weights_sha256(base)
    adapters = add_adapters(policy, plan.config, base_sha256)
    with AdaptedWeights(policy, plan, adapters, seed) as weights:
        copy_policy_files(base, path, path)
        write_adapter_config(path, dataclasses.replace(plan.config))
        shapes = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
        keys = adapters.keys
        specs = [TensorSpec(key, shapes[name], torch.float32) for name, key in keys.items()]
        create_tensor_file(path / ADAPTER_WEIGHTS, specs, {"format": "pt", BASE_SHA256: base_sha256})
        generator = torch.Generator().manual_seed(seed)
        with TensorFile(path / ADAPTER_WEIGHTS, writable=True) as file:
            for name, key in keys.items():
                count = torch.Size(shapes[name]).numel()
                begin = weights.read(name, 0, count).float()
                file.write(key, 0, begin + 0.05 * torch.randn(count, generator=generator))
    return path
