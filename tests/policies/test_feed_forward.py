"""Feed-forward layers that keep two tensors: the same bits as transformers' own, and fewer bytes."""

import copy
from contextlib import nullcontext

import peft
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaMLP

from craft_ds.engines.activation_checkpointing import _checkpoint
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.feed_forward import LeanGemmaMLP, keep_gate_and_up_
from craft_ds.policies.loading import build_policy, load_policy_config

TOKENS, WIDTH, INNER = 40, 16, 128
LINEARS = ("gate_proj", "up_proj", "down_proj")


def layer(*, lean, dtype=torch.float32, adapters=(), frozen=()):
    torch.manual_seed(0)
    config = GemmaConfig(hidden_size=WIDTH, intermediate_size=INNER, hidden_act="gelu_pytorch_tanh")
    model = nn.ModuleDict({"mlp": GemmaMLP(config)})
    if lean:
        keep_gate_and_up_(model)
    if adapters:
        lora = peft.LoraConfig(target_modules=list(adapters), r=2, lora_dropout=0.25, init_lora_weights=False)
        peft.inject_adapter_in_model(lora, model)
    for name in frozen:
        getattr(model["mlp"], name).requires_grad_(False)
    return model["mlp"].to(dtype)


def outcome(mlp, dtype=torch.float32, autocast=False):
    """Return output and gradients, and the bytes that the forward pass keeps beside the output."""
    x = torch.randn(2, TOKENS // 2, WIDTH, generator=torch.Generator().manual_seed(1))
    x = x.to(dtype).requires_grad_()
    torch.manual_seed(2)  # dropout
    with MemoryCounter() as counter:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            output = mlp(x)
        kept = counter.live - output.numel() * output.element_size()
        output.float().square().sum().backward()
    found = {name: p.grad for name, p in mlp.named_parameters() if p.grad is not None}
    return {"output": output, "x": x.grad, **found}, kept


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frozen": LINEARS},
        {"frozen": ("down_proj",)},
        {"adapters": LINEARS},
        {"adapters": ("gate_proj",), "frozen": ("up_proj",)},
    ],
    ids=["full", "frozen", "frozen_down", "adapters", "adapters_of_gate"],
)
def test_no_bit_changes(options, dtype, autocast, recompute):
    mlp, plain = (layer(lean=lean, dtype=dtype, **options) for lean in (True, False))
    if recompute:
        _checkpoint(mlp)
    (found, _), (expected, _) = (outcome(each, dtype, autocast) for each in (mlp, plain))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("adapters", "tensors"), [((), 2), (("gate_proj", "up_proj"), 2), (LINEARS, 3)])
def test_two_tensors_are_kept_of_four(dtype, adapters, tensors):
    """With adapters on `down_proj`, its input is kept too."""

    def kept(lean):
        mlp = layer(lean=lean, dtype=dtype, adapters=adapters).eval()  # without the masks of dropout
        return outcome(mlp, dtype)[1] // (TOKENS * INNER * dtype.itemsize)

    assert kept(lean=False) == (3 if adapters and "down_proj" not in adapters else 4)
    assert kept(lean=True) == tensors


@pytest.mark.parametrize("adapters", [(), LINEARS])
def test_no_product_with_a_weight_is_computed_again(adapters):
    def flops(lean):
        with FlopCounterMode(display=False) as counter:
            outcome(layer(lean=lean, adapters=adapters))
        return counter.get_total_flops()

    assert flops(lean=True) == flops(lean=False) > 0


def test_without_a_gradient_nothing_is_kept():
    mlp = layer(lean=True)
    with torch.no_grad(), MemoryCounter() as counter:
        output = mlp(torch.ones(TOKENS, WIDTH))
    assert counter.live == output.numel() * 4
    assert torch.equal(output, layer(lean=False)(torch.ones(TOKENS, WIDTH)))


def test_a_copy_computes_with_its_own_weights():
    mlp = layer(lean=True)
    twin = copy.deepcopy(mlp)
    with torch.no_grad():
        twin.down_proj.weight.zero_()
    assert not twin(torch.ones(1, WIDTH)).any()
    assert mlp(torch.ones(1, WIDTH)).any()


def test_policies_are_built_with_them(policy_dir):
    policy = build_policy(load_policy_config(policy_dir), policy_dir)
    layers = policy.model.paligemma_with_expert.paligemma.model.language_model.layers
    assert all(type(each.mlp) is LeanGemmaMLP for each in layers)
