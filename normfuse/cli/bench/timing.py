"""How long a call takes: CUDA graphs of many calls, replayed between events.

Cold: a graph calls over K sets of operands, each call with results of its own, so that no call
finds its data in the L2 cache. Sets that are large enough span more than three times the cache,
and a replay finds only what the end of the last one left. Sets that are too small for that are
read for the first time since the cache was emptied: before each replay, outside the events, the GPU
reads `FLUSH_BYTES` of other data. It reads and does not write, so that no line is left to be
written back in the measured time. Spreading small sets over a large range of addresses would not
do: their few lines would stay in the cache all the same.

Hot: one set, over and over; what decode sees where the last op has just written the operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Protocol

import torch

Tensor = torch.Tensor
Call = Callable[..., Sequence[Tensor]]
Sets = Sequence[tuple[Tensor, ...]]

MB = 10**6
L2_BYTES = 60 * MB  # H200: 50 MiB, rounded up
SPAN_BYTES = 200 * MB  # what all sets of a rotation span: more than 3 * L2_BYTES
HUGE_BYTES = 600 * MB  # a set that empties the cache ten times over by itself
GRAPH_BYTES = 400 * MB  # what one graph moves at least, so that its launch counts for little
SAMPLE_BYTES = 1200 * MB  # what one sample moves: about 0.3 ms
FLUSH_BYTES = 256 * MB
MAX_SETS = 256
HOT_CALLS = 50
ROUNDS = 3
SAMPLES = 7  # a round


@dataclass(frozen=True)
class Rotation:
    """How often a graph calls over how many sets.

    Attributes:
        num_sets: distinct sets of operands.
        cycles: how often the graph goes through them.
        replays: of the graph in one sample.
        flushes: whether the cache is emptied before each sample, because the sets would fit it.
    """

    num_sets: int
    cycles: int
    replays: int
    flushes: bool

    @classmethod
    def cold(cls, set_bytes: int) -> Rotation:
        """The rotation for sets of so many bytes, results included."""
        wanted = math.ceil(SPAN_BYTES / set_bytes)
        if wanted > MAX_SETS:
            return cls(MAX_SETS, 1, 1, True)
        num_sets = 1 if set_bytes >= HUGE_BYTES else max(3, wanted)
        cycles = max(1, math.ceil(GRAPH_BYTES / (num_sets * set_bytes)))
        replays = max(1, math.ceil(SAMPLE_BYTES / (cycles * num_sets * set_bytes)))
        return cls(num_sets, cycles, replays, False)

    @classmethod
    def hot(cls, set_bytes: int) -> Rotation | None:
        """One set over and over; None if the cache does not hold it."""
        return None if set_bytes > L2_BYTES else cls(1, HOT_CALLS, 4, False)

    @property
    def num_calls(self) -> int:
        """Of the op, in one sample."""
        return self.num_sets * self.cycles * self.replays


@dataclass(frozen=True)
class Timing:
    """A median over all samples, and how far the medians of the rounds lie apart.

    Attributes:
        us: microseconds a call.
        spread: largest minus smallest median of a round, as a share of `us`.
        fastest_us: the fastest sample.
    """

    us: float
    spread: float
    fastest_us: float

    @classmethod
    def of(cls, rounds: Sequence[Sequence[float]]) -> Timing:
        """Of the samples of each round, in microseconds a call."""
        samples = [sample for samples in rounds for sample in samples]
        medians = [median(samples) for samples in rounds]
        us = median(samples)
        return cls(us, (max(medians) - min(medians)) / us, min(samples))


class TimingError(RuntimeError):
    """The recording of the contender `name` cannot be replayed; the cause is chained."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} cannot be replayed")
        self.name = name


class Recording(Protocol):
    """Calls that were recorded and can be replayed."""

    def replay(self) -> None: ...


class Clock(Protocol):
    """A device on which calls are recorded and timed."""

    device: torch.device

    def rotations(self, set_bytes: int) -> tuple[Rotation, Rotation | None]:
        """How to time sets of so many bytes cold, and hot if that is another thing."""

    def session(self) -> Any:
        """A context; what is recorded in it shares one region of memory."""

    def record(
        self, call: Call, sets: Sets, cycles: int, results: list[Sequence[Tensor] | None] | None
    ) -> Recording:
        """Records the calls; the last results of each set are left in `results`, if given."""

    def samples(self, recording: Recording, rotation: Rotation, count: int) -> list[float]:
        """Microseconds a call, `count` times."""

    def synchronize(self) -> None:
        """Waits for the device, and raises what went wrong there."""

    def forget_error(self) -> None:
        """Forgets a launch that was refused: the next launch would report it as its own."""


