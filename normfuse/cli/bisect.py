"""`python -m normfuse bisect MODEL`: the site whose fusion changes an output beyond a tolerance."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from normfuse.cli.bisection import (
    FusedSite,
    Outputs,
    Trials,
    allowed_by_roundings,
    differences,
    magnitudes,
    smallest_set,
)
from normfuse.cli.errors import UsageError
from normfuse.cli.subject import DEVICES, DTYPES, HELP, load

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

SCHEMA = 1  # of the JSON text; goes up when a key changes its meaning or goes away
LOWERINGS = ("triton", "op", "auto")

DESCRIPTION = """\
Runs a model with every site inline, then with every site fused. If an output differs by more than
the tolerance, the set of fused sites is halved until none can be left out. Exit status: 0 if
nothing is beyond the tolerance, 1 if a site was found, 2 for wrong usage.
"""
EXAMPLES = """
The tolerance is a share of the largest element of an output. By default it is 0, equal bits, for
--lowering op. For kernels, an output may be off by twice the error of the inline form, and one
rounding; the error is that against the model in float64.

examples:
  python -m normfuse bisect qwen3
  python -m normfuse bisect my_model.py:make --lowering triton --tolerance 0.01
"""


@dataclass
class Culprit:
    """Sites that change an output beyond the tolerance together, and none of which can be left out.

    Attributes:
        sites: one, as a rule.
        alone: the largest difference of each output with these sites fused and no other.
    """

    sites: list[FusedSite]
    alone: list[float]


@dataclass
class Bisection:
    """What came out.

    Attributes:
        model: what was run.
        lowering: the form of fused sites.
        num_sites: how many can be fused.
        magnitudes: the largest element of each output.
        allowed: how far each output may be off.
        fused: how far it is with every site fused.
        culprits: what was found.
        after: how far it is with every site fused but those.
        num_runs: how often the model was captured.
    """

    model: str
    lowering: str
    num_sites: int
    magnitudes: list[float]
    allowed: list[float]
    fused: list[float]
    culprits: list[Culprit] = field(default_factory=list)
    after: list[float] = field(default_factory=list)
    num_runs: int = 0

    def is_beyond(self, found: list[float]) -> bool:
        """Whether one of these differences is more than is allowed."""
        return _is_beyond(found, self.allowed)

    def to_json(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2)


def _is_beyond(found: list[float], allowed: list[float]) -> bool:
    return any(one > limit for one, limit in zip(found, allowed, strict=True))


def add_parser(subparsers: Subparsers) -> None:
    """Describes `bisect` and its arguments."""
    parser = subparsers.add_parser(
        "bisect",
        help="find the site whose fusion changes an output beyond a tolerance",
        description=DESCRIPTION,
        epilog=HELP + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="what to run, see below")
    dtype = "of weights and inputs (default: bf16; as it comes from a factory)"
    add("--dtype", choices=DTYPES, help=dtype)
    device = "where it runs (default: the GPU, if there is one; as it comes from a factory)"
    add("--device", choices=DEVICES, help=device)
    layers = "layers of a model type (default: one of each kind, at least two)"
    add("--layers", type=int, metavar="N", help=layers)
    lowering = "what fused sites become (default: triton with a GPU, else op)"
    add("--lowering", choices=LOWERINGS, help=lowering)
    tolerance = "how far an output may be off, see below; 0 asks for equal bits"
    add("--tolerance", type=float, metavar="SHARE", help=tolerance)
    code = (
        "let Inductor generate code, whose own roundings differ; by default, the rewritten graph "
    )
    add("--inductor", action="store_true", help=code + "runs node by node")
    add("--all", action="store_true", help="go on after the first site that is found")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Bisects the model of the command line; returns 1 if a site was found."""
    if args.tolerance is not None and not 0 <= args.tolerance < float("inf"):
        raise UsageError(
            f"--tolerance must be a number that is not negative, got {args.tolerance:g}: "
            "pass a share, such as 0.01"
        )
    console = Console(stderr=True)
    with console.status(escape(f"building {args.model}")):
        subject = load(args.model, args.dtype, args.device, args.layers)
    lowering = args.lowering or ("triton" if torch.cuda.is_available() else "op")
    trials = Trials(subject, lowering, generates_code=args.inductor)
    found = _bisect(trials, args.tolerance, args.all, console)
    if args.json:
        print(found.to_json())
    else:
        _print(found)
    return 1 if found.culprits else 0


