"""What the checks of `normfuse.options(check=...)` have found: the answer of `check_report`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from normfuse.ops.checking import CheckedSite, checked_sites, forget_checked_sites
from normfuse.report import HEADING_RULE, as_text, join_paths, plural, short_source

SCHEMA = 1  # of the JSON text; goes up when a key changes its meaning or goes away

_NO_SITES = (
    "No site was checked. Compile with normfuse.options(check='sample'), or with the option "
    "normfuse.check; sites that are lowered to 'inline' have nothing to be compared with."
)


class CheckReport:
    """The checked sites of this process; prints as a table, in colour with `rich.print`.

    Attributes:
        sites: one `CheckedSite` for each op and place in a model, in the order of their first call.
    """

    def __init__(self, sites: Iterable[CheckedSite] = ()) -> None:
        self.sites = list(sites)

    @property
    def beyond(self) -> list[CheckedSite]:
        """The sites with an element that was farther from its exact value than their bound."""
        return [site for site in self.sites if site.num_beyond]

    def summary(self) -> str:
        """The report in one line."""
        checked = sum(site.num_checked for site in self.sites)
        calls = sum(site.num_calls for site in self.sites)
        return (
            f"{plural(len(self.sites), 'site')} checked on {checked} of {plural(calls, 'call')}: "
            f"{len(self.beyond) or 'none'} beyond bounds"
        )

    def to_json(self) -> str:
        """The whole report."""
        sites = [asdict(site) for site in self.sites]
        return json.dumps({"schema": SCHEMA, "sites": sites}, indent=2)

    def __repr__(self) -> str:
        return f"<CheckReport: {self.summary()}>"

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.sites:
            yield Text(_NO_SITES)
            return
        yield _table(self.sites)
        yield ""
        yield Text(self.summary(), style="bold")
        yield Text("  errors are in units of the bound of each element, so that above 1 is beyond")
        for site in self.sites:
            if site.first is not None:
                yield Text(f"  {site.module}, {site.op}: {site.first}", style="red")
        for why in dict.fromkeys(site.not_checked for site in self.sites if site.not_checked):
            num = sum(site.not_checked == why for site in self.sites)
            yield Text(f"  calls of {plural(num, 'site')} were due and not compared: {why}")


def check_report() -> CheckReport:
    """What checks have found since the process began, or since `reset_checks`.

    Models that are compiled with the option `normfuse.check` compare the two forms of each fused
    site on some calls. The same place of two models with the same module path is one site.
    """
    return CheckReport(checked_sites())


def reset_checks() -> None:
    """Forget what checks have found; the next call of each site counts as its first."""
    forget_checked_sites()


def _table(sites: list[CheckedSite]) -> Table:
    table = Table(box=HEADING_RULE, show_edge=False, header_style="bold")
    for heading in ("sites", "checked", "beyond", "error", "inline"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("module", "op", "source"):
        table.add_column(heading, overflow="fold")
    for same in _groups(sites):
        beyond = sum(site.num_beyond for site in same)
        table.add_row(
            str(len(same)),
            f"{sum(site.num_checked for site in same)}/{sum(site.num_calls for site in same)}",
            str(beyond),
            f"{max(site.error for site in same):.2f}",
            f"{max(site.inline_error for site in same):.2f}",
            Text(join_paths([site.module for site in same]), "red" if beyond else "green"),
            same[0].op,
            Text(short_source(same[0].source), "dim"),
        )
    return table


def _groups(sites: list[CheckedSite]) -> list[list[CheckedSite]]:
    """The same site of many layers together; those that were beyond their bounds come first."""
    groups: dict[object, list[CheckedSite]] = {}
    for site in sorted(sites, key=lambda site: site.num_beyond == 0):
        path = re.sub(r"\b\d+\b", "#", site.module)
        groups.setdefault((site.num_beyond > 0, site.op, path, site.source), []).append(site)
    return list(groups.values())
