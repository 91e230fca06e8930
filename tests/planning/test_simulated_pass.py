"""What the planner simulates is what PyTorch does: the same bytes, to the last one."""

from contextlib import nullcontext

import pytest
import torch
from lerobot.policies.act.configuration_act import ACTConfig
from planning_small import WORKLOAD, full_batch, read, small_config

from craft_ds.activation_checkpointing import checkpoint_activations
from craft_ds.errors import UserError
from craft_ds.memory_counter import MemoryCounter
from craft_ds.planning.rhythm import SingleRhythm
from craft_ds.planning.shapes import Lora, Workload, skeleton_without_tokenizers
from craft_ds.planning.simulate import simulate_pass
from craft_ds.policies.adapter import token_loss
from craft_ds.policies.skeleton import materialize_
from craft_ds.policies.weights import unique_tensors
from craft_ds.tensor_file import fill_


def real_peak(config, *, autocast=False, checkpointing=False):
    """The most bytes that a real pass has alive, gradients included."""
    policy = skeleton_without_tokenizers(config).train()
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
    """The same of a simulated pass: gradients grow beside it."""
    rhythm, peak = SingleRhythm(), 0
    for event in trace.events:
        rhythm.on(event)
        peak = max(peak, event.peak + rhythm.gradient)
    return peak


@pytest.mark.parametrize("cameras", [1, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_simulated_pass_takes_what_the_real_one_takes(cameras, checkpointing, autocast):
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


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    def kept(count, **options):
        return simulate_pass(small_config(), Workload(count, 40, 20), **options).kept

    assert kept(6) == pytest.approx(2 * kept(3), rel=0.05)
    assert kept(3, checkpointing=True) < 0.5 * kept(3)


def test_every_gradient_is_seen_once():
    trace = simulate_pass(small_config(), WORKLOAD)
    assert sum(event.numel for event in trace.events) == trace.trainable
    assert trace.frozen == 0
    assert trace.trainable == sum(unit.numel for unit in trace.units)


def test_lora_freezes_the_base_and_trains_rank_times_the_sides_of_each_target():
    base, rank = simulate_pass(small_config(), WORKLOAD), 4
    lora = simulate_pass(small_config(), WORKLOAD, lora=Lora(rank, mlp=False))
    heads, width, head = 4, 64, 16
    sides = (width + heads * head) + 2 * (width + head) + (heads * head + width)
    assert lora.trainable == 2 * rank * sides
    assert lora.frozen == base.trainable
    assert sum(event.numel for event in lora.events) == lora.trainable


def test_a_policy_whose_batches_are_unknown_is_refused():
    with pytest.raises(UserError, match="act"):
        simulate_pass(ACTConfig(device="cpu"), WORKLOAD)
