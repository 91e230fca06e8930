"""A run goes on in any engine on any number of ranks: all pairs of who saved it and who takes it up."""

import random

import pytest
from matrix import KINDS, MatrixLab, assert_close_losses
from runs import assert_same_bits

SAMPLE = 2
PAIRS = [(saved_by, taken_up_by) for saved_by in KINDS for taken_up_by in KINDS]


def pytest_generate_tests(metafunc):
    """All pairs in the whole campaign; else a sample, and what it goes on from."""
    config = metafunc.config
    pairs = PAIRS
    if not config.getoption("--all"):
        pairs = random.Random(f"{config.getoption('--faults-seed')} pairs").sample(PAIRS, SAMPLE)
    if "taken_up_by" in metafunc.fixturenames:
        metafunc.parametrize(("saved_by", "taken_up_by"), pairs)
    else:
        metafunc.parametrize("kind", sorted({saved_by for saved_by, _ in pairs}))


@pytest.fixture(scope="module")
def lab(inputs, fork_server, tmp_path_factory) -> MatrixLab:
    return MatrixLab(inputs, fork_server, tmp_path_factory.mktemp("matrix"))


def test_a_run_is_that_of_one_process(lab, kind):
    assert lab.whole(kind).samples == lab.whole("single-1").samples
    assert_close_losses(lab.whole(kind).rows, lab.whole("single-1").rows)


def test_a_run_goes_on_elsewhere(lab, fault_table, saved_by, taken_up_by):
    with fault_table.case("resume", f"saved by {saved_by}", f"taken up by {taken_up_by}"):
        on, reference = lab.go_on(saved_by, taken_up_by), lab.whole("single-1")
        assert on.samples == reference.samples[lab.first :]
        assert_close_losses(on.rows, reference.rows[lab.first :])
        if saved_by == taken_up_by:
            whole = lab.whole(saved_by)
            assert on.rows == whole.rows[lab.first :]
            assert_same_bits(on.directory / "final", whole.directory / "final")
