import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from craft_ds.training import plots
from craft_ds.training.plots import plot_demo, plot_lambda_analysis

COLUMNS = ["step", "lambda", "epsilon", "retention_loss", "conflict", "cos", "retention_weight", "dot"]
OLD, NEW = ["button-press-topdown-v3", "drawer-close-v3"], ["faucet-close-v3"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written, kept alive to be looked into."""
    kept = []
    save = plots._save

    def keep(figure, out_png):
        save(figure, out_png)
        kept.append(figure)

    monkeypatch.setattr(plots, "_save", keep)
    return kept


def write_history(path: Path, rows: list[list[float]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return path


def demo_summary() -> dict:
    tasks = OLD + NEW
    rows = [
        {"method": "teacher", "seed": 0, "success": [1.0, 0.9, 0.0], "loss": [0.4, 0.4, 4.0]},
        {"method": "baseline", "seed": 0, "success": [0.0, 0.6, 0.7], "loss": [2.0, 1.5, 0.6]},
        {"method": "baseline", "seed": 1, "success": [0.2, 0.8, 0.7], "loss": [2.2, 1.5, 0.6]},
        {"method": "craft", "seed": 0, "success": [0.9, 0.9, 0.9], "loss": [0.5, 0.5, 0.7]},
        {"method": "craft", "seed": 1, "success": [0.8, 1.0, 1.0], "loss": [0.5, 0.6, 0.7]},
    ]
    for row in rows:
        for measure in ("success", "loss"):
            row[measure] = dict(zip(tasks, row[measure], strict=True))
    return {"old_tasks": OLD, "new_tasks": NEW, "rows": rows}


def assert_picture(path: Path, ratio: float) -> None:
    picture = plt.imread(path)
    height, width = picture.shape[:2]
    assert width >= 1200
    assert width / height == pytest.approx(ratio, rel=0.05)
    assert picture[..., :3].std() > 0.02, "an empty picture"


def test_lambda_analysis_shows_the_history(tmp_path, figures):
    rows = [[5 * i, 1 + 0.1 * i, 1 - 0.1 * i, 0.5, int(i in (2, 3)), -0.2, 1.0, -0.5] for i in range(10)]
    out = tmp_path / "final" / "lambda_analysis.png"
    plot_lambda_analysis(write_history(tmp_path / "h.csv", rows), out)
    assert_picture(out, 12 / 3.6)
    multiplier, epsilon, loss = figures[0].axes
    steps = [5.0 * i for i in range(10)]
    np.testing.assert_allclose(multiplier.lines[0].get_xdata(), steps)
    np.testing.assert_allclose(multiplier.lines[0].get_ydata(), [1 + 0.1 * i for i in range(10)])
    np.testing.assert_allclose(epsilon.lines[0].get_ydata(), [1 - 0.1 * i for i in range(10)])
    lines = {line.get_label(): line for line in loss.lines}
    np.testing.assert_allclose(lines["retention loss"].get_ydata(), 0.5)
    np.testing.assert_allclose(lines["constraint ε"].get_ydata(), [1 - 0.1 * i for i in range(10)])
    np.testing.assert_allclose(lines["conflict (2 of 10)"].get_xdata(), [10, 15])
    assert all(axes.get_xlabel() and axes.get_ylabel() and axes.get_title() for axes in figures[0].axes)


def test_lambda_analysis_of_short_runs(tmp_path):
    for count in (0, 1):
        rows = [[0, 1.0, 1.0, 0.5, 0, 0.0, 1.0, 0.0]] * count
        plot_lambda_analysis(write_history(tmp_path / "h.csv", rows), tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").stat().st_size > 0


def test_lambda_analysis_reads_what_dual_writes(tmp_path):
    from craft_ds.algorithm.multiplier import DualState, RetentionRecord
    from craft_ds.config.configs import CraftConfig

    state = DualState(CraftConfig())
    state.update(RetentionRecord(0, 1.0, 1.0, 0.5, True, -0.2, 1.1, -0.5))
    state.write_csv(tmp_path / "lambda_history.csv")
    plot_lambda_analysis(tmp_path / "lambda_history.csv", tmp_path / "lambda_analysis.png")
    assert (tmp_path / "lambda_analysis.png").exists()


def test_smoothing_keeps_constants_and_length():
    np.testing.assert_allclose(plots._smooth(np.full(100, 0.3)), 0.3)
    assert plots._smooth(np.arange(45.0)).shape == (45,)


def test_demo_bars_are_means_and_dots_are_seeds(tmp_path, figures):
    plot_demo(demo_summary(), tmp_path / "demo.png")
    assert_picture(tmp_path / "demo.png", 12 / 4.2)
    success, loss = figures[0].axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in success.containers}
    assert list(heights) == ["before fine-tuning", "baseline", "CRaFT"]
    assert heights["before fine-tuning"] == pytest.approx([1.0, 0.9, 0.0])
    assert heights["baseline"] == pytest.approx([0.1, 0.7, 0.7])
    assert heights["CRaFT"] == pytest.approx([0.85, 0.95, 0.95])
    dots = np.concatenate([collection.get_offsets() for collection in success.collections])
    assert sorted(dots[:, 1]) == pytest.approx(sorted([0, 0.6, 0.7, 0.2, 0.8, 0.7, 0.9, 0.9, 0.9, 0.8, 1, 1]))
    assert [bar.get_height() for bar in loss.containers[1]] == pytest.approx([2.1, 1.5, 0.6])
    assert {text.get_text() for text in success.texts} >= {"old tasks", "new task", "0.85"}
    assert [label.get_text() for label in success.get_xticklabels()] == [
        "button press\ntopdown",
        "drawer\nclose",
        "faucet\nclose",
    ]


def test_demo_with_one_seed_and_without_a_method(tmp_path):
    summary = demo_summary()
    summary["rows"] = [row for row in summary["rows"] if row["seed"] == 0 and row["method"] != "teacher"]
    plot_demo(summary, tmp_path / "demo.png")
    assert (tmp_path / "demo.png").exists()


def test_figures_are_closed(tmp_path):
    plot_demo(demo_summary(), tmp_path / "demo.png")
    assert plt.get_fignums() == []
