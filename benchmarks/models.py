"""Unmodified Hugging Face models on a GPU: normfuse against plain torch.compile, end to end.

    python benchmarks/models.py --time-limit 400 --out benchmarks/results/models_h200.json
    python benchmarks/models.py --models qwen3_8b --cells decode1,decode64 --triton --jobs 1

Real widths, random weights, few layers, a small vocabulary (`model_zoo.py`). Both contenders run
under the CUDA graphs of `mode="reduce-overhead"`, and their replays take turns. Decoding is one
token for each sequence, over a static cache that holds 512; every step is the same step. A kernel
of Inductor's that both contenders have has the same launch in both (`same_launches.py`).

A result is compared with eager's before anything is timed, and one that is further from it than
plain Inductor's allows is reported, not timed. Then, for each contender:

    gpu_ms       GPU time of a step, medians over rounds; the CPU is ahead, so that no gap counts
    wall_ms      the same on a clock, until the GPU is done
    compiled_us  all kernels in Triton, Inductor's and ours: without the matrix products
    norm_us      of these, those of norms and rotary embeddings: ours, and Inductor's with a word
                 such as rsqrt, mean, cos or cat in their name. Whatever Inductor fused with them
                 counts, too (in decoding, the copies of the cache), and what was fused without us
                 may be a kernel of its own with us: do not compare the two, compare `compiled_us`
    launches     kernels whose launch Inductor timed, and those that took that of a known one
    compile_s    of the first cell of a model: without caches, in one thread unless
                 TORCHINDUCTOR_COMPILE_THREADS says otherwise; the mean of two, in either order;
                 tracing included, running and trying launches not
    cost_us      with `--without`: `compiled_us`, less that of plain Inductor for the same model
                 without norms and rotary embeddings (`model_floor.py`): what they cost
    peak_mb      memory beyond weights and inputs while it compiles, records and replays

Each model has a process of its own, or several that share its cells, so that models compile at the
same time; they take turns on the GPU, or are dealt out to several. Compile times hold while there
are as many cores as processes.
What the time limit cuts off is listed; the first cell of every model comes first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

# Kineto and CUDA graphs in one process, as `torch.compile` sets it for its own backend.
os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
os.environ.setdefault("TEARDOWN_CUPTI", "0")

import torch
from model_cells import CELLS, MODE, TINY_CELLS, WITHOUT, Plan, forget, measure
from model_zoo import MODELS, build
from models_summary import json_text, show, summary
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from same_launches import share_launches

from normfuse.cli.bench.peers import one_line
from normfuse.cli.bench.record import environment
from normfuse.passes import inductor
from normfuse.tuning.store import replace_file

LAST_SECONDS = 5  # of the time limit, to write and to show

Row = dict[str, Any]


def arguments_of(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = {"type": _names, "metavar": "NAME,..."}
    parser.add_argument("--models", default=list(MODELS), help=", ".join(MODELS), **names)
    parser.add_argument("--cells", default=list(CELLS), help=", ".join(CELLS), **names)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=30, help="of timing, at least 1")
    parser.add_argument("--triton", action="store_true", help='time lowering="triton", too')
    parser.add_argument(f"--{WITHOUT}", action="store_true", help="time what the rest costs, too")
    parser.add_argument("--no-compile-times", action="store_true", help="compile with caches")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="after the imports")
    jobs = "processes; 1 is this one (default: one for each model, at most one for each core)"
    jobs += "; more than models share a model's cells"
    parser.add_argument("--jobs", type=int, help=jobs)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shrink all: measures nothing")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _names(text: str) -> list[str]:
    """Models or cells, separated by commas."""
    names = text.split(",")
    for name in names:
        if name not in (*MODELS, *CELLS):
            raise argparse.ArgumentTypeError(
                f"a name must be one of {', '.join((*MODELS, *CELLS))}, got {name}: correct it"
            )
    return names


def rows_of(
    models: list[str],
    cells: list[str],
    arguments: argparse.Namespace,
    turn: AbstractContextManager[Any],
) -> Iterator[Row]:
    """A row for each cell, one of each model first."""
    others = [name for name in ("triton", WITHOUT) if getattr(arguments, name)]
    names = ("plain", "auto", *others)
    options = {"disable_cpp_codegen": True} if arguments.device == "cpu" else {}
    plan = Plan(names, arguments.rounds, options, turn)
    shapes = TINY_CELLS if arguments.tiny else CELLS
    built: dict[str, Any] = {}
    _prepare(arguments.device, options)
    share_launches()
    for cell, model in product(cells, models):
        row: Row = {"model": model, "cell": cell, "layers": arguments.layers}
        cold = cell == arguments.cells[0] and not arguments.no_compile_times
        reverse = (list(MODELS).index(model) + list(CELLS).index(cell)) % 2 == 1
        try:
            if model not in built:
                built[model] = build(model, arguments.device, arguments.layers, tiny=arguments.tiny)
            found = measure(built[model], shapes[cell], plan, cold=cold, reverse=reverse)
            yield {**row, "contenders": found}
        except Exception as error:  # such as a lack of memory; the other cells go on
            yield {**row, "failed": one_line(error)}
        forget()


def _prepare(device: str, options: dict[str, Any]) -> None:
    """Imports and workspaces, which are not what is measured."""
    mode = {**inductor.mode_options(MODE), **options} if device == "cuda" else options
    product = torch.compile(lambda x: (x @ x).sin().sum() + 1, options=mode)
    for _ in range(3):
        product(torch.ones(64, 64, device=device, dtype=torch.bfloat16))


def _work(
    group: tuple[list[str], list[str]], arguments: argparse.Namespace, turn: Any, rows: Any
) -> None:
    """A process: sends the rows of its models and cells, and None at the end."""
    for row in rows_of(*group, arguments, turn):
        rows.put(row)
    rows.put(None)


def run(arguments: argparse.Namespace, keep: Callable[[Row], None]) -> None:
    """Measures all cells, until the time limit."""
    deadline = time.monotonic() + (arguments.time_limit or 1e9) - LAST_SECONDS
    jobs = arguments.jobs or min(len(arguments.models), os.cpu_count() or 1)
    if jobs == 1:
        for row in rows_of(arguments.models, arguments.cells, arguments, nullcontext()):
            keep(row)
            if time.monotonic() > deadline:
                return
        return
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    places, rows = [(device, context.RLock()) for device in _devices(arguments)], context.Queue()
    processes, visible = [], os.environ.get("CUDA_VISIBLE_DEVICES")
    for index, group in enumerate(_groups(arguments, jobs)):
        device, turn = places[index % len(places)]
        os.environ["CUDA_VISIBLE_DEVICES"] = device  # the process inherits it
        work = (group, arguments, turn, rows)
        processes.append(context.Process(target=_work, args=work, daemon=False))
        processes[-1].start()
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    try:
        _collect(processes, rows, deadline, keep)
    finally:
        for process in processes:
            process.terminate()


def _groups(arguments: argparse.Namespace, jobs: int) -> Iterator[tuple[list[str], list[str]]]:
    """Models and cells for each process; a model's cells are shared out where jobs are left."""
    models, cells = arguments.models, arguments.cells
    count = min(max(1, jobs // len(models)), len(cells))
    for share, index in product(range(count), range(min(jobs, len(models)))):
        yield models[index::jobs], cells[share::count]


def _devices(arguments: argparse.Namespace) -> list[str]:
    """What CUDA_VISIBLE_DEVICES says for each GPU that this process sees, if it is to use any."""
    if arguments.device != "cuda":
        return [""]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = map(str, range(torch.cuda.device_count()))
    return list(numbers) if visible is None else visible.split(",")


def _collect(processes: list[Any], rows: Any, deadline: float, keep: Callable[[Row], None]) -> None:
    """The rows of all processes until each has ended, or the time has."""
    num_running = len(processes)
    while num_running and time.monotonic() < deadline:
        try:
            row = rows.get(timeout=1)
        except queue.Empty:
            if not any(process.is_alive() for process in processes):
                return  # killed, such as for memory: what is missing is listed
            continue
        if row is None:
            num_running -= 1
        else:
            keep(row)


def record_of(arguments: argparse.Namespace, rows: list[Row], command: str) -> dict[str, Any]:
    """What is written: environment, summary, rows, and what is missing."""
    import transformers

    reached = {(row["model"], row["cell"]) for row in rows}
    wanted = product(arguments.cells, arguments.models)
    return {
        **environment(command),
        "transformers": transformers.__version__,
        "date": date.today().isoformat(),
        "measured": arguments.device == "cuda" and not arguments.tiny,
        "layers": arguments.layers,
        "rounds": arguments.rounds,
        "gpus": max(1, torch.cuda.device_count()),
        "compile_threads": os.environ.get("TORCHINDUCTOR_COMPILE_THREADS", "default"),
        "notes": [
            f"{arguments.layers} layers, random weights, a vocabulary of 1024, bfloat16",
            "norm_us counts Inductor's kernels by their names, whatever is fused with the norms",
        ],
        "summary": summary(rows),
        "not_reached": [
            f"{model} {cell}" for cell, model in wanted if (model, cell) not in reached
        ],
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    arguments = arguments_of(argv)
    command = " ".join(["python benchmarks/models.py", *argv])
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    rows: list[Row] = []
    task = bar.add_task("measuring", total=len(arguments.models) * len(arguments.cells))

    def keep(row: Row) -> None:
        rows.append(row)
        bar.update(task, advance=1, description=f"{row['model']} {row['cell']}")
        if arguments.out:
            replace_file(arguments.out, json_text(record_of(arguments, rows, command)))

    with bar:
        run(arguments, keep)
    show(record_of(arguments, rows, command))


if __name__ == "__main__":
    main()
