"""Every frame trains with the text of its own task, whatever the order of the rows in tasks.parquet."""

import pandas as pd
import pytest

from craft_ds.data.task_texts import UNUSED, order_task_texts
from craft_ds.errors import UserError
from craft_ds.testing.damaged_samples import open_test_dataset, rewrite_column
from craft_ds.testing.datasets import TASK_TEXTS, make_test_dataset


@pytest.fixture
def root(tmp_path):
    return make_test_dataset(tmp_path / "data", tasks=3, episodes_per_task=1, frames=3)


def write_texts(root, texts: dict[str, int]) -> None:
    table = pd.DataFrame({"task_index": list(texts.values())}, index=pd.Index(list(texts), name="task"))
    table.to_parquet(root / "meta" / "tasks.parquet")


def trained_texts(root) -> list[str]:
    dataset = open_test_dataset(root, 1)
    order_task_texts(dataset)
    return [dataset[index]["task"] for index in range(0, 9, 3)]


def refused(root) -> str:
    with pytest.raises(UserError) as raised:
        order_task_texts(open_test_dataset(root, 1))
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_rows_in_any_order_give_the_right_texts(root, order):
    write_texts(root, {TASK_TEXTS[index]: index for index in order})
    assert trained_texts(root) == list(TASK_TEXTS[:3])


def test_an_index_that_no_frame_has_needs_no_text(root):
    rewrite_column(root, "task_index", [0] * 3 + [1] * 3 + [4] * 3)
    write_texts(root, {TASK_TEXTS[2]: 4, TASK_TEXTS[0]: 0, TASK_TEXTS[1]: 1})
    assert trained_texts(root) == list(TASK_TEXTS[:3])
    dataset = open_test_dataset(root, 1)
    order_task_texts(dataset)
    assert list(dataset.meta.tasks.index) == [*TASK_TEXTS[:2], UNUSED, UNUSED, TASK_TEXTS[2]]


def test_texts_that_belong_to_other_indices_are_refused(root):
    """Both the row and the index are wrong: only the episodes' own texts can tell."""
    write_texts(root, {TASK_TEXTS[1]: 0, TASK_TEXTS[0]: 1, TASK_TEXTS[2]: 2})
    line = refused(root)
    assert f"gives the frames of episode 0 the task {TASK_TEXTS[1]!r}" in line
    assert f"meta/episodes names {TASK_TEXTS[0]!r}" in line


def test_an_index_without_a_text_is_refused(root):
    write_texts(root, {TASK_TEXTS[0]: 0, TASK_TEXTS[1]: 1})
    assert "frames have task_index 2, for which meta/tasks.parquet has no text" in refused(root)


def test_an_index_with_two_texts_is_refused(root):
    write_texts(root, {TASK_TEXTS[0]: 0, TASK_TEXTS[1]: 1, TASK_TEXTS[2]: 2, TASK_TEXTS[3]: 2})
    assert f"gives task_index 2 to both {TASK_TEXTS[2]!r} and {TASK_TEXTS[3]!r}" in refused(root)


def test_a_table_without_texts_is_refused(root):
    pd.DataFrame({"task_index": [0, 1, 2]}).to_parquet(root / "meta" / "tasks.parquet")
    assert "meta/tasks.parquet has no texts as its index" in refused(root)


def test_an_empty_table_is_refused(root):
    write_texts(root, {})
    assert "has no task texts" in refused(root)
