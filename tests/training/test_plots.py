import csv
import json
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from craft_ds.algorithm.multiplier import DualState, RetentionRecord
from craft_ds.config.craft_config import CraftConfig
from craft_ds.training import plots
from craft_ds.training.plots import plot_lambda_analysis

COLUMNS = ["step", "lambda", "epsilon", "retention_loss", "conflict", "cos", "retention_weight", "dot"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written, kept for inspection."""
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


def write_metrics(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def history_row(step: int, loss: float = 0.5, *, epsilon: float = 0.6) -> list[float]:
    return [step, 1.0, epsilon, loss, 0, 0.2, 1.0, 0.1]


def lines(panel) -> dict:
    return {line.get_label(): line for line in panel.lines}


def assert_picture(path: Path, ratio: float) -> None:
    picture = plt.imread(path)
    height, width = picture.shape[:2]
    assert width >= 1200
    assert width / height == pytest.approx(ratio, rel=0.05)
    assert picture[..., :3].std() > 0.02, "an empty picture"


def test_the_panels_show_history_and_metrics(tmp_path, figures):
    rows = [[5 * i, 1 + 0.1 * i, 1 - 0.1 * i, 0.5, int(i in (2, 3)), -0.2, 1.5, -0.5] for i in range(10)]
    logged = [
        {"step": 10 * i, "train/loss": 2.0 - 0.1 * i, "time/step_s": 0.2, "time/data_s": 0.1}
        for i in range(5)
    ]
    out = tmp_path / "final" / "lambda_analysis.png"
    plot_lambda_analysis(
        write_history(tmp_path / "h.csv", rows),
        out,
        metrics_jsonl=write_metrics(tmp_path / "metrics.jsonl", [*logged, {"step": 40, "eval/task_loss": 9}]),
        teacher_loss=0.4,
    )
    assert_picture(out, 12 / 7.5)
    losses, multiplier, cosine, seconds = map(lines, figures[0].axes)
    assert losses.keys() == {"new task", "old tasks", "ε", "L0 = 0.4"}
    np.testing.assert_allclose(losses["new task"].get_xdata(), [0, 10, 20, 30, 40])
    np.testing.assert_allclose(losses["new task"].get_ydata(), [2.0, 1.9, 1.8, 1.7, 1.6])
    np.testing.assert_allclose(losses["old tasks"].get_ydata(), 0.5)
    np.testing.assert_allclose(losses["ε"].get_ydata(), [1 - 0.1 * i for i in range(10)])
    np.testing.assert_allclose(losses["L0 = 0.4"].get_ydata(), 0.4)
    np.testing.assert_allclose(multiplier["λ"].get_xdata(), [5.0 * i for i in range(10)])
    np.testing.assert_allclose(multiplier["λ"].get_ydata(), [1 + 0.1 * i for i in range(10)])
    np.testing.assert_allclose(multiplier["b/a, relative to the task gradient"].get_ydata(), 1.5)
    np.testing.assert_allclose(cosine["conflict (2 of 10)"].get_xdata(), [10, 15])
    assert len(cosine["no conflict"].get_xdata()) == 8
    np.testing.assert_allclose(seconds["step"].get_ydata(), 0.2)
    np.testing.assert_allclose(seconds["waiting for data"].get_ydata(), 0.1)
    assert all(panel.get_title() and panel.get_ylabel() for panel in figures[0].axes)
    assert [panel.get_xlabel() for panel in figures[0].axes] == ["", "", "optimizer step", "optimizer step"]


def test_legends_lie_outside_their_panels(tmp_path, figures):
    metrics = write_metrics(tmp_path / "m", [{"step": 1, "train/loss": 1.0, "time/step_s": 0.2}])
    history = write_history(tmp_path / "h.csv", [history_row(step) for step in range(9)])
    plot_lambda_analysis(history, tmp_path / "h.png", metrics_jsonl=metrics, teacher_loss=0.5)
    for panel in figures[0].axes:
        assert panel.get_legend().get_window_extent().y0 >= panel.get_window_extent().y1
        assert panel.get_legend().get_window_extent().x1 <= panel.get_window_extent().x1


def test_an_outlier_does_not_set_the_scale(tmp_path, figures):
    rows = [history_row(step, 0.5 + 0.01 * (step % 5)) for step in range(200)]
    rows[100][3] = 1000.0
    plot_lambda_analysis(write_history(tmp_path / "h.csv", rows), tmp_path / "h.png")
    panel = figures[0].axes[0]
    assert panel.get_yscale() == "linear"
    assert 0.4 < panel.get_ylim()[0] < 0.5
    assert 0.6 < panel.get_ylim()[1] < 0.7
    assert lines(panel)["old tasks"].get_ydata().max() < 0.6


def test_losses_apart_by_more_than_ten_get_a_log_scale(tmp_path, figures):
    rows = [history_row(step, 0.3) for step in range(40)]
    metrics = write_metrics(tmp_path / "m", [{"step": i, "train/loss": 6 / (1 + i)} for i in range(40)])
    plot_lambda_analysis(write_history(tmp_path / "h.csv", rows), tmp_path / "h.png", metrics_jsonl=metrics)
    panel = figures[0].axes[0]
    assert panel.get_yscale() == "log"
    assert panel.get_ylim()[0] < 0.3
    assert panel.get_ylim()[1] > 5


def test_gaps_and_torn_rows_of_the_metrics(tmp_path, figures):
    metrics = write_metrics(tmp_path / "m", [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": None}])
    with metrics.open("a") as file:
        file.write('{"step": 3, "train/l')
    history = write_history(tmp_path / "h.csv", [history_row(0)])
    plot_lambda_analysis(history, tmp_path / "h.png", metrics_jsonl=metrics)
    np.testing.assert_array_equal(lines(figures[0].axes[0])["new task"].get_ydata(), [1.0, np.nan])
    assert [text.get_text() for text in figures[0].axes[3].texts] == ["nothing logged"]


@pytest.mark.parametrize("count", [0, 1])
def test_short_runs(tmp_path, count):
    history = write_history(tmp_path / "h.csv", [history_row(0)] * count)
    plot_lambda_analysis(history, tmp_path / "h.png", metrics_jsonl=tmp_path / "missing")
    assert (tmp_path / "h.png").stat().st_size > 0


def test_a_run_without_a_cosine(tmp_path, figures):
    rows = [history_row(step) for step in range(3)]
    for row in rows:
        row[COLUMNS.index("cos")] = math.nan
    plot_lambda_analysis(write_history(tmp_path / "h.csv", rows), tmp_path / "h.png")
    assert [text.get_text() for text in figures[0].axes[2].texts] == ["nothing logged"]


def test_it_reads_what_the_dual_state_writes(tmp_path, figures):
    state = DualState(CraftConfig())
    state.ascend(RetentionRecord(0, 1.0, 1.0, 0.5, True, -0.2, 1.1, -0.5))
    state.write_csv(tmp_path / "lambda_history.csv")
    plot_lambda_analysis(tmp_path / "lambda_history.csv", tmp_path / "lambda_analysis.png")
    assert "conflict (1 of 1)" in lines(figures[0].axes[2])


def test_the_running_median_keeps_constants_and_length():
    np.testing.assert_allclose(plots._smooth(np.full(100, 0.3)), 0.3)
    for count in (40, 45, 61, 100):
        assert plots._smooth(np.arange(float(count))).shape == (count,)


def test_the_running_median_skips_gaps():
    values = np.full(100, 0.3)
    values[10], values[50:60] = np.inf, np.nan
    smooth = plots._smooth(values)
    assert np.isnan(smooth[53:57]).all()
    np.testing.assert_allclose(smooth[:50], 0.3)


def test_figures_are_closed(tmp_path):
    plot_lambda_analysis(write_history(tmp_path / "h.csv", []), tmp_path / "h.png")
    assert plt.get_fignums() == []
