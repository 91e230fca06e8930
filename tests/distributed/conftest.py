"""Fixtures of the engines under test, spawned on first use, and of the reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from lab import Lab, Result
from launch import ForkServer
from registry import EVERY, SINGLE, SPAWNS, Ranks, Spawn, by_default
from scenarios_lora import KINDS, adapters_of

from craft_ds.testing.adapters import make_test_adapters
from craft_ds.testing.policies import make_test_policy_dir

TIMEOUT_S = 420


@dataclass
class Reference:
    """The single-process engine, which runs each scenario on first use."""

    lab: Lab
    world_size: int = 1
    kind: str = "single"
    _results: dict[str, Result] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Result:
        if name not in self._results:
            self._results[name] = Result.of([SINGLE[name](self.lab)])
        return self._results[name]


@dataclass
class Found:
    """Results of an engine on some ranks. Using a failed scenario raises its error."""

    kind: str
    world_size: int
    directory: Path
    scratch: Path
    output: str

    def __getitem__(self, name: str) -> Result:
        errors = sorted(self.directory.glob(f"{self.kind}.{name}.?.error"))
        if errors:
            pytest.fail("\n".join(f"{path.name}:\n{path.read_text()}" for path in errors))
        if len(list(self.directory.glob(f"{self.kind}.{name}.?.json"))) < self.world_size:
            pytest.fail(f"the ranks ended before {name!r} was done:\n{self.output[-8000:]}")
        return Result.load(self.directory, f"{self.kind}.{name}", self.world_size)


@dataclass
class Spawner:
    """Starts each spawn once, after those whose checkpoints it reads."""

    lab: Lab
    server: ForkServer
    root: Path
    compile_cpu_adam: Callable[[], object]
    everything: bool
    _outputs: dict[Spawn, str] = field(default_factory=dict)

    def __call__(self, ranks: Ranks) -> Found:
        wanted = EVERY[ranks]
        for spawn in SPAWNS:
            needed = spawn == wanted or spawn.world_size < wanted.world_size or wanted.family == "fsdp"
            if needed and spawn not in self._outputs:
                self._outputs[spawn] = self._start(spawn)
            if spawn == wanted:
                break
        return Found(*ranks, self._directory(wanted), self.lab.scratch, self._outputs[wanted])

    def _directory(self, spawn: Spawn) -> Path:
        return self.root / f"{spawn.family}{spawn.world_size}"

    def _start(self, spawn: Spawn) -> str:
        if spawn.family == "zero_more":
            self.compile_cpu_adam()
        directory = self._directory(spawn)
        directory.mkdir()
        arguments = [spawn.family, directory, self.lab.policy_dir, self.lab.scratch]
        arguments += [
            f"{kind}/{name}"
            for kind, scenarios in SPAWNS[spawn].items()
            for name in scenarios
            if self.everything or by_default(Ranks(kind, spawn.world_size), name)
        ]
        program = Path(__file__).with_name("worker.py")
        ended = self.server.run(arguments, spawn.world_size, program=program, timeout=TIMEOUT_S)
        ends = enumerate(zip(ended.statuses, ended.outputs, strict=True))
        output = "\n".join(f"--- rank {rank}: {status}\n{printed}" for rank, (status, printed) in ends)
        print(output)
        return output


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    policy_dir = make_test_policy_dir(tmp_path_factory.mktemp("policy") / "policy")
    lab = Lab("single", 0, 1, policy_dir, tmp_path_factory.mktemp("scratch"))
    for kind, lora in KINDS.items():
        make_test_adapters(policy_dir, adapters_of(lab, kind), lora)
    return Reference(lab)


@pytest.fixture(scope="session")
def spawner(reference, fork_server, tmp_path_factory, request):
    return Spawner(
        reference.lab,
        fork_server,
        tmp_path_factory.mktemp("spawns"),
        lambda: request.getfixturevalue("compiled_cpu_adam"),
        request.config.getoption("--all"),
    )


@pytest.fixture
def ranks(request, spawner):
    """Return the results for the parameters of `registry.every`."""
    return spawner(request.param)
