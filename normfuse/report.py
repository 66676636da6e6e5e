"""What became of each norm of a model: the answer of `normfuse.explain`."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from math import prod
from pathlib import PurePath

from rich.box import Box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

SCHEMA = 1  # of the JSON text; goes up when a key changes its meaning or goes away

# One rule below the heading and nothing else, in ASCII, so that the text survives every log file.
HEADING_RULE = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
_WIDTH = 120  # where there is no terminal to ask
_WIDE_ENOUGH = 110  # columns that keep module paths in one piece
_RANGES_SHOWN = 4

_NO_GRAPH = (
    "No graph reached normfuse, so there is nothing to report. Check that the model runs under "
    "torch.compile at all: TORCH_LOGS=graph_breaks names what stops it."
)
_NO_SITES = (
    "No RMS norms were found. Check that the model has any (a LayerNorm, which subtracts a mean, "
    "is none) and that they run for these inputs; a graph break inside a norm hides it from us: "
    "TORCH_LOGS=graph_breaks lists them."
)


@dataclass(frozen=True)
class Site:
    """One RMS statistic of the captured graphs.

    Attributes:
        op: the normfuse op that it became part of; None if it was declined.
        fused: whether it became part of one.
        reason: a sentence that says why not; None if it did.
        module: path of the module, such as "model.layers.0.input_layernorm".
        source: the line of the user's code, "path/to/file.py:123".
        lowering: what the op became: "triton", "inline" or "op"; None if nothing was lowered.
        lowering_reason: why this form: the times that were measured, or what stood in the way.
        graph: number of the captured graph, from 0.
    """

    op: str | None
    fused: bool
    reason: str | None
    module: str
    source: str
    lowering: str | None
    lowering_reason: str | None = None
    graph: int = 0


class Report:
    """The sites of a model, and its graphs before and after.

    Prints as a table, in colour with `rich.print`, and as HTML in a notebook.

    Attributes:
        sites: all sites, in the order of the graphs.
        before: text of the captured graphs.
        after: text of the same graphs when they reach code generation.
        notes: sentences about the whole, such as about a graph break.
    """

    def __init__(
        self,
        sites: Iterable[Site] = (),
        before: str = "",
        after: str = "",
        notes: Iterable[str] = (),
    ) -> None:
        self.sites = list(sites)
        self.before = before
        self.after = after
        self.notes = list(notes)

    @property
    def num_sites(self) -> int:
        return len(self.sites)

    @property
    def num_fused(self) -> int:
        return sum(site.fused for site in self.sites)

    @property
    def coverage(self) -> float:
        """Share of the sites that are fused, 0 to 1; 1 if there are none."""
        return self.num_fused / self.num_sites if self.sites else 1.0

    def summary(self) -> str:
        """The report in one line."""
        graphs = len({site.graph for site in self.sites})
        return (
            f"{self.num_fused} of {plural(self.num_sites, 'norm')} fused "
            f"({_percent(self.num_fused, self.num_sites)}) in {plural(graphs, 'graph')}"
        )

    def to_json(self) -> str:
        """The whole report, graphs included; `from_json` reads it back."""
        document = {
            "schema": SCHEMA,
            "num_sites": self.num_sites,
            "num_fused": self.num_fused,
            "coverage": self.coverage,
            "sites": [asdict(site) for site in self.sites],
            "notes": self.notes,
            "before": self.before,
            "after": self.after,
        }
        return json.dumps(document, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote.

        Raises:
            ValueError: the text is not such a report, or one of another schema version.
        """
        document = json.loads(text)
        schema = document.get("schema") if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"a report must be a JSON object with schema {SCHEMA}, got schema {schema}: "
                "write it again with Report.to_json() of this version of normfuse"
            )
        names = [field.name for field in fields(Site)]
        sites = [Site(**{name: site[name] for name in names}) for site in document["sites"]]
        return cls(sites, document["before"], document["after"], document["notes"])

    def __repr__(self) -> str:
        return f"<Report: {self.summary()}>"

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.sites:
            layout = _wide_tables if options.max_width >= _WIDE_ENOUGH else _narrow_tables
            yield from layout(group_sites(self.sites))
            yield Text(self.summary(), style="bold")
            yield from map(_indented, _counts(self.sites))
        else:
            yield Text(_NO_SITES if self.before else _NO_GRAPH)
        for note in self.notes:
            yield Text(f"note: {note}")

    def _repr_html_(self) -> str:
        groups = sorted(group_sites(self.sites), key=lambda group: group.site.fused)
        headings = ("norms", "module", "op", "lowering", "why not", "source")
        lines = (self.summary() if self.sites else _NO_SITES, *_counts(self.sites), *self.notes)
        return "\n".join(
            [
                *(f"<p>{html.escape(line)}</p>" for line in lines),
                "<table>",
                _html_row("th", headings),
                *(_html_row("td", group.cells()) for group in groups),
                "</table>",
                _html_graph("Graph before", self.before),
                _html_graph("Graph after", self.after),
            ]
        )


