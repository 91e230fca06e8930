"""Checks of `craft-ds doctor`: each yields findings about one part of the machine and changes nothing."""

import fcntl
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from craft_ds.distributed.rendezvous import IFNAME, host_addresses, is_loopback, missing_interfaces
from craft_ds.errors import one_line
from craft_ds.tensor_io.filesystem import fsync

OK, WARNING, PROBLEM = "ok", "warning", "problem"
GB, GIB, MIB = 10**9, 2**30, 2**20
DISTRIBUTION = "craft-ds"
EXTRAS = {"deepspeed": "--ds_config", "world": "the world metaworld"}
"""Optional dependencies of users, and what does not work without them."""
LOCK_AGE_S = 600
"""Age from which the lock file of a torch extension must be that of a killed process, as in training."""
NVIDIA_DEVICE = Path("/dev/nvidiactl")
SHARED_MEMORY = Path("/dev/shm")
MIN_SHARED_BYTES, ADVISED_SHARED_BYTES = 128 * MIB, GIB
MIN_DISK_BYTES, ADVISED_DISK_BYTES = GB, 20 * GB


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        name: Part of the machine.
        status: `OK`, `WARNING` or `PROBLEM`.
        detail: State that was found.
        fix: Action that removes the warning or problem; empty if there is none.
    """

    name: str
    status: str
    detail: str
    fix: str = ""


Findings = Iterator[Finding]


def run_checks(output_dir: Path) -> Findings:
    """Yield the findings of all checks, as they come.

    Args:
        output_dir: Directory of future runs; it does not have to exist.
    """
    checks: dict[str, Callable[[], Findings]] = {
        "interpreter": check_interpreter,
        "versions": check_versions,
        "torch": check_torch,
        "GPUs": check_gpus,
        "NCCL": check_nccl,
        "DeepSpeed": check_deepspeed,
        "host name": check_host_name,
        "network": check_network_interfaces,
        "shared memory": check_shared_memory,
        "disk": partial(check_disk, output_dir),
        "file system": partial(check_file_system, output_dir),
        "rendering": check_rendering,
    }
    for name, check in checks.items():
        try:
            yield from check()
        except Exception as error:
            yield Finding(name, PROBLEM, f"the check failed: {type(error).__name__}: {one_line(error)}")


def check_interpreter() -> Findings:
    """Compare the interpreter's version with the supported range."""
    detail = f"{platform.python_implementation()} {platform.python_version()} ({sys.executable})"
    try:
        supported = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        supported = ""
    if platform.python_version() in SpecifierSet(supported or "", prereleases=True):
        yield Finding("interpreter", OK, detail)
    else:
        yield Finding(
            "interpreter", PROBLEM, f"{detail}; supported: {supported}", "make an environment of Python 3.12"
        )


def check_versions() -> Findings:
    """Compare installed packages with the ranges that craft-ds was tested with."""
    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        yield Finding("versions", WARNING, f"{DISTRIBUTION} is not installed here", "pip install craft-ds")
        return
    findings: list[Finding] = []
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            findings += _compare_version(requirement, extra="")
        else:
            extras = [extra for extra in EXTRAS if requirement.marker.evaluate({"extra": extra})]
            findings += [one for extra in extras for one in _compare_version(requirement, extra)]
    yield from findings or [Finding("versions", OK, "all packages are in the tested ranges")]


