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

Each is a sum of terms, one per supervised token (`hidden`: one per sample), so that `by_task` can sum them by
old task.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from lerobot.policies.pi0_fast.modeling_pi0_fast import PI0FastPolicy
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS
from torch import Tensor

from craft_ds.policies.lerobot_internals import text_tokenizer
from craft_ds.policies.pi0_fast.generation import END_OF_ACTION, greedy_action_tokens
from craft_ds.policies.pi0_fast.loss import (
    SupervisedHidden,
    action_log_probs,
    action_logits,
    supervised_hidden,
    token_losses,
)
from craft_ds.policies.token_loss import Batch, Loss, TokenLoss, token_loss

TEACHER_TOKENS = "teacher.tokens"
TEACHER_TOKEN_MASK = "teacher.token_mask"
TEACHER_TOP_IDS = "teacher.top_ids"
TEACHER_TOP_LOG_PROBS = "teacher.top_log_probs"
TEACHER_HIDDEN = "teacher.hidden"
TASK_INDEX = "task_index"
"""Field of a batch of anchors: the position of each anchor's task, int64 (B,)."""
TOP = 32
"""Number of tokens whose teacher's probabilities are stored."""
# The smallest share of the rest: below it, 1 - p is not exact in fp32.
_LOG_OF_ALMOST_ALL = -1e-6


class LossTerms(NamedTuple):
    """A loss before it is summed.

    Attributes:
        values: One value per supervised token or sample, fp32 (N,), with the graph.
        samples: The sample of each value, (N,).
    """

    values: Tensor
    samples: Tensor

    def sum(self) -> TokenLoss:
        """Return the sum over the batch."""
        total = self.values.sum()
        return TokenLoss(total, torch.full((), float(len(self.values)), device=total.device))

    def sum_by(self, groups: Tensor, count: int) -> TokenLoss:
        """Return sums and counts by group, (count,) each.

        Args:
            groups: The group of each sample, (B,).
            count: Number of groups.
        """
        numbers = torch.arange(count, device=self.values.device)[:, None]
        # Not `index_add`, whose order of summation varies on a GPU.
        member = groups.to(self.values.device)[self.samples] == numbers
        return TokenLoss(torch.where(member, self.values, 0.0).sum(dim=1), member.sum(dim=1).float())


class RetentionLoss(NamedTuple):
    """A retention loss, and the targets that it needs.

    Attributes:
        loss: The loss of a batch of anchors with their targets.
        terms: The same loss before it is summed.
        targets: The teacher's targets for a batch of anchors, by field; None: the loss needs none.
        fields: Names of the targets' fields.
        mask: The field whose true entries after the first are supervised; None: there is one term per sample.
        zero_for_teacher: The teacher's own loss is zero, so that ε has no natural unit.
    """

    loss: Callable[[PI0FastPolicy, Batch], TokenLoss]
    terms: Callable[[PI0FastPolicy, Batch], LossTerms]
    targets: Callable[[PI0FastPolicy, Batch], dict[str, Tensor]] | None = None
    fields: tuple[str, ...] = ()
    mask: str | None = ACTION_TOKEN_MASK
    zero_for_teacher: bool = False


def by_task(name: str, tasks: int) -> Loss:
    """Return a retention loss whose sums and counts are by task, (tasks,) each.

    Args:
        name: The retention loss.
        tasks: Number of tasks; the batch's `TASK_INDEX` is below it.
    """
    terms = RETENTION_LOSSES[name].terms

    def loss(policy: PI0FastPolicy, batch: Batch) -> TokenLoss:
        return terms(policy, batch).sum_by(batch[TASK_INDEX], tasks)

    return loss


def token_terms(policy: PI0FastPolicy, batch: Batch) -> LossTerms:
    """Return the cross-entropy of every recorded action token."""
    found = supervised_hidden(policy, batch)
    return LossTerms(token_losses(policy, found), found.samples)


def _with_teacher_tokens(batch: Batch) -> Batch:
    return {**batch, ACTION_TOKENS: batch[TEACHER_TOKENS], ACTION_TOKEN_MASK: batch[TEACHER_TOKEN_MASK]}


def teacher_tokens_loss(policy: PI0FastPolicy, batch: Batch) -> TokenLoss:
    """Return the cross-entropy of the teacher's greedy tokens, and their number."""
    return token_loss(policy, _with_teacher_tokens(batch))


def teacher_tokens_terms(policy: PI0FastPolicy, batch: Batch) -> LossTerms:
    """Return the cross-entropy of each of the teacher's greedy tokens."""
    return token_terms(policy, _with_teacher_tokens(batch))


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


