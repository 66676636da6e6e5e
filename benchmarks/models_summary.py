"""What the rows of `benchmarks/models.py` say together, and how they look."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from statistics import geometric_mean
from typing import Any

from model_zoo import MODELS, QK_NORM
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def ratio(row: Row, field: str, contender: str = "auto") -> float | None:
    """How many times as much plain Inductor takes; None if one of the two was not measured."""
    found = row.get("contenders", {})
    plain, ours = (found.get(name, {}).get(field) for name in ("plain", contender))
    return plain / ours if plain and ours else None


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Geometric means of plain / auto: above 1, auto is better."""
    timed = [row for row in rows if ratio(row, "gpu_ms")]
    worst = min(timed, key=lambda row: ratio(row, "gpu_ms") or 0, default=None)
    cells = list(dict.fromkeys(row["cell"] for row in timed))
    return {
        "cells": len(timed),
        "speedup": _mean(timed, "gpu_ms"),
        "speedup_qk_norm": _mean(_with_qk_norm(timed), "gpu_ms"),
        "speedup_by_cell": {
            cell: _mean([row for row in timed if row["cell"] == cell], "gpu_ms") for cell in cells
        },
        "speedup_wall": _mean(timed, "wall_ms"),
        "worst": worst and [worst["model"], worst["cell"], ratio(worst, "gpu_ms")],
        "slower": [f"{row['model']} {row['cell']}" for row in timed if _is_slower(row)],
        "compiled_speedup": _mean(timed, "compiled_us"),
        "cost_ratio": _cost_ratio(timed),
        "speedup_if_norms_cost_nothing": _mean(_dense(timed), "gpu_ms", "without"),
        "speedup_if_norms_cost_nothing_qk_norm": _mean(
            _with_qk_norm(_dense(timed)), "gpu_ms", "without"
        ),
        "compile_time_ratio": _inverse(_mean(timed, "compile_s")),
        "failed": [_failure(row) for row in rows if _failure(row)],
    }


def _with_qk_norm(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["model"] in QK_NORM]


def _dense(rows: Sequence[Row]) -> list[Row]:
    """Without norms, a router sends the tokens to other experts, which take another time."""
    return [row for row in rows if "num_experts" not in MODELS[row["model"]][1]]


def _is_slower(row: Row) -> bool:
    """By more than two runs of one program differ by."""
    return (ratio(row, "gpu_ms") or 1) < 0.99


def _mean(rows: Iterable[Row], field: str, contender: str = "auto") -> float | None:
    found = [value for row in rows if (value := ratio(row, field, contender))]
    return geometric_mean(found) if found else None


def _cost_ratio(rows: Iterable[Row]) -> float | None:
    """What norms and rotary embeddings cost in all rows, with us, as a share of what they did."""
    pairs = [[row["contenders"][name].get("cost_us") for name in ("plain", "auto")] for row in rows]
    known = [(plain, ours) for plain, ours in pairs if plain is not None and ours is not None]
    return sum(ours for _, ours in known) / sum(plain for plain, _ in known) if known else None


def _inverse(value: float | None) -> float | None:
    return value and 1 / value


def _failure(row: Row) -> str | None:
    """What went wrong in a row, as a sentence."""
    place = f"{row['model']} {row['cell']}"
    if "failed" in row:
        return f"{place}: {row['failed']}"
    failed = {name: one["failed"] for name, one in row["contenders"].items() if "failed" in one}
    return "; ".join(f"{place}, {name}: {text}" for name, text in failed.items()) or None


def json_text(record: dict[str, Any]) -> str:
    """A record as JSON, a line for each row."""
    rows = ",\n".join("    " + json.dumps(row) for row in record["rows"])
    head = json.dumps({k: v for k, v in record.items() if k != "rows"}, indent=2)
    return f'{head[:-2]},\n  "rows": [\n{rows}\n  ]\n}}\n'


def show(record: dict[str, Any]) -> None:
    """The rows as a table, and the summary below it."""
    columns = ("model", "cell", "plain ms", "auto ms", "", "wall", "Triton us", "")
    table = Table(*columns, "compile s")
    for row in record["rows"]:
        table.add_row(row["model"], row["cell"], *_columns(row))
    console = Console(width=120)
    console.print(table)
    for name, value in record["summary"].items():
        console.print(f"{name}: {value}", markup=False)
    if record["not_reached"]:
        console.print(f"not reached: {', '.join(record['not_reached'])}", markup=False)


def _columns(row: Row) -> list[str]:
    both = [row.get("contenders", {}).get(name, {}) for name in ("plain", "auto")]

    def pair(field: str, form: Callable[[float], str]) -> str:
        values = [one.get(field) for one in both]
        return " / ".join("-" if value is None else form(value) for value in values)

    def times(field: str) -> str:
        value = ratio(row, field)
        return "" if value is None else f"{value:.3f}x"

    milliseconds = [f"{one['gpu_ms']:.3f}" if "gpu_ms" in one else "-" for one in both]
    return [
        *milliseconds,
        times("gpu_ms"),
        times("wall_ms"),
        pair("compiled_us", "{:.0f}".format),
        times("compiled_us"),
        pair("compile_s", "{:.1f}".format),
    ]
