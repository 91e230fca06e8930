import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from lerobot.configs.default import DatasetConfig, WandBConfig

from craft_ds.config.train_config import TrainConfig
from craft_ds.errors import UserError
from craft_ds.training import trackers
from craft_ds.training.metrics import MetricsLogger
from craft_ds.training.trackers import check_trackers, open_trackers

METRICS = {"train/loss": 0.5, "train/grad_norm": 1.2, "train/lr": 3e-4, "craft/lambda": 1.23}

TRACKIO = """
import json
import os
from pathlib import Path

class Run:
    def __init__(self, file, name):
        self.file, self.name = file, name

    def write(self, **row):
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\\n")

    def log(self, metrics, step=None):
        self.write(step=step, **metrics)

    def finish(self):
        self.write(finished=True)

def init(project, name=None, config=None, resume="never"):
    # As trackio: a name may be given twice, and a resumed run is the latest of its name.
    runs = Path(os.environ["TRACKIO_STUB_DIR"])
    count = len(list(runs.glob(f"{project}-{name}.*")))
    index = count if resume == "never" or not count else count - 1
    run = Run(runs / f"{project}-{name}.{index}", name)
    run.write(config=config["seed"])
    return run
"""


def configure(output_dir: Path, log_to: str = "", **wandb: Any) -> TrainConfig:
    return TrainConfig(
        dataset=DatasetConfig(repo_id="us/data"),
        output_dir=output_dir,
        seed=7,
        log_to=log_to,
        wandb=WandBConfig(**wandb),
    )


def open_logger(
    config: TrainConfig, *, resume: int | None = None, run_ids: dict[str, str] | None = None
) -> MetricsLogger:
    return MetricsLogger(
        Path(config.output_dir), 10, open_trackers(config, run_ids or {}, resume), resume_step=resume
    )


@pytest.fixture
def trackio(tmp_path, monkeypatch) -> Path:
    """Put a stub of trackio on `sys.path`; its runs are files in the returned directory."""
    packages, runs = tmp_path / "packages", tmp_path / "trackio-runs"
    (packages / "trackio").mkdir(parents=True)
    runs.mkdir()
    (packages / "trackio" / "__init__.py").write_text(TRACKIO)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    monkeypatch.setenv("TRACKIO_STUB_DIR", str(runs))
    yield runs
    sys.modules.pop("trackio", None)


@pytest.fixture
def writers(monkeypatch) -> list[Any]:
    """Replace TensorBoard's writer by one that records its calls; return those that were opened."""
    opened: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int | None = None) -> None:
            self.log_dir, self.purge_step = Path(log_dir), purge_step
            self.scalars: list[tuple[str, float, int]] = []
            self.flushed = self.closed = 0
            opened.append(self)

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.scalars.append((tag, value, step))

        def flush(self) -> None:
            self.flushed = len(self.scalars)

        def close(self) -> None:
            self.closed += 1

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return opened


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_flags_name_each_tracker_once():
    assert configure(Path("run")).trackers == ()
    assert configure(Path("run"), enable=True).trackers == ("wandb",)
    assert configure(Path("run"), "trackio, wandb", enable=True).trackers == ("wandb", "trackio")
    assert configure(Path("run"), "wandb,tensorboard").trackers == ("wandb", "tensorboard")


def test_a_missing_package_is_named_with_its_command(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else name)
    check_trackers(["wandb", "tensorboard"])
    with pytest.raises(UserError, match=r"^--log_to=trackio .*not installed: pip install trackio$"):
        check_trackers(["tensorboard", "trackio"])


def test_tensorboard_gets_every_metric(tmp_path, writers):
    logger = open_logger(configure(tmp_path / "run", "tensorboard"))
    logger.log(3, METRICS)
    [writer] = writers
    assert writer.log_dir == tmp_path / "run" / "tensorboard"
    assert writer.purge_step is None
    assert writer.scalars == [(key, value, 3) for key, value in METRICS.items()]
    assert writer.flushed == len(METRICS), "metrics must be on disk before the next step"
    assert logger.tracker_run_ids == {}
    logger.close()
    logger.close()
    assert writer.closed == 1


def test_tensorboard_hides_the_steps_done_again(tmp_path, writers):
    open_logger(configure(tmp_path, "tensorboard"), resume=4).close()
    assert writers[0].purge_step == 5


