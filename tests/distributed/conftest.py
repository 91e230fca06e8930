"""Ranks are dear to start (each imports torch, transformers and DeepSpeed): one spawn a world size."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from lab import Lab, Result
from scenarios import scenarios_of

from craft_ds.local_ranks import run_ranks
from craft_ds.policies.testing import make_test_policy_dir

TIMEOUT_S = 240


@dataclass
class Ranks:
    """What one number of ranks found, by scenario. A scenario that failed fails whoever asks for it."""

    world_size: int
    lab: Lab
    directory: Path | None = None
    output: str = ""
    _results: dict[str, Result] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Result:
        if name not in self._results:
            self._results[name] = self._run(name) if self.directory is None else self._load(name)
        return self._results[name]

    def _run(self, name: str) -> Result:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return Result.of([scenarios_of(1)[name](self.lab)])
        finally:
            torch.set_num_threads(threads)

    def _load(self, name: str) -> Result:
        assert self.directory is not None
        errors = sorted(self.directory.glob(f"{name}.?.error"))
        if errors:
            pytest.fail("\n".join(f"{path.name}:\n{path.read_text()}" for path in errors))
        if len(list(self.directory.glob(f"{name}.?.json"))) < self.world_size:
            pytest.fail(f"the ranks ended before {name!r} was done:\n{self.output[-8000:]}")
        return Result.load(self.directory, name, self.world_size)


def _spawn(world_size: int, lab: Lab, directory: Path) -> Ranks:
    command = [sys.executable, str(Path(__file__).with_name("worker.py"))]
    command += [str(directory), str(lab.policy_dir), str(lab.scratch)]
    ends = run_ranks(command, world_size, timeout=TIMEOUT_S)
    output = "\n".join(f"--- rank {rank}: {end.status}\n{end.output}" for rank, end in enumerate(ends))
    print(output)
    return Ranks(world_size, lab, directory, output)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The single-process engine, which runs a scenario when it is first asked for."""
    policy_dir = make_test_policy_dir(tmp_path_factory.mktemp("policy") / "policy")
    return Ranks(1, Lab(0, 1, policy_dir, tmp_path_factory.mktemp("scratch")))


@pytest.fixture(scope="session")
def two_ranks(reference, tmp_path_factory):
    return _spawn(2, reference.lab, tmp_path_factory.mktemp("ranks2"))


@pytest.fixture(scope="session")
def three_ranks(two_ranks, tmp_path_factory):
    """Spawned after the two: it reads their checkpoint."""
    return _spawn(3, two_ranks.lab, tmp_path_factory.mktemp("ranks3"))


@pytest.fixture(params=[2, 3], ids=["2ranks", "3ranks"])
def ranks(request):
    return request.getfixturevalue("two_ranks" if request.param == 2 else "three_ranks")
