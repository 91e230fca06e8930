import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from craft_ds.cli import run_command
from craft_ds.commands import demo_plot
from craft_ds.commands.demo_plot import plot_demo, t_interval, wilson_interval

OLD, NEW = ["button-press-topdown-v3", "drawer-close-v3"], ["faucet-close-v3"]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written, kept for inspection."""
    kept = []
    save = demo_plot._save

    def keep(figure, out_png):
        save(figure, out_png)
        kept.append(figure)

    monkeypatch.setattr(demo_plot, "_save", keep)
    return kept


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
    return {"old_tasks": OLD, "new_tasks": NEW, "episodes": 10, "rows": rows}


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(0, 10, (0.0, 0.2775)), (5, 10, (0.2366, 0.7634)), (20, 20, (0.8389, 1.0)), (47, 60, (0.6638, 0.8688))],
)
def test_wilson_intervals_are_those_of_published_tables(successes, trials, expected):
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=2e-4)


def test_t_intervals():
    assert t_interval([0.5]) == (0.5, 0.5)
    low, high = t_interval([1.0, 2.0, 3.0])  # s = 1, t(2) = 4.303
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert t_interval([1.0] * 50) == (1.0, 1.0)


def test_bars_are_means_dots_seeds_and_lines_intervals(tmp_path, figures):
    plot_demo(demo_summary(), tmp_path / "demo.png")
    picture = plt.imread(tmp_path / "demo.png")
    assert picture.shape[1] >= 1200
    assert picture[..., :3].std() > 0.02, "an empty picture"
    success, loss = figures[0].axes
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in success.containers}
    assert list(widths) == ["before fine-tuning", "baseline", "CRaFT"]
    assert widths["before fine-tuning"] == pytest.approx([1.0, 0.9, 0.0])
    assert widths["baseline"] == pytest.approx([0.1, 0.7, 0.7])
    assert [bar.get_width() for bar in loss.containers[1]] == pytest.approx([2.1, 1.5, 0.6])
    lines = [collection for collection in success.collections if hasattr(collection, "get_segments")]
    ends = [np.array(line.get_segments())[:, :, 0] for line in lines]
    assert ends[0][0] == pytest.approx(wilson_interval(10, 10))  # teacher: one seed of 10 episodes
    assert ends[1][1] == pytest.approx(wilson_interval(14, 20))  # baseline: two of them
    dots = [collection for collection in success.collections if not hasattr(collection, "get_segments")]
    shown = np.concatenate([dot.get_offsets() for dot in dots if len(dot.get_offsets())])
    expected = [0, 0.6, 0.7, 0.2, 0.8, 0.7, 0.9, 0.9, 0.9, 0.8, 1, 1]
    assert sorted(shown[:, 0]) == pytest.approx(sorted(expected))
    caption = figures[0].get_supxlabel()
    assert "Wilson, over 10 episodes × 2 seeds" in caption


def test_no_label_covers_another(tmp_path, figures):
    summary = demo_summary()
    for method in ("baseline", "craft"):  # as many bars as the demo can have
        summary["rows"] += [
            row | {"method": f"lora_{method}"} for row in summary["rows"] if row["method"] == method
        ]
    plot_demo(summary, tmp_path / "demo.png")
    figure = figures[0]
    canvas = FigureCanvasAgg(figure)  # the figure was closed, and has lost its own
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [text for panel in figure.axes for text in (*panel.texts, panel.title)]
    texts += [*figure.axes[0].get_yticklabels(), *figure.legends[0].get_texts(), figure._supxlabel]
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_text()]
    boxes += [("axis", panel.xaxis.get_tightbbox(renderer)) for panel in figure.axes]
    assert len(boxes) > 30
    collisions = [
        (one, other)
        for index, (one, box) in enumerate(boxes)
        for other, another in boxes[index + 1 :]
        if box.overlaps(another)
    ]
    assert collisions == []


@pytest.mark.parametrize("name", ["demo_summary.json", "demo_summary_lora.json"])
def test_the_shipped_summaries_can_be_drawn(name, tmp_path):
    run_command("demo", ["--plot", str(DOCS / name), str(tmp_path / "demo.png")])
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert plt.get_fignums() == []


def test_one_seed_and_a_missing_method(tmp_path, figures):
    summary = demo_summary()
    summary["rows"] = [row for row in summary["rows"] if row["seed"] == 0 and row["method"] != "teacher"]
    plot_demo(summary, tmp_path / "demo.png")
    assert "not covered" in figures[0].get_supxlabel()


def test_a_file_that_is_not_a_summary_is_named(tmp_path, capsys):
    (tmp_path / "other.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(SystemExit) as ended:
        run_command("demo", ["--plot", str(tmp_path / "other.json"), str(tmp_path / "demo.png")])
    assert ended.value.code == 2
    assert "other.json: not a summary of craft-ds demo" in capsys.readouterr().err
