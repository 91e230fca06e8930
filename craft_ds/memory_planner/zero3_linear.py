"""DeepSpeed's linear layer under ZeRO-3, reduced to what the backward pass keeps.

ZeRO-3 replaces `torch.nn.functional.linear` in the process (`runtime/zero/linear.py`). Its version keeps the
input of every layer, although a frozen weight has no gradient to compute from it.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from craft_ds.policies.replace_attribute import replace_attribute


class _Zero3Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = x.matmul(weight.t())
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            grad.matmul(weight) if of_x else None,
            grad.flatten(0, -2).t().matmul(x.flatten(0, -2)) if of_weight else None,
            grad.flatten(0, -2).sum(0) if of_bias else None,
        )


def zero3_linear() -> AbstractContextManager:
    """Make every linear layer compute as under ZeRO-3."""

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _Zero3Linear.apply(x, weight, bias)

    return replace_attribute(torch.nn.functional, "linear", linear)
