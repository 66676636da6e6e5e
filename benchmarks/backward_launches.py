"""Which launch of a backward is fastest: what the rules of tile_backward.py were made from.

    python benchmarks/backward_launches.py --time-limit 150 --out backward_launches.json
    python benchmarks/backward_launches.py --ops sandwich --widths 4096 --rows 8192
    python benchmarks/backward_launches.py --together 2 4 --out together.json
    python benchmarks/backward_launches.py --ops sums --out sums.json

Every candidate is compiled beforehand, in many processes, and timed with cold caches beside the
launch that ships: both stages, weight gradients included. A candidate is how many elements of a
chunk a lane takes, how many threads share a row, in how many stages rows are loaded, how many
programs a multiprocessor gets, and how many rows a program works on together, each with threads of
its own. Those that spill registers take no part.

`sums` is the second stage alone, as one weight has it: partial sums of one, two or three programs
for each multiprocessor, in the cache, as behind the first stage. Its candidates are how many of
them a program takes at once, of how many columns, with how many warps.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.progress import track

from normfuse.cli.bench.peers import one_line
from normfuse.cli.bench.record import command_of, environment
from normfuse.cli.bench.timing import Clock, CudaClock, DryClock, Rotation
from normfuse.ops.residual_sum import Scales
from normfuse.ops.rounding import RoundingPlan

SUMS = tuple(
    (rows, cols, warps)
    for rows, cols, warps in product((64, 128, 256, 512), (8, 16, 32, 64), (2, 4, 8))
    if 4 <= rows * cols // (32 * warps) <= 64
)
DTYPE = torch.bfloat16
WIDTHS = (4096, 2816, 5376, 8192, 2048, 2560, 1024, 16384)
ROWS = (2048, 8192, 32768)
# op: tensors as large as an activation that a backward reads, and writes.
OPS = {"norm": (2, 1), "add": (3, 1), "sandwich": (4, 2)}
SMS = 132
KIB = 1024
SAMPLES = 5

Record = dict[str, Any]


class Candidate(NamedTuple):
    """Elements of a lane in a chunk, threads of a row, stages; programs of a multiprocessor; rows
    of a program at once.
    """

    lane: int
    threads: int
    stages: int
    each: int = 1
    together: int = 1

    @property
    def kernel(self) -> Candidate:
        """The number of programs is no constant of a kernel."""
        return self._replace(each=1)


def candidates(width: int, together: Sequence[int] = (1,)) -> Iterator[Candidate]:
    """Those whose chunks end near the end of a row, with 8 to 40 elements of it in a thread."""
    shapes = product((4, 8), (64, 128, 256, 512, 1024), range(2, 7), together)
    for lane, threads, stages, rows in shapes:
        chunks = -(-width // (lane * threads))
        fits = chunks * lane * threads < width + max(width // 2, lane * threads)
        if 128 <= rows * threads <= 1024 and fits and chunks <= 6 and chunks * lane <= 40:
            for each in (1, 2, 3, 4, 6):
                if each * rows * threads <= 2048:
                    yield Candidate(lane, threads, stages, each, rows)


def tried(op: str, width: int, together: Sequence[int]) -> list[Candidate]:
    """Those with which a multiprocessor has neither too little of rows on their way nor too much"""
    row = OPS[op][0] * width * DTYPE.itemsize
    return [
        one
        for one in candidates(width, together)
        if 32 * KIB <= row * one.together * one.each * (one.stages - 1) <= 224 * KIB
    ]


def tile_of(candidate: Candidate, width: int, rows: int) -> Any:
    from normfuse.ops.kernels.tile_backward import BackwardLaunch

    lane, threads, stages, each, together = candidate
    chunks = -(-width // (lane * threads))
    programs = min(SMS * each, -(-rows // together))
    warps = together * threads // 32
    return BackwardLaunch(together, lane * threads, chunks, True, warps, programs, stages)


def operands(op: str, width: int, rows: int, device: Any) -> tuple[torch.Tensor, ...]:
    """Activations, then weights, then rstds."""
    num_weights = 2 if op == "sandwich" else 1
    tensors = [torch.randn(rows, width, device=device).to(DTYPE) for _ in range(OPS[op][0])]
    tensors += [torch.randn(width, device=device).to(DTYPE) + 1 for _ in range(num_weights)]
    return *tensors, *(torch.rand(rows, 1, device=device) + 0.5 for _ in range(num_weights))


def launched(op: str, tile: Any, *tensors: torch.Tensor, wrap: Any = None) -> Sequence[Any]:
    """The gradients of one op, by a launch of the caller's choice or the one that ships."""
    from normfuse.ops.kernels import (
        add_rms_norm_backward,
        rms_norm_add_rms_norm_backward,
        rms_norm_backward,
    )
    from normfuse.ops.kernels.tile import eager

    plan = RoundingPlan.before_weight(DTYPE, DTYPE)
    how: Any = {"tile": tile, "wrap": wrap or eager}
    if op == "norm":
        grad, x, weight, rstd = tensors
        return rms_norm_backward.launch(grad, x, weight, rstd, 0.0, plan, [True] * 2, **how)
    if op == "add":
        grad, grad_total, total, weight, rstd = tensors
        # One gradient serves both operands of the sum, as autograd asks for it.
        return add_rms_norm_backward.launch(
            grad, grad_total, total, weight, rstd, Scales(), 0.0, plan, (DTYPE, DTYPE),
            [True, False, True], **how,
        )  # fmt: skip
    grad, grad_total, x, total, weight_1, weight_2, rstd_1, rstd_2 = tensors
    norms = ((weight_1, rstd_1, 0.0, plan), (weight_2, rstd_2, 0.0, plan))
    return rms_norm_add_rms_norm_backward.launch(
        grad, grad_total, x, total, norms, Scales(), DTYPE, [True] * 4, **how
    )


