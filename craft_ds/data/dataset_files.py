"""Checks of a local data set's files, before LeRobot opens it.

LeRobot looks on the hub for whatever is missing, and reports the hub's failure. It also takes rows by their
position, so rows out of order would train other frames than those that are named.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import packaging.version
import pyarrow as pa
import pyarrow.parquet as pq
from lerobot.datasets.dataset_metadata import CODEBASE_VERSION

from craft_ds.errors import UserError, one_line
from craft_ds.tensor_io.safe_json import path_inside, read_object

_TEMPLATE = re.compile(r"(?:[^{}]|\{(?:chunk_index|file_index|video_key)(?::0?\d?d?)?\})+")
_PARQUET_END = b"PAR1"


class Place(NamedTuple):
    """A local data set in messages.

    Attributes:
        root: Its folder.
        flag: Name of the flag that gave the folder.
    """

    root: Path
    flag: str

    def __str__(self) -> str:
        return f"{self.flag}={self.root}"


def check_finished(root: str | Path, flag: str = "--dataset_root") -> None:
    """Check that a folder holds a finished LeRobot v3 data set, of which files may be missing.

    Args:
        root: The data set's folder.
        flag: Name of the flag in the error message.

    Raises:
        UserError: There is no data set, its recording was not finalised, or it has another version.
    """
    place = Place(Path(root), flag)
    _read_info(place)
    for folder in (place.root / "meta" / "episodes", place.root / "data"):
        files = sorted(folder.glob("*/*.parquet"))
        broken = [file for file in files if not _parquet_is_complete(file)]
        if broken or not files:
            what = f"{broken[0]} is cut off" if broken else f"{folder} holds no parquet file"
            raise UserError(
                f"{place} was not finalised ({what}): the program that records it must "
                "end with dataset.finalize()"
            )


def check_dataset_root(
    root: str | Path, flag: str = "--dataset_root", episodes: Sequence[int] | None = None
) -> None:
    """Check that a folder holds a complete LeRobot v3 data set, consistent in itself.

    Args:
        root: The data set's folder.
        flag: Name of the flag in the error message.
        episodes: The episodes that will be used; None: all.

    Raises:
        UserError: As `check_finished`; or a file is missing, damaged or contradicts another.
    """
    check_finished(root, flag)
    place = Place(Path(root), flag)
    info = _read_info(place)
    tasks = place.root / "meta" / "tasks.parquet"
    if not tasks.is_file():
        raise UserError(f"{place} has no task texts: {tasks} is missing; copy it from the original data set")
    if not _rows(tasks):
        raise UserError(
            f"{place} has no task texts: {tasks} has no row; copy it from the original data set, or record "
            "with a task"
        )
    lengths = _check_episodes(place, info, episodes)
    _check_files(place, info, episodes)
    _check_columns(place, info)
    _check_rows(place, lengths, episodes)


def _read_info(place: Place) -> dict[str, Any]:
    path = place.root / "meta" / "info.json"
    if not path.is_file():
        raise UserError(f"{place} holds no LeRobot data set: {path} is missing")
    try:
        info = read_object(path)
        version = packaging.version.parse(str(info["codebase_version"]))
        if not isinstance(info["features"], dict):
            raise ValueError("its features are not a JSON object")
        for name in ("data_path", "video_path"):
            _check_template(name, info.get(name))
        for key in info["features"]:
            path_inside(place.root, key)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}): copy it from the original data set"
        ) from error
    supported = packaging.version.parse(CODEBASE_VERSION)
    if version.major < supported.major:
        first = (
            "" if (version.major, version.minor) == (2, 1) else "convert it to v2.1 with LeRobot 0.3, then "
        )
        raise UserError(
            f"{place} is a data set of LeRobot's format v{version}, and {CODEBASE_VERSION} is needed: {first}"
            "run python -m lerobot.scripts.convert_dataset_v21_to_v30 "
            f"--repo-id=local/{place.root.resolve().name} --root={place.root} --push-to-hub=false"
        )
    if version > supported:
        raise UserError(
            f"{place} is a data set of LeRobot's format v{version}, newer than the {CODEBASE_VERSION} of the "
            "installed LeRobot: record or export it in that format"
        )
    return info


def _check_template(name: str, template: Any) -> None:
    """Check that a template of file names is harmless: a width could be any amount of memory.

    Raises:
        ValueError: It is not a path inside the data set.
    """
    if template is None:
        return
    path_inside(Path(), template)
    if not _TEMPLATE.fullmatch(template):
        raise ValueError(f"its {name} is {template[:100]!r}")


def _check_episodes(place: Place, info: dict[str, Any], episodes: Sequence[int] | None) -> list[int]:
    """Check the table of episodes against `info.json` and the episodes asked for; return their lengths."""
    rows = list(_episode_rows(place, []))
    found = [row["episode_index"] for row in rows]
    if found != list(range(len(found))):
        raise UserError(
            f"{place}: meta/episodes lists the episodes out of order ({_listed(found)}): sort its rows by "
            "episode_index"
        )
    if info.get("total_episodes") != len(found):
        raise UserError(
            f"{place}: meta/info.json counts {info.get('total_episodes')} episodes, meta/episodes holds "
            f"{len(found)}: copy both from the original data set"
        )
    if absent := [episode for episode in episodes or () if not 0 <= episode < len(found)]:
        raise UserError(
            f"--dataset.episodes names episode {_listed(absent)}, but {place} has {len(found)} episodes, "
            f"0 to {len(found) - 1}"
        )
    return [row["length"] for row in rows]


def _check_files(place: Place, info: dict[str, Any], episodes: Sequence[int] | None) -> None:
    """Check that all data and video files of the episodes are there."""
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    wanted = None if episodes is None else set(episodes)
    missing: dict[Path, list[int]] = {}
    for row in _episode_rows(place, videos):
        if wanted is not None and row["episode_index"] not in wanted:
            continue
        for path in _files_of(info, row, videos):
            if path in missing or not (place.root / path).is_file():
                missing.setdefault(path, []).append(row["episode_index"])
    if missing:
        path, used_by = next(iter(missing.items()))
        more = f", and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise UserError(
            f"{place} lacks {path}{more}, which episode{'s' * (len(used_by) > 1)} "
            f"{_listed(used_by)} need{'s' * (len(used_by) == 1)}: restore it, or leave them out of "
            "--dataset.episodes"
        )


def _check_columns(place: Place, info: dict[str, Any]) -> None:
    """Check that the data files have the columns that `info.json` names."""
    named = {key for key, feature in info["features"].items() if feature["dtype"] != "video"}
    for file in sorted((place.root / "data").glob("*/*.parquet")):
        found = set(_schema(file).names)
        extra, absent = sorted(found - named), sorted(named - found)
        if extra or absent:
            says = (
                f"{file} has the columns {', '.join(extra)}, which meta/info.json does not name"
                if extra
                else f"meta/info.json names the columns {', '.join(absent)}, which {file} does not have"
            )
            raise UserError(f"{place}: {says}; copy both files from the original data set")


def _check_rows(place: Place, lengths: list[int], episodes: Sequence[int] | None) -> None:
    """Check that the tables hold the frames of the episodes, in order."""
    parts = [
        _read(file, ["episode_index", "index"]) for file in sorted((place.root / "data").glob("*/*.parquet"))
    ]
    episode, index = (
        np.concatenate([part.column(name).to_numpy() for part in parts])
        for name in ("episode_index", "index")
    )
    counts = np.bincount(episode, minlength=len(lengths))
    for number in range(len(lengths)) if episodes is None else episodes:
        if counts[number] != lengths[number]:
            raise UserError(
                f"{place}: the files in data/ hold {counts[number]} frames of episode {number}, "
                f"meta/episodes says {lengths[number]}: restore the missing files, or leave the episode out "
                "of --dataset.episodes"
            )
    if episodes is None and not np.array_equal(index, np.arange(len(index))):
        row = int((index != np.arange(len(index))).argmax())
        raise UserError(
            f"{place}: row {row} of the files in data/ is frame {int(index[row])}: sort the rows by index"
        )


def _episode_rows(place: Place, videos: Sequence[str]) -> Iterator[dict[str, Any]]:
    names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    names += [f"videos/{key}/{name}" for key in videos for name in ("chunk_index", "file_index")]
    for file in sorted((place.root / "meta" / "episodes").glob("*/*.parquet")):
        yield from _read(file, names).to_pylist()


def _files_of(info: dict[str, Any], row: dict[str, Any], videos: Sequence[str]) -> Iterator[Path]:
    yield Path(
        info["data_path"].format(chunk_index=row["data/chunk_index"], file_index=row["data/file_index"])
    )
    for key in videos:
        chunk, file = (row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index"))
        yield Path(info["video_path"].format(video_key=key, chunk_index=chunk, file_index=file))


def _read(file: Path, names: list[str]) -> pa.Table:
    try:
        return pq.read_table(file, columns=names).select(names)
    except (OSError, KeyError, ValueError) as error:  # pyarrow's errors are ValueErrors and KeyErrors
        raise UserError(f"{file} is damaged ({one_line(error, 160)}): restore it") from error


def _rows(file: Path) -> int:
    return int(_metadata(file).num_rows)


def _schema(file: Path) -> pa.Schema:
    return _metadata(file).schema.to_arrow_schema()


def _metadata(file: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({one_line(error, 160)}): restore it") from error


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


def _parquet_is_complete(file: Path) -> bool:
    """Return True if a file ends with parquet's magic bytes, which are written last."""
    with open(file, "rb") as stream:
        stream.seek(0, 2)
        if stream.tell() < 2 * len(_PARQUET_END):
            return False
        stream.seek(-len(_PARQUET_END), 2)
        return stream.read() == _PARQUET_END
