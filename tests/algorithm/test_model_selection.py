"""Choice of a checkpoint by its evaluations, against the definition, and the early stop."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craft_ds.algorithm.model_selection import (
    EvalRecord,
    best_record,
    describe_stall,
    evaluations_since_best,
    is_stalled,
)

# Few values, so that ties and exact equality with ε are frequent.
losses = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 1.0]) | st.floats(0, 5)
numbers = losses | st.sampled_from([math.nan, math.inf])
constrained = st.lists(st.tuples(numbers, numbers, losses), max_size=8).map(
    lambda rows: [EvalRecord(step, *row) for step, row in enumerate(rows)]
)
plain = st.lists(numbers, max_size=8).map(
    lambda rows: [EvalRecord(step, loss) for step, loss in enumerate(rows)]
)


def finite(records):
    return [
        record
        for record in records
        if math.isfinite(record.task_loss) and math.isfinite(record.retention_loss or 0.0)
    ]


@given(constrained)
def test_the_best_satisfies_the_constraint_if_any_does(records):
    best, candidates = best_record(records), finite(records)
    feasible = [record for record in candidates if record.retention_loss <= record.epsilon]
    assert (best is None) == (not candidates)
    if feasible:
        assert best in feasible
        assert best.task_loss == min(record.task_loss for record in feasible)
    elif candidates:
        excess = [record.retention_loss - record.epsilon for record in candidates]
        assert best.retention_loss - best.epsilon == min(excess)


@given(plain)
def test_a_baseline_has_the_lowest_task_loss(records):
    best, candidates = best_record(records), finite(records)
    if not candidates:
        assert best is None
    else:
        assert best == min(candidates, key=lambda record: (record.task_loss, record.step))


@given(constrained | plain, st.randoms())
def test_the_choice_is_the_same_where_others_were_deleted(records, draw):
    """A run keeps its best checkpoint and the newest ones only."""
    kept = []
    for record in records:
        kept.append(record)
        best = best_record(kept)
        kept = [one for one in kept if one is best or draw.random() < 0.5]
    assert best_record(kept) == best_record(records)
    shuffled = draw.sample(records, len(records))
    assert best_record(shuffled) == best_record(records)


@pytest.mark.parametrize(
    ("records", "step"),
    [
        ([(0.9, 0.30, 0.35), (0.5, 0.34, 0.35), (0.4, 0.36, 0.35)], 1),
        ([(0.9, 0.40, 0.35), (0.5, 0.38, 0.35), (0.4, 0.50, 0.45)], 1),
        ([(0.9, 0.50, 1.00), (0.5, 0.50, 0.50), (0.4, 0.50, 0.30)], 1),  # ε falls; equality satisfies it
        ([(0.5, 0.10, 0.35), (0.5, 0.05, 0.35)], 0),
    ],
)
def test_chosen_steps(records, step):
    assert best_record(EvalRecord(number, *row) for number, row in enumerate(records)).step == step


def test_descriptions_say_whether_the_constraint_holds():
    assert EvalRecord(1, 0.5).describe() == "task loss 0.5"
    assert EvalRecord(1, 0.5, 0.3, 0.35).describe() == "task loss 0.5, L_ret 0.3 ≤ ε 0.35"
    assert "L_ret 0.4 > ε 0.35: no checkpoint satisfies" in EvalRecord(1, 0.5, 0.4, 0.35).describe()


@given(st.lists(numbers, max_size=12), st.integers(0, 5))
def test_stalled_after_patience_evaluations_without_improvement(values, patience):
    """Against a run that counts while it goes."""
    best, count = math.inf, 0
    for number, value in enumerate(values):
        count = 0 if value < best or number == 0 else count + 1
        best = min(best, value) if math.isfinite(value) else best
    stopped = patience > 0 and count >= patience
    records = [EvalRecord(step, value) for step, value in enumerate(values)]
    assert evaluations_since_best(records) == count
    assert is_stalled(records, patience) == stopped


def test_a_stall_is_described_by_its_best():
    records = [EvalRecord(10 * step, loss) for step, loss in enumerate([3, 1, 2, 1])]
    assert describe_stall(records) == (
        "the held-out task loss did not improve in 2 evaluations on 1 at step 10"
    )