def test_trackio_gets_every_metric_and_resumes_its_run(tmp_path, trackio):
    config = configure(tmp_path / "run", "trackio", project="craft")
    logger = open_logger(config)
    logger.log(3, METRICS)
    run_ids = logger.tracker_run_ids
    logger.close()
    assert run_ids["trackio"].startswith("run-")
    first = [{"config": 7}, {"step": 3} | METRICS, {"finished": True}]
    [file] = trackio.iterdir()
    assert rows(file) == first

    open_logger(configure(tmp_path / "other" / "run", "trackio", project="craft")).close()
    moved = configure(tmp_path / "elsewhere", "trackio", project="craft")
    open_logger(moved, resume=3, run_ids=run_ids).close()
    assert rows(file) == [*first, {"config": 7}, {"finished": True}], "another run of that directory name"


def test_a_tracker_that_does_not_start_leaves_no_directory(tmp_path, trackio, writers, monkeypatch):
    import trackio as stub

    def fail(**_: object) -> None:
        raise RuntimeError("no such Space\nmore")

    monkeypatch.setattr(stub, "init", fail)
    config = configure(tmp_path / "run", "tensorboard,trackio")
    with pytest.raises(UserError, match=r"^--log_to=trackio: trackio did not start \(no such Space\)$"):
        open_logger(config)
    assert writers[0].closed == 1
    assert not (tmp_path / "run").exists()

    (tmp_path / "run").mkdir()
    with pytest.raises(UserError):
        open_logger(config, resume=1)
    assert (tmp_path / "run").exists(), "the directory of a resumed run stays"


def test_a_tracker_that_fails_is_dropped(tmp_path, trackio, writers, capsys):
    logger = open_logger(configure(tmp_path / "run", "trackio,tensorboard"))

    def fail(*_: object) -> None:
        raise OSError("disk full")

    writers[0].add_scalar = fail
    logger.log(1, METRICS)
    logger.log(2, METRICS)
    logger.close()
    assert capsys.readouterr().out.count("error: --log_to=tensorboard failed (disk full)") == 1
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    [file] = trackio.iterdir()
    assert [row.get("step") for row in rows(file)] == [None, 1, 2, None]


def test_a_tracker_that_fails_at_its_end_does_not_fail_the_run(tmp_path, writers, capsys):
    logger = open_logger(configure(tmp_path / "run", "tensorboard"))

    def fail() -> None:
        raise OSError("disk full")

    writers[0].close = fail
    logger.close()
    assert "--log_to=tensorboard failed (disk full)" in capsys.readouterr().out


def wandb_history(run_file: Path) -> tuple[list[dict], dict]:
    """Read an offline run back with wandb's own reader: history rows and configuration."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    deadline = time.monotonic() + 30
    while run_file.stat().st_size < 100 and time.monotonic() < deadline:
        time.sleep(0.05)  # wandb's own process writes the file a moment after `finish`
    store = DataStore()
    store.open_for_scan(str(run_file))
    history, config = [], {}
    while (data := store.scan_data()) is not None:
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append(
                {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in items}
            )
        elif record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return history, config


@pytest.fixture
def offline(monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def test_wandb_offline_run_holds_the_keys_and_resume_keeps_its_id(tmp_path, offline):
    config = configure(tmp_path, "wandb", mode="offline")
    logger = open_logger(config)
    logger.log(100, METRICS)
    logger.log(200, METRICS | {"train/loss": 0.25})
    run_ids = logger.tracker_run_ids
    logger.close()
    [run_file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    history, stored = wandb_history(run_file)
    assert [row["_step"] for row in history] == [100, 200]
    assert history[0].items() >= METRICS.items()
    assert history[1]["train/loss"] == 0.25
    assert stored["seed"] == 7

    assert run_ids == {"wandb": run_file.stem.removeprefix("run-")}

    open_logger(config, resume=200).close()  # finds the identity in the output directory
    open_logger(config, resume=200, run_ids=run_ids).close()
    runs = [run.name for run in tmp_path.glob("wandb/offline-run-*/run-*.wandb")]
    assert set(runs) == {run_file.name}


def test_wandb_errors_are_one_line(tmp_path, offline, monkeypatch):
    import wandb

    with pytest.raises(UserError, match=r"^--wandb.mode=ofline: choose online, offline or disabled$"):
        open_logger(configure(tmp_path, "wandb", mode="ofline"))

    def fail(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured.\nMore.")

    monkeypatch.setattr(wandb, "init", fail)
    with pytest.raises(UserError, match=r"^--log_to=wandb: .*No API key configured.* --wandb.mode=offline$"):
        open_logger(configure(tmp_path, enable=True))
