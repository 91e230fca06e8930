"""Damage to single samples of a data set with pictures, and what the error must say of it."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image

CAMERA = "observation.images.top"


class Damage(NamedTuple):
    """A column, a function of its value, and the words of the reason."""

    column: str
    change: Callable[[Any], Any]
    reason: str


def _picture(content: bytes) -> dict[str, Any]:
    return {"bytes": content, "path": None}


def _of_size(width: int, height: int, mode: str = "RGB") -> dict[str, Any]:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).convert(mode).save(stream, format="PNG")
    return _picture(stream.getvalue())


def _entry(value: float, entry: int = 1) -> Callable[[list[float]], list[float]]:
    return lambda vector: [value if index == entry else float(old) for index, old in enumerate(vector)]


DAMAGES = {
    "cut picture": Damage(CAMERA, lambda old: _picture(old["bytes"][:60]), "it cannot be read"),
    "empty picture": Damage(CAMERA, lambda old: _picture(b""), "it cannot be read"),
    "text for a picture": Damage(CAMERA, lambda old: _picture(b"not a picture"), "it cannot be read"),
    "no picture": Damage(CAMERA, lambda old: None, "observation.images.top is missing"),
    "small picture": Damage(CAMERA, lambda old: _of_size(32, 48), "a picture of 48×32×3"),
    "gray picture": Damage(CAMERA, lambda old: _of_size(64, 64, "L"), "a picture of 64×64×1"),
    "picture file that is gone": Damage(
        CAMERA, lambda old: {"bytes": None, "path": "/nowhere/frame.png"}, "/nowhere/frame.png is missing"
    ),
    "nan state": Damage("observation.state", _entry(float("nan")), "observation.state[1] is nan"),
    "infinite state": Damage("observation.state", _entry(float("-inf"), 3), "observation.state[3] is -inf"),
    "far state": Damage("observation.state", _entry(1e6), "observation.state[1] is 1e+06, far outside"),
    "state in degrees": Damage("observation.state", _entry(90.0, 0), "observation.state[0] is 90, far"),
    "nan action": Damage("action", _entry(float("nan"), 2), "action[2] is nan"),
    "infinite action": Damage("action", _entry(float("inf"), 0), "action[0] is inf"),
    "far action": Damage("action", _entry(-1e30), "action[1] is -1e+30, far outside"),
    "unknown task": Damage("task_index", lambda old: 77, "it cannot be read"),
}


def damage(root: Path, name: str, episode: int, frame: int) -> None:
    """Damage one frame."""
    kind = DAMAGES[name]
    _, table = _table(root)
    rows = zip(table["episode_index"].to_pylist(), table["frame_index"].to_pylist(), strict=True)
    row = list(rows).index((episode, frame))
    values = table[kind.column].to_pylist()
    values[row] = kind.change(values[row])
    rewrite_column(root, kind.column, values)


def rewrite_column(root: Path, name: str, values: list[Any]) -> None:
    """Replace a column of the only data file."""
    file, table = _table(root)
    at = table.schema.get_field_index(name)
    field = table.schema.field(name)
    pq.write_table(table.set_column(at, field, pa.array(values, type=field.type)), file)


def _table(root: Path) -> tuple[Path, pa.Table]:
    (file,) = (root / "data").rglob("*.parquet")
    return file, pq.read_table(file)


def open_test_dataset(root: Path, chunk: int) -> LeRobotDataset:
    """Open it with chunks of this many actions; 0: one action, without an axis for steps."""
    deltas = {"action": [step / 10 for step in range(chunk)]} if chunk else None
    return LeRobotDataset("craft-ds/test", root=root, delta_timestamps=deltas, video_backend="pyav")
