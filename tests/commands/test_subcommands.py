"""Commands that run as processes: their status, and the signals that reach them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from craft_ds.cli import run_command
from craft_ds.commands.evaluate import parse_arguments
from craft_ds.commands.subcommands import call, call_side_by_side, training_command
from craft_ds.data.lerobot_dataset import open_dataset
from craft_ds.errors import PREEMPTED_STATUS, Preempted, UserError
from craft_ds.policies.loading import load_policy, load_policy_config, load_processors
from craft_ds.policies.token_loss import token_loss
from craft_ds.testing.datasets import make_test_dataset

WAITING = """
import signal, sys, threading
done = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: done.set())
print("ready", flush=True)
done.wait(60)
print("saved", flush=True)
"""


def python(program: str) -> list[str]:
    return [sys.executable, "-c", program]


def test_one_process_needs_no_launcher():
    assert training_command("single", 1)[1:] == ["-m", "craft_ds", "train", "--engine=single"]
    assert "--ds_config=zero2_offload" in training_command("zero2_offload", 2)


def test_a_preempted_command_preempts_its_caller():
    with pytest.raises(Preempted, match="stopped"):
        call(python(f"raise SystemExit({PREEMPTED_STATUS})"))
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    call(python(""))
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_commands_side_by_side_write_their_logs(tmp_path):
    """At most `jobs` run at once: each writes how many ran beside it."""
    count = (
        "import sys, time, pathlib; own = pathlib.Path(sys.argv[1]); own.touch(); time.sleep(0.5); "
        "print(len(list(own.parent.glob('*.runs')))); own.unlink()"
    )
    commands = {f"run{i}": [*python(count), str(tmp_path / f"{i}.runs")] for i in range(4)}
    call_side_by_side(commands.items(), tmp_path, 2)
    found = [int((tmp_path / f"{name}.log").read_text()) for name in commands]
    assert max(found) == 2


def test_a_failed_command_side_by_side_names_its_log(tmp_path, capsys):
    """What runs beside it ends first; no other starts."""
    wait = python("import time; time.sleep(1); print('complete')")
    fails = python("print('why'); raise SystemExit(3)")
    with pytest.raises(SystemExit) as ended:
        call_side_by_side({"good": wait, "bad": fails, "late": wait}.items(), tmp_path, 2)
    assert ended.value.code == 1
    assert capsys.readouterr().err == f"error: bad failed: see {tmp_path / 'bad.log'}\n"
    assert (tmp_path / "bad.log").read_text() == "why\n"
    assert (tmp_path / "good.log").read_text() == "complete\n"
    assert not (tmp_path / "late.log").exists()


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=["terminated", "interrupted", "killed"]
)
def test_commands_side_by_side_end_in_order_with_their_caller(tmp_path, number):
    program = (
        "from pathlib import Path\nfrom craft_ds.cli import run_main\n"
        "from craft_ds.commands.subcommands import call_side_by_side\n"
        f"commands = [('one', {python(WAITING)}), ('other', {python(WAITING)})]\n"
        f"run_main(lambda: call_side_by_side(commands, Path({str(tmp_path)!r}), 2))"
    )
    logs = [tmp_path / "one.log", tmp_path / "other.log"]
    caller = subprocess.Popen(python(program), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def printed(what: str) -> None:
        deadline = time.monotonic() + 30
        while not all(log.exists() and log.read_text() == what for log in logs):
            assert time.monotonic() < deadline, [log.exists() and log.read_text() for log in logs]
            time.sleep(0.05)

    printed("ready\n")
    os.kill(caller.pid, number)
    caller.communicate(timeout=120)
    assert caller.returncode
    printed("ready\nsaved\n")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL], ids=["terminated", "scheduler", "killed"]
)
def test_a_command_ends_in_order_with_its_caller(number):
    program = (
        "from craft_ds.cli import run_main\nfrom craft_ds.commands.subcommands import call\n"
        f"run_main(lambda: call({python(WAITING)}))"
    )
    caller = subprocess.Popen(python(program), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert caller.stdout.readline() == "ready\n"
    time.sleep(0.1)  # the caller sets its handlers after it has started the command
    os.kill(caller.pid, number)
    output, errors = caller.communicate(timeout=120)
    assert output == "saved\n"
    if number != signal.SIGKILL:
        assert (caller.returncode, errors.count("\n")) == (PREEMPTED_STATUS, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to measure"),
        (["--world=blocks", "--tasks", "reach-pink"], "--tasks reach-pink: blocks has no such task"),
        (["--dataset.repo_id", "a", "b", "--dataset.root", "x"], "one directory for each"),
        (["--dataset.repo_id", "a", "--tasks", "old"], "--tasks has no effect without --world"),
        (["--dataset.repo_id", "a", "--data_root", "x"], "--data_root has no effect without --world"),
        (["--dataset.repo_id", "a", "--episodes", "3"], "--episodes has no effect without --world"),
    ],
)
def test_a_measurement_without_a_meaning_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_arguments(["--policy.path=x", *arguments])


def test_tasks_are_a_split_or_names():
    def tasks(*words: str) -> list[str]:
        return parse_arguments(["--policy.path=x", "--world=blocks", *words]).tasks

    assert tasks() == ["reach-red", "reach-green", "reach-blue", "reach-yellow"]
    assert tasks("--tasks", "new") == ["reach-yellow"]
    assert tasks("--tasks", "reach-blue", "reach-red") == ["reach-blue", "reach-red"]


def test_loss_is_the_mean_over_the_tokens_of_all_tasks(inputs, tmp_path):
    other = make_test_dataset(tmp_path / "other", tasks=1, episodes_per_task=1, seed=9)
    output = tmp_path / "eval.json"
    flags = [f"--policy.path={inputs.policy}", f"--output={output}", "--dataset.repo_id", "old", "other"]
    run_command("eval", [*flags, "--dataset.root", str(inputs.old), str(other)])
    old, measured = json.loads(output.read_text())["datasets"]
    assert (old["root"], measured["root"]) == (str(inputs.old), str(other))
    assert len(old["loss_by_task"]) == 2
    assert min(old["loss_by_task"].values()) < old["loss"] < max(old["loss_by_task"].values())

    config = load_policy_config(inputs.policy)
    preprocessor, _ = load_processors(config, inputs.policy)
    data_set = open_dataset("other", other, config, preprocessor)
    batch = torch.utils.data.default_collate([data_set[index] for index in range(len(data_set))])
    with torch.no_grad():
        loss = token_loss(load_policy(config, inputs.policy).eval(), preprocessor(batch))
    assert measured["loss"] == pytest.approx(float(loss.total) / float(loss.count), rel=1e-5)
