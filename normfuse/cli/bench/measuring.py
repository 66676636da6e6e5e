"""One cell: prepare every contender, record it, check what it recorded, and time them by turns."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch

from normfuse.cli.bench.accuracy import Accuracy, accuracy, poison
from normfuse.cli.bench.cells import Cell
from normfuse.cli.bench.contenders import COPY, Contender, contenders
from normfuse.cli.bench.peers import Peer, one_line
from normfuse.cli.bench.spellings import Tensor
from normfuse.cli.bench.subjects import Subject, subject
from normfuse.cli.bench.timing import (
    Clock,
    Recording,
    Rotation,
    Sets,
    Timing,
    TimingError,
    measure,
)

Record = dict[str, Any]
LEFT_OUT = "left out: it has broken the CUDA context of a process before"


class ContextLost(Exception):
    """The device answers nothing any more; what is measured so far is all there is.

    `args` are the record of the cell and the name of the contender.
    """


def measure_cell(
    cell: Cell, peers: Sequence[Peer], clock: Clock, left_out: Collection[str] = ()
) -> Record:
    """The record of one cell; a contender that fails is recorded with its exception.

    Args:
        cell: what is measured.
        peers: that take part.
        clock: of the device.
        left_out: names of contenders that do not.

    Raises:
        ContextLost: a contender has broken the CUDA context of this process.
    """
    torch.compiler.reset()
    what = subject(cell)
    rotation, hot = clock.rotations(what.num_bytes)
    record = _begun(cell, what, rotation)
    sets = [what.operands(clock.device) for _ in range(rotation.num_sets)]
    entries = record["contenders"]
    try:
        with clock.session(), torch.no_grad():
            stage = _Stage(what, sets, rotation, hot, clock, entries)
            for contender in contenders(what, peers, on_gpu=clock.device.type == "cuda"):
                if contender.name in left_out:
                    entries[contender.name] = {"failure": LEFT_OUT}
                    continue
                stage.enter(contender)
                _check_context(clock, contender.name, record)
            if COPY in left_out:
                entries[COPY] = {"failure": LEFT_OUT}
            else:
                stage.enter_copy()
                _check_context(clock, COPY, record)
            stage.run()
    except ContextLost:
        raise
    except TimingError as error:
        _check_context(clock, error.name, record)
        raise
    except Exception:
        _check_context(clock, next(reversed(entries), COPY), record)
        raise
    return record


def _begun(cell: Cell, what: Subject, rotation: Rotation) -> Record:
    """What a cell's record says before anything is measured."""
    return {
        **cell.to_json(),
        "bytes": what.num_bytes,
        "streams": list(what.streams),
        "sets": rotation.num_sets,
        "flushes": rotation.flushes,
        "contenders": {},
    }


def _check_context(clock: Clock, name: str, record: Record) -> None:
    try:
        clock.synchronize()
    except Exception as error:
        record["contenders"].setdefault(name, {})["failure"] = one_line(error)
        raise ContextLost(record, name) from error


