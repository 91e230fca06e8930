"""The launch that environment variables describe, in every combination, against a specification."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from craft_ds.distributed.env import (
    REQUIRED,
    Launch,
    is_local_rank0,
    read_launch,
    set_local_rank,
    settle_environment,
)
from craft_ds.errors import UserError

RIGHT = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
WRONG = {
    "RANK": ["-1", "4", "one", "1.0", "1_0", "１"],
    "WORLD_SIZE": ["0", "-2", "1", "two", "0x4"],
    "LOCAL_RANK": ["-1", "4", "one"],
    "MASTER_PORT": ["0", "65536", "-1", "http"],
}
EMPTY = ("", " ", "\t")
# A name has no wrong value of its own: whether it resolves is tested when it is used.
KINDS = {name: ("unset", "empty", "right", *(("wrong",) if name in WRONG else ())) for name in REQUIRED}
SITUATIONS = [dict(zip(KINDS, kinds, strict=True)) for kinds in itertools.product(*KINDS.values())]


def specification(kinds: dict[str, str]) -> tuple[str, set[str]]:
    """Return what a situation is, `launch`, `one rank` or `error`, and the variables that are named."""
    given = {name for name, kind in kinds.items() if kind in ("right", "wrong")}
    wrong = {name for name, kind in kinds.items() if kind == "wrong"}
    if "RANK" not in given:
        return "one rank", given
    if missing := set(REQUIRED) - given:
        return "error", missing
    return ("error", wrong) if wrong else ("launch", set())


def values(kind: str, name: str) -> list[str | None]:
    return {"unset": [None], "empty": [*EMPTY], "right": [RIGHT[name]], "wrong": WRONG.get(name, [])}[kind]


def test_every_combination_is_what_the_specification_says():
    assert len(SITUATIONS) == 4**4 * 3
    seen = set()
    for kinds in SITUATIONS:
        choices = [values(kind, name) for name, kind in kinds.items()]
        # Each value of each variable once, not every combination of values.
        for number in range(max(map(len, choices))):
            environment = {
                name: value
                for name, offered in zip(kinds, choices, strict=True)
                if (value := offered[number % len(offered)]) is not None
            }
            expected, named = specification(kinds)
            seen.add(expected)
            if expected == "error":
                with pytest.raises(UserError) as raised:
                    read_launch(environment)
                message = str(raised.value)
                assert "\n" not in message
                if set(REQUIRED) <= {name for name, kind in kinds.items() if kind in ("right", "wrong")}:
                    assert any(f"{name}={environment[name]}" in message for name in named), message
                else:
                    missing = message.partition("but not ")[2].partition(":")[0]
                    assert set(missing.split(", ")) == named, (environment, message)
            elif expected == "launch":
                assert read_launch(environment) == Launch(1, 4, 1, "node0", 29500)
                assert read_launch(environment).by_launcher
            else:
                assert read_launch(environment) == Launch(ignored=tuple(n for n in REQUIRED if n in named))
                assert not read_launch(environment).by_launcher
    assert seen == {"error", "launch", "one rank"}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_named_with_the_fix(name):
    for value in WRONG[name]:
        with pytest.raises(UserError) as raised:
            read_launch(RIGHT | {name: value})
        # RANK=1 of WORLD_SIZE=1: either is wrong.
        assert f"{name}={value}" in str(raised.value)
        assert "or unset RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT to run as one rank" in str(
            raised.value
        )


@given(
    st.integers(1, 64).flatmap(
        lambda world: st.tuples(st.just(world), st.integers(1, world), st.integers(0, world - 1))
    ),
    st.sampled_from(["LOCAL_WORLD_SIZE", "LOCAL_SIZE"]),
    st.integers(0, 70),
)
def test_any_consistent_set_is_a_launch_and_no_other(sizes, local_name, local_rank):
    world_size, local_size, rank = sizes
    environment = RIGHT | {
        "RANK": f" {rank} ",
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        local_name: str(local_size),
    }
    if local_rank < local_size:
        assert read_launch(environment)[:3] == (rank, world_size, local_rank)
    else:
        with pytest.raises(UserError, match=rf"^LOCAL_RANK={local_rank}: .*{local_name}={local_size}"):
            read_launch(environment)


@pytest.mark.parametrize("value", ["0", "5", "x"])
def test_a_wrong_local_world_size_is_named(value):
    with pytest.raises(UserError, match=f"^LOCAL_WORLD_SIZE={value}: "):
        read_launch(RIGHT | {"LOCAL_WORLD_SIZE": value})


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_of_mpi_or_slurm_without_ranks_do_not_run_alone(name):
    with pytest.raises(UserError, match=f"^{name}=2, but RANK is not set"):
        read_launch({name: "2", "WORLD_SIZE": "2"})
    assert read_launch({name: "1"}) == Launch()
    assert read_launch(RIGHT | {name: "2"}).rank == 1


@pytest.fixture
def environment(monkeypatch):
    """The process's environment without a launch; restored at the end."""
    for name in (*REQUIRED, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "")  # so that what the test adds or removes is undone
    return os.environ


