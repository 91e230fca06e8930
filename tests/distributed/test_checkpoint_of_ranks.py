"""All engines write the same checkpoint, and a resumed run continues exactly."""

import pytest
import torch
from registry import LOADED, Ranks, every
from safetensors.torch import load_file
from test_parity import assert_close_overall, of


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


def check_file(result, directory):
    assert_same(in_file(directory), renamed(result, "saved"))


def check_loaded(result):
    assert_same(renamed(result, "loaded"), renamed(result, "saved"))
    assert result.values[0]["loaded"] == [None, {"multiplier": 1.5}, 3]


def check_resumed(result):
    uninterrupted = renamed(result, "unbroken")
    assert_same(renamed(result, "resumed"), uninterrupted)
    saved = renamed(result, "saved")
    assert any(not tensor.equal(saved[name]) for name, tensor in uninterrupted.items())


def test_one_process_saves_and_resumes(reference):
    result = reference["save_and_resume"]
    check_file(result, reference.lab.scratch / "single_on1")
    check_loaded(result)
    check_resumed(result)


@every("save_and_resume")
def test_the_file_has_the_values_of_the_ranks(ranks, name):
    check_file(ranks[name], ranks.scratch / f"{ranks.kind}_on{ranks.world_size}")


@every("save_and_resume")
def test_loading_gives_the_same_bits(ranks, name):
    check_loaded(ranks[name])


@every("save_and_resume")
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(ranks, name):
    check_resumed(ranks[name])


def check_continued(result, written):
    assert_same(renamed(result, "loaded"), renamed(written, "saved"))
    uninterrupted = renamed(written, "unbroken")
    continued = renamed(result, "continued")
    assert_close_overall(continued, {name: uninterrupted[name] for name in continued})


def written_by(spawner, directory):
    kind, world_size = directory.split("_on")
    return spawner(Ranks(kind, int(world_size)))["save_and_resume"]


@every(*(f"load_{directory}" for directory in LOADED))
def test_another_engine_or_number_of_ranks_resumes(ranks, name, spawner):
    check_continued(ranks[name], written_by(spawner, name.removeprefix("load_")))


@pytest.mark.parametrize("directory", LOADED)
def test_one_process_resumes(reference, spawner, directory):
    written = written_by(spawner, directory)
    check_continued(reference[f"load_{directory}"], written)
