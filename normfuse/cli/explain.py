"""`python -m normfuse explain MODEL`: which norms are fused, and why the others are not."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING

import torch
from rich.columns import Columns
from rich.console import Console
from rich.markup import escape

from normfuse.cli.errors import UsageError
from normfuse.cli.subject import DEVICES, DTYPES, HELP, Subject, load
from normfuse.cli.tiny_models import model_types
from normfuse.explain import explain_with
from normfuse.report import Report
from normfuse.settings import LOWERINGS

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXAMPLES = """
examples:
  python -m normfuse explain qwen3
  python -m normfuse explain gemma3_text --layers 12 --dtype fp32
  python -m normfuse explain my_model.py:make --graph --lowering op
  python -m normfuse explain llama --min-coverage 1.0    # for a script
"""


def add_parser(subparsers: Subparsers) -> None:
    """Describes `explain` and its arguments."""
    parser = subparsers.add_parser(
        "explain",
        help="show which norms of a model are fused, and why the others are not",
        description="Shows which norms of a model are fused, and why the others are not. "
        "The model runs once, without gradients; nothing is compiled, and no GPU is needed.",
        epilog=HELP + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", help="what to explain, see below")
    add("--list", action="store_true", help="list the model types and stop")
    dtype = "of weights and inputs (default: bf16; as it comes from a factory)"
    add("--dtype", choices=DTYPES, help=dtype)
    device = "where it runs (default: the GPU, if there is one; as it comes from a factory)"
    add("--device", choices=DEVICES, help=device)
    layers = "layers of a model type (default: one of each kind, at least two)"
    add("--layers", type=int, metavar="N", help=layers)
    lowering = "what fused ops become (default: auto)"
    add("--lowering", choices=LOWERINGS, default="auto", help=lowering)
    coverage = "exit with status 1 if a smaller share of the norms is fused (0 to 1)"
    add("--min-coverage", type=float, metavar="SHARE", help=coverage)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON, graphs included")
    graph = "print the graphs as well; --lowering op keeps the fused ops in sight"
    output.add_argument("--graph", action="store_true", help=graph)


def run(args: argparse.Namespace) -> int:
    """Explains the model of the command line; returns 1 if too few of its norms are fused."""
    if args.list:
        _print_names(model_types())
        return 0
    if args.model is None:
        raise UsageError("MODEL must be given, got none: pass one, such as llama, or --list")
    if args.min_coverage is not None and not 0 <= args.min_coverage <= 1:
        raise UsageError(
            f"--min-coverage must be between 0 and 1, got {args.min_coverage:g}: "
            "pass a share, such as 0.9"
        )
    with Console(stderr=True).status(escape(f"building {args.model}")) as status:
        subject = load(args.model, args.dtype, args.device, args.layers)
        status.update(escape(f"capturing {subject.title}"))
        report = _explain(subject, args.lowering)
    if args.json:
        print(report.to_json())
    else:
        _print_report(subject.title, report, args.graph)
    return 0 if args.min_coverage is None else _check_coverage(report, args.min_coverage)


def _explain(subject: Subject, lowering: str) -> Report:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and the model's; ours stay visible
        warnings.filterwarnings("default", message="normfuse")
        options = {"normfuse.lowering": lowering}
        return explain_with(subject.model, subject.args, subject.kwargs, options=options)


def _check_coverage(report: Report, at_least: float) -> int:
    if report.sites or at_least == 0:
        if report.coverage >= at_least:
            return 0
        came = f"{report.coverage:.3f} ({report.num_fused} of {report.num_sites})"
    else:
        came = "no norms at all"
    message = f"the share of fused norms must be at least {at_least:g}, got {came}: see the report"
    print(message, file=sys.stderr)
    return 1


def _print_report(title: str, report: Report, with_graphs: bool) -> None:
    console = Console()
    console.print(title, style="bold", markup=False, highlight=False)
    console.print()
    if console.is_terminal:
        console.print(report, highlight=False)
    else:
        print(report)
    if with_graphs:
        for heading, graph in (("before", report.before), ("after", report.after)):
            console.print(f"\n{heading}", style="bold")
            print(graph.strip())


def _print_names(names: list[str]) -> None:
    console = Console()
    if console.is_terminal:
        console.print(Columns(names, column_first=True), highlight=False)
    else:
        print("\n".join(names))
