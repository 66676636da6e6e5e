"""Which launch is fastest for each op and width: what normfuse/ops/kernels/launches.py holds.

    python benchmarks/launches.py --out benchmarks/results/launches_h200.json
    python benchmarks/launches.py --ops rms_norms --widths 2816
    python benchmarks/launches.py --preset weak --time-limit 300 --out weak.json

Every candidate is compiled beforehand, in many processes, and timed with cold caches beside the
launch that ships. Candidates that sum in the same order (rows, tile, warps) share an entry
of the table; how rows are read may then differ between few rows and many. The fastest of each
cell are checked and timed again by turns with the launch that ships: they win by more than the
medians of the rounds differ, or not at all. The preset "weak" tries launches that the table does
not know yet, in cells that were lost; "between" the widths of models between those of "whole"; and
"reads" every way to read 256 to 1024 rows, in the order of summing that the table has.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from launch_candidates import OPS, PRESETS, Candidate, Plan
from rich.progress import track

from normfuse.cli.bench.accuracy import accuracy
from normfuse.cli.bench.cells import QK, Cell
from normfuse.cli.bench.peers import one_line
from normfuse.cli.bench.record import environment
from normfuse.cli.bench.subjects import Subject, subject
from normfuse.cli.bench.timing import Clock, CudaClock, DryClock, measure
from normfuse.ops.lowering import inline_form, kernel_form

COMPILE_SHARE = 0.45  # of the time limit, at most
SAMPLES = 5  # of a candidate; those of the finals are more
FINALISTS = 3
LEAST_GAIN = 0.01  # less is no reason to change a table
SHIPS = "ships"

Record = dict[str, Any]
Job = tuple[Cell, Candidate | None]


class _Watch:
    """Stands where a kernel is launched, and keeps what became of it."""

    def __init__(self) -> None:
        self.compiled: Any = None

    def __call__(self, kernel: Any) -> _Watch:
        self._kernel = kernel
        return self

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*arguments: Any, **keywords: Any) -> None:
            self.compiled = self._kernel[grid](*arguments, **keywords)

        return launch


def launched(
    what: Subject, candidate: Candidate | None, wrap: Any = None, *, on_gpu: bool = True
) -> Callable[..., Sequence[torch.Tensor]]:
    """Our op with a launch of the caller's choice, or with the one that ships."""
    if not on_gpu:  # a dry run
        return lambda *operands: what.results_of(inline_form(what.op)(*what.arguments(*operands)))
    from normfuse.ops.kernels.slots import HeadsLaunch
    from normfuse.ops.kernels.tile import Launch, eager

    form = kernel_form(what.op, what.used, wrap or eager)
    choice: Any = None
    if candidate is not None and what.cell.op in QK:
        tile = HeadsLaunch(candidate.block, candidate.num_warps, candidate.rows, programs=0)
        choice = mock.patch.object(HeadsLaunch, "for_widths", return_value=tile)
    elif candidate is not None:
        launch = Launch(*candidate, candidate.reads, candidate.reads)
        choice = mock.patch.object(Launch, "for_shape", return_value=launch)

    def call(*operands: torch.Tensor) -> Sequence[torch.Tensor]:
        with ExitStack() as stack:
            if choice is not None:
                stack.enter_context(choice)
            return what.results_of(form(*what.arguments(*operands)))

    return call


def inductor(what: Subject) -> Callable[..., Sequence[torch.Tensor]]:
    torch.compiler.reset()
    return torch.compile(what.eager, dynamic=False)


def compile_one(job: tuple[int, Cell, Candidate | str]) -> tuple[int, Record]:
    """Leaves one kernel in the caches on disk; its registers, and those that it spills."""
    number, cell, candidate = job
    what, watch = subject(cell), _Watch()
    try:
        with torch.no_grad():
            if candidate == "inductor":
                inductor(what)(*what.operands("cuda"))
            else:
                launched(what, candidate, watch)(*what.operands("cuda"))
            torch.cuda.synchronize()
    except Exception as error:  # shared memory, say: the candidate takes no part
        return number, {"failure": one_line(error)}
    if watch.compiled is None:
        return number, {}
    names = {"registers": "n_regs", "spilled": "n_spills"}
    return number, {name: getattr(watch.compiled, key, None) for name, key in names.items()}


