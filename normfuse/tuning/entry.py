"""What was measured, for which site, and how it is written down."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from normfuse.tuning.digest import kernel_digest

SCHEMA = 1  # of the JSON documents; goes up when a field changes its meaning or goes away
_NOT_WORDS = ("entries", "kernels")


class Key(NamedTuple):
    """What a measurement holds for, rows and neighbours aside.

    Attributes:
        device: name of the GPU, such as "NVIDIA H200".
        torch: its minor version, such as "2.11": another one generates other code.
        op: name of the normfuse op, without the namespace.
        parameters: the op's words and whole numbers in schema order: rounding plans, rotations, ...
        widths: of the normalised axis, one for each activation.
        dtype: of the first activation, such as "bf16".
    """

    device: str
    torch: str
    op: str
    parameters: tuple[str, ...]
    widths: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """The times of one site's two forms, its pointwise neighbours included.

    Attributes:
        rows: of all activations together.
        neighbours: what was compiled with the site: "before mul", "after add", ..., sorted.
        inline_us: GPU time of the inline form and its neighbours, microseconds.
        triton_us: the same of the Triton form.
        share: how much of `inline_us` is the site, at most; less than 1 where a whole model was
            timed.
        timed: what was timed, if not the site alone.
        tables_us: how much of `triton_us` makes tables, for which all sites pay together that read
            them.
    """

    rows: int
    neighbours: tuple[str, ...]
    inline_us: float
    triton_us: float
    share: float = 1.0
    timed: str = ""
    tables_us: float = 0.0

    def shared_by(self, sites: float) -> Measurement:
        """The times of one of so many sites that read the same tables."""
        if not self.tables_us:
            return self
        others = self.tables_us * (1 - 1 / sites)
        return replace(self, triton_us=self.triton_us - others, tables_us=self.tables_us - others)

    @property
    def speedup(self) -> float:
        return self.inline_us / self.triton_us

    def wins(self, margin: float) -> bool:
        """Whether the kernel makes the site faster by more than a margin, such as 0.03.

        Where the site is a third of what was timed, a gain of 1 % there is one of 3 % here.
        """
        return self.speedup > 1 + margin * self.share

    def excess(self, margin: float) -> float:
        """By how much it is beyond the margin; negative where it stays below."""
        return (self.speedup - 1) / self.share - margin


@dataclass(frozen=True)
class Entry:
    """One measurement and what it holds for."""

    key: Key
    measurement: Measurement


@dataclass(frozen=True)
class Document:
    """Measurements of one run: the text of a shipped table, and of each file of the user's.

    Attributes:
        device: name of the GPU.
        torch: its full version.
        triton: its version.
        normfuse: its version.
        date: of the run, as 2026-01-31.
        command: what repeats it.
        entries: all of this device and the minor version of this torch.
        kernels: for each op, the digest of the kernel that was measured (`kernel_digest`).
    """

    device: str
    torch: str
    triton: str
    normfuse: str
    date: str
    command: str
    entries: tuple[Entry, ...]
    kernels: dict[str, str] = field(default_factory=dict)

    def is_stale(self, entry: Entry) -> bool:
        """Whether an entry was measured with another kernel than the one that would run now."""
        op = entry.key.op
        return self.kernels.get(op) != kernel_digest(op)

    def text(self) -> str:
        """JSON, one line for each entry, so that a diff shows what was measured anew."""
        head = {
            "schema": SCHEMA,
            **{k: v for k, v in self.__dict__.items() if k != "entries"},
        }
        lines = ",\n".join("    " + json.dumps(_plain(entry)) for entry in self.entries)
        return json.dumps(head, indent=2)[:-2] + f',\n  "entries": [\n{lines}\n  ]\n}}\n'

    @classmethod
    def parse(cls, text: str) -> Document:
        """The document that `text()` wrote.

        Raises:
            ValueError: it is none, or one of another schema.
        """
        found = json.loads(text)
        schema = found.get("schema") if isinstance(found, dict) else None
        if schema != SCHEMA:
            raise ValueError(
                f"a table must be a JSON object with schema {SCHEMA}, got schema {schema}: "
                "measure it again with `python -m normfuse tune`"
            )
        try:
            words = [name for name in cls.__dataclass_fields__ if name not in _NOT_WORDS]
            head = {name: str(found[name]) for name in words}
            keyed = head["device"], minor(head["torch"])
            entries = tuple(_entry(*keyed, one) for one in found["entries"])
            return cls(**head, entries=entries, kernels=dict(found.get("kernels", {})))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"a table must have every field of its schema, got {type(error).__name__} {error}: "
                "measure it again with `python -m normfuse tune`"
            ) from error


def minor(version: str) -> str:
    """The minor version: 2.11.0+cu130 -> 2.11"""
    return ".".join(version.split("+")[0].split(".")[:2])


def _plain(entry: Entry) -> dict[str, Any]:
    """An entry as JSON, without what its document says for all, and without defaults."""
    key = {k: v for k, v in entry.key._asdict().items() if k not in ("device", "torch")}
    measured = asdict(entry.measurement)
    default = Measurement.__dataclass_fields__
    kept = {k: v for k, v in measured.items() if v != default[k].default}
    return {**key, **kept}


def _entry(device: str, torch: str, found: dict[str, Any]) -> Entry:
    values = {name: _tuples(value) for name, value in found.items()}
    key = Key(device, torch, **{name: values.pop(name) for name in Key._fields[2:]})
    measurement = Measurement(**values)
    if not (measurement.inline_us > 0 and measurement.triton_us > 0 and measurement.rows > 0):
        raise ValueError(
            f"a measurement must have times and rows above 0, got {measurement}: measure it again"
        )
    if not 0 <= measurement.tables_us < measurement.triton_us:
        raise ValueError(
            f"tables must take less than the kernel that reads them, got {measurement}: "
            "measure it again"
        )
    if not 0 < measurement.share <= 1:
        raise ValueError(
            f"a share must be above 0 and at most 1, got {measurement.share}: correct the table"
        )
    return Entry(key, measurement)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def merged(documents: Iterable[Document]) -> list[Entry]:
    """The entries of several documents, in order."""
    return [entry for document in documents for entry in document.entries]
