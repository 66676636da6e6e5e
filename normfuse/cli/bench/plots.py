"""Plots: the share of the memory limit that each contender reaches, against the number of rows."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from normfuse.cli.bench.cells import OPS
from normfuse.cli.bench.contenders import COPY, INDUCTOR, MAX_AUTOTUNE, OURS, TORCH

Record = dict[str, Any]

COMPOSITION = "best composition"  # of the contenders that are called "A + B"
# Okabe and Ito's colours, told apart by colour-blind eyes too, and a marker for each.
STYLES = {
    OURS: ("#000000", "o"),
    INDUCTOR: ("#0072B2", "s"),
    MAX_AUTOTUNE: ("#56B4E9", "v"),
    TORCH: ("#009E73", "^"),
    "Liger": ("#E69F00", "D"),
    "QuACK": ("#D55E00", "P"),
    "FlashInfer": ("#CC79A7", "X"),
    COMPOSITION: ("#F0E442", "*"),
    COPY: ("#999999", "."),
}
COLUMNS = 4


def draw(record: Record, directory: Path) -> list[Path]:
    """One PNG for each op, in `directory`, a panel for each width or model; the files written."""
    import matplotlib as mpl

    mpl.use("Agg")
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for op in OPS:
        panels = _panels(record["cells"], op)
        if panels:
            paths.append(directory / f"{op}.png")
            _draw_op(op, panels, record, paths[-1])
    return paths


def _panels(cells: Iterable[Record], op: str) -> dict[str, list[Record]]:
    """The cells of an op by panel, each sorted by rows."""
    panels: dict[str, list[Record]] = {}
    for cell in sorted(cells, key=lambda cell: (cell["width"], cell["heads"], cell["rows"])):
        if cell["op"] == op and cell["dtype"] == "bf16":
            heads = "+".join(map(str, cell["heads"]))
            title = f"{cell['width']}" if heads == "1" else f"heads {heads} x {cell['width']}"
            panels.setdefault(title, []).append(cell)
    return panels


def _draw_op(op: str, panels: dict[str, list[Record]], record: Record, path: Path) -> None:
    from matplotlib import pyplot

    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        lines,
        columns,
        figsize=(3.4 * columns + 0.6, 2.6 * lines + 1.3),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for axes, (title, cells) in zip(grid.flat, panels.items(), strict=False):
        handles |= _draw_panel(axes, title, cells, record["ceiling_gb_s"])
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    # The panels share it; set before all are drawn, it would stop following them.
    grid[0][0].set_ylim(bottom=0)
    facts = record["environment"]
    figure.suptitle(f"{op}, bf16, cold, {facts['gpu']}, torch {facts['torch']}", fontsize=11)
    figure.supylabel("share of the limit, bytes / speed of a 1 GiB copy", fontsize=9)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_panel(axes: Any, title: str, cells: list[Record], ceiling_gb_s: float) -> dict[str, Any]:
    """One line for each contender; the lines by name, for the legend."""
    handles = {}
    for name, (colour, marker) in STYLES.items():
        points = [
            (cell["rows"], cell["bytes"] / ceiling_gb_s / 1000 / us)
            for cell in cells
            if (us := cold_us(cell, name))
        ]
        if not points:
            continue
        style = "--" if name == COPY else "-"
        width = 2.2 if name == OURS else 1.2
        (handles[name],) = axes.plot(
            *zip(*points, strict=True), style, color=colour, marker=marker, markersize=4, lw=width
        )
    axes.set_xscale("log", base=2)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("rows", fontsize=7)
    axes.axhline(1.0, color="#999999", lw=0.6)
    axes.grid(alpha=0.3)
    axes.tick_params(labelsize=7)
    return handles


def cold_us(cell: Record, name: str) -> float | None:
    """The time of a contender, or of the fastest composition; None if it has none."""
    names = [name]
    if name == COMPOSITION:
        names = [other for other in cell["contenders"] if " + " in other]
    times = (cell["contenders"].get(one, {}).get("cold_us") for one in names)
    return min((us for us in times if us), default=None)
