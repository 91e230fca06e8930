"""Draw docs/architecture.png: the packages of craft_ds in their layers, and the imports between the layers.

python docs/draw_architecture.py
"""

import ast
import tomllib
from collections.abc import Set
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch
from matplotlib.text import Text

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "craft_ds"
NOT_DRAWN = {"testing", "__main__"}
IMPORTED_BY_ALL = "errors"
"""Drawn without its arrows: nearly every package has one."""

PLACES = {
    "cli": 0.5,
    "commands": 0.5,
    "training": 0.28,
    "export": 0.6,
    "anchors": 0.15,
    "checkpoints": 0.52,
    "memory_planner": 0.84,
    "data": 0.1,
    "engines": 0.4,
    "lora": 0.7,
    "config": 0.52,
    "worlds": 0.1,
    "policies": 0.58,
    "distributed": 0.86,
    "tensor_io": 0.45,
    "errors": 0.8,
    "algorithm": 0.3,
}
"""Horizontal place of each package, chosen so that few arrows cross or pass behind a box."""

type Import = tuple[str, str]


def layers() -> list[list[str]]:
    """Return the packages of each layer from top to bottom, as import-linter holds them."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    rows = [row.replace("|", ":").split(":") for row in settings["contracts"][0]["layers"]]
    kept = [[name.strip() for name in row if name.strip() not in NOT_DRAWN] for row in rows]
    return [row for row in kept if row] + [["algorithm"]]


def imports() -> set[Import]:
    """Return the pairs of packages of which the first imports the second."""
    found = {("cli", "commands")}  # by name, at run time
    for path in PACKAGE.rglob("*.py"):
        source = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("craft_ds."):
                found.add((source, node.module.split(".")[1]))
    return {(source, target) for source, target in found if source != target}


def direct(edges: Set[Import]) -> set[Import]:
    """Return the imports that no chain of the others replaces (the transitive reduction)."""

    def reaches(source: str, target: str, skipped: Import) -> bool:
        return any(
            middle == target or reaches(middle, target, skipped)
            for start, middle in edges
            if start == source and (start, middle) != skipped
        )

    return {edge for edge in edges if not reaches(*edge, skipped=edge)}


def draw_box(axes: Axes, name: str, x: float, y: float) -> Text:
    """Draw the box of one package."""
    colour = "#fde5c8" if name == "algorithm" else "#dbe9f6"
    style = {"boxstyle": "round,pad=0.45", "fc": colour, "ec": "0.35", "lw": 0.8}
    label = f"{name} (imported by all above)" if name == IMPORTED_BY_ALL else name
    return axes.text(x, y, label, ha="center", va="center", fontsize=10.5, bbox=style, zorder=3)


def draw_arrow(axes: Axes, source: Text, target: Text, *, strong: bool) -> None:
    """Draw one import as an arc from box to box; arcs over several layers bend outwards."""
    (x0, y0), (x1, y1) = source.get_position(), target.get_position()
    outwards = 1 if x0 + x1 < 1 else -1
    bend = outwards * 0.06 * (y0 - y1 - 0.5) if y0 - y1 > 1 else 0.0
    arrow = FancyArrowPatch(
        (x0, y0),
        (x1, y1),
        arrowstyle="-|>",
        connectionstyle=f"arc3,rad={bend}",
        patchA=source.get_bbox_patch(),
        patchB=target.get_bbox_patch(),
        shrinkA=1,
        shrinkB=2,
        mutation_scale=11 if strong else 7,
        lw=1.3 if strong else 0.6,
        color="#35506b" if strong else "#b9c3cd",
        zorder=2 if strong else 1,
    )
    axes.add_patch(arrow)


def main() -> None:
    """Draw the picture."""
    rows = layers()
    layer = {name: len(rows) - depth for depth, row in enumerate(rows) for name in row}
    figure, axes = plt.subplots(figsize=(9, 8.6), dpi=100)
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.93)
    axes.set_xlim(0, 1)
    axes.set_ylim(0.5, len(rows) + 0.5)
    axes.axis("off")
    boxes = {name: draw_box(axes, name, PLACES[name], layer[name]) for name in layer}
    figure.canvas.draw()  # gives the boxes the sizes at which arrows end
    drawn = layer.keys() - {IMPORTED_BY_ALL}
    edges = {edge for edge in imports() if set(edge) <= drawn and layer[edge[0]] != layer[edge[1]]}
    strong = direct(edges)
    for source, target in sorted(edges):
        draw_arrow(axes, boxes[source], boxes[target], strong=(source, target) in strong)
    axes.set_title(
        "craft_ds: packages import downwards\nlight: imports that a chain of dark ones also makes",
        fontsize=11,
    )
    figure.savefig(Path(__file__).with_name("architecture.png"), pil_kwargs={"optimize": True})


if __name__ == "__main__":
    main()
