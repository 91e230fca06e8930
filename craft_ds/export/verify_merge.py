"""Comparison of a merged policy with its adapters on their base, by logits and greedy action tokens.

Both compute in fp32, one after the other, so that one model is in memory at a time and only the rounding of
the merged weights makes a difference.
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

# Fraction of action tokens that may differ, by the dtype of the merged file. A changed token changes those
# after it: one of 32 samples with another first token is 3 %. Adapters of rank 8 on the shipped teachers gave
# at most 0, 4.6 % and 0.3 % on any 32 frames or anchors; adapters scaled by 0.9, 24 % on Meta-World's frames.
MAX_TOKEN_DIFFERENCE = {"float32": 0.0, "bfloat16": 0.1, "float16": 0.05}
# Tokens can hide a wrong merge: on anchors, a policy that kept its old tasks gives the tokens of its base.
# So logits may not differ by more than this fraction of the largest one. Measured: at most 1e-6, 1.1e-2 and
# 6e-4; with adapters scaled by 0.9 at least 6e-2 on frames, by 0.5 at least 0.37.
MAX_LOGIT_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.05, "float16": 0.01}


class Outputs(NamedTuple):
    """Outputs of a policy for some samples.

    Attributes:
        logits: (N, vocabulary), for the supervised action tokens of the first batch.
        tokens: (samples, steps), greedy; zeros after the end of the action.
    """

    logits: Tensor
    tokens: Tensor


class Comparison(NamedTuple):
    """Differences between the outputs of two policies.

    Attributes:
        logit_difference: The largest absolute difference of any logit.
        largest_logit: The largest absolute logit.
        tokens: Number of token positions, up to the end of the longer action of each sample.
        different_tokens: Number of positions with different tokens.
        samples: Number of samples.
        different_samples: Number of samples with different tokens.
    """

    logit_difference: float
    largest_logit: float
    tokens: int
    different_tokens: int
    samples: int
    different_samples: int

    @property
    def token_difference(self) -> float:
        """Fraction of tokens that differ."""
        return self.different_tokens / max(self.tokens, 1)

    def describe(self) -> str:
        """Return a line for the log."""
        return (
            f"largest logit difference {self.logit_difference:.3g} (largest logit {self.largest_logit:.3g}), "
            f"{self.different_tokens} of {self.tokens} action tokens differ ({self.token_difference:.2%}), "
            f"in {self.different_samples} of {self.samples} samples"
        )


def check_comparable(config: PreTrainedConfig) -> None:
    """Check that a policy has action tokens.

    Raises:
        UserError: The policy has none.
    """
    if not isinstance(config, PI0FastConfig):
        raise UserError(
            f"--merge_lora compares action tokens, but a policy of type {config.type} has none: export "
            "without it, and merge the exported adapters with PEFT's merge_and_unload"
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
    """Compare a merged policy with its adapters.

    Args:
        checkpoint: Holds the adapters.
        merged: The merged policy's directory.
        dtype: Dtype of its weights.
        max_token_difference: Fraction of action tokens that may differ; None: `MAX_TOKEN_DIFFERENCE` of the
            dtype.
        base_path: New path of the adapters' base policy, if it was moved.
        device: Device on which both compute.

    Returns:
        A description of the samples and the differences, for the log.

    Raises:
        UserError: The policies differ by more than the bounds.
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
    """Return the configuration of the same policy with fp32 parameters."""
    config = copy.copy(config)
    config.dtype = "float32"
    return config


@torch.no_grad()
def policy_outputs(policy: PI0FastPolicy, batches: list[Batch]) -> Outputs:
    """Return logits of the first batch and greedy action tokens of all batches, on the CPU."""
    policy.eval()
    logits, _ = supervised_logits(policy, batches[0])
    tokens = [greedy_action_tokens(policy, batch).cpu() for batch in batches]
    return Outputs(logits.cpu(), torch.cat(tokens))


def compare(expected: Outputs, found: Outputs) -> Comparison:
    """Compare the outputs of two policies for the same samples.

    Raises:
        UserError: A logit is non-finite.
    """
    for outputs, what in ((expected, "policy with adapters"), (found, "merged policy")):
        if not outputs.logits.isfinite().all():
            raise UserError(
                f"the {what} has non-finite logits: export an earlier checkpoint, or choose another --dtype"
            )
    generated = (expected.tokens != 0) | (found.tokens != 0)
    until_end = generated.int().flip(1).cummax(dim=1).values.flip(1).bool()
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
    what = f"the merged policy in {dtype} differs from the trained one: {comparison.describe()}"
    advice = "export again" if dtype == "float32" else "export with --dtype float32"
    limit = MAX_LOGIT_DIFFERENCE[dtype]
    if comparison.logit_difference > limit * comparison.largest_logit:
        raise UserError(f"{what}; rounding explains at most {limit:g} of the largest logit: {advice}")
    if comparison.token_difference > bound:
        raise UserError(f"{what}; --max_token_difference is {bound:g}: {advice}, or raise it")
