"""Runs that are killed and go on, beside the same run uninterrupted."""

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
from ranks import Ended, ForkServer, Saboteur
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
# Each with what else changes a save: pieces a rank, deletion of older checkpoints, a thread.
VARIANTS = {
    "fsdp, per_rank, limit 1": [
        *ENGINES["fsdp"],
        "--checkpoint.layout=per_rank",
        "--save_total_limit=1",
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
    """The checkpoints of a run by their step: a name of its own, a manifest, and every byte as it says.

    Raises:
        UserError: One has a manifest that its files belie.
    """
    found = {}
    for manifest in run.glob(f"*/{MANIFEST}"):
        directory = manifest.parent
        if not directory.is_symlink() and directory.suffix != ".tmp":
            found[verify_checkpoint(directory, 0, 1)["step"]] = directory
    return found


def going_on(flags: Sequence[str]) -> list[str]:
    """The arguments with which a run is started again after it died."""
    return [*flags, "--resume=auto"]


def _without_step(path: str) -> str:
    return re.sub(r"^step_\d+", "step", path)


class Change(NamedTuple):
    """A call that changes something in a run's directory.

    Attributes:
        rank: Who makes it.
        call: Its number there.
        operation: `rename`, `pwrite`, …
        path: What it is done to, relative to the directory.
        within: The checkpoint that is being written, `step` or `final`; before the first one, `start`.
    """

    rank: int
    call: int
    operation: str
    path: str
    within: str

    @property
    def phase(self) -> tuple[int, str, str, str]:
        """What other calls do as well, in another save or to another of many files."""
        # These are done to every file alike.
        alike = self.operation in ("copyfile", "fsync", "unlink") and "/" in self.path
        return self.rank, self.within, self.operation, "a file" if alike else _without_step(self.path)


def read_changes(log: Path, rank: int) -> list[Change]:
    """What `saboteurs.watch_changes` has noted."""
    changes, within = [], "start"
    for line in log.read_text().splitlines():
        seen = json.loads(line)
        head = _without_step(seen["path"]).split("/")[0].removesuffix(".tmp")
        within = head if head in ("step", "final") else within
        changes.append(Change(rank, seen["call"], seen["op"], seen["path"], within))
    return changes


def assert_same_checkpoint(found: Path, expected: Path) -> None:
    """Two checkpoints hold the same files, and the same bits in all that is not text."""
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


def _said(ended: Ended) -> list[str]:
    return re.findall(r"^saved .*/(\S+)$", ended.outputs[0], re.MULTILINE)


class Blow(NamedTuple):
    """A kill at a chosen call.

    Attributes:
        change: The call.
        when: `before`, `middle` or `after`.
        everybody: Whether the other ranks are killed at once too.
    """

    change: Change
    when: str
    everybody: bool

    def __str__(self) -> str:
        rank, call, operation, path, _ = self.change
        who = "all ranks" if self.everybody else f"rank {rank}"
        return f"{who} {self.when} {operation} of {path} (call {call} of rank {rank})"


def one_blow_a_phase(changes: Sequence[Change], draw: random.Random) -> list[Blow]:
    """For every phase a call of it, an instant and who dies: drawn, but no phase is left out."""
    phases: dict[tuple[Any, ...], list[Change]] = {}
    for change in changes:
        phases.setdefault(change.phase, []).append(change)
    return [draw_blow(calls, draw) for calls in phases.values()]


def draw_blow(changes: Sequence[Change], draw: random.Random) -> Blow:
    """One of these calls, an instant of it and who dies."""
    change = draw.choice(changes)
    whens = ("before", "middle", "after") if change.operation == "pwrite" else ("before", "after")
    return Blow(change, draw.choice(whens), draw.random() < 0.5)


@dataclass
class CrashLab:
    """Runs of one setting on two ranks.

    Args:
        setting: A key of `ENGINES` or `VARIANTS`.
        flags: Gives the flags of a CRaFT run by its output directory.
        server: Starts ranks.
        scratch: For runs.
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
        """The uninterrupted run; `seconds` and `changes` are its."""
        run = self.scratch / "reference"
        ended, self.changes = self.watched(self.command(run), run)
        self.seconds = ended.check().seconds
        return run

    def command(self, run: Path) -> list[str]:
        """The arguments of a new run."""
        return [*self.flags(run), *_RUN, *_SETTINGS[self.setting]]

    def new(self) -> Path:
        """A directory for a run, not yet made."""
        self._runs += 1
        return self.scratch / f"run_{self._runs:03d}"

    def watched(self, argv: Sequence[str], run: Path) -> tuple[Ended, list[Change]]:
        """Run to the end, and see what it changes in its directory."""
        logs = [self.scratch / f"{run.name}.{rank}.log" for rank in range(WORLD_SIZE)]
        ended = self.server.run(
            argv,
            WORLD_SIZE,
            saboteurs={
                rank: [Saboteur("saboteurs:watch_changes", {"directory": str(run), "log": str(log)})]
                for rank, log in enumerate(logs)
            },
        )
        return ended, [change for rank, log in enumerate(logs) for change in read_changes(log, rank)]

    def strike(self, argv: Sequence[str], run: Path, blow: Blow) -> Ended:
        """Run until a chosen call, and no further."""
        arguments = {
            "directory": str(run),
            "log": str(self.scratch / "killed.log"),
            "kill": {"call": blow.change.call, "when": blow.when},
        }
        ended = self.server.run(
            argv,
            WORLD_SIZE,
            saboteurs={blow.change.rank: [Saboteur("saboteurs:watch_changes", arguments)]},
            grace=0.0 if blow.everybody else 10.0,
        )
        assert ended.statuses[blow.change.rank] == -9, f"nobody died: {ended}"
        return ended

    @staticmethod
    def hung(ended: Ended, blow: Blow) -> list[int]:
        """Ranks that did not end by themselves when another one had died alone."""
        return [] if blow.everybody else ended.helped

    def whole_after(self, ended: Ended, run: Path, before: Sequence[str] = ()) -> list[str]:
        """Names of the checkpoints that a killed run left, each of which is the reference's to the bit.

        Args:
            ended: The launch that was killed.
            run: Its directory.
            before: Names of those that were whole before it: they must still be.
        """
        try:
            whole = complete_checkpoints(run)
        except UserError as error:
            raise AssertionError(f"a checkpoint was damaged: {error}") from error
        names = {directory.name for directory in whole.values()}
        said = [STEPS if step == "final" else int(step.removeprefix("step_")) for step in _said(ended)]
        if "limit" in self.setting:  # a newer one may have taken its place
            assert max(whole, default=0) >= max(said, default=0), (said, names)
        else:
            assert whole.keys() >= set(said), (said, names)
        assert names >= set(before), (before, names)
        for name in names:
            if (self.reference / name).exists():  # it may have deleted it since
                assert_same_checkpoint(run / name, self.reference / name)
        last = run / "last"
        assert not last.is_symlink() or last.resolve().name in names
        return sorted(names)

    def finish(self, run: Path) -> None:
        """Start a killed run again, and insist that it ends as if nothing had happened."""
        self.server.run(going_on(self.command(run)), WORLD_SIZE).check()
        assert untimed(run) == untimed(self.reference)
        names = [sorted(path.name for path in one.iterdir()) for one in (run, self.reference)]
        assert names[0] == names[1]
        assert (run / "last").resolve() == (run / "final").resolve()
        for name in names[0]:
            if (run / name / MANIFEST).exists():
                assert_same_checkpoint(run / name, self.reference / name)
        histories = [(one / "final" / "lambda_history.csv").read_text() for one in (run, self.reference)]
        assert histories[0] == histories[1]
        shutil.rmtree(run)