class _Watch:
    """Stands where kernels are launched, and keeps what became of the first."""

    def __init__(self) -> None:
        self.compiled: Any = None

    def __call__(self, kernel: Any) -> Any:
        watch = self

        class Launcher:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                def launch(*arguments: Any, **keywords: Any) -> None:
                    compiled = kernel[grid](*arguments, **keywords)
                    watch.compiled = watch.compiled or compiled

                return launch

        return Launcher()


def compile_one(job: tuple[str, int, Candidate | None]) -> tuple[Any, Record]:
    """Leaves one kernel in the caches on disk; its registers, and those that it spills."""
    op, width, candidate = job
    watch = _Watch()
    try:
        tile = None if candidate is None else tile_of(candidate, width, 256)
        launched(op, tile, *operands(op, width, 256, "cuda"), wrap=watch)
        torch.cuda.synchronize()
    except Exception as error:  # shared memory, say: the candidate takes no part
        return job, {"failure": one_line(error)}
    return job, {"registers": watch.compiled.n_regs, "spilled": watch.compiled.n_spills}


def compile_all(jobs: list[Any], workers: int) -> dict[Any, Record]:
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        found = pool.imap_unordered(compile_one, jobs)
        return dict(track(found, description="compiling", total=len(jobs)))


def unchanged(*tensors: torch.Tensor) -> Sequence[torch.Tensor]:
    """In the place of a launch, in a dry run."""
    return tensors


def measured(
    op: str, width: int, rows: int, running: list[Candidate | None], clock: Clock
) -> list[list[Any]]:
    """[us, *candidate], fastest first; the launch that ships is alone with its time."""
    size = 2 * sum(OPS[op]) * rows * width
    rotation, _ = clock.rotations(size)
    sets = [operands(op, width, rows, clock.device) for _ in range(rotation.num_sets)]
    times = []
    with clock.session(), torch.no_grad():
        for one in running:
            tile = None if one is None else tile_of(one, width, rows)
            call = partial(launched, op, tile) if clock.device.type == "cuda" else unchanged
            call(*sets[0])
            results: list[Any] = [None] * len(sets)
            recording = clock.record(call, sets, rotation.cycles, results)
            us = median(clock.samples(recording, rotation, SAMPLES))
            times.append([us, *(one or ())])
    return sorted(times)


