"""`python -m normfuse bench`: our kernels against Inductor, other libraries and the memory."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from normfuse.cli.bench.arguments import EXAMPLES, add_arguments
from normfuse.cli.bench.cells import Cell, grid
from normfuse.cli.bench.peers import Attendance, attendance, one_line
from normfuse.cli.errors import UsageError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

PRECOMPILE_SHARE = 0.4  # of the time limit, at most
PRECOMPILE_SECONDS = 900.0  # without a limit
RESTART_SECONDS = 30.0  # less is not worth a new process
CLOSING_SECONDS = 8.0  # kept for the summary and the files


def add_parser(subparsers: Subparsers) -> None:
    """Describes `bench` and its arguments."""
    parser = subparsers.add_parser(
        "bench",
        help="measure the kernels on this machine's GPU",
        description="Measures our kernels against Inductor, F.rms_norm, Liger, QuACK, FlashInfer "
        "and a copy of the same bytes, where they are installed, with cold and with warm caches. "
        "Every result is checked against float64 before it is timed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add_arguments(parser)


@dataclass
class Run:
    """A run under way.

    Attributes:
        args: of the command line.
        console: where tables and bars go.
        deadline: in `time.monotonic()` seconds; None for no limit.
        record: what is known so far.
        recent: seconds that the last few cells took.
        earlier: the record that this run continues.
        culprit: what has broken the CUDA context, as `--without` takes it.
    """

    args: argparse.Namespace
    console: Console
    deadline: float | None
    earlier: dict[str, Any] | None = None
    record: dict[str, Any] = field(default_factory=dict)
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=8))
    culprit: str | None = None

    def has_time(self) -> bool:
        """Whether one more cell like the slowest of the last few ends in time."""
        return self.remaining() > max(self.recent, default=0.0)

    def remaining(self) -> float:
        """Seconds until measuring must end."""
        if self.deadline is None:
            return float("inf")
        return self.deadline - CLOSING_SECONDS - time.monotonic()


def run(args: argparse.Namespace) -> int:
    """Measures what the command line asks for; returns 1 if a result of ours is wrong."""
    start = time.monotonic()
    _check(args)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    if args.show:
        return _show(args, console)
    earlier = _earlier(args)
    cells = _lacking(_chosen(args), earlier)
    limit = args.time_limit
    under_way = Run(args, console, None if limit is None else start + limit, earlier)
    place = tempfile.TemporaryDirectory(prefix="normfuse-bench-") if not args.cache else None
    with place or nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compilers: they would break the progress bar
        cache = args.cache or Path(place.name)  # type: ignore[union-attr]
        _measure(under_way, cells, cache)
        under_way.record["runs"][-1]["seconds"] = time.monotonic() - start
        status = _close(under_way)
        is_new = under_way.culprit not in (None, *args.without)
        if is_new and args.out and under_way.remaining() > RESTART_SECONDS:
            _restart(under_way, cache)
    return status


def _restart(under_way: Run, cache: Path) -> None:
    """Goes on in a new process, in this one's place, without what has broken this one.

    Its cache of compiled kernels stays where it is.
    """
    args = under_way.args
    without = [*args.without, under_way.culprit]
    under_way.console.print(f"the CUDA context was lost: going on without {without[-1]}")
    command = ["bench", "--ops", *args.ops, "--share", "/".join(map(str, args.share))]
    command += ["--quick"] if args.quick else []
    command += ["--cells", *args.cells] if args.cells else []
    command += ["--plots", str(args.plots)] if args.plots else []
    command += ["--dry-run"] if args.dry_run else []
    if under_way.deadline is not None:
        command += ["--time-limit", f"{under_way.deadline - time.monotonic():.0f}"]
    command += ["--out", str(args.out), "--resume", str(args.out)]
    command += ["--cache", str(cache), "--workers", "0", "--without", *without]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "normfuse", *command])


def _check(args: argparse.Namespace) -> None:
    needs_gpu = not args.dry_run and not args.show
    if needs_gpu and not torch.cuda.is_available():
        raise UsageError(
            "bench must have a CUDA device, got none: run it on a machine with a GPU, or pass "
            "--dry-run to see what it would do"
        )
    if args.time_limit is not None and args.time_limit <= 0:
        raise UsageError(
            f"--time-limit must be positive, got {args.time_limit:g}: pass seconds, such as 540"
        )
    if args.plots and find_spec("matplotlib") is None:
        raise UsageError(
            "--plots must have matplotlib, got none: pip install 'normfuse[bench]', or leave it out"
        )


def _chosen(args: argparse.Namespace) -> list[Cell]:
    cells = grid(args.ops, quick=args.quick)
    if args.cells:
        cells = [cell for cell in cells if any(text in cell.name for text in args.cells)]
    if not cells:
        raise UsageError(
            f"--cells must match some cell, got {' '.join(args.cells)}: a name reads like "
            f"'{grid(args.ops)[0].name}'"
        )
    index, count = args.share
    cells = cells[index - 1 :: count]
    return [_shrunk(cell) for cell in cells] if args.dry_run else cells


def _earlier(args: argparse.Namespace) -> dict[str, Any] | None:
    """The record to be continued."""
    from normfuse.cli.bench import record as records

    if args.resume is None:
        return None
    if not args.resume.is_file():
        raise UsageError(
            f"--resume must name a file, got {args.resume}: pass what --out has written"
        )
    return records.read(args.resume)


def _lacking(cells: list[Cell], earlier: dict[str, Any] | None) -> list[Cell]:
    """The cells that a record lacks, or that broke in it."""
    known = {cell["name"] for cell in _kept(earlier)}
    return [cell for cell in cells if cell.name not in known]


def _kept(earlier: dict[str, Any] | None) -> list[dict[str, Any]]:
    if earlier is None:
        return []
    return [cell for cell in earlier["cells"] if cell["name"] not in earlier["broken"]]


def _shrunk(cell: Cell) -> Cell:
    """A cell of a dry run: few rows, and narrow ones where the width is free."""
    width = cell.width if cell.heads != (1,) else min(cell.width, 64)
    return Cell(cell.op, min(cell.rows, 4), width, cell.heads, cell.dtype, cell.tier)


def _measure(under_way: Run, cells: list[Cell], cache: Path) -> None:
    from normfuse.cli.bench import record as records
    from normfuse.cli.bench import timing

    args = under_way.args
    command = "python -m normfuse bench " + shlex.join(_arguments())
    record = under_way.record
    record |= {"dry_run": args.dry_run, "environment": records.environment(command.strip())}
    if args.dry_run:
        present = Attendance((), {}, {"all": "a dry run has no peers"})
        clock: Any = timing.DryClock()
    else:
        present = attendance()
        clock = None
    _check_continues(under_way, present)
    if clock is None:
        present = _prepared(under_way, cells, cache, present)
        clock = timing.CudaClock()
    record["peers"] = {"versions": present.versions, "absent": present.absent}
    record["ceiling_gb_s"] = clock.copy_gb_s()
    run = dict(record)
    earlier = under_way.earlier
    record["runs"] = [run] if earlier is None else [*earlier["runs"], run]
    if earlier is not None:  # all shares are of one limit
        record["ceiling_gb_s"] = earlier["ceiling_gb_s"]
    _measure_cells(under_way, cells, present, clock)


def _check_continues(under_way: Run, present: Attendance) -> None:
    """Cells of other machines, versions or kernels do not belong in one record."""
    from normfuse.cli.bench import record as records

    if under_way.earlier is None:
        return
    now = {**under_way.record, "peers": {"versions": present.versions}}
    found = records.differences(under_way.earlier, now)
    _refuse("--resume", found, "measure without --resume")


def _refuse(option: str, differences: list[str], remedy: str) -> None:
    """Records that differ in what they may not differ in do not go together."""
    if differences:
        raise UsageError(
            f"{option} must put together runs on the same GPU, with the same versions and kernels, "
            f"got others: {'; '.join(differences)}. Instead, {remedy}"
        )


def _arguments() -> Sequence[str]:
    """Of the command, as typed."""
    rest = sys.argv[1:]
    return rest[1:] if rest[:1] == ["bench"] else rest


def _prepared(under_way: Run, cells: list[Cell], cache: Path, found: Attendance) -> Attendance:
    """Compiles beforehand, and says which of the peers found take part."""
    from normfuse.cli.bench import precompiling

    precompiling.use_cache(cache)
    workers = under_way.args.workers
    workers = max(1, (os.cpu_count() or 1) - 4) if workers is None else workers
    if workers == 0:
        return found
    limit = under_way.args.time_limit
    seconds = PRECOMPILE_SECONDS if limit is None else PRECOMPILE_SHARE * limit
    with _bar(under_way.console) as bar:
        task = bar.add_task("compiling", total=len(cells), what="")
        report = precompiling.precompile(
            cells, workers, seconds, lambda done: bar.update(task, completed=done)
        )
    under_way.record["precompiled"] = report
    if report["flashinfer"] is not None and "FlashInfer" in found.versions:
        found = found.without("FlashInfer", report["flashinfer"])
    return found


def _measure_cells(under_way: Run, cells: list[Cell], present: Attendance, clock: Any) -> None:
    from normfuse.cli.bench import record as records
    from normfuse.cli.bench.measuring import ContextLost, measure_cell

    record = under_way.record
    run = len(record["runs"]) - 1
    record |= {"cells": _kept(under_way.earlier), "not_reached": [], "broken": {}}
    waiting = list(cells)
    with _bar(under_way.console) as bar:
        task = bar.add_task("measuring", total=len(cells), what="")
        while waiting and under_way.has_time():
            cell = waiting.pop(0)
            bar.update(task, what=cell.name)
            begin = time.monotonic()
            try:
                start = f"{cell.op}: "
                without = under_way.args.without
                left_out = [one.removeprefix(start) for one in without if one.startswith(start)]
                measured = measure_cell(cell, present.present, clock, left_out)
                record["cells"].append({**measured, "run": run})
            except ContextLost as error:
                lost, name = error.args
                record["cells"].append({**lost, "run": run})
                failure = lost["contenders"][name]["failure"]
                record["broken"][cell.name] = f"{name} broke the CUDA context: {failure}"
                under_way.culprit = f"{cell.op}: {name}"
                break
            except Exception as error:  # memory, say: the next cell is smaller
                record["broken"][cell.name] = one_line(error)
            under_way.recent.append(time.monotonic() - begin)
            bar.advance(task)
            if len(record["cells"]) % 10 == 0 and under_way.args.out:
                records.write({**record, "is_complete": False}, under_way.args.out)
    record["not_reached"] = [cell.name for cell in waiting]
    record["runs"][run]["compile_caches"] = _cache_counts()


def _cache_counts() -> dict[str, int]:
    """How often Inductor found a graph compiled in this process."""
    counters = torch._dynamo.utils.counters["inductor"]
    return {name: count for name, count in counters.items() if name.startswith("fxgraph_cache_")}


def _bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns, TimeElapsedColumn(), TextColumn("{task.fields[what]}"), console=console
    )


def _close(under_way: Run) -> int:
    """Summarises, prints and writes; the status of the command."""
    from normfuse.cli.bench import record as records
    from normfuse.cli.bench import report, summary
    from normfuse.cli.bench.contenders import OURS

    record, args = under_way.record, under_way.args
    record["is_complete"] = not record["not_reached"] and not record["broken"]
    record["summary"] = summary.summarise(record["cells"], record["ceiling_gb_s"])
    if args.out:
        records.write(record, args.out)
    report.show(record, under_way.console)
    _draw(record, args, under_way.console)
    failed = [failure for failure in record["summary"]["failures"] if failure["contender"] == OURS]
    return 1 if failed or record["broken"] else 0


def _show(args: argparse.Namespace, console: Console) -> int:
    from normfuse.cli.bench import record as records
    from normfuse.cli.bench import report, summary

    for path in args.show:
        if not path.is_file():
            raise UsageError(f"--show must name a file, got {path}: pass what --out has written")
    record, *others = (records.read(path) for path in args.show)
    for other in others:
        _refuse("--show", records.differences(record, other), "show them one by one")
        record = records.joined(record, other)
    record["summary"] = summary.summarise(record["cells"], record["ceiling_gb_s"])
    if args.out:
        records.write(record, args.out)
    report.show(record, console)
    _draw(record, args, console)
    return 0


def _draw(record: dict[str, Any], args: argparse.Namespace, console: Console) -> None:
    if args.plots:
        from normfuse.cli.bench.plots import draw

        for path in draw(record, args.plots):
            console.print(f"drawn: {path}")
