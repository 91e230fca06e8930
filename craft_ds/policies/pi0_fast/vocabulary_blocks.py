"""Log-probabilities of a few tokens at each position, computed in blocks of the vocabulary.

At 257,152 tokens, logits, softmax and their gradient are the largest tensors of a training step, and a loss
needs only the entries of some tokens. Only one block of logits exists at a time: the forward pass sums the
softmax's denominator block by block (Milakov & Gimelshein 2018, arXiv:1805.02867), the backward pass computes
each block again. As in Wijmans et al. 2024 (arXiv:2411.09009), but no small gradient is left out.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LARGEST = 1 << 24
"""Elements of the largest temporary: a block of logits, or of the weight's gradient."""


def token_log_probs(head: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities of tokens, in fp32 at least.

    Args:
        head: Linear layer without bias that computes logits. With adapters, and where all logits fit into one
            block, they are computed at once.
        hidden: Its input, (N, width).
        ids: Tokens of each position, int64 (N, K).

    Returns:
        (N, K), with the graph of `hidden` and of the head's parameters.
    """
    # Not the weight's own length, which is zero while ZeRO-3 has not gathered it.
    fits = isinstance(head, nn.Linear) and len(hidden) * head.out_features <= _LARGEST
    if fits or not isinstance(head, nn.Linear) or head.bias is not None:
        logits = head(hidden)
        return logits.to(_wide(logits.dtype)).log_softmax(dim=1).gather(1, ids)

    def forward(hidden: Tensor) -> Tensor:
        kind, dtype = hidden.device.type, head.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return _TokenLogProbs.apply(hidden.to(dtype), head.weight, ids)

    # As the head's own forward: sharded engines gather its weight when it is called.
    head.forward = forward  # type: ignore[method-assign]
    try:
        return head(hidden)
    finally:
        del head.forward


class _TokenLogProbs(torch.autograd.Function):
    """Products are computed in the dtype of `hidden`, the softmax in fp32 at least."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        dtype = _wide(hidden.dtype)
        chosen = hidden.new_zeros(ids.shape, dtype=dtype)
        largest = hidden.new_full((len(hidden), 1), -torch.inf, dtype=dtype)
        total = torch.zeros_like(largest)
        for start, rows in _blocks(hidden, weight):
            logits = (hidden @ rows.T).to(dtype)
            columns, inside = _columns(ids, start, len(rows))
            chosen = torch.where(inside, logits.gather(1, columns), chosen)
            previous, largest = largest, torch.maximum(largest, logits.amax(dim=1, keepdim=True))
            total = total * (previous - largest).exp() + logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
        log_total = total.log()
        ctx.save_for_backward(hidden, weight, ids, largest, log_total)
        # In this order: the difference of two large logits is exact, their sum with a logarithm is not.
        return (chosen - largest) - log_total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, ids, largest, log_total = ctx.saved_tensors
        (grad,) = grads
        of_hidden, of_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden, dtype=grad.dtype)
        grad_weight = torch.empty_like(weight) if of_weight else None
        shares = -grad.sum(dim=1, keepdim=True)
        for start, rows in _blocks(hidden, weight):
            logits = (hidden @ rows.T).to(grad.dtype)
            columns, inside = _columns(ids, start, len(rows))
            of_logits = logits.sub_(largest).sub_(log_total).exp_().mul_(shares)
            of_logits = of_logits.scatter_add_(1, columns, grad * inside).to(hidden.dtype)
            if of_hidden:
                grad_hidden += of_logits @ rows
            if grad_weight is not None:
                of_rows = grad_weight[start : start + len(rows)]
                if of_rows.dtype == hidden.dtype:
                    torch.mm(of_logits.T, hidden, out=of_rows)
                else:
                    of_rows.copy_(of_logits.T @ hidden)
        return grad_hidden.to(hidden.dtype) if of_hidden else None, grad_weight, None


def _blocks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of the weight's rows, in the dtype of `hidden`, with the number of their first row."""
    size = max(_LARGEST // max(hidden.shape), 1)
    for start in range(0, len(weight), size):
        yield start, weight[start : start + size].to(hidden.dtype)


def _columns(ids: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the columns (N, K) of tokens in a block, and which of them are in it."""
    columns = ids - start
    return columns.clamp(0, size - 1), (columns >= 0) & (columns < size)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
