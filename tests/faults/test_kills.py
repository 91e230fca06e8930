"""SIGKILL at any time: no complete checkpoint is lost, and the resumed run ends with the same bits."""

import random
import shutil
from pathlib import Path

import pytest
from crash_lab import ENGINES, VARIANTS, CrashLab, draw_kill_point, kill_point_per_phase, resume_arguments
from launch import Kill

RANDOM_INSTANTS = 10
RESUMES_AT_RANDOM = 4
OTHER_PHASES = 6
_ALL_RANKS = (0, 1)
_COMPLETE = ["step_000002"]
_UNFINISHED = "step_000004.tmp/optimizer.safetensors"
_TESTS = (
    "test_a_kill_in_every_phase",
    "test_a_kill_at_random_instants",
    "test_a_kill_of_a_resume",
    "test_a_kill_in_a_phase_of_a_variant",
)


@pytest.fixture(scope="module")
def labs(inputs, fork_server, tmp_path_factory):
    """A `CrashLab` per setting."""

    def flags(run):
        return [*inputs.flags(run), *inputs.craft_flags()]

    return {
        setting: CrashLab(setting, flags, fork_server, tmp_path_factory.mktemp("runs"))
        for setting in (*ENGINES, *VARIANTS)
    }


def pytest_generate_tests(metafunc):
    """Every setting in the full campaign; one per test in a sample."""
    name = metafunc.function.__name__
    settings = list(VARIANTS if name == "test_a_kill_in_a_phase_of_a_variant" else ENGINES)
    if not metafunc.config.getoption("--all"):
        number = metafunc.config.getoption("--faults-seed") + _TESTS.index(name)
        settings = [settings[number % len(settings)]]
    metafunc.parametrize("lab", settings, indirect=True)


@pytest.fixture
def lab(request, labs) -> CrashLab:
    return labs[request.param]


def draws(seed: int, *what: str) -> random.Random:
    return random.Random(f"{seed} {what}")


def test_a_kill_in_every_phase(lab, fault_table, faults_seed, full_campaign):
    draw = draws(faults_seed, "phase", lab.setting)
    assert lab.reference.exists()
    # The engines share the code that writes: split the phases between them.
    share = slice(list(ENGINES).index(lab.setting), None, len(ENGINES))
    points = kill_point_per_phase(lab.changes, draw)[share]
    if not full_campaign:
        points = [draw.choice(points)]
    kill_at_each(lab, fault_table, points)


def test_a_kill_in_a_phase_of_a_variant(lab, labs, fault_table, faults_seed, full_campaign):
    """Per-rank files, deletions, a background thread: their additional phases, and some others."""
    draw = draws(faults_seed, "variant", lab.setting)
    plain = labs[lab.setting.split(",")[0]]
    assert lab.reference.exists()
    assert plain.reference.exists()
    known = {change.phase for change in plain.changes}
    points = kill_point_per_phase([change for change in lab.changes if change.phase not in known], draw)
    others = kill_point_per_phase([change for change in lab.changes if change.phase in known], draw)
    points += draw.sample(others, OTHER_PHASES)
    if not full_campaign:
        points = [draw.choice(points)]
    kill_at_each(lab, fault_table, points)


def kill_at_each(lab, fault_table, points):
    series = fault_table.series("kill -9 at a chosen call", lab.setting)
    for point in points:
        with series.case(str(point)) as details:
            run = lab.new()
            ended = lab.run_until_kill(lab.command(run), run, point)
            details |= {"complete": lab.check_checkpoints(ended, run), "hung": lab.hung(ended, point)}
            lab.finish(run)
    series.check()


def killed_at_random(lab, draw, new_run, argv, seconds, ranks):
    """Kill a run at a random time; draw again if it had already ended.

    Returns:
        Its directory, its result and the time of the kill in seconds.
    """
    while True:
        run, instant = new_run(), draw.uniform(0.0, seconds)
        ended = lab.server.run(argv(run), 2, kill=Kill(instant, ranks))
        if ended.killed:
            return run, ended, instant
        shutil.rmtree(run)


def test_a_kill_at_random_instants(lab, fault_table, faults_seed, full_campaign):
    draw = draws(faults_seed, "instant", lab.setting)
    assert lab.reference.exists()
    series = fault_table.series("kill -9 at a random instant", lab.setting)
    for number in range(RANDOM_INSTANTS if full_campaign else 1):
        ranks = _ALL_RANKS if number % 2 else (draw.randrange(2),)
        with series.case(f"ranks {ranks}, kill {number}") as details:
            run, ended, instant = killed_at_random(lab, draw, lab.new, lab.command, lab.seconds, ranks)
            details |= {"seconds": instant, "complete": lab.check_checkpoints(ended, run), "hung": ended.hung}
            lab.finish(run)
    series.check()


def test_a_kill_of_a_resume(lab, fault_table, faults_seed, full_campaign):
    """Two kills in a row: in the save after step 4, then while the run resumes."""
    draw = draws(faults_seed, "resume", lab.setting)
    assert lab.reference.exists()
    interrupted = lab.new()
    writes = [change for change in lab.changes if (change.operation, change.path) == ("pwrite", _UNFINISHED)]
    killed = lab.run_until_kill(lab.command(interrupted), interrupted, draw_kill_point(writes, draw))
    assert lab.check_checkpoints(killed, interrupted) == _COMPLETE

    def copy() -> Path:
        run = lab.new()
        shutil.copytree(interrupted, run, symlinks=True)
        return run

    def again(run: Path) -> list[str]:
        return resume_arguments(lab.command(run))

    run = copy()
    ended, changes = lab.watched(again(run), run)
    seconds = ended.check().seconds
    lab.finish(run)
    # The calls that clean up the interrupted save and open the log files again.
    saving = next(change.call for change in changes if change.operation == "reserve")
    points = kill_point_per_phase(
        [change for change in changes if change.rank == 0 and change.call < saving], draw
    )
    if not full_campaign:
        points = [draw.choice(points)]
    series = fault_table.series("kill -9 of a resume", lab.setting)
    for point in points:
        with series.case(str(point)) as details:
            run = copy()
            ended = lab.run_until_kill(again(run), run, point)
            details |= {
                "complete": lab.check_checkpoints(ended, run, _COMPLETE),
                "hung": lab.hung(ended, point),
            }
            lab.finish(run)
    for number in range(RESUMES_AT_RANDOM if full_campaign else 0):
        with series.case(f"all ranks, kill {number}") as details:
            run, ended, instant = killed_at_random(lab, draw, copy, again, seconds, _ALL_RANKS)
            details |= {"seconds": instant, "complete": lab.check_checkpoints(ended, run, _COMPLETE)}
            lab.finish(run)
    series.check()
