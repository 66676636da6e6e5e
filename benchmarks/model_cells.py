"""Measures one model at one shape: plain `torch.compile` and normfuse, in turn."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from model_floor import without_norms
from model_zoo import Rewind, decode, prefill
from same_launches import counts
from torch._inductor.utils import fresh_cache

from normfuse.backend import patches
from normfuse.capturing import fresh
from normfuse.cli.bench.peers import one_line
from normfuse.passes import accesses, inductor

CELLS = {
    "prefill512": lambda model: prefill(model, 512),
    "prefill4096": lambda model: prefill(model, 4096),
    "decode1": lambda model: decode(model, 1),
    "decode64": lambda model: decode(model, 64),
}
TINY_CELLS = {
    "prefill512": lambda model: prefill(model, 16),
    "prefill4096": lambda model: prefill(model, 32),
    "decode1": lambda model: decode(model, 1, filled=5, cache_size=8),
    "decode64": lambda model: decode(model, 4, filled=5, cache_size=8),
}
MODE = "reduce-overhead"
WITHOUT = "without"  # norms and rotary embeddings, plainly compiled
PROFILED = 3  # replays

# The words of a kernel's name that make it one of norms and rotary embeddings.
WORDS = frozenset({"rsqrt", "rms", "norm", "mean", "pow", "cos", "sin", "cat", "neg"})
# Sleeps before each timed replay last this many times as long as the CPU needs for a call.
AHEAD = 3
CLOCK = 2_000_000_000  # cycles a second; no GPU is much faster


@dataclass
class Contender:
    """A model compiled in one way; the backend tells apart what compiles and what runs."""

    name: str
    model: Any
    turn: AbstractContextManager[Any]
    options: dict[str, Any]
    running: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        is_plain = self.name in ("plain", WITHOUT)
        ours = {} if is_plain else {"normfuse.lowering": self.name}
        self._patches = (
            patches(MODE, {**self.options, **ours})
            if ours
            else {**inductor.mode_options(MODE), **self.options}
        )
        # A function of its own: contenders that shared one would share compiled code.
        self.forward = torch.compile(fresh(self.model), backend=self._backend, dynamic=False)

    def _backend(self, graph: Any, examples: Any) -> Callable[..., Any]:
        code = inductor.compile_graph(graph, examples, self._patches)

        def run(*arguments: Any) -> Any:
            start = time.perf_counter()
            with self.turn:
                result = code(*arguments)
            self.running += time.perf_counter() - start
            return result

        return run

    def __call__(self, inputs: dict[str, Any]) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.forward(**inputs).logits


@dataclass(frozen=True)
class Plan:
    """How a cell is measured.

    Attributes:
        contenders: "plain" first, then lowerings of normfuse and `WITHOUT`.
        rounds: in which each contender is timed once.
        options: of Inductor, for all.
        turn: held while the GPU runs; for several processes that share one.
    """

    contenders: tuple[str, ...]
    rounds: int
    options: dict[str, Any]
    turn: AbstractContextManager[Any]


def measure(
    model: Any, make_inputs: Callable[[Any], Any], plan: Plan, *, cold: bool, reverse: bool
) -> dict[str, Any]:
    """What a cell's row says of its contenders.

    Args:
        model: in eval mode.
        make_inputs: makes its keyword arguments.
        plan: how to measure.
        cold: compile each twice without any cache, and keep the seconds.
        reverse: compile the last contender first.
    """
    with torch.no_grad():
        with plan.turn:
            inputs = make_inputs(model)
            rewind = Rewind(inputs)
            eager = model(**inputs).logits.float()
            rewind()
        subjects = {
            name: without_norms(model) if name == WITHOUT else model
            for name in list(plan.contenders)[:: -1 if reverse else 1]
        }
        first = _first_seconds(subjects, inputs, rewind, plan) if cold else {}
        runs, found = {}, {}
        for name, subject in subjects.items():
            runs[name] = Contender(name, subject, plan.turn, plan.options)
            found[name] = _compiled(runs[name], inputs, rewind, first.get(name))
        with plan.turn:
            _check(found, eager)
            good = {name: run for name, run in runs.items() if "failed" not in found[name]}
            for name, times in _times(good, inputs, rewind, plan.rounds).items():
                found[name] |= times
            for name, run in good.items():
                found[name] |= _profile(run, inputs, rewind)
            note_costs(found)
    return {name: found[name] for name in plan.contenders}


def forget() -> None:
    """Lets go of compiled code, recorded graphs and their memory."""
    torch._dynamo.reset()
    inductor.reset()
    accesses._known.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _first_seconds(
    subjects: dict[str, Any], inputs: Any, rewind: Rewind, plan: Plan
) -> dict[str, float]:
    """Seconds that each contender compiles, the last one first; nothing of it stays."""
    found = {}
    for name, subject in reversed(subjects.items()):
        if name != WITHOUT:
            run = Contender(name, subject, plan.turn, plan.options)
            found[name] = _compile_seconds(run, inputs)
            rewind()
            forget()
    return found


def _compile_seconds(run: Contender, inputs: Any) -> float:
    """How long the first call of a contender compiles, without any cache."""
    with fresh_cache(), torch._inductor.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        run(inputs)
        return time.perf_counter() - start - run.running


def _compiled(run: Contender, inputs: Any, rewind: Rewind, seconds: float | None) -> dict[str, Any]:
    """Compiles, records and replays a contender; its result stays under "logits".

    `seconds` it took to compile before, in another order; None where nobody asks how long it takes.
    """
    skips, launches = _cudagraph_skips(), counts.copy()
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    found: dict[str, Any] = {}
    try:
        if seconds is None:
            run(inputs)  # compiles, while others run
        else:
            found["compile_s"] = (seconds + _compile_seconds(run, inputs)) / 2
        with run.turn:
            for _ in range(2):  # records, replays
                rewind()
                logits = run(inputs)
            logits = logits.float().clone()  # the next replay writes there
            rewind()
    except Exception as error:  # whatever a compiler raises must not end the other cells
        return {"failed": one_line(error)}
    found |= {"logits": logits, "cudagraph_skips": _cudagraph_skips() - skips}
    found["launches"] = {name: counts[name] - launches[name] for name in ("timed", "known")}
    if is_cuda:
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return found


def _cudagraph_skips() -> int:
    return int(torch._dynamo.utils.counters["inductor"]["cudagraph_skips"])


def _check(found: dict[str, dict[str, Any]], eager: torch.Tensor) -> None:
    """Replaces logits by errors; a contender that is further from eager than plain fails.

    It may be twice as far, and one rounding of bfloat16 more: root mean squares of all logits.
    """

    def size(value: torch.Tensor) -> float:
        return value.square().mean().sqrt().item()

    for one in found.values():
        if "logits" in one:
            one["error"] = size(one.pop("logits") - eager) / size(eager)
    allowed = 2 * found["plain"].get("error", 0) + torch.finfo(torch.bfloat16).eps
    for name, one in found.items():
        if name != WITHOUT and "failed" not in one and not one["error"] <= allowed:
            one["failed"] = f"differs from eager by {one['error']:.2e}, allowed is {allowed:.2e}"


def _times(
    runs: dict[str, Contender], inputs: Any, rewind: Rewind, rounds: int
) -> dict[str, dict[str, float]]:
    """Medians of GPU and wall time, milliseconds; rounds alternate in their order."""
    gpu: dict[str, list[float]] = {name: [] for name in runs}
    wall: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs.items())
    for index in range(rounds):
        for name, run in order[:: 1 if index % 2 else -1]:
            sent_ms, wall_ms = _wall_ms(run, inputs, rewind)
            wall[name].append(wall_ms)
            gpu[name].append(_gpu_ms(run, inputs, rewind, sent_ms * AHEAD))
    return {
        name: {"gpu_ms": median(gpu[name]), "wall_ms": median(wall[name])}
        for name in (runs if rounds else ())
    }


def _wall_ms(run: Contender, inputs: Any, rewind: Rewind) -> tuple[float, float]:
    """Until the CPU has sent everything, and until the GPU has done it."""
    rewind()
    _synchronize()
    start = time.perf_counter()
    run(inputs)
    sent = time.perf_counter()
    _synchronize()
    return (sent - start) * 1e3, (time.perf_counter() - start) * 1e3


def _gpu_ms(run: Contender, inputs: Any, rewind: Rewind, ahead_ms: float) -> float:
    """From the first to the last kernel: the GPU sleeps until the CPU has sent all of them."""
    if not torch.cuda.is_available():
        return _wall_ms(run, inputs, rewind)[1]
    rewind()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(ahead_ms / 1e3 * CLOCK))
    start.record()
    run(inputs)
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _profile(run: Contender, inputs: Any, rewind: Rewind) -> dict[str, Any]:
    """GPU time of the kernels of a step, microseconds, in sum and by kind."""
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return {}
    try:
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
            for _ in range(PROFILED):
                rewind()
                run(inputs)
            torch.cuda.synchronize()
        kernels = [
            (event.name, event.time_range.elapsed_us() / PROFILED)
            for event in found.events()
            if event.device_type == torch.autograd.DeviceType.CUDA
        ]
    except Exception as error:  # times are worth keeping without it
        return {"profile_failed": one_line(error)}
    return shares(kernels)


def note_costs(found: dict[str, dict[str, Any]]) -> None:
    """What norms and rotary embeddings cost each contender, where the rest was measured."""
    rest = found.get(WITHOUT, {}).get("compiled_us")
    for name, one in found.items():
        if rest is not None and name != WITHOUT and "compiled_us" in one:
            one["cost_us"] = one["compiled_us"] - rest


def shares(kernels: list[tuple[str, float]]) -> dict[str, Any]:
    """Microseconds of all kernels, of ours and Inductor's, and of those that norm or rotate."""
    own = [(name, us) for name, us in kernels if is_compiled(name)]
    norms = [(name, us) for name, us in own if is_norm(name)]
    total = sum(us for name, us in kernels if not name.startswith("Mem"))
    if not total:
        return {"profile_failed": "no kernel was seen"}
    return {
        "kernels_us": total,
        "compiled_us": sum(us for _, us in own),
        "norm_us": sum(us for _, us in norms),
        "norm_launches": len(norms) // PROFILED,
        "norm_share": sum(us for _, us in norms) / total,
    }


def is_compiled(name: str) -> bool:
    """Whether a kernel is written in Triton: Inductor's, or ours."""
    return name.startswith("triton_") or is_ours(name)


def is_ours(name: str) -> bool:
    return re.match(r"(\w*rms_norms?(_\w+)?|sum_partials|copy)_kernel", name) is not None


def is_norm(name: str) -> bool:
    """Whether a Triton kernel is counted as norm or rotary embedding.

    Ours are. One of Inductor's is if its name, which lists up to ten operations, has one of
    `WORDS`; what it fused with them counts, too.
    """
    return is_ours(name) or bool(WORDS & set(name.split("_")))
