"""What a run says: speedups, shares of the limit, losses; from the records of its cells alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from normfuse.cli.bench.cells import OPS
from normfuse.cli.bench.contenders import COPY, INDUCTOR, NO_RIVALS, OURS

Record = dict[str, Any]

LOSS = 0.98  # less than this share of the best contender's speed is a loss, the rest is noise
REGIMES = ("decode", "middle", "prefill")
# What is averaged: each a key of `compared`.
RATIOS = ("vs_inductor", "vs_best", "of_copy", "of_limit")


def compared(cell: Record, ceiling_gb_s: float, kind: str = "cold") -> Record:
    """Ours against the others in one cell, by times of one kind ("cold" or "hot").

    Returns:
        limit_us: the bytes at the speed of a large copy.
        vs_inductor, vs_best: how many times as fast ours is; best the fastest of all rivals.
        best: its name.
        of_copy, of_limit: ours as a share of a copy of the same bytes, and of the limit.
        Each is None where a time is missing.
    """
    times = {name: entry.get(f"{kind}_us") for name, entry in cell["contenders"].items()}
    ours = times.get(OURS)
    rivals = {name: us for name, us in times.items() if us and name not in NO_RIVALS}
    best = min(rivals, key=rivals.__getitem__) if rivals else None
    limit = cell["bytes"] / ceiling_gb_s / 1000
    return {
        "limit_us": limit,
        "vs_inductor": _ratio(times.get(INDUCTOR), ours),
        "vs_best": _ratio(rivals[best] if best else None, ours),
        "best": best,
        "of_copy": _ratio(times.get(COPY), ours),
        "of_limit": _ratio(limit, ours),
    }


def _ratio(other: float | None, ours: float | None) -> float | None:
    return other / ours if other and ours else None


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the values that there are; None if there is none."""
    logarithms = [math.log(value) for value in values if value is not None]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None


def summarise(cells: Sequence[Record], ceiling_gb_s: float) -> Record:
    """Geometric means overall, per regime, per op and per both, and what went wrong.

    Returns:
        cold, hot: {"overall", "regimes", "ops", "ops_and_regimes"} of means of `RATIOS`, with the
            number of cells in which ours was timed.
        losses: cells in which ours is slower than `LOSS` of the best rival's speed, worst first.
        failures: contenders that failed or computed something wrong, ours first.
    """
    return {
        "cold": _means(cells, ceiling_gb_s, "cold"),
        "hot": _means(cells, ceiling_gb_s, "hot"),
        "losses": losses(cells, ceiling_gb_s),
        "failures": failures(cells),
    }


def _means(cells: Sequence[Record], ceiling_gb_s: float, kind: str) -> Record:
    rows = [(cell, compared(cell, ceiling_gb_s, kind)) for cell in cells]
    timed = [(cell, row) for cell, row in rows if row["of_limit"] is not None]

    def mean(wanted: Callable[[Record], bool]) -> Record:
        chosen = [row for cell, row in timed if wanted(cell)]
        means = {name: geometric_mean(row[name] for row in chosen) for name in RATIOS}
        return {"cells": len(chosen), **means}

    ops = [op for op in OPS if any(cell["op"] == op for cell in cells)]
    return {
        "overall": mean(lambda cell: True),
        "regimes": {
            regime: mean(lambda cell, regime=regime: cell["regime"] == regime)  # type: ignore[misc]
            for regime in REGIMES
        },
        "ops": {
            op: mean(lambda cell, op=op: cell["op"] == op)  # type: ignore[misc]
            for op in ops
        },
        "ops_and_regimes": {
            op: {
                regime: mean(
                    lambda cell, op=op, regime=regime: (  # type: ignore[misc]
                        cell["op"] == op and cell["regime"] == regime
                    )
                )
                for regime in REGIMES
            }
            for op in ops
        },
    }


def losses(cells: Sequence[Record], ceiling_gb_s: float) -> list[Record]:
    """Cells in which ours loses, cold, the worst first."""
    found = []
    for cell in cells:
        row = compared(cell, ceiling_gb_s)
        if row["vs_best"] is not None and row["vs_best"] < LOSS:
            entries = cell["contenders"]
            found.append(
                {
                    "cell": cell["name"],
                    "vs_best": row["vs_best"],
                    "best": row["best"],
                    "ours_us": entries[OURS]["cold_us"],
                    "best_us": entries[row["best"]]["cold_us"],
                    "spread": max(entries[name]["cold_spread"] for name in (OURS, row["best"])),
                    "of_copy": row["of_copy"],
                }
            )
    return sorted(found, key=lambda loss: float(loss["vs_best"]))


def failures(cells: Sequence[Record]) -> list[Record]:
    """Contenders that were not timed, and why; ours first."""
    found = [
        {"cell": cell["name"], "contender": name, "failure": entry["failure"]}
        for cell in cells
        for name, entry in cell["contenders"].items()
        if entry.get("failure")
    ]
    return sorted(found, key=lambda failure: failure["contender"] != OURS)
