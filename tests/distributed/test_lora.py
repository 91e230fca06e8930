"""Adapters in every engine: they train as in one process, nothing else trains, and they resume."""

import pytest
import torch
from registry import LORA_LOADED, Ranks, every
from safetensors.torch import load_file
from scenarios import FOLLOWED_BY
from test_checkpoint_of_ranks import assert_same, renamed
from test_parity import assert_close_overall, assert_surgery_close, assert_values_close, of

from craft_ds.lora.adapters import base_name
from craft_ds.policies.loading import build_policy, load_policy_config
from craft_ds.policies.weights import WeightReader

KINDS = ("lora-plain", "lora-dora", "lora-mixed", "lora-vision", "lora-recompute")


@every(*(f"lora-surgery-{mode}" for mode in FOLLOWED_BY))
def test_surgery_sees_the_adapters_alone(ranks, name, reference):
    found, expected = ranks[name], reference[name]
    assert_surgery_close(found, expected)
    assert all("lora_" in key for key in found.tensors)
    assert_close_overall(found.tensors, expected.tensors)


@every(*KINDS)
def test_adapters_after_five_steps(ranks, name, reference):
    found, expected = ranks[name], reference[name]
    assert_close_overall(of(found, "parameters"), of(expected, "parameters"))
    assert_close_overall(of(found, "moments"), of(expected, "moments"))
    assert_values_close(found, expected)


@every(*KINDS)
def test_nothing_else_trains(ranks, name, reference):
    found = ranks[name]
    for values in found.values:
        assert values["frozen"] == []
        assert values["trains"] == values["keys"] == reference[name].values[0]["trains"]
    check_base(found, reference)


@every(*KINDS)
def test_every_adapter_moved(ranks, name, reference):
    scratch = reference.lab.scratch
    kind = name.removeprefix("lora-").replace("recompute", "plain")
    stored_adapters = load_file(scratch / f"adapters_{kind}" / "adapter_model.safetensors")
    assert len(stored_adapters) == len(of(ranks[name], "parameters"))
    for key, tensor in of(ranks[name], "parameters").items():
        parameter = key.removeprefix("parameters/").replace(".default.weight", ".weight")
        stored = f"base_model.model.{parameter}".replace("magnitude_vector.weight", "magnitude_vector")
        assert not torch.equal(stored_adapters[stored].flatten(), tensor), key


def check_base(result, reference, prefix="frozen"):
    """Every frozen value equals the base policy's bit by bit."""
    policy_dir = reference.lab.policy_dir
    policy = build_policy(load_policy_config(policy_dir), policy_dir)
    checked = 0
    with WeightReader(policy_dir, policy) as weights:
        for key, tensor in of(result, prefix).items():
            name = key.removeprefix(f"{prefix}/")
            if "lora_" in name or name.endswith((".exp_avg", ".exp_avg_sq")):
                continue
            base = weights.read(base_name(name), 0, tensor.numel())
            assert torch.equal(base, tensor), name
            checked += 1
    assert checked > 20


@every("lora-bf16")
def test_a_bf16_base_with_fp32_adapters(ranks, name, reference):
    """Bounds are three times what was measured."""
    found, exact = ranks[name], reference["lora-plain"]
    for values in found.values:
        assert values["forward_dtypes"] == ["torch.bfloat16"]
        assert values["frozen_dtypes"] == ["torch.bfloat16"]
        assert values["master_dtypes"] == ["torch.float32"]
        assert values["frozen"] == []
    assert_close_overall(of(found, "parameters"), of(exact, "parameters"), 1e-2)
    assert_values_close(found, exact, tolerance=0.05)


def test_a_bf16_base_on_one_process(reference):
    values = reference["lora-bf16"].values[0]
    # Its adapters are fp32 in memory; autocast casts them as they are used.
    assert values["forward_dtypes"] == ["torch.bfloat16", "torch.float32"]
    assert values["frozen_dtypes"] == ["torch.bfloat16"]
    assert values["master_dtypes"] == ["torch.float32"]


