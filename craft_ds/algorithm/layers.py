"""Layers of a policy, derived from parameter names: the units of `--craft.surgery_scope=layer`."""

from collections.abc import Iterable, Sequence

from torch import Tensor

# Name parts that PEFT adds below a module: what follows belongs to the module's layer.
_OF_ADAPTERS = ("lora_", "base_layer", "modules_to_save")


def layer_of(name: str) -> str:
    """Return the layer of a parameter: its numbered block, or the module that owns it.

    A block ends at the first number in the name, so that all parts of a decoder layer are one layer, and so
    are experts or lists within it. Outside of blocks every module with parameters is a layer of its own, such
    as the embedding, the head or a final norm. Adapters belong to the layer of the module that they adapt.

    Args:
        name: Fully qualified name of a parameter.

    Example:
        >>> layer_of("model.language_model.layers.3.self_attn.q_proj.lora_A.default.weight")
        'model.language_model.layers.3'
        >>> layer_of("model.lm_head.weight"), layer_of("model.lm_head.lora_B.default.weight")
        ('model.lm_head', 'model.lm_head')
    """
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: position + 1])
        if part.startswith(_OF_ADAPTERS):
            return ".".join(parts[:position])
    return ".".join(parts[:-1])


def split_by_layer(names: Iterable[str], parts: Iterable[tuple[str, Tensor]]) -> list[Sequence[Tensor]]:
    """Group this rank's parts of a gradient by layer.

    Args:
        names: Names of all trainable parameters, in the same order on all ranks.
        parts: This rank's parts with the names of their parameters.

    Returns:
        The parts of each layer of `names`, in the order of their first parameters; empty where this rank
        has none.
    """
    layers: dict[str, list[Tensor]] = {layer_of(name): [] for name in names}
    for name, part in parts:
        layers[layer_of(name)].append(part)
    return list(layers.values())
