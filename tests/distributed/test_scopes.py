"""Every sharded engine gives the numbers of one process by layer and by task."""

import math

import pytest
from registry import every
from scenarios_scopes import SOME
from test_parity import (
    assert_close,
    assert_close_overall,
    assert_surgery_close,
    assert_training_close,
    assert_values_close,
    of,
)
from toy import samples

from craft_ds.algorithm.layers import layer_of


@every("layers")
def test_surgery_by_layer(ranks, name, reference):
    assert_surgery_close(ranks[name], reference[name])
    assert_close(ranks[name].tensors, reference[name].tensors)


@every("layers-bf16")
def test_surgery_by_layer_in_bf16(ranks, name, reference):
    """ZeRO-2 accumulates in another place then; parts of other parameters would be off by their full size."""
    found, exact = ranks[name], reference["layers"]
    assert_close_overall(found.tensors, exact.tensors, 0.03)
    assert {values["merge"][6] for values in found.values} == {exact.values[0]["merge"][6]}


def test_each_layer_is_projected_by_itself(reference):
    """One process against the definition, from the gradients of the two passes."""
    passes, merged = reference["untouched"].tensors, reference["layers"]
    tokens = [int(samples(0, retention=retention)["mask"].sum()) for retention in (False, True)]
    layers: dict[str, list[str]] = {}
    for key in of(reference["untouched"], "task"):
        parameter = key.removeprefix("task/")
        layers.setdefault(layer_of(parameter), []).append(parameter)
    conflicts, squares = 0, 0.0
    for names in layers.values():
        g_t, g_r = (
            [passes[f"{kind}/{one}"].double() / count for one in names]
            for kind, count in zip(("task", "retention"), tokens, strict=True)
        )
        tt, tr, rr = (
            sum(float(x @ y) for x, y in zip(*pair, strict=True))
            for pair in ((g_t, g_t), (g_t, g_r), (g_r, g_r))
        )
        conflict = bool(tt and rr) and tr / math.sqrt(tt * rr) < SOME
        conflicts += conflict
        b = 0.7 - (tr / rr if conflict else 0.0)
        expected = {f"merged/{one}": t + b * r for one, t, r in zip(names, g_t, g_r, strict=True)}
        assert_close({key: merged.tensors[key] for key in expected}, expected)
        squares += sum(float(tensor @ tensor) for tensor in expected.values())
    _, _, _, _, norm, _, share = merged.values[0]["merge"]
    assert norm == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert share == conflicts / len(layers)
    assert 0 < conflicts < len(layers)


@every("scopes")
def test_steps_by_layer_and_task(ranks, name, reference):
    assert_training_close(ranks, ranks[name], reference[name])


@every("buffer-cpu")
def test_g_t_in_host_memory(ranks, name, reference):
    """Against the reference that keeps it on the device."""
    assert_surgery_close(ranks[name], reference["layers"])
    assert_close(ranks[name].tensors, reference["layers"].tensors)


@every("buffer-bf16")
def test_g_t_in_bf16(ranks, name, reference):
    """Against the reference that keeps it in fp32; it is rounded to 8 bits, and nothing else is."""
    found, exact = ranks[name], reference["surgery-weighted-conflict"]
    assert_close_overall(found.tensors, exact.tensors, 2**-9)
    with pytest.raises(AssertionError):
        assert_close_overall(found.tensors, exact.tensors, 2**-13)
    for values in found.values:
        tt, tr, rr = values["triple"]
        exact_tt, exact_tr, exact_rr = exact.values[0]["triple"]
        assert rr == pytest.approx(exact_rr, rel=1e-6)
        assert tt == pytest.approx(exact_tt, rel=2**-8)
        assert tr == pytest.approx(exact_tr, abs=2**-8 * math.sqrt(exact_tt * exact_rr))


@every("joint")
def test_both_losses_in_one_gradient(ranks, name, reference):
    """Against the reference's steps with two gradients."""
    assert_training_close(ranks, ranks[name], reference[name])


@every("joint-bf16")
def test_both_losses_in_one_gradient_in_bf16(ranks, name, reference):
    assert_close_overall(of(ranks[name], "parameters"), of(reference["joint"], "parameters"), 0.03)


@every("lora-scopes")
def test_adapters_by_layer_and_task(ranks, name, reference):
    found, expected = ranks[name], reference[name]
    assert_close_overall(of(found, "parameters"), of(expected, "parameters"))
    assert_close_overall(of(found, "moments"), of(expected, "moments"))
    assert_values_close(found, expected)