def measured_sums(width: int, clock: Clock) -> dict[str, list[list[Any]]]:
    """[us, rows, columns, warps] of the second stage, fastest first, by the number of programs."""
    from normfuse.ops.kernels.row_backward import sum_partials_kernel

    def summed(sums: torch.Tensor, weight: torch.Tensor, how: Any) -> Sequence[Any]:
        rows, cols, warps = how
        grad = torch.empty_like(weight)
        sum_partials_kernel[(-(-width // cols), 1)](
            *(sums, grad, sums.shape[0], *[None, None, 0] * 3),
            **{"N_1": width, "N_2": 0, "N_3": 0, "N_4": 0, "ROWS": rows, "BLOCK": cols},
            num_warps=warps,
        )
        return [grad]

    found: dict[str, list[list[Any]]] = {}
    weight = torch.ones(width, dtype=DTYPE, device=clock.device)
    for programs in (SMS, 2 * SMS, 3 * SMS):
        sets = [(torch.randn(programs, width, device=clock.device), weight)]
        rotation = Rotation.hot(sets[0][0].nbytes)
        assert rotation is not None, "partial sums fit in the cache"
        times = []
        with clock.session(), torch.no_grad():
            for how in SUMS:
                call = partial(summed, how=how) if clock.device.type == "cuda" else unchanged
                call(*sets[0])
                recording = clock.record(call, sets, rotation.cycles, [None])
                times.append([median(clock.samples(recording, rotation, SAMPLES)), *how])
        found[f"{programs} x {width}"] = sorted(times)
    return found


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=[*OPS, "sums"])
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--together", nargs="+", type=int, default=[1], choices=[1, 2, 4])
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--dry-run", action="store_true", help="no GPU; the times are made up")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    end = time.monotonic() + arguments.time_limit
    clock: Clock = DryClock() if arguments.dry_run else CudaClock()
    plan = list(product(arguments.widths, [op for op in arguments.ops if op in OPS]))
    jobs = [
        (op, width, kernel)
        for width, op in plan
        for kernel in [None, *dict.fromkeys(c.kernel for c in tried(op, width, arguments.together))]
    ]
    kernels = {} if arguments.dry_run else compile_all(jobs, arguments.workers)
    record: Record = {
        **environment(command_of("benchmarks/backward_launches.py", argv)),
        "is_dry": arguments.dry_run,
        "fields": ["us", *Candidate._fields],
        "kernels": [[*job[:2], job[2], found] for job, found in kernels.items()],
        "cells": {},
        "sums": {},
    }
    for width in arguments.widths if "sums" in arguments.ops else ():
        record["sums"] |= measured_sums(width, clock)
    for name, times in record["sums"].items():
        print(f"sums {name}:", *(f"{us:.2f} {how}" for us, *how in times[:5]))
    for (width, op), rows in track(list(product(plan, arguments.rows)), description="measuring"):
        if time.monotonic() > end:
            break
        found = tried(op, width, arguments.together)
        running = [None, *(one for one in found if _runs(kernels, op, width, one))]
        name = f"{op} {rows} x {width}"
        times = measured(op, width, rows, running, clock)
        record["cells"][name] = times
        ships = next(row[0] for row in times if len(row) == 1)
        print(f"{name}: ships {ships:.1f} us;", *(f"{t:.1f} {one}" for t, *one in times[:4]))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record) + "\n")


def _runs(kernels: dict[Any, Record], op: str, width: int, one: Candidate) -> bool:
    """Whether it compiled, spills nothing, and all its programs have registers at once."""
    found = kernels.get((op, width, one.kernel), {"spilled": 0, "registers": 32})
    if found.get("spilled") != 0:
        return False
    threads = one.each * one.together * one.threads
    return one.each == 1 or threads * -(-found["registers"] // 8) * 8 <= 65536


if __name__ == "__main__":
    main()