def compile_all(
    plan: Plan, workers: int, seconds: float, *, with_inductor: bool
) -> dict[Any, Record]:
    """What became of every launch of the plan that could be compiled in so many seconds."""
    first: dict[Any, Job] = {}
    for cell, tried in plan:
        plain = [_plain(cell, one) for one in tried]
        kernels = [None, *tried, *plain, *(["inductor"] if with_inductor else [])]
        for one in kernels:
            first.setdefault(_kernel(cell, one), (cell, one))
    jobs = [(number, *job) for number, job in enumerate(first.values())]
    keys, found = list(first), {}
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    end = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = pool.imap_unordered(compile_one, jobs)
        try:
            for _ in track(jobs, description="compiling"):
                left = None if math.isinf(end) else max(0.0, end - time.monotonic())
                number, record = results.next(left)
                found[keys[number]] = record
        except multiprocessing.TimeoutError:
            pool.terminate()
    return found


def _kernel(cell: Cell, candidate: Candidate | str | None) -> Any:
    """What two cells must agree in to share a kernel: of a candidate, all but their rows."""
    rows = None if isinstance(candidate, Candidate) else cell.rows
    return cell.op, cell.width, cell.dtype, cell.heads, rows, candidate


def _plain(cell: Cell, candidate: Candidate) -> Candidate:
    """The launch that sums in the same order and is simplest: held, or read again."""
    if cell.op in QK:
        return candidate._replace(rows=1)
    return candidate._replace(reads="" if cell.width > 32768 else "held")


class Trial:
    """One cell, and the launches that are tried in it."""

    def __init__(self, cell: Cell, clock: Clock) -> None:
        self.what, self.clock = subject(cell), clock
        self.rotation, _ = clock.rotations(self.what.num_bytes)
        count = self.rotation.num_sets
        self.sets = [self.what.operands(clock.device) for _ in range(count)]

    def call(self, candidate: Candidate | None) -> Callable[..., Sequence[torch.Tensor]]:
        return launched(self.what, candidate, on_gpu=self.clock.device.type == "cuda")

    def recorded(self, call: Callable[..., Sequence[torch.Tensor]]) -> Any:
        call(*self.sets[0])
        results: list[Sequence[torch.Tensor] | None] = [None] * len(self.sets)
        return self.clock.record(call, self.sets, self.rotation.cycles, results)

    def us(self, call: Callable[..., Sequence[torch.Tensor]]) -> float:
        """Microseconds a call, in one go."""
        return median(self.clock.samples(self.recorded(call), self.rotation, SAMPLES))

    def first_round(self, tried: list[Candidate], compiled: dict[Any, Record]) -> list[list[Any]]:
        """[us, *candidate] of every launch that runs, fastest first."""
        times = []
        for one in tried:
            known = compiled.get(_kernel(self.what.cell, one), {"failure": "not compiled in time"})
            if "failure" not in known:
                times.append([self.us(self.call(one)), *one])
        return sorted(times)

    def final(self, best: list[Candidate]) -> Record:
        """The fastest of the first round and the launch that ships, by turns; and their results."""
        names = {SHIPS: None, **{str(list(one)): one for one in best}}
        calls = {name: self.call(one) for name, one in names.items()}
        recordings = {name: self.recorded(call) for name, call in calls.items()}
        timings = measure(self.clock, recordings, self.rotation)
        ships = timings[SHIPS]
        entries = {}
        for name, one in names.items():
            timing = timings[name]
            noise = max(LEAST_GAIN, ships.spread, timing.spread)
            entries[name] = {
                "us": timing.us,
                "spread": timing.spread,
                "gain": ships.us / timing.us - 1,
                "wins": ships.us / timing.us - 1 > noise,
                **({} if one is None else self.checked(one)),
            }
        return entries

    def checked(self, one: Candidate) -> Record:
        """Whether it is right, and has the bits of rows that are read in the simplest way."""
        results = self.call(one)(*self.sets[0])
        plain = self.call(_plain(self.what.cell, one))(*self.sets[0])
        pairs = zip(results, plain, strict=True)
        return {
            "is_right": accuracy(self.what, self.sets[0], results).is_as_close_as_eager,
            "same_bits": all(torch.equal(left, right) for left, right in pairs),
        }


def measured(
    cell: Cell,
    tried: list[Candidate],
    compiled: dict[Any, Record],
    clock: Clock,
    *,
    with_inductor: bool,
) -> Record:
    """The record of one cell."""
    trial = Trial(cell, clock)
    with clock.session(), torch.no_grad():
        record: Record = {"cell": cell.name, "ships_us": trial.us(trial.call(None))}
        record["tries"] = trial.first_round(tried, compiled)
        if with_inductor:
            record["inductor_us"] = trial.us(inductor(trial.what))
        best = [Candidate(*row[1:]) for row in record["tries"][:FINALISTS]]
        record["final"] = trial.final(best)
    return record


