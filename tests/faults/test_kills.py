"""SIGKILL at any instant: nothing whole is lost, and the run goes on to the bits of the uninterrupted one."""

import random
import shutil
from pathlib import Path

import pytest
from crashes import ENGINES, VARIANTS, CrashLab, draw_blow, going_on, one_blow_a_phase
from ranks import Kill

RANDOM_INSTANTS = 10
RESUMES_AT_RANDOM = 4
OTHER_PHASES = 6
_EVERYBODY = (0, 1)
_WHOLE = ["step_000002"]
_UNFINISHED = "step_000004.tmp/optimizer.safetensors"
_TESTS = (
    "test_a_kill_in_every_phase",
    "test_a_kill_at_random_instants",
    "test_a_kill_of_a_resume",
    "test_a_kill_in_what_a_variant_adds",
)


@pytest.fixture(scope="module")
def labs(inputs, fork_server, tmp_path_factory):
    """A laboratory for each setting."""

    def flags(run):
        return [*inputs.flags(run), *inputs.craft_flags()]

    return {
        setting: CrashLab(setting, flags, fork_server, tmp_path_factory.mktemp("runs"))
        for setting in (*ENGINES, *VARIANTS)
    }


def pytest_generate_tests(metafunc):
    """Every setting in the whole campaign; in a sample one a test."""
    name = metafunc.function.__name__
    settings = list(VARIANTS if name == "test_a_kill_in_what_a_variant_adds" else ENGINES)
    if not metafunc.config.getoption("--all"):
        number = metafunc.config.getoption("--faults-seed") + _TESTS.index(name)
        settings = [settings[number % len(settings)]]
    metafunc.parametrize("lab", settings, indirect=True)


@pytest.fixture
def lab(request, labs) -> CrashLab:
    return labs[request.param]


def draws(seed: int, *what: str) -> random.Random:
    return random.Random(f"{seed} {what}")


def test_a_kill_in_every_phase(lab, fault_table, faults_seed, whole_campaign):
    draw = draws(faults_seed, "phase", lab.setting)
    assert lab.reference.exists()
    # The engines write by the same code: each takes its share of the phases, and together they take all.
    share = slice(list(ENGINES).index(lab.setting), None, len(ENGINES))
    blows = one_blow_a_phase(lab.changes, draw)[share]
    if not whole_campaign:
        blows = [draw.choice(blows)]
    strike_each(lab, fault_table, blows)


def test_a_kill_in_what_a_variant_adds(lab, labs, fault_table, faults_seed, whole_campaign):
    """Pieces, deletions, a thread beside training: the phases that are new with them, and some others."""
    draw = draws(faults_seed, "variant", lab.setting)
    plain = labs[lab.setting.split(",")[0]]
    assert lab.reference.exists()
    assert plain.reference.exists()
    known = {change.phase for change in plain.changes}
    blows = one_blow_a_phase([change for change in lab.changes if change.phase not in known], draw)
    others = one_blow_a_phase([change for change in lab.changes if change.phase in known], draw)
    blows += draw.sample(others, OTHER_PHASES)
    if not whole_campaign:
        blows = [draw.choice(blows)]
    strike_each(lab, fault_table, blows)


def strike_each(lab, fault_table, blows):
    series = fault_table.series("kill -9 at a chosen call", lab.setting)
    for blow in blows:
        with series.case(str(blow)) as details:
            run = lab.new()
            ended = lab.strike(lab.command(run), run, blow)
            details |= {"whole": lab.whole_after(ended, run), "hung": lab.hung(ended, blow)}
            lab.finish(run)
    series.check()


def killed_at_random(lab, draw, begin, argv, seconds, ranks):
    """A run that was killed at some instant of it: drawn again if it had ended by then.

    Returns:
        Its directory, how it ended and the instant.
    """
    while True:
        run, instant = begin(), draw.uniform(0.0, seconds)
        ended = lab.server.run(argv(run), 2, kill=Kill(instant, ranks))
        if ended.killed:
            return run, ended, instant
        shutil.rmtree(run)


def test_a_kill_at_random_instants(lab, fault_table, faults_seed, whole_campaign):
    draw = draws(faults_seed, "instant", lab.setting)
    assert lab.reference.exists()
    series = fault_table.series("kill -9 at a random instant", lab.setting)
    for number in range(RANDOM_INSTANTS if whole_campaign else 1):
        ranks = _EVERYBODY if number % 2 else (draw.randrange(2),)
        with series.case(f"ranks {ranks}, kill {number}") as details:
            run, ended, instant = killed_at_random(lab, draw, lab.new, lab.command, lab.seconds, ranks)
            details |= {"seconds": instant, "whole": lab.whole_after(ended, run), "hung": ended.helped}
            lab.finish(run)
    series.check()


def test_a_kill_of_a_resume(lab, fault_table, faults_seed, whole_campaign):
    """Two kills in a row: in the save after step 4, then while the run is being taken up again."""
    draw = draws(faults_seed, "resume", lab.setting)
    assert lab.reference.exists()
    wreck = lab.new()
    writes = [change for change in lab.changes if (change.operation, change.path) == ("pwrite", _UNFINISHED)]
    struck = lab.strike(lab.command(wreck), wreck, draw_blow(writes, draw))
    assert lab.whole_after(struck, wreck) == _WHOLE

    def copy() -> Path:
        run = lab.new()
        shutil.copytree(wreck, run, symlinks=True)
        return run

    def again(run: Path) -> list[str]:
        return going_on(lab.command(run))

    run = copy()
    ended, changes = lab.watched(again(run), run)
    seconds = ended.check().seconds
    lab.finish(run)
    # What clears the wreck away, and what is opened anew.
    saving = next(change.call for change in changes if change.operation == "reserve")
    blows = one_blow_a_phase(
        [change for change in changes if change.rank == 0 and change.call < saving], draw
    )
    if not whole_campaign:
        blows = [draw.choice(blows)]
    series = fault_table.series("kill -9 of a resume", lab.setting)
    for blow in blows:
        with series.case(str(blow)) as details:
            run = copy()
            ended = lab.strike(again(run), run, blow)
            details |= {"whole": lab.whole_after(ended, run, _WHOLE), "hung": lab.hung(ended, blow)}
            lab.finish(run)
    for number in range(RESUMES_AT_RANDOM if whole_campaign else 0):
        with series.case(f"all ranks, kill {number}") as details:
            run, ended, instant = killed_at_random(lab, draw, copy, again, seconds, _EVERYBODY)
            details |= {"seconds": instant, "whole": lab.whole_after(ended, run, _WHOLE)}
            lab.finish(run)
    series.check()
