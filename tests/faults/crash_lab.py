"""Kill runs at chosen calls, resume them, and compare them with the same run uninterrupted."""

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from launch import FaultInjector, ForkServer, LaunchResult
from runs import assert_same_state, untimed
from safetensors.torch import load_file

from craft_ds.checkpoints import verify_checkpoint
from craft_ds.checkpoints.manifest import MANIFEST
from craft_ds.errors import UserError

ROOT = Path(__file__).parents[2]
ENGINES = {
    "fsdp": ["--engine=fsdp"],
    "zero3": [f"--ds_config={ROOT / 'ds_configs' / 'zero3.json'}"],
}
STEPS = 8
# Further settings that change a save: per-rank files, deletion of older checkpoints, the best of them, a
# background thread.
VARIANTS = {
    "fsdp, per_rank, limit 1, best": [
        *ENGINES["fsdp"],
        "--checkpoint.layout=per_rank",
        "--save_total_limit=1",
        "--save_best=true",
        "--dataset.eval_split=0.25",
    ],
    "zero3, background, limit 2": [
        *ENGINES["zero3"],
        "--checkpoint.background=true",
        "--save_total_limit=2",
        "--keep_period=4",
    ],
}
_SETTINGS = ENGINES | VARIANTS
_RUN = [f"--steps={STEPS}", "--save_freq=2", "--craft.retention_freq=3"]
WORLD_SIZE = 2


