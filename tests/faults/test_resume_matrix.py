"""A run resumes in any engine on any number of ranks: all pairs of saving and resuming engine."""

import random

import pytest
from resume_matrix import KINDS, MatrixLab, assert_close_losses
from runs import assert_same_bits

SAMPLE = 2
PAIRS = [(saved_by, resumed_by) for saved_by in KINDS for resumed_by in KINDS]


def pytest_generate_tests(metafunc):
    """All pairs in the full campaign; otherwise a sample, and the kinds it resumes from."""
    config = metafunc.config
    pairs = PAIRS
    if not config.getoption("--all"):
        pairs = random.Random(f"{config.getoption('--faults-seed')} pairs").sample(PAIRS, SAMPLE)
    if "resumed_by" in metafunc.fixturenames:
        metafunc.parametrize(("saved_by", "resumed_by"), pairs)
    else:
        metafunc.parametrize("kind", sorted({saved_by for saved_by, _ in pairs}))


@pytest.fixture(scope="module")
def lab(inputs, fork_server, tmp_path_factory) -> MatrixLab:
    return MatrixLab(inputs, fork_server, tmp_path_factory.mktemp("matrix"))


def test_a_run_equals_the_run_of_one_process(lab, kind):
    assert lab.uninterrupted(kind).samples == lab.uninterrupted("single-1").samples
    assert_close_losses(lab.uninterrupted(kind).rows, lab.uninterrupted("single-1").rows)


def test_a_run_resumes_in_another_engine(lab, fault_table, saved_by, resumed_by):
    with fault_table.case("resume", f"saved by {saved_by}", f"resumed by {resumed_by}"):
        resumed, reference = lab.resume(saved_by, resumed_by), lab.uninterrupted("single-1")
        assert resumed.samples == reference.samples[lab.first :]
        assert_close_losses(resumed.rows, reference.rows[lab.first :])
        if saved_by == resumed_by:
            uninterrupted = lab.uninterrupted(saved_by)
            assert resumed.rows == uninterrupted.rows[lab.first :]
            assert_same_bits(resumed.directory / "final", uninterrupted.directory / "final")