@dataclass(frozen=True)
class SiteGroup:
    """The same norm of many layers: sites that differ in the numbers of their paths only."""

    site: Site  # one of them
    module: str  # all their paths, such as "model.layers.{0..5}.input_layernorm"
    num_sites: int

    def cells(self) -> tuple[str, ...]:
        site = self.site
        return (
            str(self.num_sites),
            self.module,
            site.op or "",
            site.lowering or "",
            site.reason or "",
            short_source(site.source),
        )


def group_sites(sites: Iterable[Site]) -> list[SiteGroup]:
    """Joins the repeated sites of a stack of layers; groups stand where their first site stood."""
    members: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        shape = re.sub(r"\b\d+\b", "#", site.module)
        key = (site.op, site.reason, shape, site.source, site.lowering, site.lowering_reason)
        members.setdefault(key, []).append(site)
    return [
        SiteGroup(same[0], join_paths([site.module for site in same]), len(same))
        for same in members.values()
    ]


def join_paths(paths: list[str]) -> str:
    """One text for paths that differ in numbers only: a.0.b, a.1.b -> a.{0..1}.b

    Where not every combination of the numbers occurs, `*` stands for those that vary.
    """
    numbers = [[int(number) for number in re.findall(r"\b\d+\b", path)] for path in paths]
    columns = [sorted(set(column)) for column in zip(*numbers, strict=True)]
    complete = prod(len(column) for column in columns) == len(set(paths))
    texts = iter([_ranges(column) if complete else _star(column) for column in columns])
    return re.sub(r"\b\d+\b", lambda _: next(texts), paths[0])


def _star(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else "*"


def _ranges(numbers: list[int]) -> str:
    """As a shell would write it: [3] -> 3, [0, 1, 2, 5] -> {0..2,5}, [5, 11, 17] -> {5..17..6}."""
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {after - before for before, after in pairwise(numbers)}
    if len(numbers) > 2 and len(steps) == 1 and steps != {1}:
        return f"{{{numbers[0]}..{numbers[-1]}..{steps.pop()}}}"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    if len(texts) > _RANGES_SHOWN:
        texts = [*texts[: _RANGES_SHOWN - 1], "...", texts[-1]]
    return "{" + ",".join(texts) + "}"


def as_text(renderable: RenderableType) -> str:
    """What rich would show, without colour, as wide as the terminal."""
    width = shutil.get_terminal_size(fallback=(_WIDTH, 0)).columns
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def _wide_tables(groups: list[SiteGroup]) -> Iterator[RenderableType]:
    """What was declined and why, then what was fused into what."""
    declined = [group.cells() for group in groups if not group.site.fused]
    fused = [group.cells() for group in groups if group.site.fused]
    if declined:
        table = _table("not fused", "why not", "source")
        for num, module, _, _, reason, source in declined:
            table.add_row(num, Text(module, "yellow"), Text(reason), Text(source, "dim"))
        yield table
        yield ""
    if fused:
        table = _table("fused", "into", "lowering", "source")
        for num, module, op, lowering, _, source in fused:
            table.add_row(num, Text(module, "green"), op, lowering, Text(source, "dim"))
        yield table
        yield ""


def _narrow_tables(groups: list[SiteGroup]) -> Iterator[RenderableType]:
    """The same in two columns: everything about a site stands below its module."""
    for fused, heading, style in ((False, "not fused", "yellow"), (True, "fused", "green")):
        table = _table(heading)
        for group in groups:
            if group.site.fused is fused:
                num, module, op, lowering, reason, source = group.cells()
                became = f"{op}, {lowering}" if lowering else op
                about = Text.assemble(
                    (module, style), "\n", reason or became, "\n", (source, "dim")
                )
                table.add_row(num, about)
        if table.row_count:
            yield table
            yield ""


def _table(*headings: str) -> Table:
    table = Table(box=HEADING_RULE, show_edge=False, header_style="bold")
    table.add_column("norms", justify="right", no_wrap=True)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _counts(sites: list[Site]) -> Iterator[str]:
    """Norms by op, then by lowering with its reason, a line each."""
    by_op = Counter(site.op for site in sites if site.op)
    yield from (f"{plural(num, 'norm')} in {op}" for op, num in by_op.most_common())
    by_lowering = Counter((site.lowering, site.lowering_reason) for site in sites if site.lowering)
    for (lowering, reason), num in by_lowering.most_common():
        yield f"{plural(num, 'norm')} lowered to {lowering}" + (f": {reason}" if reason else "")


def _indented(line: str) -> RenderableType:
    return Padding(Text(line), (0, 0, 0, 2))


def plural(num: int, word: str) -> str:
    return f"{num} {word}" if num == 1 else f"{num} {word}s"


def _percent(part: int, whole: int) -> str:
    """Rounded down, so that only all is 100 %."""
    return f"{100 * part // whole if whole else 100} %"


def short_source(source: str) -> str:
    """The file's name and line: the whole path is in the JSON text."""
    return PurePath(source).name


def _html_row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _html_graph(title: str, graph: str) -> str:
    return f"<details><summary>{title}</summary><pre>{html.escape(graph)}</pre></details>"
