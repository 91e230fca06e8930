"""The same run in every engine on 1 to 3 ranks, and resumes across all pairs of them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crash_lab import ENGINES
from launch import FaultInjector, ForkServer
from runs import untimed

GLOBAL_BATCH = 6
# A file that fixes the global batch size must not prevent resuming on another number of ranks.
_ZERO3 = f"--ds_config={Path(__file__).with_name('zero3_six_samples.json')}"
KINDS = {
    "single-1": ["--engine=single", "--ds_config=null"],
    **{f"zero3-{n}": ["--engine=zero", _ZERO3] for n in (1, 2, 3)},
    **{f"fsdp-{n}": [*ENGINES["fsdp"], "--ds_config=null"] for n in (1, 2, 3)},
}
"""Flags of each engine and number of ranks; they also override those saved by another."""

COMPARED = ("train/loss", "craft/retention_loss", "craft/lambda")


class Run(NamedTuple):
    """Outcome of a run.

    Attributes:
        directory: Its output directory.
        rows: Its logged metrics, without times.
        samples: Indices of the samples of each step, in the order of the global batch.
    """

    directory: Path
    rows: list[dict[str, Any]]
    samples: list[list[int]]


def ranks_of(kind: str) -> int:
    """Return the number of ranks of a kind."""
    return int(kind.rsplit("-", 1)[1])


def assert_close_losses(found: Sequence[dict], expected: Sequence[dict]) -> None:
    """Assert that the losses of two logs agree step by step to a relative 1e-5."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for key in COMPARED:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=0.0), (other["step"], key)


@dataclass
class MatrixLab:
    """Runs of 6 steps with retention steps 1, 3 and 5 and a checkpoint after the first `first` steps.

    Args:
        inputs: The policy, the data and the anchors.
        server: Starts ranks.
        scratch: Directory for runs.
    """

    inputs: Any
    server: ForkServer
    scratch: Path
    first: int = 3
    _uninterrupted: dict[str, Run] = field(default_factory=dict)

    def uninterrupted(self, kind: str) -> Run:
        """Return the uninterrupted run of a kind, made once."""
        if kind not in self._uninterrupted:
            run = self.scratch / kind
            share = GLOBAL_BATCH // ranks_of(kind)
            flags = [
                *self.inputs.flags(run),
                *self.inputs.craft_flags(),
                "--steps=6",
                f"--save_freq={self.first}",
            ]
            flags += [f"--batch_size={share}", f"--craft.anchor_batch_size={share}"]
            self._uninterrupted[kind] = self._run(run, kind, flags)
        return self._uninterrupted[kind]

    def resume(self, saved_by: str, resumed_by: str) -> Run:
        """Resume a run of one kind as another, with the saved flags except those of the engine."""
        run = self.scratch / f"{saved_by}-{resumed_by}"
        checkpoint = self.uninterrupted(saved_by).directory / f"step_{self.first:06d}"
        flags = [f"--config_path={checkpoint}", "--resume=true", f"--output_dir={run}"]
        return self._run(run, resumed_by, flags)

    def _run(self, run: Path, kind: str, flags: Sequence[str]) -> Run:
        logs = [self.scratch / f"{run.name}.{rank}.samples" for rank in range(ranks_of(kind))]
        injectors = {
            rank: [FaultInjector("fault_injectors:log_samples", {"log": str(log)})]
            for rank, log in enumerate(logs)
        }
        self.server.run([*flags, *KINDS[kind]], ranks_of(kind), injectors=injectors).check()
        rows = [row for row in untimed(run) if "train/loss" in row]  # without the last λ
        drawn = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
        return Run(run, rows, _in_order(drawn, len(rows)))


def _in_order(drawn: Sequence[Sequence[dict]], steps: int) -> list[list[int]]:
    """Return the samples of each step in stream order over all ranks, without prefetched ones."""
    stream = {place: sample for rank in drawn for one in rank for place, sample in one}
    places = sorted(stream)[: steps * GLOBAL_BATCH]
    assert len(places) == steps * GLOBAL_BATCH
    return [
        [stream[place] for place in places[first : first + GLOBAL_BATCH]]
        for first in range(0, len(places), GLOBAL_BATCH)
    ]
