"""`python -m normfuse tune MODEL ...`: measures the sites of models, for `lowering="auto"`."""

from __future__ import annotations

import argparse
import gc
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from normfuse import tuning
from normfuse.cli import workers
from normfuse.cli.bench.record import without_directories
from normfuse.cli.errors import UsageError
from normfuse.cli.sites import regions_of, unique
from normfuse.cli.subject import DTYPES, load_real
from normfuse.passes import measure
from normfuse.passes.region import Region
from normfuse.tuning import MARGIN, Document, Entry, Rows, store

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

ROWS = (1, 16, 64, 256, 1024, 4096)

DESCRIPTION = """\
Measures every site of these models in both of its forms, as a Triton kernel and as plain torch that
Inductor compiles, together with its pointwise neighbours, and keeps the times. From then on
lowering="auto" goes by them. Needs a CUDA device that does nothing else meanwhile.
"""
HELP = """\
MODEL is one of
  llama, gemma3_text, qwen3, ...   a transformers model type, at the widths of its default
                                   configuration: two layers or one of each kind, random weights,
                                   nothing is downloaded
  path.py:factory                  a function of yours that returns (model, args, kwargs) or
                                   (model, inputs); with --rows it must take a parameter `rows`
examples:
  python -m normfuse tune qwen3 gemma3_text
  python -m normfuse tune my_model.py:make
  python -m normfuse tune my_model.py:make_with_rows --rows 1 64 4096 --jobs 8
"""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Job:
    """One model at one number of rows."""

    model: str
    dtype: str | None
    layers: int | None
    rows: int | None
    training: bool


def add_parser(subparsers: Subparsers) -> None:
    """Describes `tune` and its arguments."""
    parser = subparsers.add_parser(
        "tune",
        help="measure the norms of a model on this GPU, so that auto can choose",
        description=DESCRIPTION,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="what to measure, see below")
    rows = f"tokens of the inputs (default: {' '.join(map(str, ROWS))}; as a factory makes them)"
    add("--rows", type=int, nargs="+", metavar="N", help=rows)
    add("--dtype", choices=DTYPES, help="of weights and inputs (default: bf16; as from a factory)")
    layers = "layers of a model type (default: one of each kind, at least two)"
    add("--layers", type=int, metavar="N", help=layers)
    training = "measure training instead of inference: with gradients, and backward"
    add("--training", action="store_true", help=training)
    jobs = "processes that compile at once; they take turns on the GPU (default: 1)"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    again = "measure what the tables already know, too"
    add("--again", action="store_true", help=again)
    out = "write one table there, as it is shipped, instead of the user's own table"
    add("--out", type=Path, metavar="PATH.json", help=out)


def run(args: argparse.Namespace) -> int:
    """Measures the models of the command line; returns 1 if something could not be measured."""
    _check_device()
    _check_numbers(args)
    command = without_directories("python -m normfuse tune " + shlex.join(sys.argv[2:]))
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )
    with workers.workers(args.jobs) as each, bar:
        captured = _all(each, _capture, _jobs(args), bar, "capturing")
        regions = unique(region for found in captured for region in found)
        wanted = [region for region in regions if args.again or args.out or not _is_known(region)]
        tasks = [(region, command) for region in wanted]
        documents = _all(each, _measure, tasks, bar, "measuring", partial(_keep, args.out))
    _print(documents, len(regions) - len(wanted), args.out)
    complete = len(captured) == len(_jobs(args)) and len(documents) == len(tasks)
    return 0 if complete else 1


def _check_device() -> None:
    if not torch.cuda.is_available():
        raise UsageError(
            "tune must have a CUDA device, got none: run it on the GPU that the model is for; "
            "off CUDA auto takes the inline form, and nothing needs to be measured"
        )


def _check_numbers(args: argparse.Namespace) -> None:
    for name, values in (("--rows", args.rows or [1]), ("--jobs", [args.jobs])):
        if min(values) < 1:
            raise UsageError(f"{name} must be at least 1, got {min(values)}: pass a larger number")


def _jobs(args: argparse.Namespace) -> list[Job]:
    """Every model at every number of rows; a factory that was given none decides for itself."""
    jobs = []
    for model in args.models:
        own = [None] if ".py:" in model else list(ROWS)
        for rows in args.rows or own:
            jobs.append(Job(model, args.dtype, args.layers, rows, args.training))
    return jobs


def _capture(job: Job) -> list[Region]:
    subject = load_real(job.model, job.dtype, job.layers, job.rows)
    regions = regions_of(subject, training=job.training)
    torch._dynamo.reset()  # lets go of the model
    gc.collect()
    gc.freeze()  # recording a CUDA graph collects garbage, which takes long among so many modules
    torch.cuda.empty_cache()  # for the other processes
    return regions


def _measure(task: tuple[Region, str]) -> Document:
    return measure.measure(*task, workers.turn)


def _all(
    each: workers.Each,
    function: Callable[[T], R],
    values: Sequence[T],
    bar: Progress,
    what: str,
    keep: Callable[[list[R]], None] = lambda results: None,
) -> list[R]:
    """The results of a function, with a line on the screen for each value that it failed for.

    `keep` gets all of them after each, so that an interrupted run has what it has measured.
    """
    task = bar.add_task(what, total=len(values))
    results = []
    for value, result in each(function, values):
        bar.advance(task)
        if isinstance(result, UsageError):
            raise result
        if isinstance(result, Exception):
            text = f"{what} failed: {_name(value)}: {type(result).__name__}: {result}"
            bar.console.print(text, markup=False, style="yellow")
        else:
            results.append(result)
            keep(results)
    return results


def _name(value: Job | tuple[Region, str] | Any) -> str:
    if isinstance(value, Job):
        return f"{value.model} at {value.rows or 'its own'} rows"
    region, _ = value
    return f"{region.key.op} of {region.key.widths} at {region.rows} rows"


def _is_known(region: Region) -> bool:
    rows, table = Rows.exactly(region.rows), tuning.tables().table
    return table.knows(region.key, rows, region.neighbours)


def _keep(out: Path | None, documents: list[Document]) -> None:
    """All into one file as it is shipped, in order; or the last into the user's table."""
    if out is None:
        tuning.tables().add(documents[-1])
    else:
        entries = tuple(sorted(tuning.merged(documents), key=_order))
        kernels = {op: text for one in documents for op, text in one.kernels.items()}
        whole = replace(documents[0], entries=entries, kernels=dict(sorted(kernels.items())))
        store.replace_file(out, whole.text())


def _order(entry: Entry) -> Any:
    return entry.key, entry.measurement.rows, entry.measurement.neighbours


def _print(documents: list[Document], num_known: int, out: Path | None) -> None:
    table = Table("op", "width", "rows", "neighbours", "inline us", "triton us", "", "auto takes")
    entries = sorted(tuning.merged(documents), key=_order)
    for key, found in ((entry.key, entry.measurement) for entry in entries):
        table.add_row(
            key.op,
            " ".join(str(width) for width in dict.fromkeys(key.widths)),
            str(found.rows),
            ", ".join(found.neighbours),
            f"{found.inline_us:.2f}",
            f"{found.triton_us:.2f}",
            f"{found.speedup:.2f}x",
            "triton" if found.wins(MARGIN) else "inline",
        )
    console = Console()
    console.print(table)
    place = out or tuning.tables().directory
    known = f"; {num_known} were known already (--again measures them anew)" if num_known else ""
    console.print(f"{len(entries)} measured, kept in {place}{known}", soft_wrap=True, markup=False)
