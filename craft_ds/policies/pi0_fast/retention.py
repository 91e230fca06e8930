"""Retention losses of pi0_fast: how far a policy is on an anchor from what it did before fine-tuning.

`token_ce` compares it with the recorded actions. The others compare it with the teacher itself, whose outputs
(the targets) an anchor stores beside its tokens:

- `teacher_tokens`: cross-entropy of the tokens that the teacher decodes greedily for the observation;
- `teacher_kl`: KL divergence of the teacher's next-token distributions from the policy's along the recorded
  actions, on the teacher's 32 most probable tokens and one bucket for the rest (distillation: Hinton et al.
  2015, arXiv:1503.02531; learning without forgetting: Li & Hoiem 2016, arXiv:1606.09282);
- `hidden`: squared distance of the decoder's output, averaged over the action tokens, relative to the
  teacher's (feature distillation: Romero et al. 2015, arXiv:1412.6550).

The last two are zero for the teacher itself.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS
from torch import Tensor

from craft_ds.policies.lerobot_internals import text_tokenizer
from craft_ds.policies.pi0_fast.generation import END_OF_ACTION, greedy_action_tokens
from craft_ds.policies.pi0_fast.loss import SupervisedHidden, action_logits, supervised_hidden
from craft_ds.policies.token_loss import Batch, TokenLoss, token_loss

TEACHER_TOKENS = "teacher.tokens"
TEACHER_TOKEN_MASK = "teacher.token_mask"
TEACHER_TOP_IDS = "teacher.top_ids"
TEACHER_TOP_LOG_PROBS = "teacher.top_log_probs"
TEACHER_HIDDEN = "teacher.hidden"
TOP = 32
"""Number of tokens whose teacher's probabilities are stored."""
# The smallest share of the rest: below it, 1 - p is not exact in fp32.
_LOG_OF_ALMOST_ALL = -1e-6


class RetentionLoss(NamedTuple):
    """A retention loss, and the targets that it needs.

    Attributes:
        loss: The loss of a batch of anchors with their targets.
        targets: The teacher's targets for a batch of anchors, by field; None: the loss needs none.
        fields: Names of the targets' fields.
        zero_for_teacher: The teacher's own loss is zero, so that ε has no natural unit.
    """

    loss: Callable[[PI0FastPolicy, Batch], TokenLoss]
    targets: Callable[[PI0FastPolicy, Batch], dict[str, Tensor]] | None = None
    fields: tuple[str, ...] = ()
    zero_for_teacher: bool = False


def teacher_tokens_loss(policy: PI0FastPolicy, batch: Batch) -> TokenLoss:
    """Return the cross-entropy of the teacher's greedy tokens, and their number."""
    tokens, mask = batch[TEACHER_TOKENS], batch[TEACHER_TOKEN_MASK]
    return token_loss(policy, {**batch, ACTION_TOKENS: tokens, ACTION_TOKEN_MASK: mask})


@torch.no_grad()
def teacher_tokens(policy: PI0FastPolicy, batch: Batch) -> dict[str, Tensor]:
    """Return the policy's greedy tokens in the form of recorded ones: int32 and bool, (B, A)."""
    tokenizer = text_tokenizer(policy)
    end, *rest = tokenizer.encode(END_OF_ACTION)
    length = batch[ACTION_TOKENS].shape[1]
    tokens = torch.zeros(len(batch[ACTION_TOKENS]), length, dtype=torch.int32)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, decoded in enumerate(greedy_action_tokens(policy, batch).tolist()):
        complete = decoded[: decoded.index(end) + 1] + rest if end in decoded else decoded
        sequence = [tokenizer.bos_token_id, *complete][:length]
        tokens[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int32)
        mask[row, : len(sequence)] = True
    return {TEACHER_TOKENS: tokens, TEACHER_TOKEN_MASK: mask}


