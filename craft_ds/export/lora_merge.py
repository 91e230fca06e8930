"""Merge adapters into the weights of their base policy by range, without a full tensor in memory."""

import math
from typing import NamedTuple, Self

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from craft_ds.errors import UserError
from craft_ds.lora.adapters import AdapterPlan, add_adapters
from craft_ds.lora.weights import open_weights
from craft_ds.policies.weights import tied_names, unique_tensors
from craft_ds.tensor_io.tensor_file import TensorSpec


class _Adapter(NamedTuple):
    """An adapter without its values: names of its tensors A, B and m, the scale s, and the sizes of A."""

    a: str
    b: str
    magnitude: str | None
    scale: float
    rank: int
    inputs: int


class MergedWeights:
    """Weights of a policy with its adapters merged, read by range.

    A weight W of shape (outputs, inputs) with an adapter becomes, in fp32 for any dtypes of the files,

        LoRA:  W' = W + s·B·A
        DoRA:  W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖      (norm and m per row)

    with s as PEFT scales this layer. Fully trained modules are read from the adapter file, all other weights
    from the base policy.

    Args:
        policy: From `build_policy`, without adapters; they are added here.
        plan: Stored adapters and their base.

    Attributes:
        specs: The tensors of the policy without adapters.

    Raises:
        UserError: As `AdaptedWeights`; or an adapter is on a weight that layers share.
    """

    def __init__(self, policy: nn.Module, plan: AdapterPlan):
        # Read before the adapters rename the base's parameters.
        self.specs = [
            TensorSpec(name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in unique_tensors(policy).items()
        ]
        shapes = {spec.name: spec.shape for spec in self.specs}
        tied = tied_names(policy)
        self._weights = open_weights(policy, plan.base, plan, add_adapters(policy, plan.config))
        layers = {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}
        shared = {f"{name}.weight" for name in layers} & {*tied.keys(), *tied.values()}
        if shared:
            self._weights.__exit__()
            raise UserError(
                f"{min(shared)} has adapters and is shared with another layer, which the merge would change: "
                "export without --merge_lora"
            )
        self._adapters = {
            f"{name}.weight": _describe(name, layer, shapes[f"{name}.weight"][1])
            for name, layer in layers.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._weights.__exit__()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flattened tensor, 1-D: fp32 if merged, else the file's dtype."""
        adapter = self._adapters.get(name)
        if adapter is None or start == stop:
            return self._weights.read(name, start, stop)
        first, last = start // adapter.inputs, math.ceil(stop / adapter.inputs)
        offset = first * adapter.inputs
        return self._rows(name, adapter, first, last).view(-1)[start - offset : stop - offset]

    def _rows(self, name: str, adapter: _Adapter, first: int, last: int) -> Tensor:
        """Return rows [first, last) of a merged weight."""

        def matrix(name: str, width: int, first: int, last: int) -> Tensor:
            return self._weights.read(name, first * width, last * width).float().view(-1, width)

        a = matrix(adapter.a, adapter.inputs, 0, adapter.rank)
        b = matrix(adapter.b, adapter.rank, first, last)
        rows = (b @ a).mul_(adapter.scale).add_(matrix(name, adapter.inputs, first, last))
        if adapter.magnitude is not None:
            m = matrix(adapter.magnitude, 1, first, last)
            rows.mul_(m / rows.norm(dim=1, keepdim=True))
        return rows


def _describe(name: str, layer: LoraLayer, inputs: int) -> _Adapter:
    (adapter,) = layer.scaling
    magnitude = f"{name}.lora_magnitude_vector.{adapter}.weight"
    return _Adapter(
        a=f"{name}.lora_A.{adapter}.weight",
        b=f"{name}.lora_B.{adapter}.weight",
        magnitude=magnitude if adapter in layer.lora_magnitude_vector else None,
        scale=layer.scaling[adapter],
        rank=layer.r[adapter],
        inputs=inputs,
    )
