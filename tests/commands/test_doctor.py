"""Each check of `craft-ds doctor` with an injected fault, and a healthy machine."""

import errno
import importlib.metadata
import json
import os
import socket
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from craft_ds.cli import run_command
from craft_ds.commands import doctor_checks
from craft_ds.commands.doctor_checks import (
    GB,
    GIB,
    OK,
    PROBLEM,
    WARNING,
    Finding,
    check_deepspeed,
    check_disk,
    check_file_system,
    check_gpus,
    check_host_name,
    check_interpreter,
    check_nccl,
    check_network_interfaces,
    check_rendering,
    check_shared_memory,
    check_torch,
    check_versions,
    run_checks,
)

Usage = namedtuple("Usage", "total used free")


def only(findings, status: str) -> Finding:
    """Return the single finding of a check, which has this status and, unless it is ok, a fix."""
    (finding,) = findings
    assert finding.status == status, finding
    assert bool(finding.fix) == (status != OK)
    return finding


def refuse(*_args, **_kwargs):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_healthy_machine_has_no_problem(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("craft_ds.worlds.gl_problem", lambda: None)
    run_command("doctor", ["--output_dir", str(tmp_path / "outputs" / "run")])
    printed = capsys.readouterr().out
    assert "problem " not in printed
    assert printed.splitlines()[-1].startswith("0 problem(s)")
    assert not list(tmp_path.iterdir())


def test_json_and_the_exit_status_report_a_problem(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("craft_ds.worlds.gl_problem", lambda: "no GL (no EGL): install software EGL")
    with pytest.raises(SystemExit) as ended:
        run_command("doctor", ["--json", "--output_dir", str(tmp_path)])
    assert ended.value.code == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert all(set(finding) == {"name", "status", "detail", "fix"} for finding in findings)
    problems = [finding for finding in findings if finding["status"] == PROBLEM]
    assert problems == [
        {"name": "rendering", "status": PROBLEM, "detail": "no GL (no EGL)", "fix": "install software EGL"}
    ]


def test_a_check_that_fails_is_a_problem(monkeypatch, tmp_path):
    def broken():
        raise RuntimeError("no such thing")

    monkeypatch.setattr(doctor_checks, "check_nccl", broken)
    monkeypatch.setattr("craft_ds.worlds.gl_problem", lambda: None)
    details = {finding.name: finding for finding in run_checks(tmp_path)}
    assert details["NCCL"].status == PROBLEM
    assert "RuntimeError: no such thing" in details["NCCL"].detail
    assert "rendering" in details


def test_an_unsupported_interpreter(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert "3.9.1" in only(check_interpreter(), PROBLEM).detail


@pytest.mark.parametrize(
    ("package", "version", "status", "word"),
    [
        ("torch", "2.5.0", PROBLEM, "older"),
        ("torch", "2.12.0", WARNING, "newer"),
        ("torch", None, PROBLEM, "not installed"),
        ("deepspeed", "0.10.0", PROBLEM, "older"),
        ("deepspeed", None, WARNING, "not installed"),
        ("mujoco", "3.9.0", WARNING, "newer"),
        ("ninja", "1.0", PROBLEM, "older"),
    ],
)
def test_versions_outside_the_tested_range(monkeypatch, package, version, status, word):
    true_version = importlib.metadata.version

    def fake_version(name):
        if name != package:
            return true_version(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", fake_version)
    finding = only(check_versions(), status)
    assert package in finding.detail
    assert word in finding.detail
    assert "pip install" in finding.fix


def test_torch_that_cannot_use_the_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_checks, "NVIDIA_DEVICE", tmp_path)  # exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the NVIDIA driver" in only(check_torch(), PROBLEM).fix
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "install a CUDA build" in only(check_torch(), PROBLEM).fix
    monkeypatch.setattr(doctor_checks, "NVIDIA_DEVICE", tmp_path / "none")
    only(check_torch(), OK)


@pytest.mark.parametrize(
    ("free", "major", "status", "word"),
    [(79, 9, OK, "79.0 of 80.0 GiB free"), (20, 9, WARNING, "others use it"), (79, 7, WARNING, "bf16")],
)
def test_gpus(monkeypatch, free, major, status, word):
    properties = namedtuple("Properties", "name major")("H100", major)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free * GIB, 80 * GIB))
    assert word in only(check_gpus(), status).detail


def test_no_gpu_is_not_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "CPU" in only(check_gpus(), OK).detail
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    only(check_nccl(), OK)


def test_gpus_without_nccl(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    only(check_nccl(), PROBLEM)


@pytest.fixture
def extensions(monkeypatch, tmp_path) -> Path:
    """The directory in which CPU Adam is built."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    return tmp_path / "cpu_adam"


def test_cpu_adam_that_is_compiled_needs_no_compiler(monkeypatch, extensions):
    monkeypatch.setattr("shutil.which", lambda tool: None)
    finding = only(check_deepspeed(), PROBLEM)
    assert "g++ and ninja" in finding.detail
    (extensions / "cpu_adam.so").touch()
    only(check_deepspeed(), OK)


def test_cpu_adam_that_can_be_compiled(monkeypatch, extensions):
    monkeypatch.setattr("shutil.which", lambda tool: f"/usr/bin/{tool}")
    only(check_deepspeed(), OK)


def test_a_lock_of_a_killed_build_is_a_problem(monkeypatch, extensions):
    lock = extensions / "lock"
    lock.touch()
    assert [finding.status for finding in check_deepspeed()] == [WARNING, OK]
    os.utime(lock, (time.time() - 3600,) * 2)
    stale, _ = check_deepspeed()
    assert stale.status == PROBLEM
    assert "60 min ago" in stale.detail
    assert stale.fix == f"rm {lock}"


def test_without_deepspeed_fsdp_is_named(monkeypatch):
    monkeypatch.setattr(doctor_checks, "find_spec", lambda name: None)
    assert "--engine=fsdp" in only(check_deepspeed(), OK).detail


def test_a_host_name_that_does_not_resolve(monkeypatch):
    def unknown(*_args, **_kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "gethostname", lambda: "box7")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    finding = only(check_host_name(), PROBLEM)
    assert "box7 does not resolve" in finding.detail
    assert "/etc/hosts" in finding.fix


def test_a_host_name_of_another_machine(monkeypatch):
    other = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: other)
    assert "192.0.2.1, which is not an address" in only(check_host_name(), PROBLEM).detail


def test_an_interface_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,ib9")
    finding = only(check_network_interfaces(), PROBLEM)
    assert finding.detail.endswith("no ib9")
    assert "lo" in finding.fix
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    only(check_network_interfaces(), OK)


def test_gloo_that_cannot_open_a_socket(monkeypatch):
    def fail():
        raise RuntimeError("no address")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(torch.distributed.ProcessGroupGloo, "create_default_device", fail)
    assert "no address" in only(check_network_interfaces(), PROBLEM).detail


@pytest.mark.parametrize(("free", "status"), [(64 << 20, PROBLEM), (512 << 20, WARNING), (8 << 30, OK)])
def test_shared_memory(monkeypatch, free, status):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(8 << 30, 0, free))
    only(check_shared_memory(), status)


@pytest.mark.parametrize(("free", "status"), [(0, PROBLEM), (5 * GB, WARNING), (500 * GB, OK)])
def test_disk(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(1000 * GB, 0, free))
    finding = only(check_disk(tmp_path / "not" / "yet"), status)
    assert finding.detail.endswith(str(tmp_path)) or str(tmp_path) in finding.detail


@pytest.mark.parametrize(
    ("function", "word"),
    [("fcntl.flock", "locks do not"), ("os.fsync", "fsync does not"), ("pathlib.Path.replace", "renames do")],
)
def test_a_file_system_without_an_operation(monkeypatch, tmp_path, function, word):
    monkeypatch.setattr(function, refuse)
    finding = only(check_file_system(tmp_path), PROBLEM)
    assert word in finding.detail
    assert "No locks available" in finding.detail
    assert "--output_dir" in finding.fix
    assert not list(tmp_path.iterdir())


def test_locks_that_exclude_nobody_are_a_problem(monkeypatch, tmp_path):
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    assert "locks do not work" in only(check_file_system(tmp_path), PROBLEM).detail


def test_a_directory_without_permission(monkeypatch, tmp_path):
    def denied(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", denied)
    assert "not writable" in only(check_file_system(tmp_path), PROBLEM).detail


def test_rendering_is_only_tried_with_metaworld(monkeypatch):
    monkeypatch.setattr(doctor_checks, "find_spec", lambda name: None)
    only(check_rendering(), OK)
