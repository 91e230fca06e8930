"""Room for a file: promised where the file system can, and never bought by writing it full."""

import ctypes
import errno
from types import SimpleNamespace

import pytest

from craft_ds.tensor_io.filesystem import reserve

SIZE = 1 << 20


def test_room_is_taken_at_once(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), SIZE)
    found = (tmp_path / "file").stat()
    assert found.st_size == SIZE
    assert found.st_blocks * 512 >= SIZE


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_no_room_can_be_promised_the_file_is_sparse(tmp_path, monkeypatch, number):
    def fallocate(*_: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(fallocate=fallocate))
    with (tmp_path / "file").open("wb") as file:
        reserve(file.fileno(), SIZE)
    found = (tmp_path / "file").stat()
    assert found.st_size == SIZE
    assert found.st_blocks == 0


def test_a_disk_without_room_says_so(tmp_path):
    with (tmp_path / "file").open("wb") as file, pytest.raises(OSError, match=r"No space left|too large"):
        reserve(file.fileno(), 1 << 55)
    assert (tmp_path / "file").stat().st_size == 0
