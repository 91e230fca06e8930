"""One small policy, its data sets and its anchors for all tests of the commands: made once, never changed."""

import os
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import ForkServer
from lerobot.configs.default import DatasetConfig

from craft_ds.anchors.build import BuildOptions, build_anchor_cache
from craft_ds.config.train_config import TrainConfig
from craft_ds.policies.loading import load_policy_config
from craft_ds.testing.datasets import make_test_dataset
from craft_ds.testing.permissions import is_not_permitted
from craft_ds.testing.policies import make_test_policy_dir
from craft_ds.worlds import gl_problem

# Bits of runs are compared, in this process and in others: all compute with one thread.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser):
    group = parser.getgroup("craft-ds")
    group.addoption("--all", action="store_true", help="run the full campaign of tests/faults, not a sample")
    group.addoption(
        "--faults-seed",
        type=int,
        default=int(os.environ.get("CRAFT_FAULTS_SEED", "5")),
        help="seed of the sample and of random instants (default: CRAFT_FAULTS_SEED, or 5)",
    )


_ONE_PROCESS = (
    "test_collectives.py",
    "test_diagnosis.py",
    "test_env.py",
    "test_preemption.py",
    "test_watchdog.py",
)

_IN_PROCESS_FAULTS = (
    "test_deletion.py",
    "test_foreign_code.py",
    "test_forgeries.py",
    "test_fuzz.py",
    "test_output_directory.py",
    "test_secrets.py",
    "test_untrusted.py",
    "test_untrusted_files.py",
    "test_untrusted_metadata.py",
)


def pytest_collection_modifyitems(config, items):
    """Mark tests by what they use; single tests elsewhere carry their marker themselves."""
    if not config.getoption("--all"):
        _keep_samples(config, items)
    for item in items:
        folder = item.path.parent.name
        if folder == "faults":
            item.add_marker("faults")
        if item.path.name in _IN_PROCESS_FAULTS:
            item.add_marker("one_process")
        if folder == "distributed" and item.path.name not in _ONE_PROCESS:
            item.add_marker("distributed")
        if "metaworld" in item.fixturenames:
            item.add_marker("world")
        if "compiled_cpu_adam" in item.fixturenames:
            item.add_marker("slow")


