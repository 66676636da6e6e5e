"""The README's numbers of training, made from records of two benchmarks.

python tools/training_table.py            # print them
python tools/training_table.py --write    # put them into README.md

The records are those of `benchmarks/backward.py` and `benchmarks/training.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import geometric_mean
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BACKWARD, STEPS = RESULTS / "backward_h200.json", RESULTS / "training_h200.json"
BEGIN, END = "<!-- training:begin -->\n", "<!-- training:end -->"

RIVALS = ("inductor", "aten", "liger", "quack")
OPS = {
    "norm": "RMSNorm",
    "add": "residual add -> RMSNorm",
    "sandwich": "RMSNorm -> add -> RMSNorm",
    "heads": "QK-norm + RoPE",
}

Row = dict[str, Any]


def section(backward: Row, steps: Row) -> str:
    """What the records say, as Markdown.

    Raises:
        ValueError: a record is of a trial without a GPU.
    """
    if backward["is_dry"] or steps["device"] != "cuda":
        raise ValueError("the records must be measured, got a trial: run both benchmarks on a GPU")
    return f"{_backward(backward)}\n{_steps(steps)}"


def _backward(record: Row) -> str:
    rows = record["rows"]
    counts = sorted({row["rows"] for row in rows})
    head = ["gradients of", "cells", "vs Inductor", "vs the best, worst cell"]
    head += [f"of the limit, {count} rows" for count in counts]
    table = [head, ["---"] * len(head)]
    for op, name in OPS.items():
        table.append(_line(name, [row for row in rows if row["op"] == op], counts))
    table.append(_line("all", rows, counts))
    missing = len(record["left_out"]) + len(record["failed"])
    return (
        "- **Backward** of norms, both weight-gradient stages included, cold, over one "
        f"{record['gpu']}; the best is the\n  fastest of Inductor, `F.rms_norm`, Liger and QuACK. "
        f"Heads have as many rows for each token as there\n  are heads. Cells without a number: "
        f"{missing}. From {_link(BACKWARD)}, by\n  `{record['command']}`.\n\n"
        + "".join(f"| {' | '.join(line)} |\n" for line in table)
    )


def _line(name: str, rows: list[Row], counts: list[int]) -> list[str]:
    best = [min(row[rival] for rival in RIVALS if rival in row) for row in rows]
    worst = min(time / row["normfuse"] for time, row in zip(best, rows, strict=True))
    mean = geometric_mean(row["speedup"] for row in rows)
    return [name, str(len(rows)), f"{mean:.2f}x", f"{worst:.2f}x", *_limits(rows, counts)]


def _limits(rows: list[Row], counts: list[int]) -> list[str]:
    """The least and the largest share of the memory limit, for each number of rows."""
    columns = []
    for count in counts:
        shares = [row["limit"] / row["normfuse"] for row in rows if row["rows"] == count]
        columns.append(f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %")
    return columns


def _steps(record: Row) -> str:
    lines = []
    for cell in record["cells"]:
        plain, auto = (cell["contenders"][name] for name in ("plain", "auto"))
        lines.append(
            f"  `{cell['model']}`, {cell['layers']} layers, {cell['shape']} tokens: a step takes "
            f"{auto['step_ms']:.1f} ms instead of {plain['step_ms']:.1f}\n  "
            f"({plain['step_ms'] / auto['step_ms']:.2f}x), and "
            f"{auto['peak_mib']:.0f} MiB at its peak instead of {plain['peak_mib']:.0f}.\n"
        )
    return (
        "\n- **Training steps** of whole models in bf16, `auto` and plain `torch.compile` in "
        f"turn\n  ({_link(STEPS)}).\n{''.join(lines)}"
    )


def _link(path: Path) -> str:
    return f"[{path.name}]({path.relative_to(ROOT).as_posix()})"


def with_section(text: str, records: tuple[Row, Row]) -> str:
    """A README with its section renewed."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + section(*records) + END + tail


def committed() -> tuple[Row, Row]:
    """The records that the README shows."""
    return json.loads(BACKWARD.read_text()), json.loads(STEPS.read_text())


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(with_section(README.read_text(), committed()))
    else:
        print(section(*committed()), end="")