def test_left_over_variables_are_named_and_removed(environment, capsys):
    environment.update(WORLD_SIZE="2", LOCAL_RANK=" 1", MASTER_PORT="x", LOCAL_WORLD_SIZE="2")
    assert settle_environment()[:3] == (0, 1, 0)
    assert capsys.readouterr().err == (
        "warning: ignored WORLD_SIZE=2, LOCAL_RANK=1, MASTER_PORT=x, LOCAL_WORLD_SIZE=2: without RANK this "
        "process runs as one rank\n"
    )
    assert not {*REQUIRED, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"} & environment.keys()
    settle_environment()
    assert capsys.readouterr().err == ""


def test_a_launch_is_kept(environment, capsys):
    environment.update(RIGHT)
    settle_environment()
    assert {name: environment[name] for name in RIGHT} == RIGHT
    assert "LOCAL_WORLD_SIZE" not in environment  # was empty
    assert capsys.readouterr().err == ""


def test_a_process_with_a_wrong_environment_can_speak(environment):
    environment.update(RANK="1", LOCAL_RANK="1")
    assert is_local_rank0()
    environment.update(RIGHT)
    assert not is_local_rank0()


def test_deepspeed_finds_a_local_rank_without_a_launcher(environment, capsys):
    settle_environment()
    set_local_rank()
    assert environment["LOCAL_RANK"] == "0"
    settle_environment()  # of the next run in this process
    assert "LOCAL_RANK" not in environment
    assert capsys.readouterr().err == ""
    environment["LOCAL_RANK"] = "3"
    set_local_rank()
    assert environment["LOCAL_RANK"] == "3"


def test_nothing_else_reads_these_variables():
    """Other modules call `read_launch`; the testing package sets them for the ranks that it starts."""
    package = Path(__file__).parents[2] / "craft_ds"
    for path in package.rglob("*.py"):
        if path.parent.name != "testing" and path.name != "env.py":
            text = path.read_text()
            assert not [name for name in REQUIRED if f'"{name}"' in text], path


@pytest.mark.parametrize("command", ["version", "export", "anchors", "evaluate", "train"])
@pytest.mark.parametrize(
    ("left", "status", "line"),
    [
        (
            {"RANK": "1"},
            2,
            "error: RANK=1 is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: ",
        ),
        (RIGHT | {"WORLD_SIZE": ""}, 2, "error: RANK=1 is set, but not WORLD_SIZE: "),
        (RIGHT | {"LOCAL_RANK": "x"}, 2, "error: LOCAL_RANK=x: must be an integer of at least 0"),
        (
            {"LOCAL_RANK": "1"},
            None,
            "warning: ignored LOCAL_RANK=1: without RANK this process runs as one rank",
        ),
    ],
)
def test_every_command_says_so_in_one_line(command, left, status, line):
    clean = {key: value for key, value in os.environ.items() if key not in REQUIRED}
    ended = subprocess.run(
        [sys.executable, "-m", "craft_ds", command, *(["--nonsense=1"] if status is None else [])],
        env=clean | left,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lines = ended.stderr.splitlines()
    assert lines[0].startswith(line), ended.stderr
    if status is None:  # errors are printed although LOCAL_RANK was not 0
        assert ended.returncode == 2 or command == "version"
        assert command == "version" or "error: " in "".join(lines[1:])
    else:
        assert ended.returncode == status
        assert len(lines) == 1, ended.stderr
