import contextlib
import json
import os
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from craft_ds.training.metrics import MetricsLogger, console_line, drop_rows_after, eval_line, json_row

PLAIN = {"train/loss": 0.523, "train/grad_norm": 1.2341, "train/lr": 3e-4}
CRAFT = PLAIN | {
    "craft/retention_loss": 0.456,
    "craft/lambda": 1.23,
    "craft/epsilon": 0.95,
    "craft/grad_conflict": 1.0,
    "craft/grad_dot": -0.01,
    "craft/grad_cos": -0.15,
    "craft/retention_weight": 1.4,
    "time/step_s": 0.2,
}


def make_logger(path: Path, *, main: bool = True, resume: int | None = None) -> MetricsLogger:
    return MetricsLogger(path, 10_000, is_main=main, resume_step=resume)


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_console_line_is_the_guides():
    assert console_line(100, 10_000, CRAFT) == (
        "Step 100/10000 | loss=0.523 | grdn=1.234 | lr=3.0e-04 | "
        "L_ret=0.456 | λ=1.23 | ε=0.95 | conflict=✓ | cos=-0.15"
    )
    assert "conflict=✗" in console_line(100, 10_000, CRAFT | {"craft/grad_conflict": 0.0})


def test_console_line_ends_with_speed_and_time_left():
    times = {"time/step_s": 0.5, "time/samples_per_s": 32.0}
    assert console_line(100, 10_000, CRAFT | times) == (
        console_line(100, 10_000, CRAFT) + " | 0.50 s/step | 32 samples/s | 1:22:30 left"
    )


def test_console_line_of_the_baseline_has_no_retention_fields():
    assert console_line(1, 10, PLAIN) == "Step 1/10 | loss=0.523 | grdn=1.234 | lr=3.0e-04"


def test_eval_line():
    line = eval_line(5, 10, PLAIN | {"eval/task_loss": 0.4, "eval/anchor_loss": 0.25})
    assert line == "Step 5/10 | eval | task_loss=0.400 | anchor_loss=0.250"


def test_json_row_is_strict():
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json_row(3, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/lr": 0.1})
    row = json.loads(line, parse_constant=refuse)
    assert row == {"step": 3, "train/loss": None, "train/grad_norm": None, "train/lr": 0.1}


def test_rows_and_console(tmp_path, capsys):
    logger = make_logger(tmp_path)
    logger.log(100, CRAFT)
    logger.advance()
    logger.log(200, {"eval/task_loss": 0.4})
    logger.log(300, {})
    logger.close()
    assert read_rows(tmp_path) == [{"step": 100} | CRAFT, {"step": 200, "eval/task_loss": 0.4}]
    output = capsys.readouterr()
    assert output.out.splitlines() == [
        console_line(100, 10_000, CRAFT),
        "Step 200/10000 | eval | task_loss=0.400",
    ]
    assert output.err == ""  # no bar where stderr is not a terminal


def test_rows_are_on_disk_before_close(tmp_path):
    logger = make_logger(tmp_path)
    logger.log(1, PLAIN)
    assert len(read_rows(tmp_path)) == 1
    logger.close()


def test_bar_survives_on_a_terminal(tmp_path, monkeypatch):
    """With a terminal for stderr, the bar starts at the resumed step and advances."""
    reader, writer = os.openpty()
    termios.tcsetwinsize(writer, (25, 100))
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        logger = make_logger(tmp_path, resume=9_998)
        logger.advance()
        logger.advance()
        logger.close()
    shown = b""
    with contextlib.suppress(OSError):  # Linux's way of saying that the terminal has closed
        while part := os.read(reader, 10_000):
            shown += part
    os.close(reader)
    assert b"9998/10000" in shown
    assert b"10000/10000" in shown


def test_other_ranks_do_nothing(tmp_path, capsys):
    logger = make_logger(tmp_path / "run", main=False)
    logger.log(1, CRAFT)
    logger.advance()
    logger.say("hello")
    logger.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_resume_drops_later_and_torn_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "a"')
    logger = make_logger(tmp_path, resume=2)
    logger.log(3, {"a": 30.0})
    logger.close()
    assert read_rows(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 30.0}]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_without_rows_and_new_run(tmp_path):
    drop_rows_after(tmp_path / "metrics.jsonl", 5)
    assert not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    make_logger(tmp_path).close()
    assert read_rows(tmp_path) == []


def test_dying_while_rows_are_dropped_loses_nothing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 9}\n')

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        drop_rows_after(path, 1)
    assert path.read_text() == '{"step": 1}\n{"step": 9}\n'


def test_console_that_cannot_show_greek(tmp_path, monkeypatch):
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        logger = make_logger(tmp_path)
        logger.log(1, CRAFT)
        logger.close()
        monkeypatch.undo()
    assert "?=1.23" in (tmp_path / "out").read_text()


def test_a_reader_that_has_ended_ends_neither_the_log_nor_the_run(tmp_path):
    program = (
        "import sys; from pathlib import Path; from craft_ds.training.metrics import MetricsLogger\n"
        f"logger = MetricsLogger(Path({str(tmp_path)!r}), 10)\n"
        f"logger.log(1, {PLAIN!r}); sys.stdin.read()\n"
        f"logger.log(2, {PLAIN!r}); logger.advance(); logger.log(3, {PLAIN!r}); logger.close()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline().startswith(b"Step 1/10")
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2, 3]
