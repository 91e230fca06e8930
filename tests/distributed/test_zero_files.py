"""Every accepted DeepSpeed file gives the numbers of the single process."""

from pathlib import Path

import pytest
import zero_files
from lab import Lab, Result
from test_parity import assert_close, assert_triple_close


@pytest.fixture(scope="module")
def found(fork_server, tmp_path_factory):
    results = tmp_path_factory.mktemp("zero_files")
    fork_server.run([results], 3, program=Path(zero_files.__file__), timeout=240).check()
    return results


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    nowhere = tmp_path_factory.mktemp("single")
    return Result.of([zero_files.train(Lab("single", 0, 1, nowhere, nowhere))])


@pytest.mark.parametrize("name", zero_files.FILES)
def test_a_file_changes_no_number(name, found, expected):
    result = Result.load(found, name, 3)
    for values in result.values:
        assert_triple_close(values["triple"], expected.values[0]["triple"])
    assert_close(result.tensors, expected.tensors)


def test_the_last_micro_batch_uses_fewer_parameters(expected):
    """Otherwise a gradient that a later micro-batch loses would pass."""
    assert expected.tensors["moments/task_only.weight.exp_avg"].abs().max() > 1e-4
