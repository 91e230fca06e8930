"""One tensor file in pieces, one per rank, for file systems on which ranks cannot write to the same file.

`model.safetensors` becomes `model.rank_00000.safetensors`, … A piece is a safetensors file of 1-D tensors,
each a part of a flattened tensor under the tensor's own name. Its metadata entry `parts` holds, as JSON,
the start of each part and the shape of the full tensor.
"""

import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from craft_ds.tensor_io.safe_json import parse_object
from craft_ds.tensor_io.tensor_file import TensorFile, TensorSpec, create_tensor_file

_PARTS = "parts"


class Part(NamedTuple):
    """Elements [start, start + numel) of a flattened tensor of this name, shape and dtype."""

    spec: TensorSpec
    start: int
    numel: int


def piece_path(path: Path, rank: int) -> Path:
    """Return the path of a rank's piece of a file."""
    return path.with_name(f"{path.stem}.rank_{rank:05d}{path.suffix}")


def pieces_of(path: Path) -> list[Path]:
    """Return the existing pieces of a file, in rank order."""
    return sorted(path.parent.glob(f"{path.stem}.rank_*{path.suffix}"))


def create_piece(path: Path, parts: Iterable[Part], metadata: dict[str, str] | None = None) -> None:
    """Create a piece of its full size without values; `TensorFile.write` fills it, each part from element 0.

    Args:
        path: From `piece_path`.
        parts: Contents, at most one part per tensor.
        metadata: Strings for the header, the same in every piece.

    Raises:
        OSError: The disk is full or the directory is not writable.
    """
    parts = list(parts)
    places = {part.spec.name: [part.start, list(part.spec.shape)] for part in parts}
    specs = [part.spec._replace(shape=(part.numel,)) for part in parts]
    create_tensor_file(path, specs, {**(metadata or {}), _PARTS: json.dumps(places)})


class PerRankFile:
    """The pieces of a file, read like a single `TensorFile`.

    Args:
        path: The file's name without ranks.

    Raises:
        ValueError: A piece is damaged or missing, or the pieces do not belong together.
        OSError: A piece cannot be opened.
    """

    def __init__(self, path: Path):
        self._files = ExitStack()
        self._specs: dict[str, TensorSpec] = {}
        self._parts: dict[str, list[tuple[int, int, TensorFile]]] = {}
        self.metadata: dict[str, str] = {}
        try:
            for piece in pieces_of(path):
                self._add(self._files.enter_context(TensorFile(piece)))
            for name, parts in self._parts.items():
                parts.sort(key=lambda part: part[0])
                ends = [0, *(stop for _, stop, _ in parts)]
                if [start for start, *_ in parts] != ends[:-1] or ends[-1] != math.prod(
                    self._specs[name].shape
                ):
                    raise ValueError(f"the pieces of {path} do not cover {name}: one is missing or repeated")
        except (KeyError, TypeError, AttributeError):
            self._files.close()
            raise ValueError(f"a piece of {path} is damaged") from None
        except BaseException:
            self._files.close()
            raise

    def _add(self, file: TensorFile) -> None:
        try:
            places = parse_object(file.metadata[_PARTS].encode())
        except ValueError as error:
            raise TypeError(_PARTS) from error
        self.metadata |= {key: value for key, value in file.metadata.items() if key != _PARTS}
        for name, (numel,), dtype in file.specs():
            start, shape = places[name]
            spec = TensorSpec(name, tuple(shape), dtype)
            if self._specs.setdefault(name, spec) != spec:
                raise ValueError(f"the pieces disagree on shape or dtype of {name}")
            self._parts.setdefault(name, []).append((start, start + numel, file))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def specs(self) -> list[TensorSpec]:
        """Return name, full shape and dtype of every tensor."""
        return list(self._specs.values())

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flattened tensor, 1-D, on the CPU.

        Raises:
            KeyError: The file has no such tensor.
            IndexError: The tensor has no such elements.
        """
        parts = self._parts[name]
        if not 0 <= start <= stop <= parts[-1][1]:
            raise IndexError(f"{name} has {parts[-1][1]} elements, not [{start}, {stop})")
        found = [
            file.read(name, max(start, first) - first, min(stop, last) - first)
            for first, last, file in parts
            if first < stop and start < last
        ]
        return torch.cat(found) if found else torch.empty(0, dtype=self._specs[name].dtype)


def open_tensors(path: Path) -> TensorFile | PerRankFile:
    """Open a tensor file, consolidated or in pieces.

    Raises:
        ValueError: The file or a piece is damaged.
        OSError: It does not exist or cannot be read.
    """
    return PerRankFile(path) if not path.exists() and pieces_of(path) else TensorFile(path)
