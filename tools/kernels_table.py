"""The README's table of kernel numbers, made from a record of `python -m normfuse bench`.

python tools/kernels_table.py            # print it
python tools/kernels_table.py --write    # put it into README.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RECORD = ROOT / "benchmarks" / "results" / "kernels_h200.json"
BEGIN, END = "<!-- kernels:begin -->\n", "<!-- kernels:end -->"

REGIMES = ("decode", "middle", "prefill")
HEAD = (
    "| op | cells | vs Inductor: up to 64 rows | up to 2048 | more | vs the best | of a copy |\n"
    "|---|---|---|---|---|---|---|\n"
)


def section(record: dict[str, Any]) -> str:
    """What a record says, as Markdown: where and how it was measured, then one row an op.

    Raises:
        ValueError: the record is of a dry run, whose times are made up.
    """
    if record["dry_run"]:
        raise ValueError("the record must be measured, got a dry run: run bench on a GPU")
    return f"{_introduction(record)}\n\n{HEAD}{_rows(record['summary']['cold'])}"


def _introduction(record: dict[str, Any]) -> str:
    facts, summary = record["environment"], record["summary"]
    rivals = ", ".join(f"{name} {text}" for name, text in record["peers"]["versions"].items())
    num_losses, num_cells = len(summary["losses"]), summary["cold"]["overall"]["cells"]
    place = RECORD.relative_to(ROOT).as_posix()
    return (
        "- **Kernels**, one call in a CUDA graph over operands that no cache holds, geometric means"
        f"\n  over {num_cells} shapes on one {facts['gpu']}, torch {facts['torch']}, triton "
        f"{facts['triton']}. The best is the fastest\n  of Inductor, its max-autotune, "
        f"`F.rms_norm`, and {rivals or 'no library'};\n  the copy moves the same bytes. "
        f"{num_losses} of the shapes are lost, by more than 2 %, and listed first in\n"
        f"  [{RECORD.name}]({place}), whose command was\n  `{facts['command']}`{_others(record)}."
    )


def _others(record: dict[str, Any]) -> str:
    """How many more runs are in the record: on other GPUs, or later."""
    count = len(record["runs"]) - 1
    return f"\n  beside {count} like it for the other cells" if count else ""


def _rows(means: dict[str, Any]) -> str:
    rows = []
    for op, mean in means["ops"].items():
        regimes = [means["ops_and_regimes"][op][regime]["vs_inductor"] for regime in REGIMES]
        rows.append(_row(f"`{op}`", mean, regimes))
    regimes = [means["regimes"][regime]["vs_inductor"] for regime in REGIMES]
    return "".join([*rows, _row("all", means["overall"], regimes)])


def _row(name: str, mean: dict[str, Any], regimes: list[float | None]) -> str:
    times = [_times(value) for value in (*regimes, mean["vs_best"])]
    of_copy = "" if mean["of_copy"] is None else f"{100 * mean['of_copy']:.0f} %"
    return f"| {' | '.join([name, str(mean['cells']), *times, of_copy])} |\n"


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def with_section(text: str, record: dict[str, Any] | None) -> str:
    """A README with its section renewed; an empty one if nothing was measured yet."""
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return head + BEGIN + ("" if record is None else section(record)) + END + tail


def committed() -> dict[str, Any] | None:
    """The record that the README shows."""
    found: dict[str, Any] | None = json.loads(RECORD.read_text()) if RECORD.exists() else None
    return found


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(with_section(README.read_text(), committed()))
    else:
        record = committed()
        print("nothing was measured yet" if record is None else section(record), end="")
