"""Which form a site takes, by what was measured: a lookup in a dictionary, then a few numbers."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from normfuse.tuning.entry import Entry, Key, Measurement

# Two measurements speak for the rows between them if they are at most this factor apart, as are
# decoding with one sequence and with 16.
MAX_GAP = 16


class Rows(NamedTuple):
    """How many rows a site has: equal numbers, or the range of a symbolic one and its hint."""

    lowest: int
    typical: int
    highest: int

    @classmethod
    def exactly(cls, rows: int) -> Rows:
        return cls(rows, rows, rows)


def bucket(rows: int) -> int:
    """The power of two that rows are rounded up to: 1, 2, 4, 8, ..."""
    return 1 << max(rows - 1, 0).bit_length()


@dataclass(frozen=True)
class Verdict:
    """What the table says about a site.

    Attributes:
        wins: whether it takes the kernel.
        decisive: of the measurements that were asked, the one that is worst for the kernel.
        asked: how many they were.
    """

    wins: bool
    decisive: Measurement
    asked: int


class Table:
    """All measurements in force.

    A site is answered by the measurements of its key that had at least its neighbours: only the
    inline form gains from a neighbour, so that with fewer of them the kernel does no worse.
    """

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self._found: dict[Key, dict[tuple[int, tuple[str, ...]], Measurement]] = defaultdict(dict)
        for entry in entries:
            self.add(entry)

    def __iter__(self) -> Iterator[Entry]:
        for key, measurements in self._found.items():
            yield from (Entry(key, one) for one in measurements.values())

    def __len__(self) -> int:
        return sum(len(measurements) for measurements in self._found.values())

    def add(self, entry: Entry) -> None:
        """A measurement; it replaces one of the same key, bucket and neighbours."""
        place = (bucket(entry.measurement.rows), entry.measurement.neighbours)
        self._found[entry.key][place] = entry.measurement

    def knows(self, key: Key, rows: Rows, neighbours: tuple[str, ...]) -> bool:
        """Whether a site's own bucket was measured with its own neighbours."""
        return (bucket(rows.typical), neighbours) in self._found.get(key, {})

    def has_measured(self, key: Key, rows: Rows) -> bool:
        """Whether a site's bucket, or those around it, were measured, with whatever neighbours."""
        measured = {size: one for (size, _), one in self._found.get(key, {}).items()}
        return bool(_around(measured, bucket(rows.typical)))

    def verdict(
        self, key: Key, rows: Rows, neighbours: tuple[str, ...], margin: float, sites: int = 1
    ) -> Verdict | None:
        """Which form a site takes; None if nothing was measured that could tell.

        Rows between two measured buckets must win in both. A symbolic number of rows must win at
        its hint, and in every measured bucket of its range: one compiled graph serves all of them,
        and no guard is put on them. Of what makes the tables of a site it pays its part, if so many
        sites read them.
        """
        found = self._by_bucket(key, neighbours)
        measured = {size: one.shared_by(sites) for size, one in found.items()}
        asked = _around(measured, bucket(rows.typical))
        if not asked:
            return None
        if rows.lowest < rows.highest:
            low, high = bucket(rows.lowest), bucket(rows.highest)
            asked |= {size: one for size, one in measured.items() if low <= size <= high}
        decisive = min(asked.values(), key=lambda one: one.excess(margin))
        return Verdict(decisive.wins(margin), decisive, len(asked))

    def verdicts(self, key: Key, rows: Rows, margin: float) -> list[Verdict]:
        """What the table says of a site with any of the neighbours that were measured."""
        measured = {neighbours for _, neighbours in list(self._found.get(key, {}))}
        found = [self.verdict(key, rows, neighbours, margin) for neighbours in sorted(measured)]
        return [verdict for verdict in found if verdict is not None]

    def verdicts_of_any(self, key: Key, rows: Rows, margin: float) -> list[Verdict]:
        """The same of all keys that differ from this one in nothing but parameters."""
        return [
            verdict
            for one in list(self._found)
            if one._replace(parameters=key.parameters) == key
            for verdict in self.verdicts(one, rows, margin)
        ]

    def winners(self, device: str, torch: str, margin: float) -> list[Key]:
        """The keys of a device and a minor version of torch under which a kernel won anything."""
        return [
            key
            for key, measurements in list(self._found.items())
            if (key.device, key.torch) == (device, torch)
            and any(one.shared_by(math.inf).wins(margin) for one in list(measurements.values()))
        ]

    def _by_bucket(self, key: Key, neighbours: tuple[str, ...]) -> dict[int, Measurement]:
        """What speaks for a site; of several in one bucket, the one with the fewest neighbours."""
        found: dict[int, Measurement] = {}
        for (size, _), one in list(self._found.get(key, {}).items()):
            if _cover(one.neighbours, neighbours) and (
                size not in found or len(one.neighbours) < len(found[size].neighbours)
            ):
                found[size] = one
        return found


def _cover(measured: tuple[str, ...], needed: tuple[str, ...]) -> bool:
    return measured == needed or Counter(needed) <= Counter(measured)


def _around(measured: dict[int, Measurement], size: int) -> dict[int, Measurement]:
    """The measurement of a bucket, or those of the buckets on either side."""
    if size in measured:
        return {size: measured[size]}
    below = max((one for one in measured if one < size), default=None)
    above = min((one for one in measured if one > size), default=None)
    if below is None or above is None or above > MAX_GAP * below:
        return {}
    return {below: measured[below], above: measured[above]}
