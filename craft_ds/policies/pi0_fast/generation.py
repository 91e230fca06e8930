"""Greedy action chunks of a policy, sharded over ranks or not.

Every forward pass of a sharded policy is a collective. Greedy decoding ends at a different length on each
rank, and the others would wait forever for the shards of a rank that stopped: all ranks decode until the last
one has finished.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import singledispatch

import torch
import torch.distributed as dist
from lerobot.configs import PreTrainedConfig
from lerobot.policies.common.vla_utils import prepare_attention_masks_4d
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_LANGUAGE_ATTENTION_MASK, OBS_LANGUAGE_TOKENS
from torch import Tensor

from craft_ds.policies.device_copies import on_host
from craft_ds.policies.lerobot_internals import text_tokenizer
from craft_ds.policies.pi0_fast.loss import longest
from craft_ds.policies.pi0_fast.vision import image_tokens
from craft_ds.policies.token_loss import Batch

END_OF_ACTION = "|"
"""The token after which nothing is decoded."""


@singledispatch
def action_chunk(policy: PreTrainedPolicy, batch: Batch) -> Tensor:
    """Return a policy's actions for a batch of observations, before its postprocessor.

    Collective where there is a process group: call equally often on all ranks, each with its own
    observations. Policy types without a registered function must act in a number of forward passes that does
    not depend on the observations, as those do that predict or denoise a chunk.

    Args:
        policy: Any LeRobot policy; set to evaluation mode.
        batch: A policy batch from the policy's preprocessor; actions in it are not read.

    Returns:
        (B, steps, action width).
    """
    return policy.predict_action_chunk(batch)


@action_chunk.register
def pi0_fast_action_chunk(policy: PI0FastPolicy, batch: Batch) -> Tensor:
    """Return the actions of the greedy tokens; zeros for a sample whose tokens give no actions."""
    tokens = greedy_action_tokens(policy, batch)
    with _without_prefix_validation(policy.config):
        return policy.detokenize_actions(
            tokens, policy.config.n_action_steps, policy.config.output_features[ACTION].shape[0]
        )


@torch.no_grad()
def greedy_action_tokens(policy: PI0FastPolicy, batch: Batch) -> Tensor:
    """Decode the most probable action tokens, ignoring the policy's temperature.

    Equals the tokens of `PI0FastPytorch.sample_actions_fast_kv_cache` at temperature 0, up to each sample's
    end of action, with less work: the prompt is cut to the longest of the batch, and all cameras pass the
    vision tower in one call. As there, the token that starts an action is part of the bidirectional prefix.
    Collective where there is a process group.

    Args:
        policy: A pi0_fast of any size; set to evaluation mode.
        batch: Images (B, C, H, W) in [0, 1] or their vision features; prompt tokens and mask (B, P).

    Returns:
        Text tokenizer ids (B, max_decoding_steps), int64; zeros after the end of action.
    """
    policy.eval()
    model, tokenizer, limit = policy.model, text_tokenizer(policy), policy.config.max_decoding_steps
    decoder = model.paligemma_with_expert.paligemma.model.language_model
    lm_head = model.paligemma_with_expert.paligemma.lm_head
    embed_words = model.paligemma_with_expert.embed_language_tokens
    end_of_action = tokenizer.convert_tokens_to_ids(END_OF_ACTION)

    device, size = next(policy.parameters()).device, batch[OBS_LANGUAGE_TOKENS].shape[0]
    length = longest(on_host(batch[OBS_LANGUAGE_ATTENTION_MASK]))
    begin = torch.full((size, 1), tokenizer.bos_token_id, device=device)
    prompt = torch.cat([batch[OBS_LANGUAGE_TOKENS][:, :length].to(device), begin], dim=1)
    prompt_mask = batch[OBS_LANGUAGE_ATTENTION_MASK][:, :length].to(device)

    vision, camera_masks = image_tokens(policy, batch)
    inputs = torch.cat([vision, embed_words(prompt)], dim=1)
    if decoder.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16:
        inputs = inputs.to(torch.bfloat16)
    one = torch.ones_like(begin, dtype=torch.bool)
    cameras = [mask[:, None].expand(-1, vision.shape[1] // len(camera_masks)) for mask in camera_masks]
    present = torch.cat([*cameras, prompt_mask, one], dim=1)
    attention = present[:, None] & present[:, :, None]
    positions = present.cumsum(dim=1) - 1

    tokens = begin.new_zeros(size, limit)
    finished = torch.zeros(size, dtype=torch.bool, device=device)
    cache = None
    for step in range(limit):
        output = decoder(
            inputs_embeds=inputs,
            attention_mask=prepare_attention_masks_4d(attention, dtype=inputs.dtype),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            last_outputs=1,
        )
        token = lm_head(output.last_hidden_state[:, -1]).argmax(dim=-1)
        tokens[:, step] = token.where(~finished, 0)
        finished |= token == end_of_action
        if step + 1 == limit or _on_all_ranks(finished.all()):
            break
        cache = output.past_key_values
        inputs = embed_words(tokens[:, step : step + 1]).to(inputs.dtype)
        present = torch.cat([present, one], dim=1)
        attention = present[:, None]
        positions = present.sum(dim=1, keepdim=True) - 1
    return tokens


def _on_all_ranks(flag: Tensor) -> bool:
    """Return True if a bool scalar is true on every rank: a collective of 4 bytes."""
    if dist.is_initialized():
        flag = flag.int()
        dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


@contextmanager
def _without_prefix_validation(config: PreTrainedConfig) -> Iterator[None]:
    """Do not raise an error for actions without the expected prefix: the episode fails instead.

    An error on one rank of a sharded policy would make the other ranks wait.
    """
    strict = config.validate_action_token_prefix
    config.validate_action_token_prefix = False
    try:
        yield
    finally:
        config.validate_action_token_prefix = strict
