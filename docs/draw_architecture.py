"""Draw docs/architecture.png: the packages of craft_ds in their layers, and the imports between them.

python docs/draw_architecture.py
"""

import ast
import tomllib
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "craft_ds"


def layers() -> list[list[str]]:
    """Return the packages of each layer from top to bottom, as import-linter holds them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    rows = [row.replace("|", ":").split(":") for row in settings["contracts"][0]["layers"]]
    return [[name.strip() for name in row] for row in rows] + [["algorithm"]]


def imports() -> Counter[tuple[str, str]]:
    """Count the import statements between packages."""
    found: Counter[tuple[str, str]] = Counter()
    for path in PACKAGE.rglob("*.py"):
        source = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("craft_ds."):
                target = node.module.split(".")[1]
                if target != source:
                    found[source, target] += 1
    return found


def main() -> None:
    """Draw the picture."""
    rows = layers()
    place = {
        name: ((index + 0.5) / len(row), len(rows) - depth)
        for depth, row in enumerate(rows)
        for index, name in enumerate(row)
    }
    figure, axes = plt.subplots(figsize=(9, 9))
    for (source, target), count in imports().items():
        if source in place and target in place:
            (x0, y0), (x1, y1) = place[source], place[target]
            axes.annotate(
                "",
                (x1, y1 + 0.22),
                (x0, y0 - 0.22),
                arrowprops={"arrowstyle": "->", "color": "0.6", "lw": 0.5 + min(count, 12) / 6, "alpha": 0.6},
            )
    for name, (x, y) in place.items():
        style = {
            "boxstyle": "round,pad=0.4",
            "fc": "#dbe9f6" if name != "algorithm" else "#fde5c8",
            "ec": "0.3",
        }
        axes.text(x, y, name, ha="center", va="center", fontsize=10, bbox=style)
    axes.set_xlim(0, 1)
    axes.set_ylim(0.4, len(rows) + 0.6)
    axes.set_title("craft_ds: packages import downwards; line width: number of import statements")
    axes.axis("off")
    figure.savefig(Path(__file__).with_name("architecture.png"), dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main()