def complete_checkpoints(run: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step: directories with a final name and a manifest, fully verified.

    Raises:
        UserError: The files of one do not match its manifest.
    """
    found = {}
    for manifest in run.glob(f"*/{MANIFEST}"):
        directory = manifest.parent
        if not directory.is_symlink() and directory.suffix != ".tmp":
            found[verify_checkpoint(directory, 0, 1)["step"]] = directory
    return found


def resume_arguments(flags: Sequence[str]) -> list[str]:
    """Return the arguments that restart a run after a crash."""
    return [*flags, "--resume=auto"]


def _without_step(path: str) -> str:
    return re.sub(r"^step_\d+", "step", path)


class Change(NamedTuple):
    """A call that changes something in a run's directory.

    Attributes:
        rank: The calling rank.
        call: Number of the call on that rank.
        operation: `rename`, `pwrite`, …
        path: The changed path, relative to the directory.
        within: The checkpoint being written, `step` or `final`; before the first one, `start`.
    """

    rank: int
    call: int
    operation: str
    path: str
    within: str

    @property
    def phase(self) -> tuple[int, str, str, str]:
        """Key shared with equivalent calls, those of another save or to another of many files."""
        # These are made forevery file.
        alike = self.operation in ("copyfile", "fsync", "unlink") and "/" in self.path
        return self.rank, self.within, self.operation, "a file" if alike else _without_step(self.path)


def read_changes(log: Path, rank: int) -> list[Change]:
    """Read the log of `fault_injectors.watch_changes`."""
    changes, within = [], "start"
    for line in log.read_text().splitlines():
        seen = json.loads(line)
        head = _without_step(seen["path"]).split("/")[0].removesuffix(".tmp")
        within = head if head in ("step", "final") else within
        changes.append(Change(rank, seen["call"], seen["op"], seen["path"], within))
    return changes


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Assert that two checkpoints hold the same files with the same tensors and training state."""
    names = [
        sorted(str(path.relative_to(one)) for path in one.rglob("*") if path.is_file())
        for one in (found, expected)
    ]
    assert names[0] == names[1]
    for name in names[1]:
        if name.endswith(".safetensors"):
            one, other = load_file(found / name), load_file(expected / name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in other), (found, name)
    assert_same_state(found, expected)


def _reported_saves(ended: LaunchResult) -> list[str]:
    return re.findall(r"^saved .*/(\S+)$", ended.outputs[0], re.MULTILINE)


class KillPoint(NamedTuple):
    """A kill at a chosen call.

    Attributes:
        change: The call.
        when: `before`, `middle` or `after`.
        all_ranks: True if the other ranks are killed immediately too.
    """

    change: Change
    when: str
    all_ranks: bool

    def __str__(self) -> str:
        rank, call, operation, path, _ = self.change
        who = "all ranks" if self.all_ranks else f"rank {rank}"
        return f"{who} {self.when} {operation} of {path} (call {call} of rank {rank})"


def kill_point_per_phase(changes: Sequence[Change], draw: random.Random) -> list[KillPoint]:
    """Draw a kill point in every phase."""
    phases: dict[tuple[Any, ...], list[Change]] = {}
    for change in changes:
        phases.setdefault(change.phase, []).append(change)
    return [draw_kill_point(calls, draw) for calls in phases.values()]


def draw_kill_point(changes: Sequence[Change], draw: random.Random) -> KillPoint:
    """Draw one of these calls, an instant of it and the killed ranks."""
    change = draw.choice(changes)
    whens = ("before", "middle", "after") if change.operation == "pwrite" else ("before", "after")
    return KillPoint(change, draw.choice(whens), draw.random() < 0.5)


@dataclass
class CrashLab:
    """Runs of one setting on two ranks.

    Args:
        setting: A key of `ENGINES` or `VARIANTS`.
        flags: Returns the flags of a CRaFT run for an output directory.
        server: Starts ranks.
        scratch: Directory for runs.
    """

    setting: str
    flags: Callable[[Path], list[str]]
    server: ForkServer
    scratch: Path
    seconds: float = 0.0
    changes: list[Change] = field(default_factory=list)
    _runs: int = 0

    @cached_property
    def reference(self) -> Path:
        """The uninterrupted run; also sets `seconds` and `changes`."""
        run = self.scratch / "reference"
        ended, self.changes = self.watched(self.command(run), run)
        self.seconds = ended.check().seconds
        return run

    def command(self, run: Path) -> list[str]:
        """Return the arguments of a new run."""
        return [*self.flags(run), *_RUN, *_SETTINGS[self.setting]]

    def new(self) -> Path:
        """Return a new path for a run."""
        self._runs += 1
        return self.scratch / f"run_{self._runs:03d}"

    def watched(self, argv: Sequence[str], run: Path) -> tuple[LaunchResult, list[Change]]:
        """Run to the end and record the changes in the run's directory."""
        logs = [self.scratch / f"{run.name}.{rank}.log" for rank in range(WORLD_SIZE)]
        ended = self.server.run(
            argv,
            WORLD_SIZE,
            injectors={
                rank: [
                    FaultInjector("fault_injectors:watch_changes", {"directory": str(run), "log": str(log)})
                ]
                for rank, log in enumerate(logs)
            },
        )
        return ended, [change for rank, log in enumerate(logs) for change in read_changes(log, rank)]

    def run_until_kill(self, argv: Sequence[str], run: Path, point: KillPoint) -> LaunchResult:
        """Run until a rank is killed at the chosen call."""
        arguments = {
            "directory": str(run),
            "log": str(self.scratch / "killed.log"),
            "kill": {"call": point.change.call, "when": point.when},
        }
        ended = self.server.run(
            argv,
            WORLD_SIZE,
            injectors={point.change.rank: [FaultInjector("fault_injectors:watch_changes", arguments)]},
            grace=0.0 if point.all_ranks else 10.0,
        )
        assert ended.statuses[point.change.rank] == -9, f"no rank was killed: {ended}"
        return ended

    @staticmethod
    def hung(ended: LaunchResult, point: KillPoint) -> list[int]:
        """Return the ranks that did not exit by themselves after one other rank was killed."""
        return [] if point.all_ranks else ended.hung

    def check_checkpoints(self, ended: LaunchResult, run: Path, before: Sequence[str] = ()) -> list[str]:
        """Assert that every checkpoint of a killed run equals the reference's bit by bit; return their names.

        Args:
            ended: The killed launch.
            run: Its directory.
            before: Names of the checkpoints that were complete before it and still must be.
        """
        try:
            complete = complete_checkpoints(run)
        except UserError as error:
            raise AssertionError(f"a checkpoint was damaged: {error}") from error
        names = {directory.name for directory in complete.values()}
        reported = [
            STEPS if step == "final" else int(step.removeprefix("step_")) for step in _reported_saves(ended)
        ]
        if "limit" in self.setting:  # a newer one may have replaced it
            assert max(complete, default=0) >= max(reported, default=0), (reported, names)
        else:
            assert complete.keys() >= set(reported), (reported, names)
        assert names >= set(before), (before, names)
        for name in names:
            if (self.reference / name).exists():  # the reference may have deleted it later
                assert_same_checkpoint(run / name, self.reference / name)
        for link in (run / "last", run / "best"):
            assert not link.is_symlink() or link.resolve().name in names
        return sorted(names)

    def finish(self, run: Path) -> None:
        """Resume a killed run and assert that it ends like the uninterrupted one."""
        self.server.run(resume_arguments(self.command(run)), WORLD_SIZE).check()
        assert untimed(run) == untimed(self.reference)
        names = [sorted(path.name for path in one.iterdir()) for one in (run, self.reference)]
        assert names[0] == names[1]
        assert (run / "last").resolve() == (run / "final").resolve()
        assert (run / "best").resolve().name == (self.reference / "best").resolve().name
        for name in names[0]:
            if (run / name / MANIFEST).exists():
                assert_same_checkpoint(run / name, self.reference / name)
        histories = [(one / "final" / "lambda_history.csv").read_text() for one in (run, self.reference)]
        assert histories[0] == histories[1]
        shutil.rmtree(run)
