"""Durable and atomic file operations."""

import ctypes
import errno
from types import SimpleNamespace

import pytest

from craft_ds.tensor_io import filesystem
from craft_ds.tensor_io.filesystem import (
    atomic_directory,
    atomic_file,
    publish_directory,
    reserve,
    unfinished_path,
)

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


def test_an_atomic_file_appears_complete(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with atomic_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_an_atomic_file_keeps_the_old_content_after_an_error(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"


def test_publish_directory_flushes_everything_before_the_rename(tmp_path, monkeypatch):
    temporary, directory = tmp_path / "unfinished", tmp_path / "directory"
    (temporary / "inner").mkdir(parents=True)
    (temporary / "inner" / "file").touch()
    calls = []
    monkeypatch.setattr(filesystem, "fsync", lambda path: calls.append((path, directory.exists())))
    publish_directory(temporary, directory)
    before = {temporary, temporary / "inner", temporary / "inner" / "file"}
    assert set(calls[:-1]) == {(path, False) for path in before}
    assert calls[-1] == (tmp_path, True)


def test_an_atomic_directory_is_complete_or_absent(tmp_path):
    directory = tmp_path / "directory"
    unfinished_path(directory).mkdir()
    (unfinished_path(directory) / "leftover").touch()

    def interrupted() -> None:
        with atomic_directory(directory) as temporary:
            assert not temporary.exists()
            temporary.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(directory) as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
        assert not directory.exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["directory", "file"]
