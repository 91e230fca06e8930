"""Compare methods of saving under kills and damage: craft-ds, PyTorch (DCP), DeepSpeed and LeRobot.

    python benchmarks/bench_fault_tolerance.py

Ranks that this script forks train a tiny pi0_fast of 0.97 M parameters in name only: the state of a step is
made from its number, saved and compared after loading: every tensor of parameters and moments, the
optimizer's step, the schedule's position and the run's step.

Kills: a checkpoint is saved; while the next one is being saved, SIGKILL hits all ranks, or one of them and
half a second later the others, as a launcher does. The moment is drawn from the time that a save takes. Then
new ranks resume as the method's documentation says.

Damage: of a run with two checkpoints, one file of the newer one is damaged: a bit flipped, cut, removed, a
page of 4 KiB zeroed, or replaced by the older checkpoint's file of the same name. Then as above. Files and
places are drawn at random, each file with the same probability.

Outcomes of a trial:
  harmless        resumed without help, and everything is that of one state that was saved; in brackets how
                  often it is that of the older checkpoint
  detected        an error, and an older checkpoint that is named by hand loads
  lost            an error, and no checkpoint loads, although one was complete
  silently wrong  resumed without an error, and the state differs from every state that was saved

The same seed gives the same schedule to every method; the moment of a kill is a time, so that repeated runs
differ in what it hits.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fault_methods import METHODS, Method, Subject, preload
from harness import OUTPUTS, argument_parser, hardware, write_result

from craft_ds.cli import run_main
from craft_ds.errors import UserError, one_line

OUTCOMES = ("harmless", "detected", "lost", "silently wrong")
DAMAGES = ("bit flipped", "cut", "removed", "page zeroed", "older file")
_PAGE = 4096
_WAITS = "waits for the other rank"
_LIMIT = 60.0
"""Seconds that a save or a load may take before it counts as a hang."""


def parse_arguments() -> argparse.Namespace:
    parser = argument_parser(__doc__)
    add = parser.add_argument
    add("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="methods to compare")
    add("--kills", type=int, default=40, help="kills per method (default: 40)")
    add("--damages", type=int, default=60, help="damaged files per method (default: 60)")
    add("--seed", type=int, default=5)
    add("--quick", action="store_true", help="2 kills and 5 damages per method, one of each kind")
    add("--output", type=Path, help="JSON file of the figures, in which those of other methods are kept")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.damages = 2, len(DAMAGES)
    return args


class Answer(NamedTuple):
    """What a rank answers: a result, or the error."""

    result: Any = None
    error: str | None = None


class Ranks:
    """Forked ranks that hold a method's subject and obey commands."""

    def __init__(self, method: type[Method], log: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(method.world_size):
            ours, theirs = fork.Pipe()
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": method.world_size}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = fork.Process(target=_serve, args=(method, theirs, variables, log), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers("start")

    def save(self, run: Path, step: int) -> None:
        """Save the state of a step.

        Raises:
            UserError: It failed.
        """
        self.begin_save(run, step)
        self._answers("save")

    def begin_save(self, run: Path, step: int) -> None:
        """Return when all ranks are about to save the state of a step."""
        self._send("save", run, step)
        self._answers("begin")

    def load(self, run: Path, by_hand: int | None) -> list[Answer]:
        """Load the checkpoint of the documented way to resume, or that of a step by hand."""
        self._send("load", run, by_hand)
        return self._receive()

    def fingerprints(self, steps: range) -> dict[int, list[Any]]:
        """Return the fingerprints of the states of some steps, per rank."""
        found = {}
        for step in steps:
            self._send("fingerprint", None, step)
            found[step] = self._answers("fingerprint")
        return found

    def kill(self, first: int | None = None) -> None:
        """Kill all ranks at once, or one and half a second later the others."""
        if first is not None:
            self._processes[first].kill()
            time.sleep(0.5)
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def _send(self, *command: Any) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a rank that has died answers nothing
                pipe.send(command)

    def _receive(self) -> list[Answer]:
        """Return one answer per rank; after an error of one rank the others have a short time to follow."""
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + _LIMIT
        while len(answers) < len(self._pipes):
            open_ones = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in answers}
            ready = wait(list(open_ones), timeout=max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                try:
                    answer = pipe.recv()
                except EOFError:
                    answer = Answer(error="the process died")
                answers[open_ones[pipe]] = answer
                if answer.error:
                    deadline = min(deadline, time.monotonic() + 1.0)
            if not ready:
                answers |= {rank: Answer(error=_WAITS) for rank in open_ones.values()}
        return [answers[rank] for rank in range(len(self._pipes))]

    def _answers(self, what: str) -> list[Any]:
        answers = self._receive()
        for answer in answers:
            if answer.error:
                raise UserError(f"{what}: {answer.error}")
        return [answer.result for answer in answers]


def _serve(method: type[Method], pipe: Connection, variables: dict[str, Any], log: Path) -> None:
    """Obey the commands of `Ranks` in a forked rank."""
    os.environ.update({key: str(value) for key, value in variables.items()})
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)

    def answer(act: Callable[[], Any]) -> None:
        try:
            pipe.send(Answer(act()))
        except BaseException as error:  # whatever a damaged file raises
            pipe.send(Answer(error=f"{type(error).__name__}: {one_line(error)}"[:300]))

    subjects: list[Method] = []
    answer(lambda: subjects.append(method(Subject(method.kind))))
    (saver,) = subjects
    while True:
        what, run, step = pipe.recv()
        if what == "load":
            answer(partial(_load, saver, run, step))
            continue
        saver.subject.set_state(step)
        if what == "fingerprint":
            answer(saver.subject.fingerprint)
            continue
        saver.subject.engine.barrier()
        pipe.send(Answer())
        answer(partial(saver.save, run, step))


