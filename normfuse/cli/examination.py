"""What the installed torch and transformers make of each micro-block, and the recorded table.

The table is `doctor.json` beside this file: for each block, what became of its norms when it was
recorded, and with which versions. That the results are eager's, to the bit, is always expected.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from normfuse.cli.errors import UsageError
from normfuse.cli.micro_blocks import MicroBlock
from normfuse.cli.subject import Subject
from normfuse.explain import explain_with
from normfuse.testing import capture

SCHEMA = 1
TABLE = Path(__file__).with_name("doctor.json")
PACKAGES = ("torch", "transformers", "triton")


@dataclass(frozen=True)
class Table:
    """What is expected: versions of `PACKAGES`, None where one was missing, and sites by block."""

    versions: dict[str, str | None]
    blocks: dict[str, list[str]]

    @classmethod
    def load(cls) -> Table:
        document = json.loads(TABLE.read_text(encoding="utf-8"))
        assert document["schema"] == SCHEMA
        return cls(document["versions"], document["blocks"])

    def save(self) -> None:
        """Writes the table into the package.

        Raises:
            UsageError: the package cannot be written to.
        """
        rows = [f"{json.dumps(name)}: {json.dumps(sites)}" for name, sites in self.blocks.items()]
        text = (
            f'{{\n  "schema": {SCHEMA},\n  "versions": {json.dumps(self.versions)},\n'
            '  "blocks": {\n    ' + ",\n    ".join(rows) + "\n  }\n}\n"
        )
        try:
            TABLE.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"--record must be able to write {TABLE.name} into the package, got {error}: "
                "run it in a source tree"
            ) from error


@dataclass(frozen=True)
class Examination:
    """One block, compared.

    Attributes:
        name: the block's.
        expected: what became of each norm when the table was recorded: the op, or "declined: " and
            the reason. None if the table does not have the block.
        found: the same, now. None if the block did not run.
        is_exact: whether the rewritten graph gives eager's bits.
        error: why the block did not run; None if it did.
        skipped: why it was not tried; None if it was.
    """

    name: str
    expected: list[str] | None
    found: list[str] | None = None
    is_exact: bool = False
    error: str | None = None
    skipped: str | None = None

    @property
    def verdict(self) -> str:
        """One of "skipped", "failed", "inexact", "new", "changed" and "same"."""
        if self.skipped:
            return "skipped"
        if self.found is None:
            return "failed"
        if not self.is_exact:
            return "inexact"
        if self.expected is None:
            return "new"
        return "same" if self.found == self.expected else "changed"

    @property
    def is_good(self) -> bool:
        return self.verdict in ("same", "skipped")


def installed_versions() -> dict[str, str | None]:
    """Versions of `PACKAGES` without their build, such as "2.13.0" of 2.13.0+cpu."""
    return {"torch": _public(torch.__version__)} | {
        name: _installed(name) for name in PACKAGES if name != "torch"
    }


def examine(block: MicroBlock, table: Table) -> Examination:
    """Builds, captures and runs one block; what goes wrong is part of the result."""
    expected = table.blocks.get(block.name)
    if block.needs_transformers and installed_versions()["transformers"] is None:
        return Examination(block.name, expected, skipped="transformers is not installed")
    # What Dynamo remembers of the block before would make numbers of this one symbolic.
    torch._dynamo.reset()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            subject = block.build()
            found = _sites(subject)
            return Examination(block.name, expected, found, is_exact=_is_exact(subject))
    except Exception as error:  # a new version of torch or transformers can break in any way
        text = " ".join(str(error).split("\n\n")[0].split())
        return Examination(block.name, expected, error=f"{type(error).__name__}: {text}")


def _sites(subject: Subject) -> list[str]:
    options = {"normfuse.lowering": "op"}
    report = explain_with(subject.model, subject.args, subject.kwargs, options=options)
    return [site.op or f"declined: {site.reason}" for site in report.sites]


def _is_exact(subject: Subject) -> bool:
    """Whether our rewrite changes no bit.

    Inductor's own passes may change some of a whole model's; then its graph without ours decides.
    """

    def outputs(model: Any) -> list[torch.Tensor]:
        leaves = tree_leaves(model(*subject.args, **subject.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    rewritten = outputs(capture(subject.model, lowering="op"))
    if _same_bits(rewritten, outputs(subject.model)):
        return True
    return _same_bits(rewritten, outputs(capture(subject.model, rules=[])))


def _same_bits(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(torch.equal(one, other) for one, other in pairs)


def _public(full: str) -> str:
    return full.partition("+")[0]


def _installed(name: str) -> str | None:
    try:
        return _public(version(name))
    except PackageNotFoundError:
        return None
