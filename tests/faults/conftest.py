"""Fixtures of the fault tests: the seed of random samples and the table of results."""

import os
import platform
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "commands"))  # for its module `runs`

pytest.register_assert_rewrite("crash_lab", "resume_matrix")

from fault_table import FaultTable  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "outputs" / "bench" / "fault_campaign.json"
_TABLE = pytest.StashKey[FaultTable]()


def pytest_configure(config):
    config.stash[_TABLE] = FaultTable()


@pytest.fixture(scope="session")
def fault_table(request) -> FaultTable:
    """Table in which fault tests record their cases."""
    return request.config.stash[_TABLE]


@pytest.fixture(scope="session")
def full_campaign(request) -> bool:
    """True if every case is to be run (`--all`) instead of a sample."""
    return request.config.getoption("--all")


@pytest.fixture(scope="session")
def faults_seed(request) -> int:
    """Seed of samples and random instants."""
    return request.config.getoption("--faults-seed")


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash[_TABLE]
    if not table.entries:
        return
    seed, full = config.getoption("--faults-seed"), config.getoption("--all")
    what = "the full campaign" if full else "a sample; --all runs the full campaign"
    terminalreporter.section(f"faults: {what}; --faults-seed={seed}")
    for line in table.lines():
        terminalreporter.line(line)
    if full:
        hardware = f"{os.cpu_count()} x {platform.machine()}, torch {torch.__version__}"
        table.write(RESULT, seed=seed, hardware=hardware)
        terminalreporter.line(f"written {RESULT.relative_to(ROOT)}")
