import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from craft_ds.training import plots
from craft_ds.training.plots import plot_lambda_analysis

COLUMNS = ["step", "lambda", "epsilon", "retention_loss", "conflict", "cos", "retention_weight", "dot"]


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
    state.ascend(RetentionRecord(0, 1.0, 1.0, 0.5, True, -0.2, 1.1, -0.5))
    state.write_csv(tmp_path / "lambda_history.csv")
    plot_lambda_analysis(tmp_path / "lambda_history.csv", tmp_path / "lambda_analysis.png")
    assert (tmp_path / "lambda_analysis.png").exists()


def test_smoothing_keeps_constants_and_length():
    np.testing.assert_allclose(plots._smooth(np.full(100, 0.3)), 0.3)
    assert plots._smooth(np.arange(45.0)).shape == (45,)


def test_figures_are_closed(tmp_path):
    plot_lambda_analysis(write_history(tmp_path / "h.csv", []), tmp_path / "h.png")
    assert plt.get_fignums() == []
