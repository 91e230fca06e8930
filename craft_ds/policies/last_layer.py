"""Decoders whose last layer computes only the outputs that are read.

A loss reads the decoder's output at the action tokens, generation reads it at the last token, and no layer
follows that would attend to the others. So the last layer computes keys and values of all positions, but
queries, output projection and feed-forward layer of the last positions only.
"""

from functools import cache
from typing import Any

from lerobot.policies.pi_gemma import PiGemmaModel
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma.modeling_gemma import GemmaAttention, eager_attention_forward, rotate_half


def skip_unread_outputs_(policy: nn.Module) -> None:
    """Let the Gemma decoders of a policy skip outputs in their last layer; parameters are not touched.

    `decoder(..., last_outputs=n)` then returns the output of the last n positions, at least one. Without it,
    or on a decoder that this function did not change, the output of all positions is returned. Decoders with
    the adaptive norms of pi0.5 are not changed.
    """
    for decoder in policy.modules():
        if isinstance(decoder, PiGemmaModel) and len(decoder.layers):
            layer: Any = decoder.layers[decoder.config.num_hidden_layers - 1]
            adaptive = getattr(decoder.config, "use_adarms", False)
            if type(layer.self_attn) is GemmaAttention and not adaptive:
                # Not a new `forward` on the instance, which would refer to this module in copies too.
                layer.__class__ = _last_layer_class(layer.__class__)
                layer.self_attn.__class__ = LastAttention


class LastAttention(GemmaAttention):
    """Attention of all positions or of the last ones to all."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        last_outputs: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the output of the last positions, as `GemmaAttention.forward` does of all of them.

        Args:
            hidden_states: (B, L, width), normalized.
            position_embeddings: Cosines and sines (B, L, head width).
            attention_mask: Added to the scores, (B, 1, L, keys).
            past_key_values: Keys and values of earlier positions; those of `hidden_states` are added.
            last_outputs: Number of positions whose output is read, at least 1; None: all.
            **kwargs: As in transformers.
        """
        if last_outputs is None:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
        cos, sin = (each.unsqueeze(1) for each in position_embeddings)
        wanted = hidden_states[:, -last_outputs:]
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, x in (
                (self.q_proj, wanted),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )
        queries = _rotate(queries, cos[:, :, -last_outputs:], sin[:, :, -last_outputs:])
        keys = _rotate(keys, cos, sin)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, -last_outputs:]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, queries, keys, values, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2).contiguous()), weights


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embeddings, as transformers' `apply_rotary_pos_emb`."""
    return (heads * cos) + (rotate_half(heads) * sin)


@cache
def _last_layer_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of a decoder layer's class, of which LeRobot defines one for each decoder."""

    class LastLayer(base):  # type: ignore[valid-type, misc]
        """The last layer of a decoder."""

        def forward(self, hidden_states: Tensor, last_outputs: int | None = None, **kwargs: Any) -> Any:
            """Return the output of the last positions: of all without `last_outputs`."""
            if last_outputs is None:
                return super().forward(hidden_states, **kwargs)
            # Norms also return a gate, which is None without adaptive norms.
            normalized, _ = self.input_layernorm(hidden_states)
            attended, _ = self.self_attn(normalized, last_outputs=last_outputs, **kwargs)
            hidden = hidden_states[:, -last_outputs:] + attended
            normalized, _ = self.post_attention_layernorm(hidden)
            return hidden + self.mlp(normalized)

    return LastLayer
