"""Penalties in every engine: the numbers of one process, and a resumed run that continues exactly."""

import pytest
import torch
from registry import Ranks, every
from test_checkpoint_of_ranks import assert_same, renamed
from test_parity import (
    TOLERANCE,
    assert_close_overall,
    assert_training_close,
    assert_values_close,
    of,
    relative_error,
)


@every("penalty-ewc", "penalty-l2")
def test_penalised_steps(ranks, name, reference):
    assert_training_close(ranks, ranks[name], reference[name])


@pytest.mark.parametrize("name", ["penalty-ewc", "penalty-l2"])
def test_the_penalty_has_an_effect(reference, name):
    """A parameter that both losses use moves otherwise than without a penalty."""
    found, plain = of(reference[name], "parameters"), reference["trajectory-accumulate2-clipped"]
    moved = {
        key.removeprefix("parameters/"): relative_error(tensor, plain.tensors[key])
        for key, tensor in found.items()
    }
    assert moved["outer.weight"] > 100 * TOLERANCE
    losses = [values[2] for key, values in reference[name].values[0].items() if key.startswith("step")]
    assert losses[0] == 0.0
    assert min(losses[1:]) > 0.0


@every("penalty-bf16")
def test_masters_are_aligned_with_bf16_gradients(ranks, name, reference):
    """Bounds are those of `test_bf16_stays_near_the_reference`."""
    found, exact = ranks[name], reference["penalty-ewc"]
    assert_close_overall(of(found, "parameters"), of(exact, "parameters"), 2.5e-3)
    assert_close_overall(of(found, "moments"), of(exact, "moments"), 1e-2)
    assert_values_close(found, exact, tolerance=0.05)


@every("lora-penalty")
def test_penalised_adapters(ranks, name, reference):
    found, expected = ranks[name], reference[name]
    assert_close_overall(of(found, "parameters"), of(expected, "parameters"))
    assert_close_overall(of(found, "moments"), of(expected, "moments"))
    assert_values_close(found, expected)


def test_one_process_resumes_with_its_penalty(reference):
    result = reference["penalty-resume"]
    assert_same(renamed(result, "resumed"), renamed(result, "unbroken"))


@every("penalty-resume")
def test_a_resumed_penalty_is_exact(ranks, name, reference):
    """And so is the moving average of the weights."""
    result = ranks[name]
    averages = [key for key in of(result, "unbroken") if key.endswith(".ema")]
    assert averages
    for key in averages:  # neither the start nor the end
        assert not torch.equal(result.tensors[key], result.tensors[key.removesuffix(".ema")])
    assert_same(renamed(result, "resumed"), renamed(result, "unbroken"))
    expected = reference[name]
    assert_close_overall(of(result, "unbroken"), of(expected, "unbroken"))
    assert_values_close(result, expected)


@every(*(f"penalty-load_{directory}" for directory in ("zero2_on2", "zero3_on2", "fsdp_on2")))
def test_another_engine_or_number_of_ranks_resumes_with_the_penalty(ranks, name, spawner):
    kind, world_size = name.removeprefix("penalty-load_").split("_on")
    written = spawner(Ranks(kind, int(world_size)))["penalty-resume"]
    assert_close_overall(renamed(ranks[name], "resumed"), renamed(written, "unbroken"))
