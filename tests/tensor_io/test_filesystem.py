"""Durable and atomic file operations."""

import ctypes
import errno
from types import SimpleNamespace

import pytest

from craft_ds.tensor_io.filesystem import reserve

SIZE = 1 << 20


def test_reserve_allocates_disk_space(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), SIZE)
    found = (tmp_path / "file").stat()
    assert found.st_size == SIZE
    assert found.st_blocks * 512 >= SIZE


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_reserve_makes_a_sparse_file_without_fallocate(tmp_path, monkeypatch, number):
    def fallocate(*_: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=fallocate))
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), SIZE)
    found = (tmp_path / "file").stat()
    assert found.st_size == SIZE
    assert found.st_blocks == 0


def test_reserve_fails_on_a_full_disk(tmp_path):
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match=r"No space left|too large"):
        reserve(file.fileno(), 1 << 55)
    assert (tmp_path / "file").stat().st_size == 0
