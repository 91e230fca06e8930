"""Memory models of the engines on a handwritten pass of two units."""

from dataclasses import replace

import pytest

from craft_ds.memory_planner.engine_models import make_memory_model
from craft_ds.memory_planner.engine_options import EngineOptions
from craft_ds.memory_planner.shapes import Unit
from craft_ds.memory_planner.simulate import Event, PassTrace

FIRST, SECOND, ROOT = 0, 1, 2


@pytest.fixture
def trace():
    units = (Unit("a", (100,)), Unit("b", (300,)), Unit("", (10,)))
    kinds = [
        ("start", -1, 0),
        ("forward", FIRST, 0),
        ("forward_end", FIRST, 0),
        ("forward", SECOND, 0),
        ("forward_end", SECOND, 0),
        ("backward", SECOND, 0),
        ("gradient", SECOND, 300),
        ("backward", FIRST, 0),
        ("gradient", FIRST, 100),
        ("gradient", ROOT, 10),
        ("end", -1, 0),
    ]
    return PassTrace(units, tuple(Event(kind, unit, numel, 0, 0) for kind, unit, numel in kinds), 0)


def held(trace, **options):
    """Return the elements held after each event and their maximum, of a pass in fp32."""
    model = make_memory_model(trace, EngineOptions(**options))
    answers = [model.on(event) for event in trace.events]
    return [steady // 4 for _, steady in answers], max(most for most, _ in answers) // 4, model.gradient // 4


def test_one_process_only_accumulates_its_gradient(trace):
    steady, most, gradient = held(trace, engine="single", ranks=1)
    assert (set(steady), most, gradient) == ({0}, 0, 410)


def test_fsdp_holds_the_root_the_current_and_the_next_unit(trace):
    steady, most, gradient = held(trace, engine="fsdp", ranks=2)
    # root; a; freed; b; freed; b and a ahead; b reduced: its flat gradient beside a; a; a reduced; root; end
    assert steady == [10, 110, 10, 310, 10, 410, 10 + 100 + 300, 410, 10 + 100, 10, 0]
    # b's gradient, its flat copy and its shard, when b's parameters are free again.
    assert most == max(10 + 300 + 300, 10 + 100 + 300 + 300 + 150)
    assert gradient == 410 // 2


def test_fsdp_without_reshard_keeps_units_until_backward(trace):
    steady, _, _ = held(trace, engine="fsdp", ranks=2, reshard_after_forward=False)
    assert steady[:6] == [10, 110, 110, 410, 410, 410]


def test_fsdp_gathers_head_and_embedding_once(trace):
    embedding, head, root = trace.units
    units = (replace(embedding, only_looks_up=True), replace(head, ends_forward=True), root)
    steady, _, _ = held(replace(trace, units=units), engine="fsdp", ranks=2)
    # As above, but the head stays from forward to backward, and the embedding is not gathered again.
    assert steady == [10, 110, 10, 310, 310, 310, 10 + 300, 310, 10 + 100, 10, 0]


def test_zero3_keeps_parameters_that_are_reused_soon(trace):
    options = {"engine": "zero3", "ranks": 2, "persistence": 0, "prefetch": 0}
    assert held(trace, **options)[0][:6] == [0, 100, 100, 400, 400, 400]
    # b is used again at once, a only after b has run twice.
    assert held(trace, **options, max_reuse=600)[0][:5] == [0, 100, 0, 300, 300]


def test_zero3_copies_prefetched_parameters_from_a_buffer(trace):
    options = {"engine": "zero3", "ranks": 2, "persistence": 0}
    units = (Unit("a", (100,)), Unit("b", (150, 150)), trace.units[ROOT])
    steady, most, _ = held(replace(trace, units=units), **options)
    assert steady[:4] == [0, 100 + 300, 100 + 300, 100 + 300]
    assert most == 100 + 2 * 300
    # A parameter that is prefetched alone is gathered in place.
    assert held(trace, **options, reduce_bucket=1000)[1] == 410
    # No room to ask for more.
    assert held(trace, **options, max_live=100)[0][:4] == [0, 100, 100, 400]


def test_zero3_keeps_prefetched_parameters(trace):
    options = {"engine": "zero3", "ranks": 2, "persistence": 0, "max_reuse": 600}
    assert held(trace, **options)[0][:5] == [0, 400, 400, 400, 400]
    # With room for b alone, the backward pass of a is not seen in time: a is prefetched again.
    assert held(trace, **options, prefetch=300)[0][:5] == [0, 400, 300, 400, 400]


def test_zero3_reduces_when_the_bucket_is_full(trace):
    options = {"engine": "zero3", "ranks": 2, "persistence": 1000}
    assert held(trace, **options, reduce_bucket=1000)[1] == 410
    assert held(trace, **options, reduce_bucket=300)[1] == 300


@pytest.mark.parametrize("engine", ["fsdp", "zero3"])
def test_a_frozen_unit_is_freed_when_the_next_starts(trace, engine):
    units = (trace.units[FIRST], Unit("b", (), (300,)), trace.units[ROOT])
    events = tuple(event for event in trace.events if (event.kind, event.unit) != ("gradient", SECOND))
    steady, _, _ = held(replace(trace, units=units, events=events), engine=engine, ranks=2, persistence=0)
    before, after = (
        events.index(Event("backward", SECOND, 0, 0, 0)),
        events.index(Event("backward", FIRST, 0, 0, 0)),
    )
    assert steady[before] >= 400
    assert steady[after] <= 110


def test_zero3_frees_a_unit_without_a_gradient(trace):
    units = (Unit("a", (), (100,)), *trace.units[SECOND:])
    events = tuple(
        event for event in trace.events if event.unit != FIRST or event.kind in ("forward", "forward_end")
    )
    trace = replace(trace, units=units, events=events)
    options = {"engine": "zero3", "ranks": 2, "persistence": 0, "prefetch": 0}
    assert held(trace, **options)[0][:5] == [0, 100, 0, 300, 300]
    # Nothing else runs between the two passes of b, however short the distance may be.
    assert held(trace, **options, max_reuse=1)[0][4] == 300


def test_zero2_gathers_nothing(trace):
    steady, _, _ = held(trace, engine="zero2", ranks=2)
    assert set(steady) == {0}
