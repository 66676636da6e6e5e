"""docs/coverage.md: which norms of each transformers model type are fused, and why the rest is not.

Each model type is built tiny, as `python -m normfuse explain` builds it, in another process:
a crash or a hang costs that model type only. Half an hour on two cores.

python tools/coverage.py                        # the whole document
python tools/coverage.py --only llama,gemma3    # renew these model types, keep the others
python tools/coverage.py --jobs 4               # four processes
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import re
import sys
import textwrap
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from normfuse.cli import tiny_models
from normfuse.cli.errors import UsageError
from normfuse.cli.subject import Subject, load
from normfuse.explain import explain_with

DOCUMENT = Path(__file__).parent.parent / "docs/coverage.md"
COMMAND = "make coverage"
TIMEOUT = 300  # seconds for one model type; the slowest takes about 30
MODELS_PER_PROCESS = 50  # each leaves some 50 MB behind: its module, and what Dynamo cached
REASON_LENGTH = 160

FUSED, NONE, NOT_BUILT = "## Norms", "## No RMS norm", "## Not built"
HEADING = "| model type | dtype | norms | fused | into (norms) | not fused (norms) |"


@dataclass(frozen=True)
class Row:
    """One model type; `failure` says why it could not be built and captured."""

    model_type: str
    dtype: str = ""
    num_norms: int = 0
    num_fused: int = 0
    ops: str = ""
    declined: str = ""
    failure: str = ""

    def line(self) -> str:
        """The row of the table of norms."""
        counts = f"{self.num_norms} | {self.num_fused}"
        return f"| {self.model_type} | {self.dtype} | {counts} | {self.ops} | {self.declined} |"

    @classmethod
    def of_line(cls, line: str) -> Row:
        name, dtype, norms, fused, ops, declined = line.strip("|").split("|")
        return cls(
            *(name.strip(), dtype.strip(), int(norms), int(fused)), ops.strip(), declined.strip()
        )


def measure(model_type: str) -> Row:
    """Builds and explains one model type, in bfloat16, or in float32 if it does not run there."""
    failure = ""
    for dtype in ("bf16", "fp32"):
        # What Dynamo remembers of another model would make numbers of this one symbolic.
        torch._dynamo.reset()
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _explained(model_type, dtype, load(model_type, dtype, "cpu", None))
        except Exception as error:  # every model type has its own ways to fail
            failure = failure or _one_line(error)
    return Row(model_type, failure=failure)


def _explained(model_type: str, dtype: str, subject: Subject) -> Row:
    options = {"normfuse.lowering": "op"}
    report = explain_with(subject.model, subject.args, subject.kwargs, options=options)
    return Row(
        model_type,
        dtype,
        report.num_sites,
        report.num_fused,
        ", ".join(_counted(site.op for site in report.sites if site.op)),
        "; ".join(_counted(_cell(site.reason) for site in report.sites if site.reason)),
    )


def _counted(words: Iterable[str]) -> list[str]:
    """The most frequent first: ["8 add_rms_norm", "1 rms_norm"]."""
    counts = sorted(Counter(words).items(), key=lambda pair: (-pair[1], pair[0]))
    return [f"{count} {word}" for word, count in counts]


def _reasons(rows: Iterable[Row]) -> Iterator[str]:
    """The reason of each norm that was not fused, read back from the cells."""
    for row in rows:
        for cell in re.split(r"; (?=\d+ )", row.declined) if row.declined else ():
            count, _, reason = cell.partition(" ")
            yield from [reason] * int(count)


def _one_line(error: Exception) -> str:
    """What the error was at first, without addresses, paths and advice."""
    cause = error.__cause__ if isinstance(error, UsageError) and error.__cause__ else error
    text = next((line for line in str(cause).splitlines() if line.strip()), "")
    if isinstance(cause, UsageError):
        return _cell(text.partition(": pass ")[0])
    text = re.sub(r"(?:/[\w.+-]+)+/", "", re.sub(r"0x[0-9a-f]+", "0x...", text))
    return _cell(textwrap.shorten(f"{type(cause).__name__}: {text}", REASON_LENGTH))


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("`", "'")


def render(rows: Iterable[Row]) -> str:
    """The document; the same rows in any order give the same text."""
    rows = sorted(rows, key=lambda row: row.model_type)
    built = [row for row in rows if not row.failure]
    with_norms = [row for row in built if row.num_norms]
    without = [row.model_type for row in built if not row.num_norms]
    norms = sum(row.num_norms for row in with_norms)
    fused = sum(row.num_fused for row in with_norms)
    percent = 100 * fused / norms if norms else 100
    lines = [
        "# Coverage",
        "",
        f"**{len(with_norms)} model types with {norms} norms: {fused} fused ({percent:.1f} %).**",
        f"{len(without)} more have no RMS norm; {len(rows) - len(built)} take no tokens or could",
        "not be built: they are at the end, with the reason. The norms that are not fused:",
        "",
        *[f"- {line}" for line in _counted(_reasons(with_norms))],
        "",
        f"{versions()}; written by `{COMMAND}`.",
        "",
        *textwrap.wrap(
            "Each is a tiny model of its default configuration, with a layer of each kind, in "
            "inference, in the dtype that is named: float32 only where bfloat16 does not run in "
            "eager either. A norm counts once for each layer and each time that it is called.",
            100,
        ),
        *("", FUSED, "", HEADING, "|---|---|--:|--:|---|---|"),
        *[row.line() for row in with_norms],
        *("", NONE, ""),
        *_names(without),
        *("", NOT_BUILT, "", "| why | model types |", "|---|---|"),
        *[f"| {why} | {' '.join(_names(names, 10**6))} |" for why, names in _failures(rows)],
    ]
    return "\n".join(lines) + "\n"


def versions() -> str:
    """What a row depends on besides our sources."""
    return f"torch {torch.__version__.partition('+')[0]}, transformers {version('transformers')}"


def read(text: str) -> dict[str, Row]:
    """The rows of a document, by model type."""
    _, rest = text.split(FUSED)
    table, rest = rest.split(NONE)
    without, failed = rest.split(NOT_BUILT)
    rows = [Row.of_line(line) for line in table.strip().splitlines()[2:]]
    rows += [Row(name, "any") for name in re.findall(r"`(\w[^`]*)`", without)]
    for line in failed.strip().splitlines()[2:]:
        why, names = line.strip("|").split("|")
        rows += [Row(name, failure=why.strip()) for name in re.findall(r"`([^`]+)`", names)]
    return {row.model_type: row for row in rows}


def _failures(rows: list[Row]) -> list[tuple[str, list[str]]]:
    names: dict[str, list[str]] = {}
    for row in rows:
        if row.failure:
            names.setdefault(row.failure, []).append(row.model_type)
    return sorted(names.items())


def _names(names: list[str], width: int = 100) -> list[str]:
    text = ", ".join(f"`{name}`" for name in names)
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def measure_all(names: list[str], jobs: int) -> Iterator[Row]:
    """Rows as they come, from this many processes."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Row] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    for _ in range(jobs):
        threading.Thread(target=_supervise, args=(waiting, done), daemon=True).start()
    for _ in names:
        yield done.get()