def _load(method: Method, run: Path, by_hand: int | None) -> list[Any]:
    method.subject.set_state(-1)
    method.load(method.newest(run) if by_hand is None else method.checkpoint(run, by_hand))
    return method.subject.fingerprint()


class Campaign:
    """All trials of one method."""

    def __init__(self, name: str, scratch: Path, seed: int):
        self._method = METHODS[name]
        preload(self._method.kind)
        self._scratch = scratch
        self._seed = seed
        self._log = scratch / "log"
        self._ranks: Ranks | None = None
        self._states = self._running().fingerprints(range(1, 3))

    def kills(self, number: int) -> list[dict[str, Any]]:
        """Kill ranks while they save the second checkpoint of a run."""
        duration = self._duration()
        rows = []
        for trial in range(number):
            chosen = random.Random(f"{self._seed} kill {trial}")
            moment, victim = chosen.uniform(0.0, 1.05), chosen.choice((None, 0, 1))
            run = self._scratch / f"kill_{trial}"
            ranks = self._running()
            ranks.save(run, 1)
            ranks.begin_save(run, 2)
            time.sleep(moment * duration)
            ranks.kill(victim if self._method.world_size > 1 else None)
            self._ranks = None
            rows.append({"kind": "kill", "moment": moment, "victim": victim} | self._outcome(run))
            shutil.rmtree(run)
        return rows

    def damages(self, number: int) -> list[dict[str, Any]]:
        """Damage one file of the second checkpoint of a run, where there are two."""
        if not self._method.keeps_older:
            return []
        source = self._scratch / "complete"
        for step in (1, 2):
            self._running().save(source, step)
        rows = []
        for trial in range(number):
            chosen = random.Random(f"{self._seed} damage {trial}")
            run = self._scratch / f"damage_{trial}"
            shutil.copytree(source, run, symlinks=True)
            kind = DAMAGES[trial % len(DAMAGES)]
            file = self._damage(run, kind, chosen)
            rows.append({"kind": kind, "file": file} | self._outcome(run))
            shutil.rmtree(run)
        return rows

    def close(self) -> None:
        """Kill the ranks."""
        if self._ranks is not None:
            self._ranks.kill()

    def _running(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks(self._method, self._log)
        return self._ranks

    def _duration(self) -> float:
        """Return the seconds of a save: the median of three after a first one."""
        seconds = []
        for repeat in range(4):
            run = self._scratch / f"duration_{repeat}"
            self._running().save(run, 1)
            self._running().begin_save(run, 2)
            started = time.perf_counter()
            self._running()._answers("save")
            seconds.append(time.perf_counter() - started)
            shutil.rmtree(run)
        return statistics.median(seconds[1:])

    def _damage(self, run: Path, kind: str, chosen: random.Random) -> str:
        method = self._method.__new__(self._method)
        newer, older = method.checkpoint(run, 2), method.checkpoint(run, 1)
        files = method.files(newer)
        if kind == "older file":  # where both have one and it differs
            files = [
                file
                for file in files
                if (twin := older / file.relative_to(newer.parent if file.parent == run else newer)).is_file()
                and twin.read_bytes() != file.read_bytes()
            ]
        else:
            files = [file for file in files if file.stat().st_size]
        file = files[int(chosen.random() * len(files))]
        content = bytearray(file.read_bytes())
        place = int(chosen.random() * len(content))
        match kind:
            case "bit flipped":
                content[place] ^= 1 << chosen.randrange(8)
                file.write_bytes(content)
            case "cut":
                os.truncate(file, place)
            case "removed":
                file.unlink()
            case "page zeroed":
                page = place // _PAGE * _PAGE
                content[page : page + _PAGE] = bytes(len(content[page : page + _PAGE]))
                file.write_bytes(content)
            case "older file":
                file.write_bytes((older / file.relative_to(newer)).read_bytes())
        return str(file.relative_to(run))

    def _outcome(self, run: Path) -> dict[str, Any]:
        step, error = self._resume(run, None)
        if error is None:
            return {"outcome": "harmless" if step else "silently wrong", "step": step}
        older, _ = self._resume(run, 1)
        # The kind of error: messages hold paths of this machine.
        return {"outcome": "detected" if older else "lost", "error": error.partition(":")[0]}

    def _resume(self, run: Path, by_hand: int | None) -> tuple[int | None, str | None]:
        """Return the step whose state was loaded, None if it is of no step; and the error."""
        answers = self._running().load(run, by_hand)
        errors = [answer.error for answer in answers if answer.error]
        if errors:  # ranks of which one failed may no longer agree on their collectives
            self.close()
            self._ranks = None
            return None, next((error for error in errors if error != _WAITS), _WAITS)
        found = [answer.result for answer in answers]
        return next((step for step, state in self._states.items() if state == found), None), None


def table(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Return the outcomes side by side, as a table in Markdown; in brackets: from the older checkpoint."""
    lines = ["| method | trials |" + "".join(f" {outcome} |" for outcome in OUTCOMES)]
    lines.append("|---|---|" + "---|" * len(OUTCOMES))
    for part in ("kills", "damages"):
        for name, found in rows.items():
            mine = [row for row in found if (row["kind"] == "kill") == (part == "kills")]
            if mine:
                counts = Counter(row["outcome"] for row in mine)
                older = sum(row.get("step") == 1 for row in mine)
                cells = f" {counts[OUTCOMES[0]]} ({older}) |"
                cells += "".join(f" {counts[outcome]} |" for outcome in OUTCOMES[1:])
                lines.append(f"| {METHODS[name].label} | {len(mine)} {part} |{cells}")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    print(f"{hardware()}; load average before: {os.getloadavg()[0]:.1f}", flush=True)
    rows: dict[str, list[dict[str, Any]]] = {}
    if args.output and args.output.exists():
        rows |= json.loads(args.output.read_text())["rows"]
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    for name in args.methods:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=OUTPUTS) as scratch:
            campaign = Campaign(name, Path(scratch), args.seed)
            try:
                rows[name] = campaign.kills(args.kills) + campaign.damages(args.damages)
            finally:
                campaign.close()
        counts = Counter(row["outcome"] for row in rows[name])
        print(f"{METHODS[name].label}: {dict(counts)}, {time.perf_counter() - started:.0f} s", flush=True)
        result = {"hardware": hardware(), "seed": args.seed, "rows": rows}
        if args.output:
            args.output.write_text(json.dumps(result) + "\n")
    print(f"\n{table(rows)}\n")
    if not args.output:
        write_result("bench_fault_tolerance", result)


if __name__ == "__main__":
    run_main(main)
