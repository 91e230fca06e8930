"""The policy that training started from, θ_0 of a penalty, which a resumed run reads again.

A checkpoint names it instead of containing another copy of all weights: each rank reads its own part, so
that θ_0 is exact in every engine and on any number of ranks.
"""

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from craft_ds.config.train_config import TrainConfig
from craft_ds.errors import UserError
from craft_ds.lora.adapters import ADAPTER_WEIGHTS, AdapterPlan, Adapters, has_adapters
from craft_ds.lora.weights import AdaptedWeights, open_weights
from craft_ds.policies.loading import resolve_policy_path
from craft_ds.policies.weights import WeightReader, weights_sha256


@dataclass(frozen=True)
class StartPolicy:
    """Identity of the policy that training started from.

    Attributes:
        path: Its directory, absolute and without symbolic links, or its hub id; empty: its adapters were new.
        revision: Revision of a hub policy.
        sha256: SHA-256 of its weights, or of its adapters; empty if these were new, since their base policy
            is checked with the checkpoint's adapters.
        seed: Seed from which new adapters were drawn.
    """

    path: str
    revision: str
    sha256: str
    seed: int

    @classmethod
    def of_new_run(cls, config: TrainConfig, directory: Path) -> Self:
        """Return the identity of a policy; reads all of its weights.

        Args:
            config: The configuration of the run.
            directory: The policy's directory.

        Raises:
            UserError: Its weights are stored in one file per rank.
        """
        assert config.policy is not None
        seed = config.seed or 0
        if config.lora.enabled and not has_adapters(directory):
            return cls("", "", "", seed)
        given = str(config.policy.pretrained_path)
        path = str(Path(given).resolve()) if Path(given).is_dir() else given
        return cls(path, config.policy.pretrained_revision or "", _sha256(directory), seed)

    def verify(self, config: TrainConfig) -> None:
        """Check that the policy is still there and unchanged; reads all of its weights.

        Raises:
            UserError: It is missing or has changed.
        """
        if not self.path:
            return
        remedy = "restore it, or start a new run with --policy.path instead of --resume"
        needed = f"--penalty.name={config.penalty.name} needs the policy that the run started from"
        try:
            found = _sha256(self._directory())
        except UserError as error:
            raise UserError(f"{needed}: {error}; {remedy}") from error
        if found != self.sha256:
            raise UserError(
                f"{needed}: the weights of {self.path} have changed (SHA-256 {found[:12]}…, not "
                f"{self.sha256[:12]}…); {remedy}"
            )

    def open(
        self, policy: nn.Module, plan: AdapterPlan | None, adapters: Adapters | None
    ) -> WeightReader | AdaptedWeights:
        """Open the policy's weights.

        Args:
            policy: The policy without values; not changed.
            plan: The plan of the adapters in the policy; None for full training.
            adapters: From `add_adapters`; None for full training.

        Raises:
            UserError: They do not fit the policy.
        """
        directory = self._directory() if self.path or plan is None else plan.base
        if plan is not None:
            plan = replace(plan, stored=directory if has_adapters(directory) else None)
        return open_weights(policy, directory, plan, adapters, self.seed)

    def _directory(self) -> Path:
        return resolve_policy_path(self.path, self.revision or None)

    def state_dict(self) -> dict[str, Any]:
        """Return plain Python values."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Any) -> Self:
        """Return the policy that `state_dict` described.

        Raises:
            TypeError: The state has other entries.
            ValueError: An entry has another type.
        """
        start = cls(**state)
        if [type(value) for value in asdict(start).values()] != [str, str, str, int]:
            raise ValueError(f"start={state!r}")
        return start


def resolve_start(config: TrainConfig, saved: StartPolicy | None, directory: Path) -> StartPolicy:
    """Return the policy that the run starts or has started from, which is there and unchanged.

    Args:
        config: The configuration of the run, with a penalty.
        saved: From the checkpoint of a resumed run.
        directory: The policy's directory in a new run.

    Raises:
        UserError: It is missing or has changed, or the resumed run had no penalty when it started.
    """
    if not config.resume:
        return StartPolicy.of_new_run(config, directory)
    if saved is None:
        raise UserError(
            f"--penalty.name={config.penalty.name}, but the run of {config.checkpoint_path} started without "
            "a penalty: omit the flag, or start a new run with --policy.path instead of --resume"
        )
    saved.verify(config)
    return saved


def _sha256(directory: Path) -> str:
    if not has_adapters(directory):
        return weights_sha256(directory)
    path = directory / ADAPTER_WEIGHTS
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}): a penalty needs adapters in one file") from error
