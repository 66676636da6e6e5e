"""`python -m normfuse doctor`: whether normfuse does here what it did when it was recorded."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from normfuse.cli.environment import Check, check_environment
from normfuse.cli.errors import UsageError
from normfuse.cli.examination import (
    SCHEMA,
    TABLE,
    Examination,
    Table,
    examine,
    installed_versions,
)
from normfuse.cli.micro_blocks import BLOCKS

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EPILOG = f"""
Each block is a small chain around a norm, or a class of the installed transformers. Two things are
compared: what became of each norm, with the table {TABLE.name} in the package, and the results of
the rewritten graph with eager's, to the bit. It runs on the CPU in less than a minute.

The exit status is 0 if everything matches and 1 if anything differs; other versions than the
recorded ones do not count as long as the blocks match.
"""
_COLOURS = {"same": "green", "ok": "green", "skipped": "yellow", "new": "yellow"}
_WIDTH = 120  # where there is no terminal to ask


def add_parser(subparsers: Subparsers) -> None:
    """Describes `doctor` and its arguments."""
    parser = subparsers.add_parser(
        "doctor",
        help="check that the installed torch and transformers still match what normfuse knows",
        description="Checks the environment, and compiles a fixed set of small blocks to see that "
        "the installed torch and transformers still match what normfuse knows.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--json", action="store_true", help="print JSON")
    record = "write what is found into the package's table: for those who change a rule"
    add("--record", action="store_true", help=record)


def run(args: argparse.Namespace) -> int:
    """Examines everything; returns 1 if anything differs."""
    diagnosis = _diagnose()
    if args.json:
        print(json.dumps(diagnosis.to_dict(), indent=2))
        return 0 if diagnosis.is_good else 1
    _print(diagnosis.parts())
    if args.record:
        _record(diagnosis)
        print(f"recorded {len(diagnosis.blocks)} blocks with {_listed(diagnosis.installed)}")
        return 0
    style = "green" if diagnosis.is_good else "bold red"
    _print(Text(line, style) for line in diagnosis.advice())
    return 0 if diagnosis.is_good else 1


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was looked at."""

    recorded: dict[str, str | None]
    installed: dict[str, str | None]
    checks: list[Check]
    blocks: list[Examination]

    @property
    def is_good(self) -> bool:
        environment = all(check.is_good for check in self.checks)
        return environment and all(block.is_good for block in self.blocks)

    def advice(self) -> Iterator[str]:
        """What to do, a line for each cause."""
        if self.is_good:
            yield "everything matches: nothing to do"
        for check in self.checks:
            if not check.is_good:
                yield f"{check.name}: {check.advice}"
        report = "report it with the output of `python -m normfuse doctor --json`"
        recorded = _listed(self.recorded)
        verdicts = {block.verdict for block in self.blocks}
        if "inexact" in verdicts:
            yield (
                'results differ from eager\'s: do not use backend="normfuse" here; '
                f"install {recorded}, and {report}"
            )
        if "failed" in verdicts:
            yield f"a block must build, compile and run: install {recorded}, or {report}"
        if verdicts & {"changed", "new"}:
            if self.installed == self.recorded:
                yield (
                    "normfuse itself changed: if that is what you want, "
                    "python -m normfuse doctor --record; if you changed nothing, install it again"
                )
            else:
                yield (
                    "results are still eager's, but norms are fused otherwise than recorded: "
                    f"install {recorded}, or {report}"
                )

    def parts(self) -> Iterator[Grid | Text]:
        """The report, without the advice."""
        checks = _grid()
        for check in self.checks:
            word = "ok" if check.is_good else "problem"
            checks.add_row(_word(word), check.name, Text(check.finding))
        yield from (Text("environment", "bold"), checks, Text("\nblocks", "bold"))
        blocks = _grid()
        for block in self.blocks:
            blocks.add_row(_word(block.verdict), block.name, Text(_explained(block)))
        yield blocks
        others = {
            name: version
            for name, version in self.installed.items()
            if version != self.recorded.get(name)
        }
        here = f"here {_listed(others)}" if others else "here the same"
        yield Text(f"\nrecorded with {_listed(self.recorded)}; {here}")
        good = sum(block.verdict == "same" for block in self.blocks)
        yield Text(f"{good} of {len(self.blocks)} blocks as recorded, with eager's bits", "bold")

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "ok": self.is_good,
            "recorded": self.recorded,
            "installed": self.installed,
            "environment": [asdict(check) for check in self.checks],
            "blocks": [{"verdict": block.verdict, **asdict(block)} for block in self.blocks],
            "advice": list(self.advice()),
        }


def _diagnose() -> Diagnosis:
    table = Table.load()
    with Console(stderr=True).status("checking the environment") as status:
        checks = check_environment()
        blocks = []
        for number, block in enumerate(BLOCKS, 1):
            status.update(escape(f"compiling {block.name} ({number} of {len(BLOCKS)})"))
            blocks.append(examine(block, table))
    return Diagnosis(table.versions, installed_versions(), checks, blocks)


def _print(parts: Iterable[Grid | Text]) -> None:
    width = shutil.get_terminal_size(fallback=(_WIDTH, 0)).columns
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _record(diagnosis: Diagnosis) -> None:
    bad = [
        block.name
        for block in diagnosis.blocks
        if block.verdict in ("failed", "inexact", "skipped")
    ]
    if bad:
        raise UsageError(
            f"--record must have every block run with eager's bits, got trouble with "
            f"{', '.join(bad)}: nothing is recorded, see above"
        )
    found = {block.name: block.found or [] for block in diagnosis.blocks}
    Table(diagnosis.installed, found).save()


def _explained(block: Examination) -> str:
    if block.verdict in ("skipped", "failed"):
        return block.skipped or block.error or ""
    found = _joined(block.found)
    if block.verdict == "inexact":
        return f"{found}: results differ from eager's"
    if block.verdict == "same":
        return found
    return f"expected {_joined(block.expected)}\nfound    {found}"


def _joined(sites: list[str] | None) -> str:
    """Repeated ops counted: rms_norm x 2, add_rms_norm."""
    if sites is None:
        return "nothing: the table does not have this block"
    runs = [(site, len(list(same))) for site, same in groupby(sites)]
    texts = [f"{site} x {count}" if count > 1 else site for site, count in runs]
    return ", ".join(texts) or "no norm"


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())


def _grid() -> Grid:
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    return grid


def _word(word: str) -> Text:
    return Text(word, _COLOURS.get(word, "bold red"))