def _bisect(trials: Trials, tolerance: float | None, find_all: bool, console: Console) -> Bisection:
    with console.status(escape(f"running {trials.subject.title}")):
        sites, reference = trials.inline()
        allowed = _allowed(trials, reference, tolerance)
        _check_repeatable(trials, reference, allowed)
        off = _Off(trials, reference)
        fused = off(sites)
    title, sizes = trials.subject.title, magnitudes(reference)
    found = Bisection(title, trials.lowering, len(sites), sizes, allowed, fused, after=fused)
    with _progress(console) as bar:
        while found.is_beyond(found.after) and (find_all or not found.culprits):
            culprit = _culprit(sites, lambda chosen: found.is_beyond(off(chosen)), bar)
            sites = [site for site in sites if site not in culprit]
            found.culprits.append(Culprit(culprit, alone=off(culprit)))
            found.after = off(sites)
    found.num_runs = trials.num_runs
    return found


class _Off:
    """How far each output is off with some sites fused; the same sites run once."""

    def __init__(self, trials: Trials, reference: Outputs) -> None:
        self.trials = trials
        self.reference = reference
        self._known: dict[tuple[FusedSite, ...], list[float]] = {}

    def __call__(self, chosen: Sequence[FusedSite]) -> list[float]:
        key = tuple(chosen)
        if key not in self._known:
            self._known[key] = differences(self.trials.run(chosen), self.reference)
        return self._known[key]


def _culprit(
    sites: list[FusedSite], is_beyond: Callable[[Sequence[FusedSite]], bool], bar: Progress
) -> list[FusedSite]:
    task = bar.add_task("sites ruled out", total=len(sites))

    def show(ruled_out: int) -> None:
        bar.update(task, completed=ruled_out)

    culprit = smallest_set(sites, is_beyond, show)
    bar.update(task, total=len(sites) - len(culprit), completed=len(sites) - len(culprit))
    return culprit


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=console)


def _allowed(trials: Trials, reference: Outputs, tolerance: float | None) -> list[float]:
    if tolerance is None and trials.lowering == "op" and not trials.generates_code:
        tolerance = 0.0
    if tolerance is not None:
        return [tolerance * size for size in magnitudes(reference)]
    try:
        return allowed_by_roundings(reference, trials.exact())
    except Exception as error:  # every model has its own ways to refuse a type
        raise UsageError(
            "the model must run in float64 to derive a tolerance, got "
            f"{type(error).__name__}: {error}: pass --tolerance"
        ) from error


def _check_repeatable(trials: Trials, reference: Outputs, allowed: list[float]) -> None:
    again = differences(trials.run([]), reference)
    if _is_beyond(again, allowed):
        raise UsageError(
            f"{trials.subject.title} must have the same outputs in every run, got a difference of "
            f"{max(again):.3g} between two without any fused site: put it into eval mode and seed "
            "what is random, or pass a larger --tolerance"
        )


def _print(found: Bisection) -> None:
    console = Console()
    console.print(found.model, style="bold", markup=False, highlight=False)
    console.print()
    console.print(_outputs(found), highlight=False)
    if not found.num_sites:
        console.print(f"no site is fused with --lowering {found.lowering}: nothing to compare")
    elif not found.culprits:
        console.print(f"nothing beyond the tolerance, with all of {found.num_sites} sites fused")
    for culprit in found.culprits:
        together = "these sites change an output only together:" if len(culprit.sites) > 1 else ""
        for line in filter(None, (together, *map(_line, culprit.sites))):
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    if found.culprits and found.is_beyond(found.after):
        console.print("without it, an output is still beyond the tolerance: --all goes on")
    console.print(f"the model ran {found.num_runs} times", style="dim")


def _line(site: FusedSite) -> str:
    return f"{site.module or '(no module)'}: {site.op}, {site.lowering}, {site.source}"


def _outputs(found: Bisection) -> Table:
    """The numbers of each output that is beyond; without any, of the one that is nearest."""
    rows = range(len(found.fused))
    beyond = [row for row in rows if found.fused[row] > found.allowed[row]]
    nearest = sorted(rows, key=lambda row: _share(found.fused[row], found.allowed[row]))[-1:]
    headings = ["output", "largest", "allowed", "all fused"]
    if found.culprits:
        headings += ["found fused", "found inline"]
    table = Table(*headings)
    for row in beyond or nearest:
        numbers: list[Any] = [found.magnitudes[row], found.allowed[row], found.fused[row]]
        if found.culprits:
            numbers += [max(c.alone[row] for c in found.culprits), found.after[row]]
        table.add_row(str(row), *(f"{number:.4g}" for number in numbers))
    return table


def _share(found: float, allowed: float) -> float:
    return found / allowed if allowed else found
