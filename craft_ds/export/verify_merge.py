"""Whether a merged policy does what its adapters do on their base: logits and greedy action tokens compared.

Both compute in fp32, one after the other, so that one model is in memory at a time and only the rounding of
the merged weights shows.
"""

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pi0_fast.configuration_pi0_fast import PI0FastConfig
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from torch import Tensor

from craft_ds.errors import UserError
from craft_ds.export.comparison_samples import draw_samples
from craft_ds.lora.weights import load_trained_policy
from craft_ds.policies.loading import load_policy_config
from craft_ds.policies.pi0_fast.generation import greedy_action_tokens
from craft_ds.policies.pi0_fast.loss import supervised_logits
from craft_ds.policies.token_loss import Batch

# Share of action tokens that may differ, by the dtype of the merged file. One token that changes changes
# those after it: a sample of 32 that begins otherwise is 3 %. Adapters of rank 8 on the shipped teachers gave
# 0, 4.6 % and 0.3 % at most on any 32 frames or anchors; adapters scaled by 0.9, 24 % of Meta-World's frames.
MAX_TOKEN_DIFFERENCE = {"float32": 0.0, "bfloat16": 0.1, "float16": 0.05}
# Tokens may hide a wrong merge: a policy that kept its old tasks says on their anchors what its base says.
# So logits may not differ by more than this share of the largest one. Measured: 1e-6, 1.1e-2 and 6e-4 at
# most; with adapters scaled by 0.9 6e-2, by 0.5 0.37 at least on frames.
MAX_LOGIT_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}


class Outputs(NamedTuple):
    """What a policy makes of samples.

    Attributes:
        logits: (N, vocabulary), of the first batch's supervised action tokens.
        tokens: (samples, steps), greedy; zeros after the end of action.
    """

    logits: Tensor
    tokens: Tensor


class Comparison(NamedTuple):
    """How two policies differ.

    Attributes:
        logit_difference: The largest absolute difference of any logit.
        largest_logit: The largest absolute logit.
        tokens: Positions of actions, each up to the end of the longer of the two.
        different_tokens: How many of them hold another token.
        samples: Actions.
        different_samples: How many of them have any such position.
    """

    logit_difference: float
    largest_logit: float
    tokens: int
    different_tokens: int
    samples: int
    different_samples: int

    @property
    def token_difference(self) -> float:
        """Share of tokens that differ."""
        return self.different_tokens / max(self.tokens, 1)

    def describe(self) -> str:
        """A line for the log."""
        return (
            f"largest logit difference {self.logit_difference:.3g} (largest logit {self.largest_logit:.3g}), "
            f"{self.different_tokens} of {self.tokens} action tokens differ ({self.token_difference:.2%}), "
            f"in {self.different_samples} of {self.samples} samples"
        )


def check_comparable(config: PreTrainedConfig) -> None:
    """Check that a policy has action tokens.

    Raises:
        UserError: It has none.
    """
    if not isinstance(config, PI0FastConfig):
        raise UserError(
            f"--merge_lora compares action tokens, and a policy of type {config.type} has none: leave it "
            "out, and merge the exported adapters by PEFT's merge_and_unload"
        )


def verify_merge(
    checkpoint: Path,
    merged: Path,
    *,
    dtype: str,
    max_token_difference: float | None = None,
    base_path: str = "",
    device: str = "cpu",
) -> str:
    """Compare a merged policy with the adapters that it was made of.

    Args:
        checkpoint: Holds the adapters.
        merged: The merged policy's directory.
        dtype: Of its weights.
        max_token_difference: Share of action tokens that may differ; None: `MAX_TOKEN_DIFFERENCE` of the
            dtype.
        base_path: Where the base policy of the adapters lies now, if it was moved.
        device: Where both compute.

    Returns:
        What was compared and how much it differs, for the log.

    Raises:
        UserError: More differs than may.
    """
    config = load_policy_config(checkpoint)
    samples = draw_samples(checkpoint, config)

    def outputs(path: Path) -> Outputs:
        config = in_fp32(load_policy_config(path))
        return policy_outputs(load_trained_policy(config, path, device, base_path), samples.batches)

    comparison = compare(outputs(checkpoint), outputs(merged))
    bound = MAX_TOKEN_DIFFERENCE[dtype] if max_token_difference is None else max_token_difference
    _refuse_difference(comparison, dtype, bound)
    return f"merged, and compared with the adapters on {samples.origin}: {comparison.describe()}"


def in_fp32(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of the same policy with fp32 parameters."""
    config = copy.copy(config)
    config.dtype = "float32"
    return config


@torch.no_grad()
def policy_outputs(policy: PI0FastPolicy, batches: list[Batch]) -> Outputs:
    """Logits of the first batch and greedy action tokens of all, on the CPU."""
    policy.eval()
    logits, _ = supervised_logits(policy, batches[0])
    tokens = [greedy_action_tokens(policy, batch).cpu() for batch in batches]
    return Outputs(logits.cpu(), torch.cat(tokens))


def compare(expected: Outputs, found: Outputs) -> Comparison:
    """How the outputs of two policies for the same samples differ.

    Raises:
        UserError: A logit is not finite.
    """
    for outputs, what in ((expected, "policy with adapters"), (found, "merged policy")):
        if not outputs.logits.isfinite().all():
            raise UserError(
                f"logits of the {what} are not finite: export an earlier checkpoint, or in another --dtype"
            )
    spoken = (expected.tokens != 0) | (found.tokens != 0)
    until_end = spoken.int().flip(1).cummax(dim=1).values.flip(1).bool()
    differs = (expected.tokens != found.tokens) & until_end
    return Comparison(
        logit_difference=float((expected.logits - found.logits).abs().max()),
        largest_logit=float(expected.logits.abs().max()),
        tokens=int(until_end.sum()),
        different_tokens=int(differs.sum()),
        samples=len(differs),
        different_samples=int(differs.any(dim=1).sum()),
    )


def _refuse_difference(comparison: Comparison, dtype: str, bound: float) -> None:
    what = f"the merged policy in {dtype} is not the one that was trained: {comparison.describe()}"
    mend = "export again" if dtype == "float32" else "export with --dtype float32"
    limit = MAX_LOGIT_DIFFERENCE[dtype]
    if comparison.logit_difference > limit * comparison.largest_logit:
        raise UserError(f"{what}; rounding explains {limit:g} of the largest logit at most: {mend}")
    if comparison.token_difference > bound:
        raise UserError(f"{what}; --max_token_difference is {bound:g}: {mend}, or raise it")
