"""Tensor files in per-rank pieces read like consolidated ones."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from craft_ds.tensor_io.per_rank_file import Part, PerRankFile, create_piece, open_tensors, piece_path
from craft_ds.tensor_io.tensor_file import TensorFile, TensorSpec, write_tensor_file

TENSORS = {"a": torch.arange(35.0).reshape(5, 7), "b": torch.arange(3.0), "c": torch.empty(0, 4)}


def write(path, cuts):
    """Write pieces of `TENSORS`: rank r holds each flattened tensor between its cuts r and r + 1."""
    for rank in range(len(cuts["a"]) - 1):
        held = {}
        for name, tensor in TENSORS.items():
            start, stop = cuts[name][rank : rank + 2]
            if stop > start or tensor.numel() == rank == 0:
                spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
                held[name] = Part(spec, start, stop - start), tensor.reshape(-1)[start:stop]
        piece = piece_path(path, rank)
        create_piece(piece, [part for part, _ in held.values()], {"format": "pt"})
        with TensorFile(piece, writable=True) as file:
            for name, (_, values) in held.items():
                file.write(name, 0, values)


@given(
    st.lists(st.integers(0, 35), min_size=1, max_size=4).map(sorted), st.integers(0, 35), st.integers(0, 35)
)
@settings(max_examples=40, deadline=None)
def test_any_range_over_any_pieces(tmp_path_factory, inner, start, stop):
    path = tmp_path_factory.mktemp("pieces") / "model.safetensors"
    ranks = len(inner) + 1
    write(path, {"a": [0, *inner, 35], "b": [0] * ranks + [3], "c": [0] * (ranks + 1)})
    with open_tensors(path) as file:
        assert isinstance(file, PerRankFile)
        assert {spec.name: spec.shape for spec in file.specs()} == {"a": (5, 7), "b": (3,), "c": (0, 4)}
        assert file.metadata == {"format": "pt"}
        start, stop = min(start, stop), max(start, stop)
        assert torch.equal(file.read("a", start, stop), TENSORS["a"].reshape(-1)[start:stop])
        assert torch.equal(file.read("b", 0, 3), TENSORS["b"])
        assert file.read("c", 0, 0).numel() == 0
        with pytest.raises(IndexError):
            file.read("a", 0, 36)


@pytest.fixture
def pieces(tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, {"a": [0, 10, 20, 35], "b": [0, 0, 3, 3], "c": [0, 0, 0, 0]})
    return path


@pytest.mark.parametrize("rank", range(3))
def test_a_missing_piece_is_an_error(pieces, rank):
    piece_path(pieces, rank).unlink()
    with pytest.raises(ValueError, match="do not cover a: one is missing"):
        PerRankFile(pieces)


def test_a_repeated_piece_is_an_error(pieces):
    piece_path(pieces, 3).write_bytes(piece_path(pieces, 1).read_bytes())
    with pytest.raises(ValueError, match="do not cover"):
        PerRankFile(pieces)


@pytest.mark.parametrize("parts", ["{", "[]", "{}", json.dumps({"a": 3, "c": [0, [1]]})])
def test_damaged_metadata_is_an_error(pieces, parts):
    spec = TensorSpec("a", (10,), torch.float32)
    write_tensor_file(piece_path(pieces, 0), [spec], lambda *_: torch.zeros(10), {"parts": parts})
    with pytest.raises(ValueError, match=r"damaged|disagree|cover"):
        PerRankFile(pieces)


def test_pieces_of_another_run_are_an_error(pieces):
    spec = TensorSpec("a", (7, 5), torch.float32)
    create_piece(piece_path(pieces, 0), [Part(spec, 0, 10)])
    with pytest.raises(ValueError, match="disagree on shape"):
        PerRankFile(pieces)


def test_a_consolidated_file_is_preferred(pieces):
    write_tensor_file(pieces, [TensorSpec("a", (2,), torch.float32)], lambda *_: torch.ones(2))
    with open_tensors(pieces) as file:
        assert isinstance(file, TensorFile)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_tensors(tmp_path / "model.safetensors")
