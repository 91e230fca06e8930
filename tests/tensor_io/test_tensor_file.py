import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from craft_ds.tensor_io import tensor_file
from craft_ds.tensor_io.tensor_file import TensorFile, TensorSpec, create_tensor_file, write_tensor_file

settings.register_profile(
    "patient", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("patient")

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
specs_lists = st.lists(
    st.builds(
        TensorSpec,
        st.text("abc.λ_0", min_size=1, max_size=8),
        st.lists(st.integers(0, 7), max_size=3).map(tuple),
        st.sampled_from(DTYPES),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)


def values_of(spec: TensorSpec, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2 if spec.dtype == torch.bool else 100, spec.shape, generator=rng).to(spec.dtype)


def read_by_safetensors(path):
    with safe_open(path, framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}, reader.metadata()  # noqa: SIM118


@given(specs=specs_lists, writers=st.integers(1, 4), data=st.data())
def test_ranges_written_by_several_writers_are_one_file(tmp_path, specs, writers, data):
    path = tmp_path / "x.safetensors"
    expected = {spec.name: values_of(spec, seed) for seed, spec in enumerate(specs)}
    create_tensor_file(path, specs, {"format": "pt"})
    pieces = []
    for name, values in expected.items():
        cuts = data.draw(st.lists(st.integers(0, values.numel()), max_size=3).map(sorted))
        bounds = [0, *cuts, values.numel()]
        pieces += [(name, start, stop) for start, stop in pairwise(bounds)]
    pieces = data.draw(st.permutations(pieces))
    files = [TensorFile(path, writable=True) for _ in range(writers)]
    for number, (name, start, stop) in enumerate(pieces):
        files[number % writers].write(name, start, expected[name].flatten()[start:stop])
    for file in files:
        with file:
            file.sync()

    found, metadata = read_by_safetensors(path)
    assert metadata == {"format": "pt"}
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert torch.equal(found[name], values)
    with TensorFile(path) as file:
        assert sorted(file.specs()) == sorted(specs)
        for name, start, stop in pieces:
            assert torch.equal(file.read(name, start, stop), expected[name].flatten()[start:stop])


def test_files_of_the_reference_implementation(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {f"t{i}": values_of(TensorSpec("", (3, i), dtype), i) for i, dtype in enumerate(DTYPES)}
    save_file(tensors, path, {"steps": "7"})
    with TensorFile(path) as file:
        assert file.metadata == {"steps": "7"}
        for name, values in tensors.items():
            assert torch.equal(file.read(name, 0, values.numel()), values.flatten())


def test_values_are_cast_to_the_dtype_of_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    create_tensor_file(path, [TensorSpec("w", (2, 2), torch.bfloat16)])
    with TensorFile(path, writable=True) as file:
        file.write("w", 1, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
        assert file.read("w", 0, 4).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_strided_view_is_written_correctly(tmp_path):
    path = tmp_path / "x.safetensors"
    create_tensor_file(path, [TensorSpec("w", (3,), torch.float32)])
    with TensorFile(path, writable=True) as file:
        file.write("w", 0, torch.arange(6.0)[::2])
        assert file.read("w", 0, 3).tolist() == [0.0, 2.0, 4.0]


@pytest.mark.parametrize(("start", "stop"), [(0, 4), (-1, 2), (2, 1), (4, 4)])
def test_a_range_never_extends_into_the_next_tensor(tmp_path, start, stop):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3), "b": torch.ones(3)}, path)
    with TensorFile(path, writable=True) as file:
        with pytest.raises(IndexError, match="a has 3 elements"):
            file.read("a", start, stop)
        with pytest.raises(IndexError, match="a has 3 elements"):
            file.write("a", 2, torch.zeros(2))
        with pytest.raises(KeyError, match="c"):
            file.read("c", 0, 1)


def test_a_created_file_has_its_full_size(tmp_path):
    path = tmp_path / "x.safetensors"
    create_tensor_file(path, [TensorSpec("w", (1000,), torch.float32)])
    assert path.stat().st_size > 4000
    assert not read_by_safetensors(path)[0]["w"].any()


def assert_damaged(path):
    with pytest.raises(ValueError, match=f"{path.name} is not a safetensors file"):
        TensorFile(path)


def with_header(path, header: bytes, body: bytes = b"") -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\0" * 8, b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"]
)
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert_damaged(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "X32", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "shape": None, "data_offsets": [0, 8]},
        [],
        None,
    ],
)
def test_a_damaged_entry(tmp_path, entry):
    path = tmp_path / "x.safetensors"
    with_header(path, json.dumps({"w": entry}).encode(), bytes(8))
    assert_damaged(path)


@pytest.mark.parametrize("header", [b"{", b"[]", b"null", b'"x"', b"\xff\xfe"])
def test_a_header_that_is_not_an_object(tmp_path, header):
    path = tmp_path / "x.safetensors"
    with_header(path, header)
    assert_damaged(path)


@given(position=st.integers(0, 400), byte=st.integers(0, 255), cut=st.booleans())
def test_any_damage_to_the_header_is_an_error_or_harmless(tmp_path, position, byte, cut):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(30.0), "b": torch.arange(4)}, path)
    content = bytearray(path.read_bytes())
    position = min(position, len(content) - 1)
    content[position] = byte
    path.write_bytes(content[:position] if cut else content)
    try:
        file = TensorFile(path)
    except ValueError:
        return
    with file:
        for spec in file.specs():
            assert file.read(spec.name, 0, math.prod(spec.shape)).numel() == math.prod(spec.shape)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(30.0)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert_damaged(path)
    with pytest.raises(SafetensorError):
        read_by_safetensors(path)


def test_write_tensor_file_reads_and_writes_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_file, "_PIECE", 10)
    values = {"a": torch.randn(7, 5), "b": torch.arange(20), "c": torch.tensor(3.5), "d": torch.empty(0, 4)}
    ranges = []

    def read(name, start, stop):
        ranges.append(stop - start)
        return values[name].reshape(-1)[start:stop]

    path = tmp_path / "x.safetensors"
    dtypes = {"a": torch.float16, "b": torch.int64, "c": torch.bfloat16, "d": torch.float32}
    specs = (TensorSpec(name, tuple(value.shape), dtypes[name]) for name, value in values.items())
    write_tensor_file(path, specs, read, {"format": "pt", "made": "so"})
    found = load_file(path)
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(found[name], value.to(dtypes[name])), name
    assert sorted(ranges) == [1, 5, 10, 10, 10, 10, 10]
    with TensorFile(path) as file:
        assert file.metadata == {"format": "pt", "made": "so"}