class _Stage:
    """The contenders of one cell, as recordings that wait to be timed."""

    def __init__(
        self,
        what: Subject,
        sets: Sets,
        rotation: Rotation,
        hot: Rotation | None,
        clock: Clock,
        entries: dict[str, Record],
    ) -> None:
        self._what, self._sets, self._clock, self._entries = what, sets, clock, entries
        self._rotation, self._hot = rotation, hot
        self._cold_recordings: dict[str, Recording] = {}
        self._hot_recordings: dict[str, Recording] = {}

    def enter(self, contender: Contender) -> None:
        """Records a contender and checks it; one that fails or is wrong is not timed."""
        entry: Record = {"failure": None}
        self._entries[contender.name] = entry
        try:
            call = contender.prepare()
            sets = [contender.adapt(operands) for operands in self._sets]
            # The first call compiles, on operands of its own.
            results = call(*contender.adapt(self._sets[0]))
            self._clock.synchronize()
            found = accuracy(self._what, self._sets[0], results) if contender.overwrites else None
            del results
            found = self._record(contender.name, call, sets, found)
        except Exception as error:
            entry["failure"] = one_line(error)
            self._withdraw(contender.name)
            self._clock.forget_error()
            return
        entry |= {"error": _number(found.error), "eager_error": found.eager_error}
        entry["failure"] = _verdict(contender, found)
        if entry["failure"]:
            self._withdraw(contender.name)

    def enter_copy(self) -> None:
        """Records the copy of the same bytes with every tile, and keeps the fastest."""
        entry: Record = {"failure": None}
        self._entries[COPY] = entry
        try:
            sets = self._copy_sets()
            trials: dict[str, Recording] = {}
            calls = copies(self._what.streams[1], self._clock.device)
            for tile, call in calls.items():
                call(*sets[0])
                trials[tile] = self._recorded(call, sets)
            times = {
                tile: min(self._clock.samples(trial, self._rotation, 3))
                for tile, trial in trials.items()
            }
            best = min(times, key=times.__getitem__)
            entry["tile"] = best
            self._cold_recordings[COPY] = trials[best]
            if self._hot is not None:
                self._hot_recordings[COPY] = self._recorded_hot(calls[best], sets[0])
        except Exception as error:
            entry["failure"] = one_line(error)
            self._withdraw(COPY)

    def run(self) -> None:
        """Times all recordings by turns, and enters the times."""
        cold = measure(self._clock, self._cold_recordings, self._rotation)
        hot: dict[str, Timing] = {}
        if self._hot is not None:
            hot = measure(self._clock, self._hot_recordings, self._hot)
        for name, entry in self._entries.items():
            for kind, timings in (("cold", cold), ("hot", hot)):
                timing = timings.get(name)
                entry[f"{kind}_us"] = None if timing is None else timing.us
                entry[f"{kind}_spread"] = None if timing is None else timing.spread

    def _record(self, name: str, call: Any, sets: Sets, found: Accuracy | None) -> Accuracy:
        """Records cold and hot, and checks the cold results of the first and the last set.

        What is checked is the recording itself: its results are filled with NaN, then it is
        replayed. One that writes over its operands can only be checked before, as `found`.
        """
        results: list[Sequence[Tensor] | None] = [None] * len(sets)
        recording = self._recorded(call, sets, results)
        self._cold_recordings[name] = recording
        if found is None:
            for kept in results:
                poison(kept or ())
            recording.replay()
            self._clock.synchronize()
            checked = {0, len(sets) - 1}
            reports = [accuracy(self._what, self._sets[i], results[i] or ()) for i in checked]
            found = max(reports, key=lambda report: (math.isnan(report.excess), report.excess))
        results[:] = [None] * len(sets)  # the next recording takes their memory
        if self._hot is not None:
            self._hot_recordings[name] = self._recorded_hot(call, sets[0])
        return found

    def _recorded(
        self, call: Any, sets: Sets, results: list[Sequence[Tensor] | None] | None = None
    ) -> Recording:
        if results is None:
            results = [None] * len(sets)
        return self._clock.record(call, sets, self._rotation.cycles, results)

    def _recorded_hot(self, call: Any, operands: tuple[Tensor, ...]) -> Recording:
        assert self._hot is not None
        return self._clock.record(call, [operands], self._hot.cycles, None)

    def _copy_sets(self) -> Sets:
        """As many sets as the subject has, with its bytes shared out evenly between all streams."""
        num_read, num_written = self._what.streams
        element = torch.empty((), dtype=self._what.dtype).element_size()
        length = self._what.num_bytes // (element * (num_read + num_written))
        make = partial(torch.ones, length, dtype=self._what.dtype, device=self._clock.device)
        return [tuple(make() for _ in range(num_read)) for _ in self._sets]

    def _withdraw(self, name: str) -> None:
        self._cold_recordings.pop(name, None)
        self._hot_recordings.pop(name, None)


def copies(num_results: int, device: torch.device) -> dict[str, Any]:
    """The copies to choose from, by the name of their tile."""
    if device.type != "cuda":
        return {"dry": lambda *xs: tuple(xs[0].clone() for _ in range(num_results))}
    from normfuse.ops.kernels import copy

    def call(tile: copy.CopyTile) -> Any:
        return lambda *xs: copy.launch(xs, num_results, tile=tile)

    return {f"{tile.block} x {tile.num_warps}": call(tile) for tile in copy.TILES}


def _number(value: float) -> float | None:
    """A value that JSON has; None for a NaN."""
    return value if math.isfinite(value) else None


def _verdict(contender: Contender, found: Accuracy) -> str | None:
    """Why a contender is wrong; None if it is right."""
    if not found.is_the_same_function:
        return f"wrong: its error is {found.error:.3g}, and eager's {found.eager_error:.3g}"
    if contender.is_exact and not found.is_as_close_as_eager:
        return (
            f"wrong: its error must be at most twice eager's {found.eager_error:.3g} plus one "
            f"rounding, got {found.error:.3g}"
        )
    return None
