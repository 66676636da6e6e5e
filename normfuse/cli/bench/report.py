"""A run as tables: what is lost or wrong first, then the means, then every cell."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from normfuse.cli.bench.contenders import INDUCTOR, OURS
from normfuse.cli.bench.summary import LOSS, REGIMES, compared

Record = dict[str, Any]
MAX_CELLS = 60  # of a table that one still reads


def show(record: Record, console: Console) -> None:
    """Prints a record."""
    _show_head(record, console)
    summary = record["summary"]
    _show_losses(summary["losses"], console)
    _show_failures(summary["failures"], console)
    for kind in ("cold", "hot"):
        _show_means(summary[kind], kind, console)
    _show_cells(record, console)
    for name, reason in record["broken"].items():
        console.print(f"broken: {name}: {escape(reason)}", style="red")
    if record["not_reached"]:
        console.print(f"not reached: {len(record['not_reached'])} cells, listed in the record")


def _show_head(record: Record, console: Console) -> None:
    facts = record["environment"]
    device = facts["gpu"] or "no GPU"
    console.print(f"{device}, torch {facts['torch']}, triton {facts['triton']}")
    console.print(f"a copy of 1 GiB moves {record['ceiling_gb_s']:.0f} GB/s")
    for name, version in record["peers"]["versions"].items():
        console.print(f"{name} {version}")
    for name, reason in record["peers"]["absent"].items():
        console.print(f"{name} absent: {escape(reason)}")
    if record["dry_run"]:
        console.print("dry run: the times are made up", style="bold red")


def _show_losses(losses: list[Record], console: Console) -> None:
    title = f"losses: less than {LOSS:.2f}x of the best contender, cold"
    if not losses:
        console.print(f"no {title}")
        return
    table = Table("cell", "speed", "best", "ours us", "best us", "spread", "of copy", title=title)
    for loss in losses:
        table.add_row(
            loss["cell"],
            f"{loss['vs_best']:.2f}x",
            loss["best"],
            _number(loss["ours_us"]),
            _number(loss["best_us"]),
            f"{loss['spread']:.1%}",
            _share(loss["of_copy"]),
        )
    console.print(table)


def _show_failures(failures: list[Record], console: Console) -> None:
    if not failures:
        return
    table = Table("cell", "contender", "why", title="not timed")
    for failure in failures:
        style = "red" if failure["contender"] == OURS else None
        why = escape(failure["failure"][:120])
        table.add_row(failure["cell"], failure["contender"], why, style=style)
    console.print(table)


def _show_means(means: Record, kind: str, console: Console) -> None:
    title = f"geometric means, {kind}"
    table = Table("op", "cells", "vs Inductor", "vs best", "of copy", "of limit", title=title)
    rows = {"all": means["overall"]}
    rows |= {f"all, {regime}": means["regimes"][regime] for regime in REGIMES}
    for op, mean in means["ops"].items():
        rows[op] = mean
        for regime in REGIMES:
            rows[f"  {regime}"] = means["ops_and_regimes"][op][regime]
            _add_means(table, rows)
            rows.clear()
    _add_means(table, rows)
    console.print(table)


def _add_means(table: Table, rows: dict[str, Record]) -> None:
    for name, mean in rows.items():
        if mean["cells"]:
            times = (_times(mean["vs_inductor"]), _times(mean["vs_best"]))
            shares = (_share(mean["of_copy"]), _share(mean["of_limit"]))
            table.add_row(name, str(mean["cells"]), *times, *shares)


def _show_cells(record: Record, console: Console) -> None:
    if len(record["cells"]) > MAX_CELLS:
        return
    columns = ("cell", "ours", "Inductor", "best", "", "vs best", "of copy", "of limit")
    table = Table(*columns, title="us a call, cold (hot); the record has all contenders")
    for cell in record["cells"]:
        entries = cell["contenders"]
        row = compared(cell, record["ceiling_gb_s"])
        table.add_row(
            cell["name"],
            _entry(entries.get(OURS)),
            _entry(entries.get(INDUCTOR)),
            _entry(entries.get(row["best"])),
            row["best"],
            _times(row["vs_best"]),
            _share(row["of_copy"]),
            _share(row["of_limit"]),
        )
    console.print(table)


def _entry(entry: Record | None) -> str:
    if entry is None:
        return ""
    if entry.get("cold_us") is None:
        return "failed"
    hot = entry.get("hot_us")
    return _number(entry["cold_us"]) + ("" if hot is None else f" ({_number(hot)})")


def _number(us: float) -> str:
    return f"{us:.2f}" if us < 100 else f"{us:.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0%}"