def _keep_samples(config, items):
    """Deselect all but n cases of each test with the marker `sample(n)`; the seed decides which."""
    cases: dict[str, list] = {}
    for item in items:
        if item.get_closest_marker("sample"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    dropped = set()
    for test, found in cases.items():
        count = found[0].get_closest_marker("sample").args[0]
        if len(found) > count:
            order = random.Random(f"{config.getoption('--faults-seed')} {test}")
            dropped |= set(found) - set(order.sample(found, count))
    if dropped:
        config.hook.pytest_deselected(items=list(dropped))
        items[:] = [item for item in items if item not in dropped]


@dataclass(frozen=True)
class Inputs:
    """What a run reads: a teacher, the new task's data (80 frames), the old tasks' data and anchors."""

    policy: Path
    new: Path
    old: Path
    anchors: Path

    def build_anchors(self, output: Path, **changes: Any) -> Path:
        """Build 24 anchors of the old tasks with the teacher, or with changes of the `BuildOptions`."""
        options = {
            "dataset_repo_id": "craft-ds/test",
            "dataset_root": str(self.old),
            "policy_path": str(self.policy),
            "num_samples": 24,
            "num_workers": 0,
            "heldout_fraction": 0.34,
        }
        build_anchor_cache(BuildOptions(**(options | {"output_dir": str(output)} | changes)))
        return output

    def flags(self, output: Path) -> list[str]:
        """A plain run of 4 steps."""
        return [
            f"--policy.path={self.policy}",
            "--policy.device=cpu",
            "--dataset.repo_id=craft-ds/test",
            f"--dataset.root={self.new}",
            f"--output_dir={output}",
            "--steps=4",
            "--batch_size=2",
            "--num_workers=0",
            "--log_freq=1",
            "--save_freq=0",
        ]

    def craft_flags(self) -> list[str]:
        """What makes it a CRaFT run with retention steps 0 and 2."""
        return [
            "--craft.enabled=true",
            f"--craft.anchor_cache_dir={self.anchors}",
            "--craft.anchor_batch_size=2",
            "--craft.retention_freq=2",
        ]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    inputs = Inputs(root / "policy", root / "new", root / "old", root / "anchors")
    make_test_policy_dir(inputs.policy)
    make_test_dataset(inputs.old, tasks=2, episodes_per_task=3)
    make_test_dataset(inputs.new, tasks=1, episodes_per_task=4, seed=5)
    inputs.build_anchors(inputs.anchors)
    return inputs


@pytest.fixture
def data_config(inputs, monkeypatch) -> TrainConfig:
    """Configuration of a run on the new task's data, not validated yet."""
    monkeypatch.setattr(sys, "argv", ["train_craft.py"])
    policy = load_policy_config(inputs.policy)
    policy.pretrained_path = inputs.policy
    dataset = DatasetConfig("craft-ds/test", root=str(inputs.new), video_backend="pyav")
    return TrainConfig(dataset=dataset, policy=policy, batch_size=2, num_workers=0, seed=3)


ADAPTERS = {
    "attention": ["--lora=attention"],
    "attention_mlp": ["--lora=attention_mlp"],
    "attention_mlp_vision": ["--lora=attention_mlp_vision"],
    "rslora": ["--lora=preset", "--lora.use_rslora=true", "--lora.rank=3"],
    "dora": ["--lora=attention_mlp_vision", "--lora.use_dora=true"],
    "gaussian": ["--lora=preset", "--lora.init=gaussian"],
    "modules_to_save": ["--lora=preset", "--lora.modules_to_save=[multi_modal_projector,lm_head]"],
}


@pytest.fixture(scope="session")
def adapted(inputs, tmp_path_factory) -> Callable[[str], Path]:
    """The final checkpoint of a LoRA run of three large steps, by the kind of adapters: each made once.

    "anchors" has the adapters of "attention_mlp", trained by CRaFT.
    """
    from craft_ds.config.parser import parse_arguments
    from craft_ds.training.trainer import train_craft

    root = tmp_path_factory.mktemp("adapted")

    def checkpoint(kind: str) -> Path:
        output = root / kind
        if not output.exists():
            flags = [*inputs.flags(output), "--steps=3", "--policy.optimizer_lr=0.02"]
            flags += ["--policy.scheduler_warmup_steps=0"]
            special = inputs.craft_flags() if kind == "anchors" else []
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr("sys.argv", ["train_craft.py"])
                train_craft(parse_arguments([*flags, *special, *ADAPTERS.get(kind, ["--lora=preset"])]))
        return output / "final"

    return checkpoint


COMPILE_CPU_ADAM = """
from deepspeed.ops.op_builder import CPUAdamBuilder
from craft_ds.engines.deepspeed_cpu_adam import compile_cpu_adam

compile_cpu_adam()
print(CPUAdamBuilder().load().__file__)
"""


@pytest.fixture(scope="session")
def compiler() -> Callable[..., Path]:
    """Compile DeepSpeed's Adam in a process of its own, in the environment given; where it has put it."""

    def run(**variables: str) -> Path:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ended = subprocess.run(
            [sys.executable, "-c", COMPILE_CPU_ADAM],
            env={**os.environ, "PATH": path, **variables},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
        print(ended.stderr, file=sys.stderr)
        return Path(ended.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def compiled_cpu_adam(compiler) -> Path:
    """Compiled before there are ranks with a deadline: it takes minutes, once a machine."""
    return compiler()


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status and what it printed."""

    status: int
    output: str
    errors: str


@pytest.fixture
def set_launch(monkeypatch) -> Callable[[int, int], None]:
    """Make this process a rank of a launch on one machine, which it does not end with."""

    def set_variables(rank: int, world_size: int) -> None:
        values = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "MASTER_PORT": 29500}
        for name, value in {**values, "MASTER_ADDR": "127.0.0.1"}.items():
            monkeypatch.setenv(name, str(value))
        for module in ("craft_ds.cli", "craft_ds.training.build"):
            monkeypatch.setattr(f"{module}.end_with_launcher", lambda: None)

    return set_variables


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory) -> Iterator[ForkServer]:
    """Server that starts ranks without imports."""
    server = ForkServer(tmp_path_factory.mktemp("ranks"))
    yield server
    server.close()


@pytest.fixture
def train(inputs, monkeypatch, capsys) -> Callable[..., Ended]:
    """Run `scripts/train_craft.py` in this process: flags of a plain run, then those given, which win."""
    from craft_ds.cli import run_command

    def run(output: Path | None, *flags: str) -> Ended:
        defaults = [] if output is None else inputs.flags(output)
        monkeypatch.setattr(sys, "argv", ["train_craft.py", *defaults, *map(str, flags)])
        capsys.readouterr()
        status = 0
        try:
            run_command("train", sys.argv[1:])
        except SystemExit as leaving:
            status = leaving.code
        printed = capsys.readouterr()
        return Ended(status, printed.out, printed.err)

    return run


@pytest.fixture
def refuses(train) -> Callable[..., str]:
    """Run a training command that must end with status 2 and one line, and leave its output alone."""

    def run(output: Path | None, *flags: str, untouched: Path | None = None) -> str:
        before = _contents(untouched or output)
        ended = train(output, *flags)
        assert ended.status == 2, ended
        said = [
            line for line in ended.output.splitlines() if not line.startswith(("resuming from ", "craft-ds "))
        ]
        assert said == []
        assert _contents(untouched or output) == before
        return error_line(ended.errors)

    return run


def error_line(errors: str) -> str:
    """The one line of an error output."""
    assert errors.startswith("error: "), errors
    assert errors.endswith("\n"), errors
    assert errors.count("\n") == 1, errors
    return errors.removeprefix("error: ").strip()


def _contents(path: Path | None) -> dict[str, bytes | None] | None:
    """Every file below a directory with its bytes; None where there is nothing."""
    if path is None or not path.exists():
        return None
    files = [path, *path.rglob("*")]
    return {str(file): file.read_bytes() if file.is_file() else None for file in files}


@pytest.fixture
def mounts() -> Iterator[Callable[..., None]]:
    """Call mount(8) for a path; unmounted after the test. Skips where that is not allowed."""
    mounted: list[Path] = []

    def run(path: Path, *arguments: str) -> None:
        ended = subprocess.run(["mount", *arguments, path], capture_output=True, text=True, check=False)
        if ended.returncode:
            assert is_not_permitted(ended.stderr), ended.stderr
            pytest.skip(f"this machine does not permit mounts: {ended.stderr.strip()}")
        if "remount" not in arguments[1]:
            mounted.append(path)

    yield run
    for path in reversed(mounted):
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def mount(mounts) -> Callable[..., Path]:
    """Mount a file system in memory, of a size as `mount -o size=` takes it."""

    def run(path: Path, size: str = "64m") -> Path:
        path.mkdir(exist_ok=True)
        mounts(path, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")
        return path

    return run


@pytest.fixture
def read_only(mounts) -> Callable[[Path], None]:
    """Make a directory read-only, for root too."""

    def run(path: Path) -> None:
        mounts(path, "--bind", str(path))
        mounts(path, "-o", "remount,ro,bind")

    return run


@pytest.fixture(scope="session")
def inductor():
    """Skip where TorchInductor cannot build. Does not use `check_compile`, which the tests check."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler is installed")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        pytest.skip("Python's headers are not installed")


@pytest.fixture(scope="session")
def metaworld():
    """The class MetaWorld; test_gl.py asserts that a machine which skips here says why."""
    if problem := gl_problem():
        pytest.skip(problem)
    from craft_ds.worlds.metaworld import MetaWorld

    return MetaWorld