def decisions(plan: Plan, records: dict[str, Record]) -> list[Record]:
    """For each op and width the order of summing that is fastest over its cells: an entry."""
    groups: dict[Any, dict[str, Record]] = {}
    for cell, _ in plan:
        if cell.name in records:
            key = (cell.op, cell.width, cell.dtype, cell.heads)
            groups.setdefault(key, {})[cell.name] = records[cell.name]
    entries = ((key, _entry(cells)) for key, cells in groups.items())
    return [{"group": key, **entry} for key, entry in entries if entry is not None]


def _entry(cells: dict[str, Record]) -> Record | None:
    """The order with the largest gain, a geometric mean; None if none runs in every cell."""
    orders: dict[Any, dict[str, list[Any]]] = {}
    for name, record in cells.items():
        for row in record["tries"]:  # fastest first
            orders.setdefault(Candidate(*row[1:]).order, {}).setdefault(name, row)
    gains = {
        order: math.prod(cells[name]["ships_us"] / row[0] for name, row in rows.items())
        for order, rows in orders.items()
        if len(rows) == len(cells)
    }
    if not gains:
        return None
    order = max(gains, key=gains.__getitem__)
    reads = {name: Candidate(*row[1:]).reads for name, row in orders[order].items()}
    return {"order": order, "gain": gains[order] ** (1 / len(cells)), "reads": reads}


def show(record: Record) -> None:
    """A line for each cell, and for each entry of the table."""
    for row in record["cells"]:
        final = dict(row["final"])
        ships = final.pop(SHIPS)
        for name, entry in sorted(final.items(), key=lambda item: item[1]["us"])[:1]:
            is_wrong = not (entry["is_right"] and entry.get("same_bits", True))
            verdict = "OTHER BITS" if is_wrong else "wins" if entry["wins"] else "no gain"
            print(f"{row['cell']}: {ships['us']:.2f} us, {name} {entry['us']:.2f} us: {verdict}")
    for row in record["decisions"]:
        print(f"{row['group']}: {row['order']} {row['gain']:.3f}x, read as {row['reads']}")


def main(given: Sequence[str] | None = None) -> None:
    """Measures what the command line asks for."""
    arguments = _parsed(given)
    end = time.monotonic() + arguments.time_limit
    plan = PRESETS[arguments.preset](arguments.ops, arguments.widths)
    has_inductor = arguments.preset == "whole" and not arguments.dry_run
    if arguments.dry_run:
        plan = [(_shrunk(cell), tried[:2]) for cell, tried in plan]
        compiled: dict[Any, Record] = {
            _kernel(cell, one): {} for cell, some in plan for one in some
        }
        clock: Clock = DryClock()
    else:
        seconds = COMPILE_SHARE * arguments.time_limit
        compiled = compile_all(plan, arguments.workers, seconds, with_inductor=has_inductor)
        clock = CudaClock()
    record = {
        **environment("python " + " ".join(sys.argv)),
        "try": ["us", *Candidate._fields],
        "launches": [{"launch": list(map(str, key)), **what} for key, what in compiled.items()],
    }
    records: dict[str, Record] = {}
    slowest = 0.0
    for cell, tried in track(plan, description="measuring"):
        begin = time.monotonic()
        if begin + slowest > end:
            break
        records[cell.name] = measured(cell, tried, compiled, clock, with_inductor=has_inductor)
        slowest = max(slowest, time.monotonic() - begin)
        record["cells"] = list(records.values())
        record["decisions"] = decisions(plan, records)
        record["not_reached"] = [cell.name for cell, _ in plan if cell.name not in records]
        if arguments.out:
            arguments.out.write_text(json.dumps(record) + "\n")
    show(record)


def _parsed(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="whole", choices=PRESETS)
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--widths", nargs="+", type=int)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="S")
    parser.add_argument("--dry-run", action="store_true", help="no GPU; the times are made up")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(given)


def _shrunk(cell: Cell) -> Cell:
    width = cell.width if cell.heads != (1,) else min(cell.width, 64)
    return Cell(cell.op, min(cell.rows, 4), width, cell.heads, cell.dtype)


if __name__ == "__main__":
    main()
