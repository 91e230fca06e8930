"""Two hosts with host names, networks and addresses of their own, on which launchers run as on a cluster.

The hosts are namespaces of this machine (`two_hosts`): one file system, two ranks, gloo over the cable
between them, which a test can pull.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from runs import losses, metrics
from two_hosts import Host, NotPermittedError, two_hosts

from craft_ds.checkpoints import read_manifest

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BINARIES = Path(sys.executable).parent
TRAIN = ROOT / "scripts" / "train_craft.py"
ZERO3 = ["--ds_config", ROOT / "ds_configs" / "zero3.json"]
FSDP = ["--engine=fsdp"]
# Seconds: a start of two ranks takes about 30 on two busy cores.
STARTS = 240


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[tuple[Host, Host]]:
    directory = tmp_path_factory.mktemp("hosts")
    try:
        created = two_hosts(directory)
        pair = created.__enter__()
    except NotPermittedError as problem:
        pytest.skip(f"this machine does not permit two hosts: {problem}")
    yield pair
    created.__exit__(None, None, None)


@pytest.fixture
def pair(hosts) -> Iterator[tuple[Host, Host]]:
    """The two hosts, with the cable plugged in and nothing running at the end."""
    yield hosts
    for host in hosts:
        host.kill()
        host.plug_in()


@pytest.fixture
def start(tmp_path) -> Iterator[Callable[..., "Command"]]:
    """Start a command on a host; its output goes to a file."""
    commands: list[Command] = []

    def run(host: Host, *command: object, cwd: Path = ROOT, **environment: str) -> Command:
        output = tmp_path / f"output_{len(commands)}"
        commands.append(Command(host, output, command, environment, cwd))
        return commands[-1]

    yield run
    for command in commands:
        command.process.kill()
        command.process.wait()


class Command:
    """A command that runs on a host."""

    def __init__(
        self,
        host: Host,
        output: Path,
        command: tuple[object, ...],
        environment: dict[str, str],
        cwd: Path,
    ):
        self._output = output
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PATH": f"{BINARIES}{os.pathsep}{os.environ['PATH']}",
            **environment,
        }
        with output.open("w") as file:
            self.process = subprocess.Popen(
                host.command(*command, cwd=cwd), env=environment, stdout=file, stderr=subprocess.STDOUT
            )

    @property
    def output(self) -> str:
        return self._output.read_text()

    def ends(self, timeout: float = STARTS) -> int:
        """Wait for its end and return its exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still runs after {timeout} s:\n{self.output[-6000:]}")


