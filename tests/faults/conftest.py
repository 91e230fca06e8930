"""A fork server for all fault tests, the seed of their samples, and the table of what they found."""

import os
import platform
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "commands"))  # what reads a run back is theirs

pytest.register_assert_rewrite("crashes", "matrix", "ranks")

from fault_table import FaultTable  # noqa: E402
from ranks import ForkServer  # noqa: E402

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "outputs" / "bench" / "fault_campaign.json"
_TABLE = pytest.StashKey[FaultTable]()


def pytest_configure(config):
    config.stash[_TABLE] = FaultTable()


@pytest.fixture(scope="session")
def fault_table(request) -> FaultTable:
    """Where a fault test notes its cases."""
    return request.config.stash[_TABLE]


@pytest.fixture(scope="session")
def whole_campaign(request) -> bool:
    """Whether every case is to be run (`--all`), not a sample."""
    return request.config.getoption("--all")


@pytest.fixture(scope="session")
def faults_seed(request) -> int:
    """What samples and random instants are drawn from."""
    return request.config.getoption("--faults-seed")


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """Ranks that start at once."""
    server = ForkServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash[_TABLE]
    if not table.entries:
        return
    seed, whole = config.getoption("--faults-seed"), config.getoption("--all")
    what = "the whole campaign" if whole else "a sample; --all runs the whole campaign"
    terminalreporter.section(f"faults: {what}; --faults-seed={seed}")
    for line in table.lines():
        terminalreporter.line(line)
    if whole:
        hardware = f"{os.cpu_count()} x {platform.machine()}, torch {torch.__version__}"
        table.write(RESULT, seed=seed, hardware=hardware)
        terminalreporter.line(f"written {RESULT.relative_to(ROOT)}")
