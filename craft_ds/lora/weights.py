"""Values of a policy with adapters, read by range: the base from its files, adapters stored or new."""

import dataclasses
import math
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from craft_ds.errors import UserError
from craft_ds.lora.adapters import (
    ADAPTER_WEIGHTS,
    AdapterPlan,
    Adapters,
    add_adapters,
    base_name,
    has_adapters,
    plan_stored_adapters,
)
from craft_ds.policies.loading import build_policy, fill_policy_, resolve_policy_path
from craft_ds.policies.weights import WeightReader, finite, weights_sha256
from craft_ds.tensor_io.per_rank_file import PerRankFile, open_tensors
from craft_ds.tensor_io.tensor_file import TensorFile

BASE_SHA256 = "base_weights_sha256"
_ROWS = 1 << 22


class AdaptedWeights:
    """Ranges of all tensors of a policy with adapters.

    New adapters have PEFT's initial distribution, drawn from a generator per tensor, so that the values do
    not depend on the world size. Entries of A are uniform in ±1/√(columns of A), or Gaussian; B is zero;
    DoRA's magnitudes are the norms of the rows of the base weight.

    Args:
        policy: A policy with adapters, without values; not changed.
        plan: The plan of these adapters, with the folder of the base policy.
        adapters: From `add_adapters`. Stored adapters must have been trained on the base weights of its
            `base_sha256`.
        seed: Seed of new adapters.

    Raises:
        UserError: The weights of the base do not fit the policy, or the stored adapters are damaged, have
            other shapes or were trained on another base.
    """

    def __init__(self, policy: nn.Module, plan: AdapterPlan, adapters: Adapters, seed: int):
        self._files = ExitStack()
        self._base = self._files.enter_context(WeightReader(plan.base, policy, base_name))
        try:
            self._adapters, self._seed = adapters, seed
            self._shapes = {name: tuple(p.shape) for name, p in policy.named_parameters()}
            self._stored: TensorFile | PerRankFile | None = None
            self._directory = plan.stored or plan.base
            if plan.stored is not None:
                self._stored = self._open(plan.stored / ADAPTER_WEIGHTS, plan.base)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, 1-D."""
        key = self._adapters.keys.get(name)
        if key is not None and self._stored is not None:
            return finite(self._stored.read(key, start, stop), key, self._directory)
        stored_name = base_name(name)
        if stored_name is not None:  # frozen, or in a module that trains fully from the base's values
            return self._base.read(stored_name, start, stop)
        if ".lora_magnitude_vector." in name:
            return self._row_norms(name.split(".lora_magnitude_vector.")[0], start, stop)
        return self._initial(name).reshape(-1)[start:stop]

    def _open(self, path: Path, base: Path) -> TensorFile | PerRankFile:
        try:
            file = open_tensors(path)
            self._files.enter_context(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged ({error})") from error
        for name, _, dtype in file.specs():
            if not dtype.is_floating_point:
                raise UserError(f"{path} holds {name} as {dtype}, but adapters have floats")
        found = {name: shape for name, shape, _ in file.specs()}
        wanted = {key: self._shapes[name] for name, key in self._adapters.keys.items()}
        for problem, keys in (
            ("lacks", wanted.keys() - found.keys()),
            ("has unknown", found.keys() - wanted.keys()),
            ("has another shape for", {k for k in wanted.keys() & found.keys() if wanted[k] != found[k]}),
        ):
            if keys:
                raise UserError(f"{path} {problem} {len(keys)} tensors of the adapters, such as {min(keys)}")
        base_sha256 = self._adapters.base_sha256
        trained_on = file.metadata.get(BASE_SHA256, base_sha256)  # PEFT itself does not record it
        if trained_on != base_sha256:
            raise UserError(
                f"the adapters in {path.parent} were trained on another base policy than {base}: its weights "
                f"have SHA-256 {base_sha256[:12]}…, the adapters need {trained_on[:12]}…"
            )
        return file

    def _initial(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if ".lora_B." in name:
            return torch.zeros(shape)
        # A CPU generator uses 32 bits of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if self._adapters.config.init_lora_weights == "gaussian":
            return nn.init.normal_(torch.empty(shape), std=1 / shape[0], generator=generator)
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)

    def _row_norms(self, layer: str, start: int, stop: int) -> Tensor:
        """Return the norms of the base weight's rows [start, stop), reading some rows at a time."""
        _, width = self._shapes[f"{layer}.base_layer.weight"]
        step = max(1, _ROWS // width)
        norms = [
            self._base.read(f"{layer}.weight", row * width, min(row + step, stop) * width)
            .float()
            .view(-1, width)
            .norm(dim=1)
            for row in range(start, stop, step)
        ]
        return torch.cat(norms) if norms else torch.empty(0)


def open_weights(
    policy: nn.Module,
    directory: Path,
    plan: AdapterPlan | None = None,
    adapters: Adapters | None = None,
    seed: int = 0,
) -> WeightReader | AdaptedWeights:
    """Open the weights of a policy, with or without adapters.

    Args:
        policy: The policy without values; not changed.
        directory: Its folder. With adapters the plan names the folders instead.
        plan: The plan of the adapters in the policy; None if it has none.
        adapters: What `add_adapters` returned; None if the policy has none. The SHA-256 of the base weights
            is computed where it is empty.
        seed: Seed of new adapters.

    Raises:
        UserError: As `WeightReader` or `AdaptedWeights`.
    """
    if plan is None or adapters is None:
        return WeightReader(directory, policy)
    if not adapters.base_sha256:
        adapters = dataclasses.replace(adapters, base_sha256=weights_sha256(plan.base))
    return AdaptedWeights(policy, plan, adapters, seed)


def load_trained_policy(
    config: PreTrainedConfig, path: str | Path, device: str = "cpu", base_path: str = ""
) -> PreTrainedPolicy:
    """Load a policy as `craft_ds.policies.loading.load_policy` does, from directories with adapters too.

    Args:
        config: From `load_policy_config`; not changed.
        path: A policy directory or a hub id.
        device: Device of the policy.
        base_path: Current folder or hub id of the adapters' base policy, if it was moved.

    Returns:
        The policy in evaluation mode; adapters are beside the layers, not merged into them.

    Raises:
        UserError: As `load_policy`; the adapters are damaged, or their base policy is missing or not the one
            they were trained on.
    """
    directory = resolve_policy_path(path)
    plan = plan_stored_adapters(directory, base_path) if has_adapters(directory) else None
    policy = build_policy(config, plan.base if plan else directory)
    adapters = add_adapters(policy, plan.config) if plan else None
    with open_weights(policy, directory, plan, adapters) as weights:
        fill_policy_(policy, weights.read, device)
    return policy.eval()
