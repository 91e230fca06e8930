"""Real launchers that are killed: no process of the run stays, and its state is saved."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import metrics

psutil = pytest.importorskip("psutil")

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "scripts" / "train_craft.py")
BINARIES = Path(sys.executable).parent
# A step, a save and the polling, on a busy machine; torchrun's ranks have 30 s, as the store ends with it.
GONE_IN_S = 60.0
MARK = "CRAFT_DS_TEST_RUN"
SHELL = """
export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=$0
for rank in 0 1; do RANK=$rank LOCAL_RANK=$rank {python} "$@" & done
wait
"""
LAUNCHERS = {
    "deepspeed": [str(BINARIES / "deepspeed"), "--num_gpus=2", "--master_port"],
    "torchrun": [str(BINARIES / "torchrun"), "--nproc-per-node=2", "--master-port"],
    "accelerate": [
        str(BINARIES / "accelerate"),
        *("launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
        *("--mixed_precision=no", "--dynamo_backend=no", "--main_process_port"),
    ],
    "mpirun": [sys.executable, str(Path(__file__).with_name("piping_launcher.py"))],
    "shell": ["bash", "-c", SHELL.format(python=sys.executable)],
}
ENGINES = {"deepspeed": ["--ds_config", "zero3"]}


class Run:
    """A training run of two ranks with data-loader workers under a launcher, that never ends by itself."""

    def __init__(self, name: str, inputs, output: Path):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.output = output
        self._mark = str(output)
        self._log = output.parent / "log"
        flags = [*inputs.flags(output), *inputs.craft_flags(), "--steps=1000000", "--num_workers=1"]
        environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", MARK: self._mark}
        environment["PATH"] = f"{BINARIES}{os.pathsep}{os.environ['PATH']}"
        with self._log.open("w") as log:
            self.launcher = subprocess.Popen(
                [*LAUNCHERS[name], str(port), TRAIN, *flags, *ENGINES.get(name, ["--engine=fsdp"])],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self) -> list:
        """All processes that have inherited this run's mark, but zombies."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def rank(self, number: int):
        """The main process of a rank: the eldest with its variable."""
        ranks = [each for each in self.processes() if each.environ().get("RANK") == str(number)]
        return min(ranks, key=lambda process: process.create_time())

    def steps(self) -> int:
        file = self.output / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.exists() else 0

    def wait_for_steps(self, steps: int) -> None:
        deadline = time.monotonic() + 150
        while self.steps() < steps:
            assert self.launcher.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def kill_launcher(self) -> None:
        os.kill(self.launcher.pid, signal.SIGKILL)
        self.launcher.wait()

    def seconds_to_go(self) -> float:
        """Wait until no process is left; return the seconds."""
        began = time.monotonic()
        while left := self.processes():
            waited = time.monotonic() - began
            assert waited < GONE_IN_S, f"{[' '.join(each.cmdline())[:200] for each in left]}\n{self.text()}"
            time.sleep(0.2)
        print(f"gone in {time.monotonic() - began:.1f} s\n{self.text()[-3000:]}")
        return time.monotonic() - began

    def assert_saved(self) -> None:
        saved = sorted(self.output.glob("step_*/manifest.json"))
        assert saved, self.text()
        assert int(saved[-1].parent.name.removeprefix("step_")) == metrics(self.output)[-1]["step"]


@pytest.fixture
def launch(inputs, tmp_path):
    started: list[Run] = []

    def start(name: str) -> Run:
        started.append(Run(name, inputs, tmp_path / "run"))
        return started[-1]

    yield start
    for run in started:
        for process in run.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(OSError):
            run.launcher.kill()
        run.launcher.wait()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_killed_launcher_takes_its_ranks_along(launch, name):
    run = launch(name)
    run.wait_for_steps(2)
    assert len(run.processes()) >= 5  # launcher, ranks, workers
    run.kill_launcher()
    run.seconds_to_go()
    run.assert_saved()


@pytest.mark.sample(0)
def test_the_second_process_of_deepspeed_takes_its_ranks_along(launch):
    run = launch("deepspeed")
    run.wait_for_steps(2)
    [inner] = [each for each in run.processes() if "deepspeed.launcher.launch" in each.cmdline()]
    inner.kill()
    run.seconds_to_go()
    run.assert_saved()


@pytest.mark.sample(0)
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_a_stopped_launcher_lets_its_ranks_train_until_it_is_killed(launch, name):
    run = launch(name)
    run.wait_for_steps(2)
    os.kill(run.launcher.pid, signal.SIGSTOP)
    run.wait_for_steps(run.steps() + 10)
    run.kill_launcher()
    run.seconds_to_go()
    run.assert_saved()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["torchrun", "shell"])
@pytest.mark.parametrize("victim", [0, 1])
def test_a_stopped_rank_goes_too(launch, name, victim):
    run = launch(name)
    run.wait_for_steps(2)
    run.rank(victim).suspend()
    time.sleep(1.0)
    run.kill_launcher()
    run.seconds_to_go()


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
@pytest.mark.parametrize("seconds", [2.5, 4.0, 6.0, 8.0])
def test_a_launcher_that_is_killed_while_its_ranks_start(launch, name, seconds):
    run = launch(name)
    time.sleep(seconds)
    run.kill_launcher()
    run.seconds_to_go()
