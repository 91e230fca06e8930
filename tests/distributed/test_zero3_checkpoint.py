"""A checkpoint is the same file whatever wrote it, and goes on as if nothing had happened."""

import pytest
import torch
from safetensors.torch import load_file
from test_zero3_parity import assert_close_overall, of


def in_file(directory):
    weights = load_file(directory / "model.safetensors")
    moments = load_file(directory / "optimizer.safetensors")
    return {name: tensor.flatten() for name, tensor in (weights | moments).items()}


def renamed(result, prefix):
    return {name.removeprefix(f"{prefix}/"): tensor for name, tensor in of(result, prefix).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture(params=["reference", "two_ranks", "three_ranks"])
def any_ranks(request):
    return request.getfixturevalue(request.param)


def test_the_file_holds_what_the_ranks_held(any_ranks):
    saved = renamed(any_ranks["save_and_resume"], "saved")
    assert_same(in_file(any_ranks.lab.scratch / f"from{any_ranks.world_size}"), saved)


def test_loading_gives_the_same_bits(any_ranks):
    result = any_ranks["save_and_resume"]
    assert_same(renamed(result, "loaded"), renamed(result, "saved"))
    assert result.values[0]["loaded"] == [None, {"multiplier": 1.5}, 3]


def test_a_resumed_run_equals_an_unbroken_one_bit_by_bit(any_ranks):
    result = any_ranks["save_and_resume"]
    unbroken = renamed(result, "unbroken")
    assert_same(renamed(result, "resumed"), unbroken)
    saved = renamed(result, "saved")
    assert any(not tensor.equal(saved[name]) for name, tensor in unbroken.items())


@pytest.mark.parametrize(
    ("written_by", "read_by"),
    [("two_ranks", "three_ranks"), ("two_ranks", "reference"), ("three_ranks", "reference")],
)
def test_another_number_of_ranks_goes_on(written_by, read_by, request):
    written, reading = request.getfixturevalue(written_by), request.getfixturevalue(read_by)
    result = reading[f"load_from{written.world_size}"]
    assert_same(renamed(result, "loaded"), renamed(written["save_and_resume"], "saved"))
    unbroken = renamed(written["save_and_resume"], "unbroken")
    continued = renamed(result, "continued")
    assert_close_overall(continued, {name: unbroken[name] for name in continued})