def torchrun(rendezvous: str, rank: int, *options: str, nodes: str = "2") -> list[str]:
    """Return how the ranks of one of the hosts are launched."""
    command = ["torchrun", f"--nnodes={nodes}", "--nproc-per-node=1", *options]
    if rendezvous == "static":
        return [*command, f"--node-rank={rank}", "--master-addr=node-a", "--master-port=29500"]
    return [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=node-a:29500", "--rdzv-id=run"]


def wait_for_steps(run: Path, steps: int, *commands: Command) -> None:
    """Wait until a run has logged a number of steps."""
    deadline = time.monotonic() + STARTS
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < steps:
        ended = [command.output[-4000:] for command in commands if command.process.poll() is not None]
        assert not ended, "\n".join(ended)
        assert time.monotonic() < deadline, "\n".join(command.output[-4000:] for command in commands)
        time.sleep(0.1)


def error_lines(command: Command) -> list[str]:
    """Return the lines in which craft-ds says why it ends."""
    return re.findall(r"^error: .*", command.output, re.MULTILINE)


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory) -> list[float]:
    """The losses of one process with the same global batch."""
    run = tmp_path_factory.mktemp("reference") / "run"
    flags = [*inputs.flags(run), *inputs.craft_flags(), "--batch_size=4", "--craft.anchor_batch_size=4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, TRAIN, *flags], cwd=ROOT, env=environment, timeout=STARTS, check=True)
    return losses(run)


def test_hosts_differ_in_name_and_network(pair):
    for host, other in (pair, pair[::-1]):
        assert host.run("hostname").strip() == host.name
        assert host.run("pwd").strip() == str(Path.cwd())
        assert f"{host.address}/24" in host.run("ip", "address")
        assert other.address not in host.run("ip", "address")


@pytest.mark.sample(1)
@pytest.mark.parametrize("engine", [FSDP, ZERO3], ids=["fsdp", "zero3"])
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_losses_are_those_of_one_process(pair, start, inputs, expected, tmp_path, rendezvous, engine):
    run = tmp_path / "run"
    flags = [*inputs.flags(run), *inputs.craft_flags(), *engine]
    commands = [start(host, *torchrun(rendezvous, rank), TRAIN, *flags) for rank, host in enumerate(pair)]
    for command in commands:
        assert command.ends() == 0, command.output
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    assert read_manifest(run / "final")["world_size"] == 2
    for host in pair:
        assert host.processes() == {}


@pytest.fixture
def remote_shell(pair, tmp_path) -> Path:
    """A directory with `pdsh` and `ssh` that enter the other host instead of logging in."""
    programs = tmp_path / "bin"
    programs.mkdir()
    entered = {host.name: host.command(cwd=ROOT) for host in pair}
    for name in ("pdsh", "ssh"):
        program = programs / name
        program.write_text(f"#!{sys.executable}\nHOSTS = {entered!r}\n{REMOTE_SHELL}")
        program.chmod(0o755)
    return programs


REMOTE_SHELL = r"""
import subprocess, sys

arguments = sys.argv[1:]
values = ("-w", "-f", "-o", "-p")
options, place = {}, 0
while arguments[place].startswith("-"):
    options[arguments[place]] = arguments[place + 1] if arguments[place] in values else ""
    place += 2 if arguments[place] in values else 1
names = options["-w"].split(",") if "-w" in options else [arguments[place]]
words = arguments[place if "-w" in options else place + 1 :]
started = [
    subprocess.Popen([*HOSTS[name], "sh", "-c", " ".join(words).replace("%n", str(number))])
    for number, name in enumerate(names)
]
sys.exit(max(process.wait() for process in started))
"""


@pytest.mark.sample(0)
def test_hostfile_of_deepspeed(pair, start, inputs, expected, tmp_path, remote_shell):
    run = tmp_path / "run"
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
    command = start(
        pair[0],
        *("deepspeed", "--hostfile", hostfile, "--master_addr", pair[0].address),
        *(TRAIN, *ZERO3, *inputs.flags(run), *inputs.craft_flags()),
        PATH=os.pathsep.join(map(str, (remote_shell, BINARIES, os.environ["PATH"]))),
    )
    assert command.ends() == 0, command.output
    assert losses(run) == pytest.approx(expected, rel=1e-6)
    assert read_manifest(run / "final")["world_size"] == 2
    for host in pair:
        assert host.processes() == {}


@pytest.mark.sample(1)
@pytest.mark.parametrize("engine", [FSDP, ZERO3], ids=["fsdp", "zero3"])
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_host_that_is_cut_off(pair, start, inputs, tmp_path, train, rendezvous, engine):
    """Both ends stop and name the rank that is lost; one host resumes from the last checkpoint."""
    run = tmp_path / "run"
    flags = [*inputs.flags(run), *engine, "--save_freq=2", "--steps=100000", "--rank_timeout=20"]
    for host in pair:  # torchrun waits for the other's store until the kernel gives the connection up
        host.run("sh", "-c", "echo 5 > /proc/sys/net/ipv4/tcp_retries2")
    commands = [start(host, *torchrun(rendezvous, rank), TRAIN, *flags) for rank, host in enumerate(pair)]
    wait_for_steps(run, 5, *commands)
    pair[1].cut_off()
    cut = time.monotonic()
    for command in commands:
        assert command.ends(150) != 0
        print(f"ended after {time.monotonic() - cut:.0f} s\n{command.output[-3000:]}")
    first, second = (error_lines(command) for command in commands)
    assert len(first) == 1, commands[0].output
    assert "rank 1 on node-b has stopped or its machine is gone" in first[0]
    assert len(second) == 1, commands[1].output
    assert "rank 0" in second[0]
    for host in pair:
        assert host.processes() == {}

    steps = len(losses(run))
    alone = start(
        pair[0], "torchrun", "--nproc-per-node=1", TRAIN, *flags, "--resume=auto", f"--steps={steps + 4}"
    )
    assert alone.ends() == 0, alone.output
    assert f"resuming from {run}/step_" in alone.output
    assert read_manifest(run / "final")["world_size"] == 1
    assert metrics(run)[-1]["step"] == steps + 4


@pytest.mark.sample(0)
def test_elastic_run_resumes_with_one_host(pair, start, inputs, tmp_path):
    """A host loses power; the other starts again from the last checkpoint, with the same global batch."""
    run = tmp_path / "run"
    steps = 40
    flags = [
        *inputs.flags(run),
        *FSDP,
        "--save_freq=5",
        f"--steps={steps}",
        "--resume=auto",
        "--rank_timeout=20",
    ]
    commands = [
        start(host, *torchrun("c10d", rank, "--max-restarts=3", nodes="1:2"), TRAIN, *flags)
        for rank, host in enumerate(pair)
    ]
    wait_for_steps(run, 8, *commands)
    saved = read_manifest(run / "last")
    assert saved["world_size"] == 2
    pair[1].kill()
    assert commands[0].ends() == 0, commands[0].output[-6000:]
    print(commands[0].output[-6000:])
    final = read_manifest(run / "final")
    assert (final["step"], final["world_size"]) == (steps, 1)
    assert [row["step"] for row in metrics(run) if "train/loss" in row] == list(range(1, steps + 1))
    progress = torch.load(run / "final" / "craft_state.pt", weights_only=True)["progress"]
    assert (progress["samples_per_step"], progress["samples_seen"]) == (4, 4 * steps)
    assert pair[0].processes() == {}


SRUN = r"""
import os, signal, subprocess, sys

assert sys.argv[1] == "--kill-on-bad-exit=1"
# Slurm starts one task per node, and sends the job's signal to the tasks of every step.
tasks = [subprocess.Popen([*enter, *sys.argv[2:]]) for enter in HOSTS.values()]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
with open(os.environ["SRUN_PID"], "w") as file:
    file.write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = r"""
import os, sys

if sys.argv[1:] == ["show", "hostnames", "node-[a-b]"]:
    print(*HOSTS, sep="\n")
elif sys.argv[1:] == ["requeue", "7"]:
    open(os.environ["REQUEUED"], "a").write("requeued\n")
else:
    sys.exit(f"scontrol: unexpected {sys.argv[1:]}")
"""


@pytest.fixture
def slurm(pair, tmp_path) -> dict[str, str]:
    """The environment of a job on both hosts, with `srun` and `scontrol` on its PATH."""
    programs = tmp_path / "bin"
    programs.mkdir()
    entered = {host.name: host.command(cwd=tmp_path) for host in pair}
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(f"#!{sys.executable}\nHOSTS = {entered!r}\n{text}")
        (programs / name).chmod(0o755)
    return {
        "PATH": os.pathsep.join(map(str, (programs, BINARIES, os.environ["PATH"]))),
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SRUN_PID": str(tmp_path / "srun.pid"),
        "REQUEUED": str(tmp_path / "requeued"),
    }


@pytest.fixture
def slurm_script(tmp_path) -> Path:
    """The script in docs/multi-node.md."""
    text = (ROOT / "docs" / "multi-node.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```slurm\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    path = tmp_path / "train.slurm"
    path.write_text(script)
    return path


@pytest.mark.sample(0)
def test_slurm_script_of_the_documents(pair, start, inputs, slurm, slurm_script, tmp_path):
    """The script is signalled before its time limit, queued again, and ends at the second start."""
    run = tmp_path / "outputs" / "craft_train"
    kept = [flag for flag in inputs.flags(run) if not flag.startswith("--output_dir")]
    job = ["bash", slurm_script, *kept]

    first = start(pair[0], *job, "--steps=100000", cwd=tmp_path, **slurm)
    wait_for_steps(run, 4, first)
    os.kill(int(Path(slurm["SRUN_PID"]).read_text()), signal.SIGUSR1)
    assert first.ends() != 0
    assert "SIGUSR1 received: saved " in first.output
    assert Path(slurm["REQUEUED"]).read_text() == "requeued\n"
    saved = read_manifest(run / "last")["step"]

    second = start(pair[0], *job, f"--steps={saved + 3}", cwd=tmp_path, **slurm)
    assert second.ends() == 0, second.output
    assert f"resuming from outputs/craft_train/step_{saved:06d}" in second.output
    assert read_manifest(run / "final")["step"] == saved + 3
    assert read_manifest(run / "final")["world_size"] == 2
    assert Path(slurm["REQUEUED"]).read_text() == "requeued\n"  # not again


def test_slurm_script_drops_a_run_that_cannot_start(pair, start, slurm, slurm_script, tmp_path):
    command = start(pair[0], "bash", slurm_script, "--nonsense=1", cwd=tmp_path, **slurm)
    assert command.ends() != 0
    assert "--nonsense" in command.output
    assert not Path(slurm["REQUEUED"]).exists()
