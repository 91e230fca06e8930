"""Read the output of a run for comparison."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict]:
    """Return the logged metrics without time and memory."""
    rows = [
        {key: value for key, value in row.items() if key.split("/")[0] not in ("time", "memory")}
        for row in metrics(run)
    ]
    return [row for row in rows if row.keys() != {"step"}]


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in metrics(run) if "train/loss" in row]


def trained(checkpoint: Path) -> dict[str, Tensor]:
    """Parameters and moments."""
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def assert_same_bits(found: Path, expected: Path) -> None:
    """Two checkpoints hold the same parameters, moments, schedule, λ and history."""
    one, other = trained(found), trained(expected)
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert torch.equal(one[name], tensor), name
    assert_same_state(found, expected)


def assert_same_state(found: Path, expected: Path) -> None:
    """Two checkpoints hold the same schedule, λ and history."""
    for name in ("craft_state.pt", "scheduler.pt"):
        states = [torch.load(checkpoint / name, weights_only=True) for checkpoint in (found, expected)]
        assert repr(states[0]) == repr(states[1]), name  # NaN is not equal to itself


def assert_same_bits_of_adapters(found: Path, expected: Path) -> None:
    """As `assert_same_bits`, for checkpoints of adapters."""
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        one, other = load_file(found / file), load_file(expected / file)
        assert one.keys() == other.keys()
        for name, tensor in other.items():
            assert torch.equal(one[name], tensor), name
    assert_same_state(found, expected)


def assert_trained(checkpoint: Path, policy: Path) -> None:
    """Assert that the parameters differ from the policy's."""
    weights, initial = load_file(checkpoint / "model.safetensors"), load_file(policy / "model.safetensors")
    assert weights.keys() == initial.keys()
    assert any(not torch.equal(weights[name], initial[name]) for name in initial)
