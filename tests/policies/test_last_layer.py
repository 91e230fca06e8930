"""The last layer of a decoder: the outputs that are read, with the gradients of all, for less work."""

import copy

import peft
import pytest
import torch
from lerobot.policies.pi_gemma import PiGemmaModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GemmaConfig

from craft_ds.engines.activation_checkpointing import _checkpoint
from craft_ds.policies.last_layer import LastAttention, skip_unread_outputs_
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.worlds import teacher_directory

LENGTH, WIDTH, INNER, HEADS, HEAD = 11, 16, 48, 4, 6
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def decoder(*, skips=True, layers=2, attention="sdpa", dtype=torch.float32, adapters=False):
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=8,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=HEAD,
        attn_implementation=attention,
    )
    model = PiGemmaModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    if skips:
        skip_unread_outputs_(model)
    if adapters:
        lora = peft.LoraConfig(target_modules=LINEARS, r=2, init_lora_weights=False)
        peft.inject_adapter_in_model(lora, model)
    return model.to(dtype)


def inputs(dtype=torch.float32, length=LENGTH, earlier=0, batch=2):
    """Embeddings, a mask in which positions see others at random and always themselves, and positions."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, length, WIDTH, generator=generator).to(dtype).requires_grad_()
    seen = torch.rand(batch, 1, length, earlier + length, generator=generator) < 0.6
    seen |= torch.eye(length, earlier + length, dtype=torch.bool).roll(earlier, dims=1)
    mask = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
    positions = torch.arange(earlier, earlier + length).expand(batch, -1)
    return {"inputs_embeds": x, "attention_mask": mask, "position_ids": positions, "use_cache": False}


def outcome(model, given, n, **options):
    """The output of the last n positions, and the gradients of a function of them."""
    model.zero_grad()
    given["inputs_embeds"].grad = None
    output = model(**given, **options).last_hidden_state[:, -n:]
    weights = torch.arange(output.numel()).view_as(output).remainder(7).to(output.dtype)
    (output * weights).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": given["inputs_embeds"].grad.clone(), **gradients}


def assert_same(found, expected, tolerance=2e-5):
    assert found.keys() == expected.keys()
    for name, exact in expected.items():
        assert found[name].shape == exact.shape
        distance = (found[name].double() - exact.double()).norm()
        assert distance <= tolerance * max(exact.double().norm(), 1e-3), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("n", [1, 4, LENGTH])
def test_outputs_and_gradients_are_those_of_the_complete_layer(n, adapters, attention, recompute):
    model, plain = (decoder(skips=s, attention=attention, adapters=adapters) for s in (True, False))
    if recompute:
        for layer in model.layers:
            _checkpoint(layer)
    given = inputs()
    assert_same(outcome(model, given, n, last_outputs=n), outcome(plain, given, n))
    assert_same(outcome(model, given, n), outcome(plain, given, n), tolerance=0.0)


@pytest.mark.parametrize("n", [1, 4])
def test_in_bf16(n):
    model, plain = (decoder(skips=s, dtype=torch.bfloat16) for s in (True, False))
    given = inputs(torch.bfloat16)
    assert_same(outcome(model, given, n, last_outputs=n), outcome(plain, given, n), tolerance=0.02)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_cache_gets_the_keys_of_all_positions(layers):
    model, plain = (decoder(skips=s, layers=layers).eval() for s in (True, False))
    caches = DynamicCache(), DynamicCache()
    first, then = inputs(), inputs(length=3, earlier=LENGTH)
    for given in (first, then):
        given["use_cache"] = True
        one, all_of_them = (
            each(**given, past_key_values=cache, **options).last_hidden_state
            for each, cache, options in zip((model, plain), caches, ({"last_outputs": 1}, {}), strict=True)
        )
        assert one.shape[1] == 1
        torch.testing.assert_close(one, all_of_them[:, -1:], rtol=1e-5, atol=1e-6)
    assert [cache.get_seq_length(layers - 1) for cache in caches] == [LENGTH + 3] * 2


@pytest.mark.parametrize("n", [1, 4])
def test_the_work_that_is_left_out(n):
    def flops(**options):
        given = inputs(batch=1)
        with FlopCounterMode(display=False) as counter:
            model(**given, **options)
        return counter.get_total_flops()

    model = decoder(attention="eager")  # that of sdpa is not counted on a CPU
    heads = HEADS * HEAD
    # Query, its part of the scores and of the weighted sum, output projection; three feed-forward matrices.
    per_position = 2 * (2 * WIDTH * heads + 2 * LENGTH * heads + 3 * WIDTH * INNER)
    assert flops() - flops(last_outputs=n) == (LENGTH - n) * per_position


def test_only_the_last_layer_differs_and_copies_are_their_own():
    model = decoder(layers=3)
    skip_unread_outputs_(model)  # again
    assert [isinstance(layer.self_attn, LastAttention) for layer in model.layers] == [False, False, True]
    assert model.state_dict().keys() == decoder(layers=3, skips=False).state_dict().keys()
    twin = copy.deepcopy(model)
    given = inputs()
    with torch.no_grad():
        before = model(**given, last_outputs=2).last_hidden_state
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(**given, last_outputs=2).last_hidden_state, before)


def test_adaptive_norms_are_left_alone():
    """Their gates, which only pi0.5 has, are not part of the short layer."""
    config = decoder(skips=False).config
    config.use_adarms, config.adarms_cond_dim = True, 4
    model = PiGemmaModel(config)
    skip_unread_outputs_(model)
    given = inputs() | {"adarms_cond": torch.ones(2, 4)}
    with torch.no_grad():
        assert model(**given, last_outputs=2).last_hidden_state.shape[1] == LENGTH


def test_the_decoder_of_a_policy_is_changed():
    directory = teacher_directory("blocks")
    policy = build_policy(load_policy_config(directory), directory)
    decoders = [module for module in policy.modules() if isinstance(module, PiGemmaModel)]
    assert decoders
    assert all(isinstance(each.layers[-1].self_attn, LastAttention) for each in decoders)
