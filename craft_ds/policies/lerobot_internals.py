"""LeRobot's private names, all in one place, checked when a policy is built.

LeRobot may rename them in any release. No other module of the package uses a LeRobot attribute that begins
with an underscore (the tiny pi0_fast sets one, since it replaces the constructor that does).
"""

import copy
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy, PI0FastPytorch
from lerobot.processor import ActionTokenizerProcessorStep
from lerobot.utils.constants import ACTION
from torch import Tensor, nn

from craft_ds.errors import UserError

TESTED_VERSION = "0.6.1"
_POLICY_NAMES = ("_paligemma_tokenizer", "_preprocess_images")
_MODEL_NAMES = ("_apply_checkpoint", "_create_custom_attention_mask_fast")


def check_internals(policy: nn.Module) -> None:
    """Check that a policy has the private attributes that this module uses.

    Raises:
        UserError: One is missing, so this LeRobot is not like the tested version.
    """
    if not isinstance(policy, PI0FastPolicy):
        return
    missing = [f"PI0FastPolicy.{name}" for name in _POLICY_NAMES if not hasattr(policy, name)]
    missing += [f"PI0FastPytorch.{name}" for name in _MODEL_NAMES if not hasattr(policy.model, name)]
    if missing:
        raise _not_as_tested(", ".join(missing))


def text_tokenizer(policy: PI0FastPolicy) -> Any:
    """Return the tokenizer of the prompt and of the decoded tokens."""
    return policy._paligemma_tokenizer


def preprocess_images(policy: PI0FastPolicy, batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Resize and scale the images of all cameras to [-1, 1].

    Args:
        policy: A pi0_fast of any size.
        batch: Images (B, C, H, W) in [0, 1] of at least one camera.

    Returns:
        The images and the mask (B,) of each camera; missing cameras come last and are masked.
    """
    return policy._preprocess_images(batch)


def apply_checkpoint(model: PI0FastPytorch, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, with activation checkpointing where the model has it enabled."""
    return model._apply_checkpoint(function, *args)


def attention_mask(model: PI0FastPytorch, segments: list[tuple[str, int]], present: Tensor) -> Tensor:
    """Build pi0_fast's attention mask: bidirectional over images and prompt, causal over action tokens.

    Args:
        model: A pi0_fast of any size.
        segments: Kind (`image`, `language` or `fast`) and length of each part of the sequence.
        present: Mask (B, L) of the tokens that are not padding.

    Returns:
        bool (B, L, L).
    """
    return model._create_custom_attention_mask_fast(segments, present, present.shape[0])


def default_peft_targets(config: PreTrainedConfig) -> list[str] | str | None:
    """Return LeRobot's own PEFT target modules of a policy type; None where it has none.

    Args:
        config: The policy's configuration; no policy is built.

    Raises:
        UserError: The policy class has no such method.
    """
    policy_class: Any = get_policy_class(config.type)
    if not hasattr(policy_class, "_get_default_peft_targets"):
        raise _not_as_tested(f"{policy_class.__name__}._get_default_peft_targets")
    # The method reads no more than the configuration.
    policy = policy_class.__new__(policy_class)
    policy.config = config
    return (policy._get_default_peft_targets() or {}).get("target_modules")


def detokenize_actions(
    config: PreTrainedConfig, step: ActionTokenizerProcessorStep, tokens: Tensor
) -> Tensor:
    """Decode action tokens as a pi0_fast policy does, without building the policy.

    Args:
        config: The configuration of a pi0_fast of any size.
        step: The preprocessor's step that spells actions; its tokenizers are the policy's.
        tokens: Text tokenizer ids (B, L), without the token that starts an action; padding is 0.

    Returns:
        Normalised actions (B, n_action_steps, action width), float32.

    Raises:
        UserError: LeRobot's attributes have other names.
    """
    policy_class: Any = get_policy_class(config.type)
    if not hasattr(step, "_paligemma_tokenizer"):
        raise _not_as_tested("ActionTokenizerProcessorStep._paligemma_tokenizer")
    # Decoding reads no more than the configuration and the tokenizers.
    policy = policy_class.__new__(policy_class)
    nn.Module.__init__(policy)
    policy.config = copy.copy(config)
    policy.config.validate_action_token_prefix = False
    policy.action_tokenizer = step.action_tokenizer
    policy._paligemma_tokenizer = step._paligemma_tokenizer
    width = config.output_features[ACTION].shape[0]
    return torch.as_tensor(policy.detokenize_actions(tokens, config.n_action_steps, width)).float()


def _not_as_tested(names: str) -> UserError:
    return UserError(
        f"LeRobot {version('lerobot')} lacks {names}, which craft-ds uses: install the tested version, "
        f"lerobot=={TESTED_VERSION}"
    )