def check_resumed(result):
    """The two steps after the checkpoint repeat bit by bit, and they have an effect."""
    unbroken, saved = renamed(result, "unbroken"), renamed(result, "saved")
    assert_same(renamed(result, "resumed"), unbroken)
    assert all(not torch.equal(unbroken[name], tensor) for name, tensor in saved.items())


def in_files(directory, keys):
    """Return the content of the files, by the policy's names."""
    adapters = load_file(directory / "adapter_model.safetensors")
    moments = load_file(directory / "optimizer.safetensors")
    assert adapters.keys() == set(keys.values())
    found = {name: adapters[key].flatten() for name, key in keys.items()}
    for name, key in keys.items():
        for moment in ("exp_avg", "exp_avg_sq"):
            found[f"{name}.{moment}"] = moments[f"{key}.{moment}"].flatten()
    assert len(moments) == 2 * len(keys)  # and nothing of the base
    return found


def check_files(result, directory):
    assert not (directory / "model.safetensors").exists()
    found = in_files(directory, result.values[0]["keys"])
    assert_same(found, renamed(result, "saved"))
    assert all(tensor.numel() and tensor.any() for tensor in found.values())


def test_one_process_saves_and_resumes_adapters(reference):
    result = reference["lora-resume"]
    check_files(result, reference.lab.scratch / "lora_single_on1")
    check_resumed(result)


@every("lora-resume")
def test_the_files_hold_the_live_adapters(ranks, name):
    check_files(ranks[name], ranks.scratch / f"lora_{ranks.kind}_on{ranks.world_size}")


@every("lora-resume")
def test_new_adapters_begin_the_same_on_any_number_of_ranks(ranks, name, reference):
    assert_same(renamed(ranks[name], "initial"), renamed(reference[name], "initial"))


@every("lora-resume")
def test_resuming_adapters_is_exact(ranks, name, reference):
    result = ranks[name]
    assert_same(renamed(result, "loaded"), renamed(result, "saved"))
    assert result.values[0]["loaded"] == [None, {"multiplier": 1.5}, 3]
    check_resumed(result)
    check_base(result, reference, "resumed")


def check_continued(result, written, reference):
    assert_same(renamed(result, "loaded"), renamed(written, "saved"))
    assert_close_overall(renamed(result, "resumed"), renamed(written, "unbroken"))
    check_base(result, reference, "resumed")


@every(*(f"lora-load_{directory}" for directory in LORA_LOADED))
def test_another_engine_goes_on_with_the_adapters(ranks, name, spawner, reference):
    kind, world_size = name.removeprefix("lora-load_").split("_on")
    assert (kind, int(world_size)) != (ranks.kind, ranks.world_size)
    check_continued(ranks[name], spawner(Ranks(kind, int(world_size)))["lora-resume"], reference)


@pytest.mark.parametrize("directory", LORA_LOADED)
def test_one_process_goes_on_with_the_adapters(directory, spawner, reference):
    kind, world_size = directory.split("_on")
    written = spawner(Ranks(kind, int(world_size)))["lora-resume"]
    check_continued(reference[f"lora-load_{directory}"], written, reference)


@every("lora-costs")
def test_a_retention_step_adds_one_gradient_of_the_adapters(ranks, name):
    # FSDP2 shards by rows: the last rank has few rows of small adapters, but also its temporaries.
    shard = max(values["shard"] for values in ranks[name].values)
    for values in ranks[name].values:
        assert values["adapters"] < 0.1 * values["model"]
        assert values["retention"] - values["plain"] <= 1.3 * shard


@every("lora-costs")
def test_only_the_adapters_gradients_travel(ranks, name):
    for values in ranks[name].values:
        # A reduce-scatter is counted with what goes in and what comes out, padded.
        assert 0.5 * values["adapters"] < values["reduced"] < 2.5 * values["adapters"]