def teacher_kl_loss(policy: PI0FastPolicy, batch: Batch) -> TokenLoss:
    """Return the KL divergence in nats of the stored distributions from the policy's, and their number."""
    found = supervised_hidden(policy, batch)
    ids, log_p = (found.select(batch[name]) for name in (TEACHER_TOP_IDS, TEACHER_TOP_LOG_PROBS))
    log_q = _log_shares(action_logits(policy, found), ids)
    log_p = torch.cat([log_p, _log_rest(log_p)], dim=1)
    total = (log_p.exp() * (log_p - log_q)).sum()
    return TokenLoss(total, torch.full((), float(len(log_p)), device=total.device))


@torch.no_grad()
def teacher_top(policy: PI0FastPolicy, batch: Batch) -> dict[str, Tensor]:
    """Return the policy's most probable next tokens along the recorded actions and their log-probabilities.

    Returns:
        int32 and fp32, (B, A - 1, `TOP`); zeros where no token is supervised.
    """
    found = supervised_hidden(policy, batch)
    logits = action_logits(policy, found)
    top, ids = logits.topk(TOP, dim=1)
    size, length = batch[ACTION_TOKENS].shape
    stored = {
        TEACHER_TOP_IDS: torch.zeros(size, length - 1, TOP, dtype=torch.int32),
        TEACHER_TOP_LOG_PROBS: torch.zeros(size, length - 1, TOP),
    }
    samples = found.samples
    where = samples.cpu(), (found.positions - samples * found.columns).cpu()
    stored[TEACHER_TOP_IDS][where] = ids.int().cpu()
    stored[TEACHER_TOP_LOG_PROBS][where] = (top - logits.logsumexp(dim=1, keepdim=True)).cpu()
    return stored


def hidden_loss(policy: PI0FastPolicy, batch: Batch) -> TokenLoss:
    """Return the squared distance from the stored features relative to their norm, and the sample count."""
    wanted = batch[TEACHER_HIDDEN]
    distance = (_pooled(supervised_hidden(policy, batch), len(wanted)) - wanted).square().sum(dim=1)
    # Both are zero for a sample without supervised tokens.
    total = (distance / wanted.square().sum(dim=1).clamp(min=1e-12)).sum()
    return TokenLoss(total, torch.full((), float(len(wanted)), device=total.device))


@torch.no_grad()
def teacher_hidden(policy: PI0FastPolicy, batch: Batch) -> dict[str, Tensor]:
    """Return the mean of the decoder's output over each sample's supervised positions: fp32, (B, width)."""
    pooled = _pooled(supervised_hidden(policy, batch), len(batch[ACTION_TOKENS]))
    return {TEACHER_HIDDEN: pooled.cpu()}


RETENTION_LOSSES: dict[str, RetentionLoss] = {
    "token_ce": RetentionLoss(token_loss),
    "teacher_tokens": RetentionLoss(
        teacher_tokens_loss, teacher_tokens, (TEACHER_TOKENS, TEACHER_TOKEN_MASK)
    ),
    "teacher_kl": RetentionLoss(
        teacher_kl_loss, teacher_top, (TEACHER_TOP_IDS, TEACHER_TOP_LOG_PROBS), zero_for_teacher=True
    ),
    "hidden": RetentionLoss(hidden_loss, teacher_hidden, (TEACHER_HIDDEN,), zero_for_teacher=True),
}


def _log_shares(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of tokens and of all others together: (N, `TOP` + 1)."""
    log_q = logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)
    return torch.cat([log_q, _log_rest(log_q)], dim=1)


def _log_rest(log_shares: Tensor) -> Tensor:
    """Return log(1 - Σ p) of log-probabilities (N, `TOP`): (N, 1)."""
    log_sum = log_shares.logsumexp(dim=1, keepdim=True).clamp(max=_LOG_OF_ALMOST_ALL)
    return torch.log(-torch.expm1(log_sum))


def _pooled(found: SupervisedHidden, size: int) -> Tensor:
    """Return the mean of the hidden states of each sample in fp32: (B, width); zeros without any."""
    hidden, samples = found.hidden.float(), found.samples
    sums = hidden.new_zeros(size, hidden.shape[1]).index_add(0, samples, hidden)
    counts = hidden.new_zeros(size).index_add(0, samples, hidden.new_ones(len(hidden)))
    return sums / counts.clamp(min=1)[:, None]
