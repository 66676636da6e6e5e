"""Choice by measurement: tables of what was measured, and what they say about a site.

A process reads the tables once: those shipped with the package, then the user's, whose measurements
come from this very machine and replace shipped ones of the same site. A shipped measurement of a
kernel that has changed since is stale: it decides nothing, for what was faster may now be slower.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from normfuse.tuning import store
from normfuse.tuning.digest import kernel_digest
from normfuse.tuning.entry import Document, Entry, Key, Measurement, merged, minor
from normfuse.tuning.table import Rows, Table, Verdict, bucket

__all__ = [
    "MARGIN",
    "Document",
    "Entry",
    "Key",
    "Measurement",
    "Rows",
    "Table",
    "Tables",
    "Verdict",
    "bucket",
    "kernel_digest",
    "merged",
    "minor",
    "tables",
]

MARGIN = 0.03  # beyond what two runs of one kernel differ by


class Tables:
    """The shipped tables and one user's, as this process knows them.

    Attributes:
        table: all measurements of both that hold.
        stale: the shipped ones that do not hold any more.
        directory: where the user's are; it belongs to the kernels of now.
    """

    def __init__(self, directory: Path, shipped: Path = store.SHIPPED) -> None:
        self.directory = directory
        self._users = Table(merged(store.read(directory)))
        found = [
            (entry, one.is_stale(entry)) for one in store.read(shipped) for entry in one.entries
        ]
        self.table = Table([*(entry for entry, is_stale in found if not is_stale), *self._users])
        self.stale = Table(entry for entry, is_stale in found if is_stale)
        self._lock = threading.Lock()

    def add(self, document: Document) -> None:
        """A measurement, from now on in force here, and kept for other processes."""
        with self._lock:
            for entry in document.entries:
                self.table.add(entry)
                self._users.add(entry)
        store.write(document, self.directory)

    def digest(self) -> str:
        """What a compiled graph's key needs of the user's table; the shipped ones are sources."""
        with self._lock:
            entries = sorted(map(repr, self._users))
        return hashlib.sha256("\n".join(entries).encode()).hexdigest()


_tables: dict[tuple[str | None, ...], Tables] = {}


def tables() -> Tables:
    """The tables of this process, read when they are first asked for."""
    place = store.variables()
    if place not in _tables:
        _tables[place] = Tables(store.user_directory())
    return _tables[place]
