"""Times the two forms of a site, its pointwise neighbours compiled with it."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from normfuse.passes import inductor
from normfuse.passes.lower import Lower
from normfuse.passes.region import Region, Spec
from normfuse.settings import Settings
from normfuse.tuning import Document, Entry, Measurement, kernel_digest

FORMS = ("inline", "triton")
# The inputs of one round exceed the L2 cache by this, so that each call finds its own cold. Small
# ones would need thousands of sets; they stay in the cache, as behind the product that made them.
CACHES = 3
MAX_SETS = 128
ROUNDS = 25

Form = Callable[[list[torch.Tensor]], Any]


class Times(NamedTuple):
    """GPU time of each form, microseconds.

    Attributes:
        inline: of what Inductor makes of it.
        triton: of the kernel and what makes its tables, if that is in the region.
        by_tables: of the kernel by tables that are there; None if nothing makes them.
    """

    inline: float
    triton: float
    by_tables: float | None = None


def measure(
    region: Region,
    command: str,
    turn: AbstractContextManager[Any] | None = None,
) -> Document:
    """The measurement of a region, as a document.

    Args:
        region: with CUDA tensors as its inputs.
        command: what to write down as the way to repeat it.
        turn: held while the GPU runs; for several processes that share one.

    Raises:
        RuntimeError: a CUDA graph is being captured.
        Exception: whatever compiling or running the region raises.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a region must be measured outside of the capture of CUDA graphs, got one: "
            "call the compiled model once before it is captured"
        )
    times = _apart(lambda: _times(region, turn or nullcontext()))
    inline, triton = round(times.inline, 3), round(times.triton, 3)
    given = triton if times.by_tables is None else round(times.by_tables, 3)
    tables = max(0.0, round(triton - given, 3))
    measurement = Measurement(region.rows, region.neighbours, inline, triton, tables_us=tables)
    return Document(
        region.key.device,
        torch.__version__,
        _version("triton"),
        _version("normfuse"),
        date.today().isoformat(),
        command,
        (Entry(region.key, measurement),),
        {region.key.op: kernel_digest(region.key.op)},
    )


def _apart(function: Callable[[], Times]) -> Times:
    """Run in a thread of its own, which knows nothing of the compilation around us.

    Fake tensors, the graph that is being compiled and torch's modes all belong to a thread.
    """
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def _times(region: Region, turn: AbstractContextManager[Any]) -> Times:
    device = region.inputs[0].device
    with torch.cuda.device(device), torch.no_grad():
        forms = [compiled(region, form) for form in FORMS]
        specs = region.inputs
        if region.by_tables is not None:
            by_tables, start = compiled(region.by_tables, "triton"), len(specs)
            forms.append(lambda inputs: by_tables(inputs[start:]))
            specs += region.by_tables.inputs
        with turn:
            times = cold_times(forms, input_sets(specs, _num_sets(region, device)))
            torch.cuda.empty_cache()  # several gigabytes, for large regions
    return Times(*times)


def compiled(region: Region, form: str) -> Form:
    """A region as Inductor compiles it where its op takes this form, and nothing else is ours."""
    lower = Lower(Settings(lowering=form), makes_copies=region.makes_copies)
    hooks: dict[str, Any] = dict.fromkeys(inductor.HOOKS)
    hooks["post_grad_custom_post_pass"] = inductor.Hook(lower, f"measure {lower}")
    patches = {**hooks, "triton.cudagraphs": False}
    examples = [
        torch.empty_strided(spec.shape, spec.stride, dtype=spec.dtype, device=spec.device)
        for spec in region.inputs
    ]
    code = inductor.compile_graph(copy.deepcopy(region.module), examples, patches)
    count = len(region.inputs)
    return lambda inputs: code(*inputs[:count])


def input_sets(specs: Sequence[Spec], count: int) -> list[list[torch.Tensor]]:
    """Inputs with the given strides, several times over.

    Floats are random. Integers are zero, since they may say where in a cache to write: the first
    place is there however small the cache, and another one may end the CUDA context.
    """
    return [[_filled(spec) for spec in specs] for _ in range(count)]


def _filled(spec: Spec) -> torch.Tensor:
    if spec.dtype.is_floating_point:
        storage = torch.randn(spec.span, dtype=torch.float32, device=spec.device).to(spec.dtype)
    elif spec.dtype == torch.bool:
        storage = torch.ones(spec.span, dtype=spec.dtype, device=spec.device)
    else:
        storage = torch.zeros(spec.span, dtype=spec.dtype, device=spec.device)
    return storage.as_strided(spec.shape, spec.stride)


def _num_sets(region: Region, device: torch.device) -> int:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    size = sum(spec.span * spec.dtype.itemsize for spec in region.inputs)
    return min(max(2, math.ceil(CACHES * cache / max(size, 1))), MAX_SETS)


def cold_times(forms: Sequence[Form], sets: list[list[torch.Tensor]]) -> list[float]:
    """Median GPU time of one call of each form, microseconds.

    Each form is recorded once, called with each set of inputs in turn; the recordings are replayed
    in alternation, so that clocks and neighbours on the machine treat them alike.
    """
    for form in forms:
        for inputs in sets[:3]:
            form(inputs)  # Inductor tries its own configurations here
    torch.cuda.synchronize()
    recordings = [_recorded(form, sets) for form in forms]
    times: list[list[float]] = [[] for _ in forms]
    for _ in range(ROUNDS):
        for found, (recording, _) in zip(times, recordings, strict=True):
            found.append(_replay(recording) * 1000 / len(sets))
    return [statistics.median(found[2:]) for found in times]  # the first ones warm up


def _recorded(form: Form, sets: list[list[torch.Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A CUDA graph of one call for each set; its results stay, so that none is written twice."""
    recording = torch.cuda.CUDAGraph()
    # Other threads, such as those that load data, may use the GPU meanwhile.
    with torch.cuda.graph(recording, capture_error_mode="thread_local"):
        results = [form(inputs) for inputs in sets]
    return recording, results


def _replay(recording: torch.cuda.CUDAGraph) -> float:
    """Milliseconds."""
    event: Any = torch.cuda.Event
    start, end = (event(enable_timing=True) for _ in range(2))
    start.record()
    recording.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _version(package: str) -> str:
    if find_spec(package) is None:
        return "none"
    try:
        return version(package)
    except PackageNotFoundError:  # a source tree, or a triton that torch brings along
        return "unknown"
