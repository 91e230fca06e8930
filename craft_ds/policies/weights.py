"""Weights of a policy directory, read by range: each rank reads its own part only."""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Self

from torch import Tensor, nn

from craft_ds.errors import UserError, one_line
from craft_ds.policies.directory import WEIGHTS
from craft_ds.tensor_io.per_rank_file import PerRankFile, pieces_of
from craft_ds.tensor_io.safe_json import path_inside, read_object
from craft_ds.tensor_io.tensor_file import TensorFile

WEIGHTS_INDEX = "model.safetensors.index.json"
_EMBEDDING = "model.language_model.embed_tokens.weight"


class WeightReader:
    """Reader of ranges of a policy's parameters and persistent buffers, from one or several files.

    Args:
        directory: A policy directory.
        policy: The policy, on any device: the files must have its names and shapes.
        stored_name: Maps the name of a tensor in the policy to its name in the files; None where the files
            do not hold the tensor.

    Raises:
        UserError: As `locate_weights`.
    """

    def __init__(
        self, directory: Path, policy: nn.Module, stored_name: Callable[[str], str | None] = lambda name: name
    ):
        self._files, self._directory = ExitStack(), directory
        self._places: dict[str, tuple[TensorFile | PerRankFile, str]] = {}
        opened: dict[Path, TensorFile] = {}
        tensors = {
            stored: tensor
            for name, tensor in unique_tensors(policy).items()
            if (stored := stored_name(name)) is not None
        }
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        aliases = {
            stored: stored_name(first) or first
            for name, first in tied_names(policy).items()
            if (stored := stored_name(name)) is not None
        }
        if is_per_rank(directory):
            self._open_pieces(directory / WEIGHTS, shapes)
            self._check_kinds(directory, tensors)
            return
        for name, (path, key) in locate_weights(directory, shapes, aliases).items():
            if path not in opened:
                try:
                    opened[path] = self._files.enter_context(TensorFile(path))
                except (OSError, ValueError) as error:
                    self._files.close()
                    raise UserError(str(error)) from error
            self._places[name] = (opened[path], key)
        self._check_kinds(directory, tensors)

    def _check_kinds(self, directory: Path, tensors: Mapping[str, Tensor]) -> None:
        """Check that the files have floats where the policy has floats: others would be cast silently."""
        found = {
            (file, spec.name): spec.dtype
            for file in {file for file, _ in self._places.values()}
            for spec in file.specs()
        }
        for name, place in self._places.items():
            if found[place].is_floating_point != tensors[name].is_floating_point():
                self._files.close()
                raise UserError(
                    f"the weight file of {directory} holds {name} as {found[place]}, but the policy has "
                    f"{tensors[name].dtype}: use the original file"
                )

    def _open_pieces(self, path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        try:
            file = self._files.enter_context(PerRankFile(path))
            _check_names(path, shapes, {name: shape for name, shape, _ in file.specs()})
        except ValueError as error:
            self._files.close()
            raise UserError(str(error)) from error
        self._places = {name: (file, name) for name in shapes}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of a flattened tensor, 1-D, in the dtype of the file.

        Raises:
            UserError: They are not all finite.
        """
        file, key = self._places[name]
        return finite(file.read(key, start, stop), name, self._directory)


def finite(values: Tensor, name: str, directory: Path) -> Tensor:
    """Return values that were read from a weight file.

    Non-finite weights are damage: such a policy cannot act, and every loss of a run would be non-finite.

    Raises:
        UserError: They are not all finite.
    """
    if not values.isfinite().all():
        raise UserError(
            f"the weights in {directory} have non-finite values, in {name}: use the original file"
        )
    return values


def unique_tensors(policy: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer under its first name, as in a policy's file."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in policy.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def tied_names(policy: nn.Module) -> dict[str, str]:
    """Map the further names of tied tensors to the first name of each."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(tensor), name) for name, tensor in policy.state_dict(keep_vars=True).items()
    }
    return {name: known for name, known in names.items() if name != known}


def is_per_rank(directory: Path) -> bool:
    """Return True if the weights are in one file per rank (`--checkpoint.layout=per_rank`)."""
    return not (directory / WEIGHTS).is_file() and bool(pieces_of(directory / WEIGHTS))


def weight_files(directory: Path) -> list[Path]:
    """Return the weight files of a policy directory: `model.safetensors`, or those that the index names.

    Raises:
        UserError: There is neither, or the index names a file that is missing or outside the directory.
    """
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if is_per_rank(directory):
        raise UserError(
            f"{directory / WEIGHTS} is stored in one file per rank: join them with `craft-ds export`"
        )
    index = directory / WEIGHTS_INDEX
    if not index.is_file():
        raise UserError(f"{directory / WEIGHTS} is missing: the policy has no weights")
    try:
        files = sorted({path_inside(directory, name) for name in read_object(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged: {one_line(error)}") from error
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is missing, but {index} names it")
    return files


def weights_sha256(directory: Path) -> str:
    """Return a SHA-256 of the names and bytes of a policy directory's weight files.

    Raises:
        UserError: As `weight_files`.
    """
    digest = hashlib.sha256()
    for path in weight_files(directory):
        with path.open("rb") as file:
            digest.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()} {path.name}\n".encode())
    return digest.hexdigest()


def locate_weights(
    directory: Path, shapes: dict[str, tuple[int, ...]], aliases: Mapping[str, str] = MappingProxyType({})
) -> dict[str, tuple[Path, str]]:
    """Locate each tensor of a policy.

    Names may lack the leading `model.`, and `embed_tokens` may be missing where it equals `lm_head`, as in
    files of LeRobot and openpi.

    Args:
        directory: A policy directory.
        shapes: Names and shapes of the policy's tensors.
        aliases: Maps further names of tied tensors to names in `shapes`.

    Returns:
        For each name, the file and the tensor's key in it.

    Raises:
        UserError: Names or shapes differ between the files and the policy, or a file is damaged.
    """
    found: dict[str, tuple[Path, str]] = {}
    found_shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(directory):
        try:
            with TensorFile(file) as reader:
                for key, shape, _ in reader.specs():
                    known = key in shapes or key in aliases or key.startswith("model.")
                    name = key if known else f"model.{key}"
                    name = aliases.get(name, name)
                    found[name] = (file, key)
                    found_shapes[name] = shape
        except (OSError, ValueError) as error:
            raise UserError(one_line(error)) from error

    for name in shapes:
        head = name.replace(_EMBEDDING, "lm_head.weight")
        if name.endswith(_EMBEDDING) and name not in found and head in found:
            found[name], found_shapes[name] = found[head], found_shapes[head]

    where = directory / WEIGHTS if (directory / WEIGHTS).is_file() else directory / WEIGHTS_INDEX
    _check_names(where, shapes, found_shapes)
    return found


def _check_names(where: Path, shapes: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> None:
    for problem, names in (
        ("lacks", shapes.keys() - found.keys()),
        ("has unknown", found.keys() - shapes.keys()),
        ("has another shape for", {n for n in shapes.keys() & found.keys() if shapes[n] != found[n]}),
    ):
        if names:
            more = ", …" if len(names) > 3 else ""
            raise UserError(
                f"{where} {problem} {len(names)} tensors of the policy: {', '.join(sorted(names)[:3])}{more}"
            )