def _supervise(waiting: queue.SimpleQueue[str], done: queue.SimpleQueue[Row]) -> None:
    """Has a process work through the queue; another follows when it is full, dies or hangs."""
    context = multiprocessing.get_context("spawn")
    process, num_models = None, 0
    while (name := _next(waiting)) is not None:
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # so that its death closes the pipe
            num_models = 0
        try:
            ours.send(name)
            row = ours.recv() if ours.poll(TIMEOUT) else None
            failure = f"took longer than {TIMEOUT} seconds"
        except (EOFError, OSError):
            row, failure = None, "the process died"
        num_models += 1
        if row is None or num_models == MODELS_PER_PROCESS:
            process.kill()
            process = None
        done.put(row or Row(name, failure=failure))


def _next(waiting: queue.SimpleQueue[str]) -> str | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def _work(connection: Connection) -> None:
    """Answers model types with rows; what the models print would garble the progress bar."""
    torch.set_num_threads(1)  # tiny models; the other cores are for the other processes
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    while True:
        connection.send(measure(connection.recv()))


def main() -> int:
    """Writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="A,B", help="renew only these model types")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: 1)")
    args = parser.parse_args()
    known = tiny_models.model_types()
    names = args.only.split(",") if args.only else known
    if unknown := sorted(set(names) - set(known)):
        parser.error(f"--only must name model types, got {', '.join(unknown)}: see explain --list")
    rows = {}
    if args.only:
        text = DOCUMENT.read_text(encoding="utf-8")
        if versions() not in text:
            parser.error(f"--only must run with the document's versions, got {versions()}")
        rows = read(text)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=len(names))
        for row in measure_all(names, args.jobs):
            rows[row.model_type] = row
            progress.update(task, advance=1, description=row.model_type)
            if not progress.console.is_terminal:  # a log has no bar
                print(row.model_type, row.failure or f"{row.num_fused}/{row.num_norms}", flush=True)
    DOCUMENT.write_text(render(rows.values()), encoding="utf-8")
    print(DOCUMENT.read_text(encoding="utf-8").splitlines()[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())
