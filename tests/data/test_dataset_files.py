"""Data sets whose files are missing, damaged or inconsistent: one line that names the file."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from craft_ds.data.dataset_files import check_dataset_root, check_finished
from craft_ds.errors import UserError
from craft_ds.testing.datasets import make_test_dataset


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_test_dataset(tmp_path_factory.mktemp("files") / "data", 2, 2, frames=5)


@pytest.fixture
def root(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Two episodes with a camera as video, one file each."""
    import numpy as np

    root = tmp_path_factory.mktemp("videos") / "data"
    features = {
        "observation.images.top": {
            "dtype": "video",
            "shape": (64, 64, 3),
            "names": ["height", "width", "channels"],
        },
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        "action": {"dtype": "float32", "shape": (4,), "names": None},
    }
    dataset = LeRobotDataset.create(
        "craft-ds/test", fps=10, features=features, root=root, video_backend="pyav"
    )
    dataset.meta.update_chunk_settings(video_files_size_in_mb=0.001)
    for episode in range(2):
        for frame in range(8):
            picture = np.full((64, 64, 3), 20 * frame + episode, dtype=np.uint8)
            values = np.full(4, frame / 10, dtype=np.float32)
            dataset.add_frame(
                {
                    "observation.images.top": picture,
                    "observation.state": values,
                    "action": values,
                    "task": "press",
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def refused(root, episodes=None) -> str:
    with pytest.raises(UserError) as raised:
        check_dataset_root(root, "--dataset.root", episodes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit_info(root, **changes):
    path = root / "meta" / "info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_table(file, change):
    pq.write_table(change(pq.read_table(file)), file)


def only(root, folder):
    (file,) = (root / folder).rglob("*.parquet")
    return file


def test_a_good_data_set_passes(original, videos):
    for root in (original, videos):
        for episodes in (None, [1], [0, 1]):
            check_dataset_root(root, "--dataset.root", episodes)


def test_an_old_format_is_named_with_the_converter(root):
    edit_info(root, codebase_version="v2.1")
    shutil.rmtree(root / "meta" / "episodes")
    (root / "meta" / "episodes.jsonl").write_text("{}\n")
    line = refused(root)
    assert line.startswith(
        f"--dataset.root={root} is a data set of LeRobot's format v2.1, and v3.0 is needed"
    )
    assert "finalize" not in line
    module = line.split("python -m ")[1].split()[0]
    __import__(module)
    assert f"--root={root} --push-to-hub=false" in line


def test_an_older_format_is_first_converted_to_the_old_one(root):
    edit_info(root, codebase_version="v2.0")
    assert "convert it to v2.1" in refused(root)


def test_a_newer_format_is_named(root):
    edit_info(root, codebase_version="v4.0")
    assert "v4.0, newer than the v3.0 of the installed LeRobot" in refused(root)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"fps": 10}', '{"codebase_version": "new"}', '{"codebase_version": "v3.0"}']
)
def test_a_damaged_info_file_is_named(root, text):
    (root / "meta" / "info.json").write_text(text)
    assert refused(root).startswith(f"{root}/meta/info.json is damaged (")


def test_missing_task_texts_are_named(root):
    (root / "meta" / "tasks.parquet").unlink()
    assert f"{root}/meta/tasks.parquet is missing" in refused(root)


def test_empty_task_texts_are_named(root):
    edit_table(root / "meta" / "tasks.parquet", lambda table: table.slice(0, 0))
    assert f"has no task texts: {root}/meta/tasks.parquet has no row" in refused(root)


def test_damaged_task_texts_are_named(root):
    file = root / "meta" / "tasks.parquet"
    file.write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    assert refused(root).startswith(f"{file} is damaged (")


def test_a_missing_data_file_is_named(original, tmp_path):
    root = shutil.copytree(original, tmp_path / "two")
    file = only(root, "data")
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 10), file)
    pq.write_table(table.slice(10), file.with_name("file-001.parquet"))
    index = only(root, "meta/episodes")
    edit_table(
        index,
        lambda old: old.set_column(
            old.schema.get_field_index("data/file_index"), "data/file_index", pa.array([0, 0, 1, 1])
        ),
    )
    check_dataset_root(root)
    file.with_name("file-001.parquet").unlink()
    line = refused(root)
    assert line.startswith(
        f"--dataset.root={root} lacks data/chunk-000/file-001.parquet, which episodes 2, 3 need"
    )
    check_finished(root)  # LeRobot may fetch it from the hub
    check_dataset_root(root, "--dataset.root", [0, 1])


def test_a_missing_video_file_is_named(videos, tmp_path):
    root = shutil.copytree(videos, tmp_path / "copy")
    files = sorted((root / "videos").rglob("*.mp4"))
    files[-1].unlink()
    line = refused(root)
    assert str(files[-1].relative_to(root)) in line
    assert "--dataset.episodes" in line
    assert len(files) == 2
    assert "which episode 1 needs" in line


@pytest.mark.parametrize("episodes", [[4], [0, 4, 9], [-1]])
def test_an_episode_that_is_not_there_is_named(root, episodes):
    assert refused(root, episodes).endswith("has 4 episodes, 0 to 3")


def test_lost_frames_are_named(root):
    edit_table(only(root, "data"), lambda table: table.slice(0, 18))
    assert "hold 3 frames of episode 3, meta/episodes says 5" in refused(root)


def test_rows_out_of_order_are_named(root):
    order = [*range(7), 8, 7, *range(9, 20)]
    edit_table(only(root, "data"), lambda table: table.take(order))
    assert "row 7 of the files in data/ is frame 8" in refused(root)


def test_episodes_out_of_order_are_named(root):
    edit_table(only(root, "meta/episodes"), lambda table: table.take([1, 0, 2, 3]))
    assert "lists the episodes out of order (1, 0, 2, 3)" in refused(root)


def test_a_wrong_count_of_episodes_is_named(root):
    edit_info(root, total_episodes=9)
    assert "meta/info.json counts 9 episodes, meta/episodes holds 4" in refused(root)


def test_a_table_without_a_column_is_damaged(root):
    edit_table(only(root, "meta/episodes"), lambda table: table.drop_columns(["length"]))
    assert refused(root).startswith(f"{only(root, 'meta/episodes')} is damaged (")


@pytest.mark.parametrize("name", ["index", "action", "observation.images.top"])
def test_a_column_that_is_not_there_is_named(root, name):
    edit_table(only(root, "data"), lambda table: table.drop_columns([name]))
    assert f"meta/info.json names the columns {name}, which {only(root, 'data')} does not have" in refused(
        root
    )


def test_a_column_that_is_not_named_is_named(root):
    edit_table(only(root, "data"), lambda table: table.append_column("more", table["index"]))
    assert f"{only(root, 'data')} has the columns more, which meta/info.json does not name" in refused(root)


@pytest.mark.parametrize(
    "change",
    [
        {"data_path": "../outside/{chunk_index}"},
        {"data_path": "/etc/{chunk_index}"},
        {"data_path": "data/{chunk_index:>9999999999}.parquet"},
        {"data_path": "data/{chunk_index.__class__}.parquet"},
        {"data_path": "data/{unknown}.parquet"},
        {"data_path": 3},
        {"video_path": "videos/../../{video_key}.mp4"},
        {"video_path": "{video_key[0]}.mp4"},
        {"features": {"../../x": {"dtype": "video"}}},
    ],
    ids=str,
)
def test_templates_outside_the_data_set_are_refused(root, change):
    check_dataset_root(root)
    info = root / "meta" / "info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | change))
    with pytest.raises(UserError, match=r"info\.json is damaged"):
        check_dataset_root(root)
