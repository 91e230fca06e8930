"""A full /dev/shm is one line that names the options of the container, not a crashed worker."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from craft_ds.cli import run_main
from craft_ds.data.checked_samples import _raising, sample_loader
from craft_ds.errors import UserError
from craft_ds.testing.permissions import is_not_permitted


class Large(Dataset):
    """Samples of 4 MiB."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.zeros(1 << 20)


def read_all() -> None:
    batches = list(sample_loader(Large(), [[index] for index in range(8)], num_workers=2))
    print(f"read {len(batches)}")


def in_shared_memory_of(size: str) -> subprocess.CompletedProcess:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not installed")
    mount = f"mount -t tmpfs -o size={size} tmpfs /dev/shm"
    probe = subprocess.run(
        ["unshare", "--mount", "sh", "-c", mount], capture_output=True, text=True, check=False
    )
    if probe.returncode:
        assert is_not_permitted(probe.stderr), probe.stderr
        pytest.skip(f"this machine does not permit mounts: {probe.stderr.strip()}")
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$1"', sys.executable, str(Path(__file__))],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_a_small_shared_memory_is_one_line():
    ended = in_shared_memory_of("1m")
    assert ended.returncode == 2
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: /dev/shm, by which data-loader workers pass samples on, is full (1 MiB): ")
    assert "--ipc=host or --shm-size=8g, or use --num_workers=0" in line
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_large_shared_memory_is_enough():
    ended = in_shared_memory_of("256m")
    assert (ended.returncode, ended.stdout) == (0, "read 8\n"), ended.stderr


@pytest.mark.parametrize(
    ("message", "ours"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's", True),
        ("unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)", True),
        ("unable to write to file </torch_7_1_0>: No space left on device (28)", True),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", False),
        ("No space left on device", False),
    ],
)
def test_other_errors_of_workers_stay(message, ours):
    def batches():
        yield 1
        raise RuntimeError(message)

    reading = _raising(batches())
    assert next(reading) == 1
    with pytest.raises(UserError if ours else RuntimeError, match="/dev/shm" if ours else "") as raised:
        next(reading)
    assert isinstance(raised.value, UserError) == ours


if __name__ == "__main__":
    run_main(read_all)
