"""Which launch is fastest for each op and width: what normfuse/ops/kernels/launches.py holds.

    python benchmarks/launches.py --out benchmarks/results/launches_h200.json
    python benchmarks/launches.py --ops rms_norms --widths 2816

Every candidate is compiled beforehand, in many processes, and timed with cold caches beside
Inductor's default code. Candidates that sum in the same order (rows, tile, warps) share an entry of
the table; how rows are read may then differ between few rows and many.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from rich.progress import track

from normfuse.cli.bench.cells import Cell
from normfuse.cli.bench.record import environment
from normfuse.cli.bench.subjects import Subject, subject
from normfuse.cli.bench.timing import CudaClock
from normfuse.ops.lowering import kernel_form

ROWS = (16, 64, 512, 4096, 16384)
WIDTHS = (1024, 2048, 2816, 4096, 5376, 8192, 16384)
SHORT = (64, 128, 256, 512)  # heads
HEADS = {"l2_norm": (16,), "gated_rms_norm": (32,)}  # of a token, where rows are short
OPS = (
    "rms_norm",
    "add_rms_norm",
    "rms_norm_add",
    "rms_norm_add_rms_norm",
    "dual_rms_norm_add",
    "dual_rms_norm_add_rms_norm",
    "rms_norms",
    "modulated_rms_norm",
    *HEADS,
)
READS = ("held", "ahead held", "ahead held streamed")

Candidate = tuple[int, int, int, str]  # rows, block, warps, reads


def candidates(width: int) -> Iterator[Candidate]:
    """What is tried for rows of one width."""
    block = 1 << (width - 1).bit_length()
    if width <= 512:
        for elements, share, reads in product((512, 1024, 2048, 4096), (8, 16, 32), READS[:2]):
            if elements >= block and elements >= share * 32:
                yield elements // block, block, elements // share // 32, reads
        return
    for warps in (1, 2, 4, 8, 16, 32):
        if not 8 <= block // (32 * warps) <= 64:
            continue
        blocks = {min(block, warps * share) for share in (256, 512, 1024)}
        yield from ((1, tile, warps, reads) for tile, reads in product(sorted(blocks), READS))


def cells(ops: list[str], widths: list[int] | None) -> Iterator[Cell]:
    for op, rows in product(ops, ROWS):
        for width in widths or (SHORT if op in HEADS else WIDTHS):
            yield Cell(op, rows, width, heads=HEADS.get(op, (1,)))


def launched(what: Subject, candidate: Candidate):
    """Our op with a launch of the caller's choice."""
    from normfuse.ops.kernels.tile import Launch, eager

    rows, block, warps, reads = candidate
    tile = Launch(rows, block, warps, reads, reads)

    def call(*operands):
        with (
            mock.patch.object(Launch, "for_shape", return_value=tile),
            mock.patch("torch.library.wrap_triton", eager),
        ):
            return what.results_of(kernel_form(what.op, what.used)(*what.arguments(*operands)))

    return call


def inductor(what: Subject):
    torch.compiler.reset()
    return torch.compile(what.eager, dynamic=False)


def compile_one(job: tuple[Cell, Candidate | None]) -> None:
    """Leaves the kernels of one contender in the caches on disk."""
    cell, candidate = job
    what = subject(cell)
    with torch.no_grad():
        call = inductor(what) if candidate is None else launched(what, candidate)
        call(*what.operands("cuda"))


def measure(cell: Cell, clock: CudaClock) -> dict[str, object]:
    """Microseconds a call of Inductor's code and of every candidate, fastest first."""
    what = subject(cell)
    rotation, _ = clock.rotations(what.num_bytes)
    sets = [what.operands(clock.device) for _ in range(rotation.num_sets)]

    def timed(call) -> float:
        call(*sets[0])
        results: list[object] = [None] * len(sets)
        recording = clock.record(call, sets, rotation.cycles, results)
        return median(clock.samples(recording, rotation, 5))

    with clock.session(), torch.no_grad():
        tries = [[timed(launched(what, one)), *one] for one in candidates(cell.width)]
        plain = timed(inductor(what))
    return {"cell": cell.name, "inductor_us": plain, "tries": sorted(tries)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--widths", nargs="+", type=int)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    every = list(cells(arguments.ops, arguments.widths))
    jobs = [(cell, one) for cell in every if cell.rows == 16 for one in candidates(cell.width)]
    jobs += [(cell, None) for cell in every]
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        compiled = pool.imap_unordered(compile_one, jobs)
        for _ in track(compiled, description="compiling", total=len(jobs)):
            pass
    clock = CudaClock()
    record = {**environment("python " + " ".join(sys.argv)), "cells": []}
    for cell in track(every, description="measuring"):
        record["cells"].append(measure(cell, clock))
        if arguments.out:
            arguments.out.write_text(json.dumps(record) + "\n")
    for row in record["cells"]:
        best, *launch = row["tries"][0]
        print(f"{row['cell']}: Inductor {row['inductor_us']:.2f} us, {launch} {best:.2f} us")


if __name__ == "__main__":
    main()
