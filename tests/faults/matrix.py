"""The same run in every engine and on 1 to 3 ranks, and what one saved taken up by another."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from crashes import ENGINES
from ranks import ForkServer, Saboteur
from runs import untimed

GLOBAL_BATCH = 6
# A file that insists on the samples of a step must not keep a run from other ranks.
_ZERO3 = f"--ds_config={Path(__file__).with_name('zero3_six_samples.json')}"
KINDS = {
    "single-1": ["--engine=single", "--ds_config=null"],
    **{f"zero3-{n}": ["--engine=zero", _ZERO3] for n in (1, 2, 3)},
    **{f"fsdp-{n}": [*ENGINES["fsdp"], "--ds_config=null"] for n in (1, 2, 3)},
}
"""Flags of each engine and number of ranks; also over those that another one has saved."""

COMPARED = ("train/loss", "craft/retention_loss", "craft/lambda")


class Run(NamedTuple):
    """What a run left.

    Attributes:
        directory: Its output directory.
        rows: What it logged, without times.
        samples: Indices of the samples of each step, in the order of the global batch.
    """

    directory: Path
    rows: list[dict[str, Any]]
    samples: list[list[int]]


def ranks_of(kind: str) -> int:
    """Number of ranks of a kind."""
    return int(kind.rsplit("-", 1)[1])


def assert_close_losses(found: Sequence[dict], expected: Sequence[dict]) -> None:
    """The losses of two logs, step by step, within 1e-5 of their value."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for key in COMPARED:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=0.0), (other["step"], key)


@dataclass
class MatrixLab:
    """Runs of 6 steps with retention steps 1, 3 and 5, of which the first `first` steps were saved.

    Args:
        inputs: The policy, the data and the anchors.
        server: Starts ranks.
        scratch: For runs.
    """

    inputs: Any
    server: ForkServer
    scratch: Path
    first: int = 3
    _whole: dict[str, Run] = field(default_factory=dict)

    def whole(self, kind: str) -> Run:
        """The uninterrupted run of a kind, made when it is first asked for."""
        if kind not in self._whole:
            run = self.scratch / kind
            share = GLOBAL_BATCH // ranks_of(kind)
            flags = [
                *self.inputs.flags(run),
                *self.inputs.craft_flags(),
                "--steps=6",
                f"--save_freq={self.first}",
            ]
            flags += [f"--batch_size={share}", f"--craft.anchor_batch_size={share}"]
            self._whole[kind] = self._run(run, kind, flags)
        return self._whole[kind]

    def go_on(self, saved_by: str, taken_up_by: str) -> Run:
        """The rest of a run of one kind by another: the flags are the saved ones but for the engine."""
        run = self.scratch / f"{saved_by}-{taken_up_by}"
        checkpoint = self.whole(saved_by).directory / f"step_{self.first:06d}"
        flags = [f"--config_path={checkpoint}", "--resume=true", f"--output_dir={run}"]
        return self._run(run, taken_up_by, flags)

    def _run(self, run: Path, kind: str, flags: Sequence[str]) -> Run:
        logs = [self.scratch / f"{run.name}.{rank}.samples" for rank in range(ranks_of(kind))]
        saboteurs = {
            rank: [Saboteur("saboteurs:note_samples", {"log": str(log)})] for rank, log in enumerate(logs)
        }
        self.server.run([*flags, *KINDS[kind]], ranks_of(kind), saboteurs=saboteurs).check()
        rows = untimed(run)
        drawn = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
        return Run(run, rows, _in_order(drawn, len(rows)))


def _in_order(drawn: Sequence[Sequence[dict]], steps: int) -> list[list[int]]:
    """The samples of each step by their place in the stream, whoever drew them; without those drawn ahead."""
    stream = {place: sample for rank in drawn for one in rank for place, sample in one}
    places = sorted(stream)[: steps * GLOBAL_BATCH]
    assert len(places) == steps * GLOBAL_BATCH
    return [
        [stream[place] for place in places[first : first + GLOBAL_BATCH]]
        for first in range(0, len(places), GLOBAL_BATCH)
    ]
