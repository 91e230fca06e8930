"""The values of a policy with adapters, read by range: the base from its files, adapters stored or new."""

import math
import zlib
from contextlib import ExitStack
from dataclasses import replace
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
    plan_stored,
)
from craft_ds.policies.loading import build_policy, fill_policy_, resolve_policy_path
from craft_ds.policies.weights import WeightReader, weights_sha256
from craft_ds.tensor_io.per_rank_file import PerRankFile, open_tensors
from craft_ds.tensor_io.tensor_file import TensorFile

BASE_SHA256 = "base_weights_sha256"
_ROWS = 1 << 22


class AdaptedWeights:
    """Puts adapters into a policy without weights and reads ranges of all its tensors afterwards.

    New adapters begin as PEFT's do, drawn from generators of their own: the same values at any world size.
    A's entries are uniform in ±1/√(its columns), or Gaussian; B is zero; DoRA's magnitudes are the norms of
    the base's rows.

    Args:
        policy: A policy without adapters and weights; gets them here.
        plan: The adapters, and the base policy's folder.
        base_sha256: From `weights_sha256` of the base: stored adapters must have been trained on it.
        seed: Of new adapters.

    Attributes:
        adapters: What is in the policy now.

    Raises:
        UserError: The base's weights do not fit the policy, a target does not, or the stored adapters are
            damaged, of another shape or of another base.
    """

    def __init__(self, policy: nn.Module, plan: AdapterPlan, base_sha256: str, seed: int):
        self._files = ExitStack()
        # Before the adapters rename the base's parameters.
        self._base = self._files.enter_context(WeightReader(plan.base, policy))
        try:
            self.adapters: Adapters = replace(add_adapters(policy, plan.config), base_sha256=base_sha256)
            self._shapes = {name: tuple(p.shape) for name, p in policy.named_parameters()}
            self._seed = seed
            self._stored: TensorFile | PerRankFile | None = None
            if plan.stored is not None:
                self._stored = self._open(plan.stored / ADAPTER_WEIGHTS, base_sha256, plan.base)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor, 1-D."""
        key = self.adapters.keys.get(name)
        if key is None:
            return self._base.read(base_name(name), start, stop)
        if self._stored is not None:
            return self._stored.read(key, start, stop)
        if "lora_" not in name:  # a module that trains fully begins as the base's
            return self._base.read(name, start, stop)
        if ".lora_magnitude_vector." in name:
            return self._row_norms(name.split(".lora_magnitude_vector.")[0], start, stop)
        return self._initial(name).reshape(-1)[start:stop]

    def _open(self, path: Path, base_sha256: str, base: Path) -> TensorFile | PerRankFile:
        try:
            file = open_tensors(path)
            self._files.enter_context(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged ({error})") from error
        found = {name: shape for name, shape, _ in file.specs()}
        wanted = {key: self._shapes[name] for name, key in self.adapters.keys.items()}
        for problem, keys in (
            ("lacks", wanted.keys() - found.keys()),
            ("has unknown", found.keys() - wanted.keys()),
            ("has another shape for", {k for k in wanted.keys() & found.keys() if wanted[k] != found[k]}),
        ):
            if keys:
                raise UserError(f"{path} {problem} {len(keys)} tensors of the adapters, such as {min(keys)}")
        trained_on = file.metadata.get(BASE_SHA256, base_sha256)  # adapters made elsewhere say nothing
        if trained_on != base_sha256:
            raise UserError(
                f"the adapters in {path.parent} were trained on another base policy than {base}: its weights "
                f"have SHA-256 {base_sha256[:12]}…, those trained on {trained_on[:12]}…"
            )
        return file

    def _initial(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if ".lora_B." in name:
            return torch.zeros(shape)
        # A generator on the CPU takes 32 bits of its seed.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self._seed} {name}".encode()))
        if self.adapters.config.init_lora_weights == "gaussian":
            return nn.init.normal_(torch.empty(shape), std=1 / shape[0], generator=generator)
        return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)

    def _row_norms(self, layer: str, start: int, stop: int) -> Tensor:
        """Norms of the base weight's rows [start, stop), some rows at a time."""
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
    policy: nn.Module, directory: Path, plan: AdapterPlan | None, base_sha256: str = "", seed: int = 0
) -> WeightReader | AdaptedWeights:
    """The weights of a policy; where adapters are planned, they are put into it first.

    Args:
        policy: The policy without weights.
        directory: Its folder; with adapters the plan says where the weights lie.
        plan: The adapters; None: none.
        base_sha256: As for `AdaptedWeights`.
        seed: Of new adapters.
    """
    if plan is None:
        return WeightReader(directory, policy)
    return AdaptedWeights(policy, plan, base_sha256 or weights_sha256(plan.base), seed)


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
