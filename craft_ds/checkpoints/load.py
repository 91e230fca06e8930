"""Load training state from a checkpoint; each rank reads its own ranges, whichever engine wrote them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from craft_ds.checkpoints.manifest import read_manifest
from craft_ds.checkpoints.save import CRAFT_STATE, OPTIMIZER, SCHEDULER
from craft_ds.checkpoints.shard_plan import EMA
from craft_ds.engines.base import Engine
from craft_ds.errors import UserError, one_line
from craft_ds.lora.adapters import Adapters
from craft_ds.tensor_io.per_rank_file import open_tensors
from craft_ds.tensor_io.plain_values import read_plain_values
from craft_ds.tensor_io.tensor_file import ReadRange


def load_optimizer(directory: Path, engine: Engine, adapters: Adapters | None = None) -> None:
    """Load the optimizer state from a verified checkpoint; the policy's weights are loaded separately.

    Collective: call on all ranks.

    Args:
        directory: The checkpoint.
        engine: Holds the parameters.
        adapters: The trained adapters; None for full training.

    Raises:
        UserError: The file does not hold what this engine trains.
    """
    path = directory / OPTIMIZER
    try:
        with open_tensors(path) as moments:
            integers = [name for name, _, dtype in moments.specs() if not dtype.is_floating_point]
            if integers:
                raise ValueError(f"{integers[0]} holds integers")
            keys = sorted({name.rsplit(".", 1)[1] for name, *_ in moments.specs()} - {EMA})
            if keys:  # else no step was applied yet; the optimizer creates its state in the first one
                stored = adapters.keys if adapters is not None else {}
                _check_shapes(engine, keys, {name: shape for name, shape, _ in moments.specs()}, stored)
                read = _by_parameter_name(_checked(moments.read), stored)
                steps = int(moments.metadata["steps"])
                if not 0 < steps <= read_manifest(directory)["step"]:
                    raise ValueError(f"it is of {steps} steps")
                engine.load_optimizer(read, keys, steps)
    except (OSError, ValueError, LookupError) as error:
        raise UserError(
            f"{path} does not hold the optimizer state of this policy ({one_line(error)}): resume from an "
            "older checkpoint"
        ) from error


@contextmanager
def open_average(
    directory: Path,
    weights: ReadRange,
    shapes: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, str],
    *,
    all_trained: bool,
) -> Iterator[ReadRange | None]:
    """Open the moving average of the weights in a verified checkpoint.

    Args:
        directory: The checkpoint.
        weights: Reads the parameters that did not train, which have no average.
        shapes: Shapes of parameters by name, to compare with.
        stored: Name of a parameter in the file, where it differs.
        all_trained: All parameters in `shapes` trained, so that each must have an average.

    Yields:
        A reader by the parameter's name; None if the checkpoint has no average.

    Raises:
        UserError: An average is missing or of another shape than its parameter; by the reader: non-finite.
    """
    path = directory / OPTIMIZER

    def failed(why: object) -> UserError:
        return UserError(
            f"{path} does not hold a moving average of this policy ({why}): use an older checkpoint"
        )

    def entry_of(name: str) -> str:
        return f"{stored.get(name, name)}.{EMA}"

    with open_tensors(path) as file:
        averaged = {name: tuple(shape) for name, shape, _ in file.specs() if name.endswith(f".{EMA}")}
        if not averaged:
            yield None
            return
        for name, shape in shapes.items():
            found = averaged.get(entry_of(name), None if all_trained else shape)
            if found != tuple(shape):
                what = "missing" if found is None else f"of shape {list(found)}"
                raise failed(f"{entry_of(name)} is {what}")

        def read(name: str, start: int, stop: int) -> Tensor:
            entry = entry_of(name)
            if entry not in averaged:
                return weights(name, start, stop)
            values = file.read(entry, start, stop)
            if not values.isfinite().all():
                raise failed(f"{entry} is non-finite")
            return values

        yield read


def read_states(directory: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return scheduler state and CRaFT state of a verified checkpoint: plain Python values, never code.

    Raises:
        UserError: A file is damaged or holds another type.
    """
    return _read_state(directory / SCHEDULER, dict | None), _read_state(directory / CRAFT_STATE, dict)


def _read_state(path: Path, kind: Any) -> Any:
    try:
        state = read_plain_values(path)
    except Exception as error:  # torch.load passes on any error of its readers
        raise damaged_state(path, error) from error
    if not isinstance(state, kind):
        raise damaged_state(path, f"holds a {type(state).__name__}")
    return state


def damaged_state(path: Path, why: BaseException | str) -> UserError:
    """Return the error for a state file with unexpected contents."""
    return UserError(f"{path} is damaged ({one_line(why)}): resume from an older checkpoint")


def _checked(read: ReadRange) -> ReadRange:
    """Refuse moments that would make every parameter non-finite in the next step."""

    def checked(name: str, start: int, stop: int) -> Tensor:
        values = read(name, start, stop)
        if not values.isfinite().all() or (name.endswith("_sq") and (values < 0).any()):
            raise ValueError(f"{name} has values that no optimizer computes")
        return values

    return checked


def _check_shapes(
    engine: Engine, keys: Sequence[str], shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, str]
) -> None:
    """Check that the state of every parameter of this rank has the parameter's shape.

    Args:
        engine: Holds the parameters.
        keys: Names of the state.
        shapes: Shapes in the file, by name.
        stored: Name of a parameter in the file, where it differs.
    """
    for shard in engine.shards(frozen=False):
        for key in keys:
            name = f"{stored.get(shard.name, shard.name)}.{key}"
            if tuple(shapes[name]) != tuple(shard.shape):
                raise ValueError(f"{name} has the shape {list(shapes[name])}, not {list(shard.shape)}")


def _by_parameter_name(read: ReadRange, stored: Mapping[str, str]) -> ReadRange:
    """Translate parameter names to those of PEFT's file, which the adapters' optimizer state is stored by."""

    def by_name(name: str, start: int, stop: int) -> Tensor:
        parameter, key = name.rsplit(".", 1)
        return read(f"{stored.get(parameter, parameter)}.{key}", start, stop)

    return by_name
