"""The record of a run: one JSON file that says what was measured, on what, and by which command."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import normfuse

Record = dict[str, Any]
SOURCES = Path(normfuse.__file__).parent
_PATH = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)*([\w.+-]+)")  # not in addresses, nor where relative


def environment(command: str) -> Record:
    """Versions, device, command, and which sources were measured."""
    is_cuda = torch.cuda.is_available()
    return {
        "command": without_directories(command),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name() if is_cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "normfuse": normfuse.__version__,
        "git": _git_describe(),
        "sources": _digest(),
    }


def command_of(script: str, argv: Sequence[str] | None) -> str:
    """What repeats a run of a script; None are the arguments of this process."""
    return " ".join(["python", script, *(sys.argv[1:] if argv is None else argv)])


def without_directories(text: str) -> str:
    """A command or a message with the names of absolute paths: where a file lay says nothing."""
    return _PATH.sub(r"\1", text)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_describe() -> str | None:
    command = ["git", "-C", str(SOURCES), "describe", "--always", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None


def _digest() -> str:
    """Of the ops and kernels: equal digests, equal kernels."""
    digest = hashlib.sha256()
    for path in sorted((SOURCES / "ops").rglob("*.py")):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# What two runs must have in common for their cells to stand in one record.
SAME = ("gpu", "cuda", "torch", "triton", "sources")


def differences(old: Record, new: Record) -> list[str]:
    """What two records may not differ in but do, as sentences."""
    pairs = [
        *((name, old["environment"].get(name), new["environment"].get(name)) for name in SAME),
        ("dry_run", old["dry_run"], new["dry_run"]),
    ]
    before, now = old["peers"]["versions"], new["peers"]["versions"]
    pairs += [(name, before.get(name), now.get(name)) for name in {**before, **now}]
    return [f"{name} was {one}, is {other}" for name, one, other in pairs if one != other]


def joined(first: Record, second: Record) -> Record:
    """The cells of two records between which there are no `differences`; those of `first` stay.

    Shares are of the ceiling of `first`. The summary is left to the caller.
    """
    known = {cell["name"] for cell in first["cells"]}
    start = len(first["runs"])
    new = [cell for cell in second["cells"] if cell["name"] not in known]
    cells = [*first["cells"], *({**cell, "run": start + cell["run"]} for cell in new)]
    measured = {cell["name"] for cell in cells}
    lacking = dict.fromkeys([*first["not_reached"], *second["not_reached"]])
    not_reached = [name for name in lacking if name not in measured]
    broken = {**first["broken"], **second["broken"]}
    return {
        **first,
        "runs": [*first["runs"], *second["runs"]],
        "cells": cells,
        "not_reached": not_reached,
        "broken": broken,
        "is_complete": not not_reached and not broken,
    }


def write(record: Record, path: Path) -> None:
    """Writes a record so that `read` gives it back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Record:
    """The record that `write` wrote."""
    record: Record = json.loads(path.read_text())
    return record
