"""Files of plain values: read back as written, and nothing else is ever made of one."""

import collections
import io
import math
import os
import pickle
import resource
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.tensor_io.plain_values import read_plain_values

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 80), 1 << 80) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(value=VALUES)
def test_values_are_read_as_they_were_written(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("values") / "a.pt"
    torch.save(value, path)
    assert read_plain_values(path) == value


def test_containers_of_schedules_are_values(tmp_path):
    value = {"milestones": collections.Counter([3, 3, 7]), "groups": collections.OrderedDict(a=1.5)}
    torch.save(value, tmp_path / "a.pt")
    assert read_plain_values(tmp_path / "a.pt") == value


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pack(path, pickled, compression=zipfile.ZIP_STORED, name="archive/data.pkl"):
    """Write a pickle in the form of torch.save."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


BOMBS = {
    "bytearray": Call(bytearray, 10**12),
    "tensor": Call(torch.zeros, 10**12),
    "range": Call(list, range(10**10)),
    "program": Call(os.system, "true"),
    "nested": {"multiplier": [1.0, {"a": Call(bytearray, 10**12)}]},
    "counter": Call(collections.Counter, Call(bytearray, 10**12)),
    "attribute": Call(getattr, "text", "upper"),
    "float": Call(math.pow, 2.0, 2.0),
}


@pytest.mark.parametrize("name", sorted(BOMBS))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_call_is_refused_before_it_costs_anything(tmp_path, name, protocol):
    pack(tmp_path / "a.pt", pickle.dumps(BOMBS[name], protocol))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="something else than plain values"):
        read_plain_values(tmp_path / "a.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_a_tensor_is_no_plain_value(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="something else than plain values"):
        read_plain_values(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "not a file of torch.save"),
        (
            lambda path: torch.save({"a": 1}, path, _use_new_zipfile_serialization=False),
            "not a file of torch",
        ),
        (lambda path: path.write_bytes(b""), "not a file of torch.save"),
        (lambda path: pack(path, pickle.dumps("a" * 10**6, 2), zipfile.ZIP_DEFLATED), "compressed"),
        (lambda path: pack(path, b"", name="archive/other.pkl"), "not a file of torch.save"),
    ],
)
def test_other_files_are_refused(tmp_path, write, reason):
    write(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=reason):
        read_plain_values(tmp_path / "a.pt")


def test_two_pickles_in_a_file_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save({"a": 1}, buffer)
    (tmp_path / "a.pt").write_bytes(buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "a.pt", "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({"a": 2}))
    with pytest.raises(ValueError, match=r"not a file of torch.save"):
        read_plain_values(tmp_path / "a.pt")
