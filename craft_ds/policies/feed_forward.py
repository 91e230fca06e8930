"""Gated feed-forward layers that keep two tensors for the backward pass instead of four.

Of `down(act(gate(x)) * up(x))`, PyTorch keeps `gate(x)`, its activation, `up(x)` and the product: with
Gemma's layers, eight times as wide as the rest, most of what a training step keeps. The activation and the
product are computed again from the other two, element by element, so that gradients do not change by a bit.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaMLP


def keep_gate_and_up_(policy: nn.Module) -> None:
    """Make every feed-forward layer of Gemma in a policy keep two tensors; parameters are not touched."""
    for module in policy.modules():
        if type(module) is GemmaMLP:
            # Not a new `forward` on the instance, which would refer to this module in copies too.
            module.__class__ = LeanGemmaMLP


class LeanGemmaMLP(GemmaMLP):
    """Gemma's feed-forward layer, from whose inner tensors only `gate(x)` and `up(x)` are kept."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `down(act(gate(x)) * up(x))`."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if not torch.is_grad_enabled():
            return self._down(gate, up)
        if isinstance(self.down_proj, nn.Linear):
            # The recomputation ends when it has the input of `down_proj`, before its product with the weight.
            return checkpoint(self._down, gate, up, use_reentrant=False, preserve_rng_state=False)
        # With adapters it would end behind the product with the frozen weight, which costs too much.
        return self.down_proj(
            checkpoint(self._product, gate, up, use_reentrant=False, preserve_rng_state=False)
        )

    def _product(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.act_fn(gate) * up

    def _down(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down_proj(self._product(gate, up))
