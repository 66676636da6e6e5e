"""Training steps of unmodified Hugging Face models: normfuse against plain torch.compile.

    python benchmarks/training.py --out benchmarks/results/training_h200.json
    python benchmarks/training.py --device cpu --tiny --layers 1 --shapes 1x16 --rounds 2

Real widths, random weights, few layers, a small vocabulary, bfloat16. A step is forward, loss and
backward, and with `--optimizer` a fused AdamW. The contenders share one model and take turns;
medians are kept, of two times: `step_ms` between CUDA events around a step, and `kernels_ms`, the
sum of the times of a step's kernels by torch.profiler, which does not know how long the GPU waited
for the host.

`peak_mib` is what was allocated at most during a step of that contender, `compile_s` the time of
its first step, with empty caches. `error` is the distance of all gradients from those of a float32
model, as a share of their norm: more than twice that of eager in bfloat16 ends the run.
`changed_gradients` counts the parameters whose gradients have other bits in a second step from the
same state. Attention and embeddings may add in any order; `--deterministic` forbids that to torch.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # --deterministic asks for it

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch._inductor.utils import fresh_cache
from torch.autograd import DeviceType

import normfuse
from normfuse.capturing import fresh
from normfuse.cli.bench.record import command_of, environment

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3 4b": (
        "gemma3_text",
        {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "sliding_window": 1024,
        },
    ),
    "qwen3 8b": (
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
CONTENDERS = ("plain", "inline", "auto", "triton")
Row = dict[str, Any]
Step = Callable[[], torch.Tensor]


def build(name: str, layers: int, is_tiny: bool, device: str) -> Any:
    """A model that learns, the same at every call."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model_type, sizes = MODELS[name]
    settings = {**sizes, **TINY} if is_tiny else sizes
    config = CONFIG_MAPPING[model_type](
        **settings, vocab_size=1024, num_hidden_layers=layers, pad_token_id=0
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()


def step_of(function: Any, ids: torch.Tensor, optimizer: torch.optim.Optimizer | None) -> Step:
    """Forward, loss, backward; the optimizer's own step if there is one. Returns the loss."""

    def step() -> torch.Tensor:
        loss = function(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        return loss.detach()

    return step


def compiled(model: Any, contender: str) -> Any:
    """The model under one contender, in code of its own so that none shares another's."""
    options = {} if contender == "plain" else normfuse.options(lowering=contender)
    return torch.compile(fresh(model), options=options, dynamic=False)


@contextmanager
def lowerings() -> Iterator[list[str]]:
    """What normfuse says of its choices in the meantime."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("normfuse")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def first_step(step: Step, model: Any, device: str) -> Row:
    """The seconds of compilation, and which forms the sites of forward and backward got."""
    with fresh_cache(), lowerings() as messages:
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return {"compile_s": seconds, "lowered": [m for m in messages if m.startswith("lowered ")]}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(step: Step, device: str) -> float:
    """GPU time from the first to the last kernel of a step; on a CPU, the time of the step."""
    if device != "cuda":
        began = time.perf_counter()
        step()
        return (time.perf_counter() - began) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(steps: dict[str, Step], model: Any, rounds: int, device: str) -> dict[str, float]:
    """The median of each contender; they take turns, and each round begins with another."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            model.zero_grad(set_to_none=True)
            times[name].append(milliseconds(steps[name], device))
    return {name: statistics.median(values) for name, values in times.items()}


def kernels_ms(step: Step, model: Any, repeats: int = 3) -> float:
    """The times of all kernels, copies and fills of a step, added up."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(repeats):
            model.zero_grad(set_to_none=True)
            step()
        torch.cuda.synchronize()
    on_gpu = [e for e in profile.key_averages() if e.device_type == DeviceType.CUDA]
    # Annotations of compiled regions span the kernels inside them.
    total = sum(e.self_device_time_total for e in on_gpu if not e.is_user_annotation)
    return float(total) / repeats / 1e3


def peak_mib(step: Step, model: Any) -> float:
    """Weights included, which are the same for all."""
    model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def gradients(function: Any, model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Of all parameters, after one step without an optimizer."""
    model.zero_grad(set_to_none=True)
    step_of(function, ids, None)()
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return found


def distance(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Of all gradients together, as a share of the norm of the exact ones."""
    pairs = list(zip(found, exact, strict=True))
    apart = sum((one.double() - truth.double()).square().sum().item() for one, truth in pairs)
    size = sum(truth.double().square().sum().item() for _, truth in pairs)
    return float(apart / size) ** 0.5


def check(functions: dict[str, Any], model: Any, ids: torch.Tensor) -> dict[str, Row]:
    """How far each contender's gradients are from float32's, and how many change at a second step.

    Raises:
        AssertionError: normfuse is further away than twice eager in bfloat16.
    """
    wide = copy.deepcopy(model).float()
    exact = gradients(wide, wide, ids)
    del wide
    eager = distance(gradients(model, model, ids), exact)
    rows: dict[str, Row] = {}
    for name, function in functions.items():
        first, second = (gradients(function, model, ids) for _ in range(2))
        error = distance(first, exact)
        assert name == "plain" or error <= 2 * eager, (
            f"{name} must err by at most twice eager's {eager:.3g}, got {error:.3g}"
        )
        changed = sum(not torch.equal(*pair) for pair in zip(first, second, strict=True))
        rows[name] = {"error": error, "eager_error": eager, "changed_gradients": changed}
    return rows


def warm_up(device: str) -> None:
    """Imports and compile workers are not what `compile_s` measures."""
    model = build(next(iter(MODELS)), 1, True, device)
    ids = torch.zeros(1, 8, dtype=torch.long, device=device)
    step_of(torch.compile(fresh(model), backend="aot_eager"), ids, None)()
    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda x: x.sin().sum())(x).backward()


def cell(name: str, shape: str, arguments: argparse.Namespace) -> Row:
    """Everything about one model and shape, by contender."""
    torch._dynamo.reset()
    device = arguments.device
    batch, tokens = (int(part) for part in shape.split("x"))
    model = build(name, arguments.layers, arguments.tiny, device)
    ids = torch.randint(3, 1000, (batch, tokens), device=device)
    optimizer = None
    if arguments.optimizer:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    functions = {contender: compiled(model, contender) for contender in arguments.contenders}
    steps = {c: step_of(function, ids, optimizer) for c, function in functions.items()}
    rows = {c: first_step(step, model, device) for c, step in steps.items()}
    for contender, found in check(functions, model, ids).items():
        rows[contender].update(found)
    interleaved(steps, model, 3, device)
    for contender, median in interleaved(steps, model, arguments.rounds, device).items():
        rows[contender]["step_ms"] = median
    for contender, step in steps.items():
        on_gpu = device == "cuda"
        rows[contender]["kernels_ms"] = kernels_ms(step, model) if on_gpu else None
        rows[contender]["peak_mib"] = peak_mib(step, model) if on_gpu else None
    return {"model": name, "shape": shape, "layers": arguments.layers, "contenders": rows}


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--shapes", nargs="+", default=["1x4096", "4x2048"], help="batch x tokens")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--optimizer", action="store_true", help="a fused AdamW is part of a step")
    parser.add_argument("--deterministic", action="store_true", help="in torch's own kernels, too")
    parser.add_argument("--tiny", action="store_true", help="small widths, to try the script")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    if arguments.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a test's affair, and slow
    record: Row = {
        **environment(command_of("benchmarks/training.py", argv)),
        "device": arguments.device,
        "cells": [],
    }
    cells = list(product(arguments.models, arguments.shapes))
    warm_up(arguments.device)
    began, longest = time.monotonic(), 0.0
    for name, shape in track(cells, description="measuring"):
        start = time.monotonic()
        if start - began + longest > arguments.time_limit:
            record.setdefault("left_out", []).append(f"{name} {shape}")
            continue
        record["cells"].append(cell(name, shape, arguments))
        longest = max(longest, time.monotonic() - start)
        save(record, arguments.out)
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
    save(record, arguments.out)
    show(record)


def save(record: Row, out: Path | None) -> None:
    """Written after every cell, so that an interrupted run keeps what it has."""
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")


def show(record: Row) -> None:
    columns = ("step ms", "kernels ms", "speedup", "peak MiB", "compile s", "error", "changed")
    table = Table("model", "shape", "contender", *columns)
    for row in record["cells"]:
        plain = row["contenders"].get("plain")
        for name, found in row["contenders"].items():
            speedup = "-" if plain is None else f"{plain['step_ms'] / found['step_ms']:.3f}x"
            table.add_row(
                row["model"],
                row["shape"],
                name,
                f"{found['step_ms']:.3f}",
                number(found["kernels_ms"], 3),
                speedup,
                number(found["peak_mib"], 0),
                f"{found['compile_s']:.1f}",
                f"{found['error']:.2e}",
                str(found["changed_gradients"]),
            )
    Console(width=120).print(table)
    if "left_out" in record:
        print(f"left out by --time-limit: {', '.join(record['left_out'])}")


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    main()