def teacher_kl_terms(policy: PI0FastPolicy, batch: Batch) -> LossTerms:
    """Return the KL divergence in nats of each stored distribution from the policy's."""
    found = supervised_hidden(policy, batch)
    ids, log_p = (found.select(batch[name]) for name in (TEACHER_TOP_IDS, TEACHER_TOP_LOG_PROBS))
    log_q = _with_rest(action_log_probs(policy, found, ids))
    log_p = _with_rest(log_p)
    return LossTerms((log_p.exp() * (log_p - log_q)).sum(dim=1), found.samples)


def teacher_kl_loss(policy: PI0FastPolicy, batch: Batch) -> TokenLoss:
    """Return the KL divergence in nats of the stored distributions from the policy's, and their number."""
    return teacher_kl_terms(policy, batch).sum()


@torch.no_grad()
def teacher_top(policy: PI0FastPolicy, batch: Batch) -> dict[str, Tensor]:
    """Return the policy's most probable next tokens along the recorded actions and their log-probabilities.

    Returns:
        int32 and fp32, (B, A - 1, `TOP`); zeros where no token is supervised.
    """
    found = supervised_hidden(policy, batch)
    ids = action_logits(policy, found).topk(TOP, dim=1).indices
    # As the loss computes them, so that the teacher's own loss is zero and not negative by rounding.
    top = action_log_probs(policy, found, ids)
    size, length = batch[ACTION_TOKENS].shape
    stored = {
        TEACHER_TOP_IDS: torch.zeros(size, length - 1, TOP, dtype=torch.int32),
        TEACHER_TOP_LOG_PROBS: torch.zeros(size, length - 1, TOP),
    }
    samples = found.samples
    where = samples.cpu(), (found.positions - samples * found.columns).cpu()
    stored[TEACHER_TOP_IDS][where] = ids.int().cpu()
    stored[TEACHER_TOP_LOG_PROBS][where] = top.cpu()
    return stored


def hidden_terms(policy: PI0FastPolicy, batch: Batch) -> LossTerms:
    """Return each sample's squared distance from the stored features, relative to their norm."""
    wanted = batch[TEACHER_HIDDEN]
    distance = (_pooled(supervised_hidden(policy, batch), len(wanted)) - wanted).square().sum(dim=1)
    # Both are zero for a sample without supervised tokens.
    values = distance / wanted.square().sum(dim=1).clamp(min=1e-12)
    return LossTerms(values, torch.arange(len(wanted), device=values.device))


def hidden_loss(policy: PI0FastPolicy, batch: Batch) -> TokenLoss:
    """Return the squared distance from the stored features relative to their norm, and the sample count."""
    return hidden_terms(policy, batch).sum()


@torch.no_grad()
def teacher_hidden(policy: PI0FastPolicy, batch: Batch) -> dict[str, Tensor]:
    """Return the mean of the decoder's output over each sample's supervised positions: fp32, (B, width)."""
    pooled = _pooled(supervised_hidden(policy, batch), len(batch[ACTION_TOKENS]))
    return {TEACHER_HIDDEN: pooled.cpu()}


RETENTION_LOSSES: dict[str, RetentionLoss] = {
    "token_ce": RetentionLoss(token_loss, token_terms),
    "teacher_tokens": RetentionLoss(
        teacher_tokens_loss,
        teacher_tokens_terms,
        teacher_tokens,
        (TEACHER_TOKENS, TEACHER_TOKEN_MASK),
        TEACHER_TOKEN_MASK,
    ),
    "teacher_kl": RetentionLoss(
        teacher_kl_loss,
        teacher_kl_terms,
        teacher_top,
        (TEACHER_TOP_IDS, TEACHER_TOP_LOG_PROBS),
        zero_for_teacher=True,
    ),
    "hidden": RetentionLoss(
        hidden_loss, hidden_terms, teacher_hidden, (TEACHER_HIDDEN,), None, zero_for_teacher=True
    ),
}


def _with_rest(log_shares: Tensor) -> Tensor:
    """Add log(1 - Σ p), of all other tokens together, to log-probabilities (N, `TOP`): (N, `TOP` + 1)."""
    log_sum = log_shares.logsumexp(dim=1, keepdim=True).clamp(max=_LOG_OF_ALMOST_ALL)
    return torch.cat([log_shares, torch.log(-torch.expm1(log_sum))], dim=1)


def _pooled(found: SupervisedHidden, size: int) -> Tensor:
    """Return the mean of the hidden states of each sample in fp32: (B, width); zeros without any."""
    hidden, samples = found.hidden.float(), found.samples
    sums = hidden.new_zeros(size, hidden.shape[1]).index_add(0, samples, hidden)
    counts = hidden.new_zeros(size).index_add(0, samples, hidden.new_ones(len(hidden)))
    return sums / counts.clamp(min=1)[:, None]
