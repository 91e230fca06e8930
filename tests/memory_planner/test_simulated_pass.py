"""The simulated pass takes exactly the bytes of the real pass."""

from contextlib import nullcontext

import pytest
import torch
from lerobot.policies.act.configuration_act import ACTConfig
from small_policies import WORKLOAD, full_batch, read, small_config

from craft_ds.config.configs import LoraConfig
from craft_ds.engines.activation_checkpointing import checkpoint_activations
from craft_ds.errors import UserError
from craft_ds.lora.adapters import add_adapters
from craft_ds.lora.peft_config import make_peft_config
from craft_ds.memory_planner.engine_models import SingleMemoryModel
from craft_ds.memory_planner.shapes import Workload, meta_policy_without_tokenizers
from craft_ds.memory_planner.simulate import simulate_pass
from craft_ds.memory_planner.tensor_memory import MemoryCounter
from craft_ds.policies.meta_init import materialize_
from craft_ds.policies.token_loss import token_loss
from craft_ds.policies.weights import unique_tensors
from craft_ds.tensor_io.tensor_file import fill_


def real_peak(config, *, autocast=False, checkpointing=False, lora=None):
    """Return the peak bytes of a real pass, gradients included."""
    policy = meta_policy_without_tokenizers(config)
    if lora:
        add_adapters(policy, make_peft_config(lora, config, base_path=""))
        for parameter in policy.parameters():
            if autocast and not parameter.requires_grad:
                parameter.data = parameter.to(torch.bfloat16)
    policy.train()
    if checkpointing:
        checkpoint_activations(policy)
    materialize_(policy, "cpu")
    with torch.no_grad():
        for name, tensor in unique_tensors(policy).items():
            fill_(tensor.view(-1), read, name, 0)
    batch = full_batch(config)
    with MemoryCounter() as counter:
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = token_loss(policy, batch)
        loss.total.backward()
    return counter.peak


def simulated_peak(trace):
    """Return the peak bytes of a simulated pass plus its gradients."""
    model, peak = SingleMemoryModel(), 0
    for event in trace.events:
        model.on(event)
        peak = max(peak, event.peak + model.gradient)
    return peak


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_simulated_pass_equals_the_real_one(cameras, checkpointing, autocast):
    config = small_config(cameras)
    trace = simulate_pass(
        config,
        WORKLOAD,
        dtype=torch.bfloat16 if autocast else torch.float32,
        autocast=autocast,
        checkpointing=checkpointing,
    )
    expected = real_peak(config, autocast=autocast, checkpointing=checkpointing)
    assert simulated_peak(trace) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("preset", ["attention", "attention_mlp_vision"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_simulated_pass_equals_the_real_one_with_adapters(preset, autocast):
    config, lora = small_config(), LoraConfig(True, preset)
    dtype = torch.bfloat16 if autocast else torch.float32
    trace = simulate_pass(config, WORKLOAD, dtype=dtype, autocast=autocast, lora=lora)
    assert simulated_peak(trace) == pytest.approx(real_peak(config, autocast=autocast, lora=lora), rel=1e-3)


def test_zero3_also_keeps_the_inputs_of_frozen_layers():
    def kept(**options):
        return simulate_pass(small_config(), WORKLOAD, **options).kept

    attention = LoraConfig(True, "attention")
    config, tokens = small_config(), 3 * (16 + 40 + 19)
    # The queries of the last layer read a part of its input, which only torch's own linear layer copies.
    in_last = 4 * 3 * 19 * config.text_width
    assert kept() - kept(zero3=True) == in_last
    # Without adapters there, what gate and up read; what down reads is computed again.
    mlp = (config.text_depth - 1) * 4 * tokens * config.text_width + in_last
    assert kept(zero3=True, lora=attention) - kept(lora=attention) >= mlp


def test_activations_grow_with_the_batch():
    def kept(count, **options):
        return simulate_pass(small_config(), Workload(count, 40, 20), **options).kept

    assert kept(6) == pytest.approx(2 * kept(3), rel=0.05)
    assert kept(3, checkpointing=True) < 0.5 * kept(3)


def test_every_gradient_is_recorded_once():
    trace = simulate_pass(small_config(), WORKLOAD)
    assert sum(event.numel for event in trace.events) == trace.trainable
    assert trace.frozen == 0
    assert trace.trainable == sum(unit.numel for unit in trace.units)


def test_lora_freezes_the_base_and_trains_the_adapters():
    base, rank = simulate_pass(small_config(), WORKLOAD), 4
    lora = simulate_pass(small_config(), WORKLOAD, lora=LoraConfig(True, "attention", rank=rank))
    heads, width, head = 4, 64, 16
    sides = (width + heads * head) + 2 * (width + head) + (heads * head + width)
    assert lora.trainable == 2 * rank * sides
    assert lora.frozen == base.trainable
    assert sum(event.numel for event in lora.events) == lora.trainable


def test_each_preset_trains_more_than_the_previous():
    presets = ("attention", "attention_mlp", "attention_mlp_vision")
    traces = [simulate_pass(small_config(), WORKLOAD, lora=LoraConfig(True, preset)) for preset in presets]
    trainable = [trace.trainable for trace in traces]
    assert sorted(set(trainable)) == trainable
    assert len({trace.frozen for trace in traces}) == 1
    default = simulate_pass(small_config(), WORKLOAD, lora=LoraConfig(True))
    assert default.trainable == trainable[1]


def test_an_unknown_preset_is_refused():
    with pytest.raises(UserError, match="attention_mlp_vision"):
        simulate_pass(small_config(), WORKLOAD, lora=LoraConfig(True, "nonsense"))


def test_a_policy_with_unknown_batches_is_refused():
    with pytest.raises(UserError, match="act"):
        simulate_pass(ACTConfig(device="cpu"), WORKLOAD)