class CudaClock:
    """The GPU."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self._unrelated = torch.zeros(FLUSH_BYTES // 4, device=self.device)
        self._sum = torch.zeros((), device=self.device)
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def rotations(self, set_bytes: int) -> tuple[Rotation, Rotation | None]:
        return Rotation.cold(set_bytes), Rotation.hot(set_bytes)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Recordings made in it share one pool of memory.

        The results of one recording are dropped before the next is made, which then has the same
        addresses; so any number of contenders fits the memory, and none has better addresses.
        """
        torch.cuda.empty_cache()  # what the last session left
        self._pool = torch.cuda.graph_pool_handle()
        # A pool whose last graph is dropped is lost, so one is kept as long as the session.
        keeper = self._captured(self._sum.zero_)
        try:
            yield
        finally:
            del keeper
            self._pool = None

    def record(
        self, call: Call, sets: Sets, cycles: int, results: list[Sequence[Tensor] | None] | None
    ) -> Recording:
        """A CUDA graph of the calls."""
        graph = self._captured(partial(rotate, call, sets, cycles, results))
        return _CudaRecording(graph, call, sets)

    def _captured(self, body: Callable[[], object]) -> Recording:
        """A CUDA graph, without the garbage collection of `torch.cuda.graph`."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                body()
            except BaseException:
                with suppress(Exception):  # it complains of the same
                    graph.capture_end()
                raise
            graph.capture_end()
        torch.cuda.synchronize()
        return graph

    def samples(self, recording: Recording, rotation: Rotation, count: int) -> list[float]:
        """All are enqueued before the first is waited for: the host must not be what is timed."""
        events = [(_event(), _event()) for _ in range(count + 1)]
        for start, end in events:
            if rotation.flushes:
                torch.sum(self._unrelated, dim=0, out=self._sum)
            else:
                recording.replay()
            start.record()
            for _ in range(rotation.replays):
                recording.replay()
            end.record()
        torch.cuda.synchronize()
        # The first one waited for the host.
        return [start.elapsed_time(end) * 1000 / rotation.num_calls for start, end in events[1:]]

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def forget_error(self) -> None:
        with suppress(Exception):  # torch asks for the last error, raises it, and CUDA forgets it
            self._sum.zero_()

    def copy_gb_s(self, num_bytes: int = 2**30) -> float:
        """GB/s, read and written, of the fastest copy of so many bytes: the ceiling of everything.

        A kernel copies: in a CUDA graph, `dst.copy_(src)` is left to the copy engine, and slower.
        """
        from normfuse.ops.kernels import copy

        source = torch.ones(num_bytes // 2, dtype=torch.bfloat16, device=self.device)
        times = []
        for tile in copy.TILES:
            call = partial(_copied, tile=tile)
            call(source)  # compiles
            with self.session():
                recording = self.record(call, [(source,)], 1, None)
                times.append(median(self.samples(recording, Rotation(1, 1, 1, False), 10)))
        return 2 * num_bytes / min(times) / 1000


def _copied(source: Tensor, tile: Any) -> Sequence[Tensor]:
    from normfuse.ops.kernels import copy

    results: Sequence[Tensor] = copy.launch((source,), 1, tile=tile)
    return results


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _CudaRecording:
    """A CUDA graph, with what it needs as long as it is replayed.

    The graph knows addresses only: the kernels are unloaded with the function that launches them,
    and what the operands leave belongs to the next tensor that is made.
    """

    graph: Recording
    call: Call
    sets: Sets

    def replay(self) -> None:
        self.graph.replay()


class DryClock:
    """No GPU: what a replay does, it does on the CPU, and the times are made up."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def rotations(self, set_bytes: int) -> tuple[Rotation, Rotation | None]:
        return Rotation(3, 2, 1, False), Rotation(1, 2, 1, False)

    @contextmanager
    def session(self) -> Iterator[None]:
        yield

    def record(
        self, call: Call, sets: Sets, cycles: int, results: list[Sequence[Tensor] | None] | None
    ) -> Recording:
        rotate(call, sets, cycles, results)
        return _DryRecording(call, sets, results)

    def samples(self, recording: Recording, rotation: Rotation, count: int) -> list[float]:
        recording.replay()
        return [1.0 + index / 100 for index in range(count)]

    def synchronize(self) -> None:
        pass

    def forget_error(self) -> None:
        pass

    def copy_gb_s(self) -> float:
        return 1000.0


@dataclass(frozen=True)
class _DryRecording:
    call: Call
    sets: Sets
    results: list[Sequence[Tensor] | None] | None

    def replay(self) -> None:
        for index, operands in enumerate(self.sets):
            kept = None if self.results is None else self.results[index]
            values = self.call(*operands)
            if kept is not None:
                for old, new in zip(kept, values, strict=True):
                    old.copy_(new)


def rotate(
    call: Call, sets: Sets, cycles: int, results: list[Sequence[Tensor] | None] | None
) -> None:
    """The calls of one graph. With `results`, every set keeps results of its own."""
    for _ in range(cycles):
        for index, operands in enumerate(sets):
            if results is None:
                call(*operands)
            else:
                results[index] = None  # its memory is free for the same set's next results
                results[index] = call(*operands)


def measure(
    clock: Clock, recordings: dict[str, Recording], rotation: Rotation
) -> dict[str, Timing]:
    """Times recordings by turns, in rounds of alternating order.

    Raises:
        TimingError: a recording cannot be replayed.
    """
    rounds: dict[str, list[list[float]]] = {name: [] for name in recordings}
    for number in range(ROUNDS):
        names = list(recordings) if number % 2 == 0 else list(reversed(recordings))
        for name in names:
            try:
                rounds[name].append(clock.samples(recordings[name], rotation, SAMPLES))
            except Exception as error:
                raise TimingError(name) from error
    return {name: Timing.of(samples) for name, samples in rounds.items()}