def _compare_version(requirement: Requirement, extra: str) -> Findings:
    name, tested = requirement.name, requirement.specifier
    try:
        version = Version(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        if extra:
            detail = f"{name} is not installed: {EXTRAS[extra]} will not work"
            yield Finding("versions", WARNING, detail, f"pip install 'craft-ds[{extra}]'")
        else:
            yield Finding("versions", PROBLEM, f"{name} is not installed", f"pip install '{name}{tested}'")
        return
    if tested.contains(version, prereleases=True):
        return
    # A newer version may work and was not tested; an older one lacks what craft-ds uses.
    upper_bounds = [Version(one.version) for one in tested if one.operator in ("<", "<=", "==")]
    newer = bool(upper_bounds) and version >= min(upper_bounds)
    detail = f"{name} {version} is {'newer' if newer else 'older'} than tested ({tested})"
    yield Finding("versions", WARNING if newer else PROBLEM, detail, f"pip install '{name}{tested}'")


def check_torch() -> Findings:
    """Check that torch sees the GPUs of a machine with an NVIDIA driver."""
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    detail = f"torch {torch.__version__}, built {build}"
    if not NVIDIA_DEVICE.exists() or torch.cuda.is_available():
        yield Finding("torch", OK, detail)
    elif torch.version.cuda is None:
        fix = "install a CUDA build: https://pytorch.org/get-started/locally"
        yield Finding("torch", PROBLEM, f"{detail}, but this machine has an NVIDIA driver", fix)
    else:
        fix = f"update the NVIDIA driver for CUDA {torch.version.cuda}, and check CUDA_VISIBLE_DEVICES"
        yield Finding("torch", PROBLEM, f"{detail}, but cannot use this machine's GPUs", fix)


def check_gpus() -> Findings:
    """List the GPUs with their memory."""
    if not torch.cuda.is_available():
        yield Finding("GPUs", OK, f"none; training runs on the CPU ({os.cpu_count()} cores)")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        detail = f"{index}: {properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        if free < 0.8 * total:
            yield Finding("GPUs", WARNING, f"{detail}: others use it", "end the processes in nvidia-smi")
        elif properties.major < 8:
            yield Finding(
                "GPUs", WARNING, f"{detail}; it has no bf16 units", "use --engine.dtype=float32 on it"
            )
        else:
            yield Finding("GPUs", OK, detail)


def check_nccl() -> Findings:
    """Check that torch was built with NCCL, which ranks on GPUs need."""
    if dist.is_nccl_available():
        yield Finding("NCCL", OK, ".".join(map(str, torch.cuda.nccl.version())))
    elif torch.cuda.device_count():
        yield Finding("NCCL", PROBLEM, "torch was built without NCCL", "install torch from PyPI, for Linux")
    else:
        yield Finding("NCCL", OK, "not in this build of torch; not needed without GPUs")


def check_deepspeed() -> Findings:
    """Check that DeepSpeed's CPU Adam is compiled or can be, and that no stale lock blocks the build."""
    if find_spec("deepspeed") is None:
        yield Finding("DeepSpeed", OK, "not installed; ranks share a policy by FSDP2 (--engine=fsdp)")
        return
    directories = list(extension_directories())
    for lock in (directory / "lock" for directory in directories):
        age = _age_s(lock)
        if age is not None and age > LOCK_AGE_S:
            detail = f"{lock} was left by a process that was killed {age / 60:.0f} min ago"
            yield Finding("DeepSpeed", PROBLEM, f"{detail}; builds wait for it", f"rm {lock}")
        elif age is not None:
            yield Finding("DeepSpeed", WARNING, f"{lock}: another process compiles", "wait for it to finish")
    built = [d for d in directories if d.name == "cpu_adam" and (d / "cpu_adam.so").is_file()]
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if built:
        yield Finding("DeepSpeed", OK, f"CPU Adam is compiled in {built[0]}")
    elif missing:
        yield Finding(
            "DeepSpeed",
            PROBLEM,
            f"CPU Adam cannot be compiled without {' and '.join(missing)}: zero3_offload will not work",
            "apt-get install g++; pip install ninja, and activate the environment so that ninja is on PATH",
        )
    else:
        yield Finding("DeepSpeed", OK, "CPU Adam is compiled at first use, which takes minutes")


def extension_directories() -> Iterator[Path]:
    """Yield the directories in which torch builds extensions for this interpreter."""
    if directory := os.environ.get("TORCH_EXTENSIONS_DIR"):
        yield from (path for path in Path(directory).glob("*") if path.is_dir())
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    yield from (path for path in cache.glob(f"torch_extensions/{python}_*/*") if path.is_dir())


def _age_s(path: Path) -> float | None:
    """Return the seconds since a file was written, or None if it does not exist."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None


def check_host_name() -> Findings:
    """Check that the host name resolves to an address of this machine, as gloo needs."""
    name = socket.gethostname()
    fix = f"add the line `127.0.1.1 {name}` to /etc/hosts, or set GLOO_SOCKET_IFNAME to an interface"
    addresses = host_addresses()
    own = next((address for address, is_own in addresses if is_own), None)
    if not addresses:
        yield Finding("host name", PROBLEM, f"{name} does not resolve; gloo needs it", fix)
    elif own is None:
        found = ", ".join(sorted({address for address, _ in addresses}))
        detail = f"{name} resolves to {found}, which is not an address of this machine"
        yield Finding("host name", PROBLEM, detail, fix)
    else:
        several = "; for runs on several machines, set GLOO_SOCKET_IFNAME" if is_loopback(own) else ""
        yield Finding("host name", OK, f"{name} is {own}{several}")


def check_network_interfaces() -> Findings:
    """Check that the interfaces named for gloo exist, and that gloo can use its default one."""
    known = [name for _, name in socket.if_nameindex()]
    wanted = os.environ.get(IFNAME, "")
    fix = f"set GLOO_SOCKET_IFNAME to one of {', '.join(known)}"
    if missing := missing_interfaces():
        detail = f"GLOO_SOCKET_IFNAME={wanted}: this machine has no {', '.join(missing)}"
        yield Finding("network", PROBLEM, detail, f"{fix}, or unset it")
        return
    try:
        dist.ProcessGroupGloo.create_default_device()
    except RuntimeError as error:
        yield Finding("network", PROBLEM, f"gloo cannot open a socket: {one_line(error)}", fix)
        return
    chosen = f"on {wanted} (GLOO_SOCKET_IFNAME)" if wanted else "on the address of the host name"
    yield Finding("network", OK, f"gloo listens {chosen}; interfaces: {', '.join(known)}")


def check_shared_memory() -> Findings:
    """Check the size of /dev/shm, which data-loader workers and NCCL use."""
    if not SHARED_MEMORY.is_dir():
        yield Finding("shared memory", OK, f"there is no {SHARED_MEMORY} on this system")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    detail = f"{usage.free / GIB:.2f} of {usage.total / GIB:.2f} GiB free in {SHARED_MEMORY}"
    fix = "start the container with --shm-size=8g or --ipc=host, or train with --num_workers=0"
    if usage.free < MIN_SHARED_BYTES:
        yield Finding("shared memory", PROBLEM, f"{detail}: data-loader workers will crash", fix)
    elif usage.free < ADVISED_SHARED_BYTES:
        yield Finding("shared memory", WARNING, f"{detail}: little for data-loader workers and NCCL", fix)
    else:
        yield Finding("shared memory", OK, detail)


def check_disk(output_dir: Path) -> Findings:
    """Check the free disk space for checkpoints."""
    directory = existing_parent(output_dir)
    free = shutil.disk_usage(directory).free
    detail = f"{free / GB:.1f} GB free in {directory}"
    fix = "free some space, or choose another disk with --output_dir"
    if free < MIN_DISK_BYTES:
        yield Finding("disk", PROBLEM, f"{detail}: too little for a checkpoint", fix)
    elif free < ADVISED_DISK_BYTES:
        yield Finding("disk", WARNING, f"{detail}: a checkpoint has 12 bytes per trained parameter", fix)
    else:
        yield Finding("disk", OK, detail)


def check_file_system(output_dir: Path) -> Findings:
    """Check that the output file system is writable and has locks, fsync and atomic renames."""
    parent = existing_parent(output_dir)
    fix = "choose a local disk or another network file system with --output_dir"
    try:
        scratch = tempfile.TemporaryDirectory(dir=parent, prefix=".craft_ds_doctor.")
    except OSError as error:
        detail = f"{parent} is not writable ({error.strerror})"
        yield Finding("file system", PROBLEM, detail, "choose another --output_dir, or change its owner")
        return
    operations = {"locks": _lock, "fsync": _sync, "atomic renames": _rename}
    working = []
    with scratch as directory:
        for name, operate in operations.items():
            try:
                operate(Path(directory))
                working.append(name)
            except OSError as error:
                detail = f"{name} do not work in {parent} ({error.strerror or error})"
                yield Finding("file system", PROBLEM, detail.replace("fsync do", "fsync does"), fix)
    if len(working) == len(operations):
        yield Finding("file system", OK, f"{', '.join(working)} work in {parent}")


def _lock(directory: Path) -> None:
    with (directory / "lock").open("w") as one, (directory / "lock").open("w") as other:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise OSError("a file was locked twice at once")


def _sync(directory: Path) -> None:
    (directory / "file").write_bytes(b"content")
    fsync(directory / "file")
    fsync(directory)


def _rename(directory: Path) -> None:
    """Replace a file by another one, and rename a directory, as checkpoints do."""
    (directory / "new").write_bytes(b"new")
    (directory / "old").write_bytes(b"old")
    (directory / "new").replace(directory / "old")
    (directory / "unfinished").mkdir()
    (directory / "unfinished").rename(directory / "finished")
    if (directory / "old").read_bytes() != b"new" or not (directory / "finished").is_dir():
        raise OSError("a renamed file or directory is not found")


def existing_parent(path: Path) -> Path:
    """Return the path, or its nearest parent that is a directory."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.is_dir())


def check_rendering() -> Findings:
    """Check that MuJoCo renders off-screen, where the packages of Meta-World are installed."""
    if find_spec("metaworld") is None or find_spec("mujoco") is None:
        yield Finding("rendering", OK, "not tried: Meta-World is not installed")
        return
    from craft_ds.worlds import gl_problem

    problem = gl_problem()
    if problem is None:
        yield Finding("rendering", OK, "MuJoCo renders off-screen")
    else:
        detail, _, fix = problem.partition(": install")
        yield Finding("rendering", PROBLEM, detail, f"install{fix}" if fix else "see the message")
