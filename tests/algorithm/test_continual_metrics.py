"""Metrics of sequences: examples worked by hand, and properties on random matrices."""

import doctest

import numpy as np
import pytest

from craft_ds.algorithm import continual_metrics
from craft_ds.algorithm.continual_metrics import (
    auc,
    final_average,
    forgetting,
    forward_transfer,
    fwt,
    nbt,
)

MATRIX = [[0.9, 0.1, 0.0], [0.6, 0.8, 0.2], [0.3, 0.6, 1.0]]
CURVES = [[0.0, 0.5, 0.9], [0.1, 0.8], [1.0]]
REFERENCES = [[0.0, 0.4, 0.8], [0.0, 0.6], [0.5]]


def test_worked_example():
    assert final_average(MATRIX) == pytest.approx((0.3 + 0.6 + 1.0) / 3)
    assert nbt(MATRIX) == pytest.approx(((0.3 + 0.6) / 2 + 0.2) / 2)
    assert forgetting(MATRIX) == pytest.approx((0.6 + 0.2 + 0.0) / 3)
    own = [1.4 / 3, 0.9 / 2, 1.0]
    assert fwt(CURVES) == pytest.approx(sum(own) / 3)
    assert auc(MATRIX, CURVES) == pytest.approx(((own[0] + 0.6 + 0.3) / 3 + (own[1] + 0.6) / 2 + own[2]) / 3)
    gains = [(own[0] - 0.4) / 0.6, (own[1] - 0.3) / 0.7, (own[2] - 0.5) / 0.5]
    assert forward_transfer(CURVES, REFERENCES) == pytest.approx(sum(gains) / 3)


def test_examples_in_the_docstrings():
    assert doctest.testmod(continual_metrics).failed == 0
    assert doctest.testmod(continual_metrics).attempted > 0


def test_one_stage_forgets_nothing():
    assert nbt([[0.7]]) == forgetting([[0.7]]) == 0.0
    assert auc([[0.7]], [[0.7]]) == final_average([[0.7]]) == 0.7


@pytest.fixture(params=[(2, 0), (3, 1), (5, 2), (10, 3)], ids=lambda pair: f"{pair[0]}_tasks")
def matrix(request):
    size, seed = request.param
    return np.random.default_rng(seed).uniform(size=(size, size))


def own_results(matrix):
    return [[value] for value in np.diagonal(matrix)]


def test_results_before_learning_do_not_count(matrix):
    other = np.tril(matrix)
    curves = own_results(matrix)
    assert nbt(other.tolist()) == pytest.approx(nbt(matrix.tolist()))
    assert forgetting(other.tolist()) == pytest.approx(forgetting(matrix.tolist()))
    assert auc(other.tolist(), curves) == pytest.approx(auc(matrix.tolist(), curves))
    assert final_average(other.tolist()) == pytest.approx(final_average(matrix.tolist()))


def test_transfer_ignores_the_level_and_averages_follow_it(matrix):
    raised = (matrix + 0.25).tolist()
    assert nbt(raised) == pytest.approx(nbt(matrix.tolist()))
    assert forgetting(raised) == pytest.approx(forgetting(matrix.tolist()))
    assert final_average(raised) == pytest.approx(final_average(matrix.tolist()) + 0.25)
    curves, level = own_results(matrix), own_results(matrix + 0.25)
    assert auc(raised, level) == pytest.approx(auc(matrix.tolist(), curves) + 0.25)


def test_metrics_change_sign_with_the_results(matrix):
    assert nbt((-matrix).tolist()) == pytest.approx(-nbt(matrix.tolist()))
    assert forgetting((-matrix).tolist()) == pytest.approx(-forgetting(matrix.tolist()))


def test_auc_is_the_own_result_less_what_is_lost_later(matrix):
    size = len(matrix)
    lost = [
        np.mean([matrix[k][k] - matrix[i][k] for i in range(k + 1, size)]) if k + 1 < size else 0.0
        for k in range(size)
    ]
    areas = [matrix[k][k] - (size - 1 - k) / (size - k) * lost[k] for k in range(size)]
    assert auc(matrix.tolist(), own_results(matrix)) == pytest.approx(np.mean(areas))
    assert nbt(matrix.tolist()) == pytest.approx(np.mean(lost[:-1]))


def test_forward_transfer_is_0_for_the_reference_and_1_at_best(matrix):
    curves = (0.9 * matrix).tolist()
    assert forward_transfer(curves, curves) == pytest.approx(0.0)
    assert forward_transfer(np.ones_like(matrix).tolist(), curves) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: nbt([[0.1, 0.2]]),
        lambda: final_average([]),
        lambda: auc(MATRIX, CURVES[:2]),
        lambda: fwt([[0.1], []]),
        lambda: fwt([]),
        lambda: forward_transfer(CURVES, REFERENCES[:2]),
        lambda: forward_transfer([[0.5]], [[1.0]]),
    ],
)
def test_inputs_without_a_meaning_are_errors(call):
    with pytest.raises(ValueError, match=r"square|curves|checkpoint|references|undefined"):
        call()
