"""Files that are small on disk and large in memory are refused before they are parsed."""

import json
import struct
import tracemalloc

import pytest

from craft_ds.errors import UserError
from craft_ds.policies.remote_code import check_tokenizer
from craft_ds.tensor_io.safe_json import read_object
from craft_ds.tensor_io.tensor_file import TensorFile

LIMIT = 100e6


def header(path, entries, *, pad=0):
    """Write a safetensors file of empty tensors."""
    text = (
        json.dumps(
            {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(entries)}
        ).encode()
        + b" " * pad
    )
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


def memory_of(action):
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(path, read, words):
    def action():
        with pytest.raises((UserError, ValueError)) as caught:
            read(path)
        assert any(word in str(caught.value) for word in words), caught.value

    assert memory_of(action) < LIMIT


def test_a_header_of_a_large_policy_is_read(tmp_path):
    with TensorFile(header(tmp_path / "large.safetensors", 5000)) as file:
        assert len(list(file.specs())) == 5000


@pytest.mark.parametrize("entries", [80_000, 300_000])
def test_a_header_of_too_many_entries_is_refused(tmp_path, entries):
    refused(header(tmp_path / "many.safetensors", entries), TensorFile, ["values", "bytes", "long", "large"])


def test_a_header_of_too_many_bytes_is_refused(tmp_path):
    path = header(tmp_path / "padded.safetensors", 1, pad=1 << 25)
    refused(path, TensorFile, ["values", "bytes", "long", "large", "header"])


JSON = {
    "many keys": lambda: "{" + ",".join(f'"{i}":1' for i in range(600_000)) + "}",
    "many numbers": lambda: '{"a":[' + ",".join(["1"] * 2_000_000) + "]}",
    "many empty lists": lambda: '{"a":[' + ",".join(["[]"] * 300_000) + "]}",
    "deep": lambda: '{"a":' + "[" * 100_000 + "]" * 100_000 + "}",
    "a long number": lambda: '{"a":' + "9" * 100_000 + "}",
    "a key twice": lambda: "{" + ",".join(['"a":1'] * 100_000) + "}",
}


@pytest.mark.parametrize("kind", JSON)
def test_json_that_takes_much_memory_or_time_is_refused(tmp_path, kind):
    path = tmp_path / "config.json"
    path.write_text(JSON[kind]())
    refused(path, read_object, ["values", "nested", "twice", "JSON", "digits"])


def test_a_tokenizer_file_larger_than_any_tokenizer_is_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    with file.open("wb") as large:
        large.truncate((1 << 26) + 1)  # a hole: it takes no disk
    with pytest.raises(UserError, match="more than any tokenizer"):
        check_tokenizer(str(tmp_path), "config.json")
