"""pi0_fast's next-token loss on trimmed input, summed over tokens.

The same function as `PI0FastPolicy.forward`, times the number of supervised tokens, without the work that
does not affect it:

- prompt and action padding is cut to the longest sample of the batch;
- the last action token is a target but not an input: nothing is predicted after it;
- the decoder's last layer runs only where an action token is predicted (`craft_ds.policies.last_layer`);
- `lm_head`, 257,152 wide on the real model, runs only where a token is supervised, and in blocks of the
  vocabulary (`craft_ds.policies.pi0_fast.vocabulary_blocks`);
- all cameras pass the vision tower in one call, so that a sharded tower is gathered once; they skip the
  tower where the batch holds its features already (`craft_ds.policies.pi0_fast.vision`).
"""

from typing import NamedTuple

import torch
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.constants import (
    ACTION_TOKEN_MASK,
    ACTION_TOKENS,
    OBS_LANGUAGE_ATTENTION_MASK,
    OBS_LANGUAGE_TOKENS,
)
from torch import Tensor

from craft_ds.policies.device_copies import copy_to_device, on_host
from craft_ds.policies.lerobot_internals import apply_checkpoint, attention_mask
from craft_ds.policies.pi0_fast.vision import image_tokens
from craft_ds.policies.pi0_fast.vocabulary_blocks import token_log_probs
from craft_ds.policies.token_loss import Batch, TokenLoss, token_loss


@token_loss.register
def pi0_fast_token_loss(policy: PI0FastPolicy, batch: Batch) -> TokenLoss:
    """Compute the cross-entropy of the supervised action tokens of a batch.

    Token `t + 1` is supervised where its mask is true, and predicted from the images, the prompt and the
    action tokens up to `t`.

    The masks decide shapes, so they are read on the host: with masks on the CPU, or copied from there by
    `copy_to_device`, the host does not wait for the device.

    Args:
        policy: A pi0_fast of any size.
        batch: Images (B, C, H, W) in [0, 1] or their vision features; prompt tokens and mask (B, P); action
            tokens and mask (B, A).

    Returns:
        The sum over supervised tokens in fp32, and their count.
    """
    values = token_losses(policy, supervised_hidden(policy, batch))
    return TokenLoss(values.sum(), torch.full((), float(len(values)), device=values.device))


class SupervisedHidden(NamedTuple):
    """The decoder's output at the N positions that predict a supervised token, sample by sample.

    Attributes:
        hidden: (N, width).
        targets: The tokens to predict, (N,).
        positions: Each position as `sample * columns + column`, (N,): it predicts token `column + 1`.
        columns: Number of positions of a sample that predict an action token.
    """

    hidden: Tensor
    targets: Tensor
    positions: Tensor
    columns: int

    @property
    def samples(self) -> Tensor:
        """The sample of each position, (N,)."""
        return self.positions.div(max(self.columns, 1), rounding_mode="floor")

    def select(self, values: Tensor) -> Tensor:
        """Return the entries (N, …) of values (B, A - 1, …) at these positions."""
        return values[:, : self.columns].flatten(0, 1).index_select(0, self.positions)


def token_losses(policy: PI0FastPolicy, found: SupervisedHidden) -> Tensor:
    """Compute the cross-entropy of each supervised token, (N,) in fp32 at least."""
    return -action_log_probs(policy, found, found.targets[:, None]).squeeze(1)


def action_log_probs(policy: PI0FastPolicy, found: SupervisedHidden, ids: Tensor) -> Tensor:
    """Compute the log-probabilities of K tokens at each supervised position, without all logits at once.

    Args:
        policy: A pi0_fast of any size.
        found: From `supervised_hidden`.
        ids: The tokens, int64 (N, K).

    Returns:
        (N, K), in fp32 at least.
    """
    return token_log_probs(policy.model.paligemma_with_expert.paligemma.lm_head, found.hidden, ids)


def supervised_logits(policy: PI0FastPolicy, batch: Batch) -> tuple[Tensor, Tensor]:
    """Compute the logits of each supervised action token of a batch, and the target tokens.

    Args:
        policy: A pi0_fast of any size.
        batch: As for `pi0_fast_token_loss`.

    Returns:
        Logits (N, vocabulary) in fp32 at least, and the N target tokens, sample by sample.
    """
    found = supervised_hidden(policy, batch)
    return action_logits(policy, found), found.targets


def action_logits(policy: PI0FastPolicy, found: SupervisedHidden) -> Tensor:
    """Compute the logits (N, vocabulary) of supervised positions, in fp32 at least."""
    logits = policy.model.paligemma_with_expert.paligemma.lm_head(found.hidden)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def supervised_hidden(policy: PI0FastPolicy, batch: Batch) -> SupervisedHidden:
    """Compute the decoder's output for each supervised action token of a batch.

    Args:
        policy: A pi0_fast of any size.
        batch: As for `pi0_fast_token_loss`.
    """
    model = policy.model
    decoder = model.paligemma_with_expert.paligemma.model.language_model

    device = next(policy.parameters()).device
    fields = (OBS_LANGUAGE_TOKENS, OBS_LANGUAGE_ATTENTION_MASK, ACTION_TOKENS, ACTION_TOKEN_MASK)
    prompt, prompt_mask, actions, action_mask = (copy_to_device(batch[name], device) for name in fields)
    action_mask_on_host = on_host(action_mask)
    prompt_length, action_length = longest(on_host(prompt_mask)), max(longest(action_mask_on_host), 1)
    prompt, actions = prompt[:, :prompt_length], actions[:, :action_length]
    columns = action_length - 1
    places = action_mask_on_host[:, 1:action_length].flatten().nonzero().squeeze(1)
    supervised = copy_to_device(places, device)

    vision, camera_masks = image_tokens(policy, batch)
    words = apply_checkpoint(
        model, model.paligemma_with_expert.embed_language_tokens, torch.cat([prompt, actions[:, :-1]], dim=1)
    )
    embeddings = torch.cat([vision, words], dim=1)
    if decoder.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
        embeddings = embeddings.to(torch.bfloat16)

    segments = [("image", vision.shape[1]), ("language", prompt_length), ("fast", columns)]
    present = torch.cat(
        [
            *(mask[:, None].expand(-1, vision.shape[1] // len(camera_masks)) for mask in camera_masks),
            prompt_mask[:, :prompt_length],
            action_mask[:, :columns],
        ],
        dim=1,
    )
    attention = attention_mask(model, segments, present)
    hidden = decoder(
        inputs_embeds=embeddings,
        attention_mask=prepare_attention_masks_4d(attention, dtype=embeddings.dtype),
        position_ids=present.cumsum(dim=1) - 1,
        use_cache=False,
        last_outputs=max(columns, 1),  # one that nothing reads, so that all parameters are used on every rank
    ).last_hidden_state

    predicting = hidden[:, hidden.shape[1] - columns :].flatten(0, 1).index_select(0, supervised)
    targets = actions[:, 1:].flatten().index_select(0, supervised)
    return SupervisedHidden(predicting, targets, supervised, columns)


def longest(mask: Tensor) -> int:
    """Return the length that keeps every true entry of a (B, L) mask on the host."""
    used = mask.any(dim=0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0
