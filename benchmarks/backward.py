"""Backward of norms on a GPU: ours against Inductor, `F.rms_norm`, Liger and QuACK.

    python benchmarks/backward.py --out benchmarks/results/backward_h200.json --time-limit 200
    python benchmarks/backward.py --device cpu --widths 64 --rows 8

Only the backward is timed, as GPU time of replayed CUDA graphs. A graph holds one backward for
each of several sets of tensors, so many that a replay goes through more than three times the L2
cache, and every set has gradients of its own: everything is cold. Contenders take turns, and
medians are kept. Their gradients are first compared with float64, where rows are few enough for
that: an error above twice eager's own, plus a rounding, fails the cell, which is not timed. `copy`
is a kernel that reads and writes the same bytes, with the best of several tiles; `limit` is the
time of those bytes at the speed of the fastest copy of 1 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

import normfuse
from normfuse.cli.bench.measuring import copies
from normfuse.cli.bench.peers import one_line
from normfuse.cli.bench.record import command_of, environment
from normfuse.cli.bench.timing import Clock, CudaClock, DryClock, Recording, Rotation, measure

EPS = 1e-6
CHECKED_ROWS = 4096  # the float64 form of more does not fit beside the rest
HEADS = {"qwen3 8b": (32, 8, 128), "gemma3 12b": (16, 8, 256)}


def llama_norm(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * h.to(x.dtype)


def exact_norm(x, weight):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def aten_norm(x, weight):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def our_norm(x, weight):
    plan = normfuse.RoundingPlan.before_weight(x.dtype, weight.dtype)
    return normfuse.rms_norm(x, weight, EPS, plan=plan)


def norm_with(norm):
    return lambda x, weight: (norm(x, weight),)


def add_with(norm):
    def add(x, residual, weight):
        total = residual + x
        return norm(total, weight), total

    return add


def sandwich_with(norm):
    def sandwich(x, residual, weight_1, weight_2):
        total = residual + norm(x, weight_1)
        return norm(total, weight_2), total

    return sandwich


def half_turned(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


def heads_with(norm):
    def heads(q, k, weight_q, weight_k, cos, sin):
        q, k = norm(q, weight_q).transpose(1, 2), norm(k, weight_k).transpose(1, 2)
        return half_turned(q, cos, sin), half_turned(k, cos, sin)

    return heads


def our_add(x, residual, weight):
    plan = normfuse.RoundingPlan.before_weight(x.dtype, weight.dtype)
    return tuple(normfuse.add_rms_norm(x, residual, weight, EPS, plan=plan))


def our_sandwich(x, residual, weight_1, weight_2):
    plan = normfuse.RoundingPlan.before_weight(x.dtype, weight_1.dtype)
    plans = {"plan_1": plan, "plan_2": plan}
    return tuple(normfuse.rms_norm_add_rms_norm(x, residual, weight_1, weight_2, EPS, **plans))


def our_heads(q, k, weight_q, weight_k, cos, sin):
    plan = normfuse.RoundingPlan.before_weight(q.dtype, weight_q.dtype)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    turned = normfuse.qk_rms_norm_rope(
        q, k, cos, sin, weight_q, weight_k, EPS, plan_q=plan, plan_k=plan
    )
    return turned.q, turned.k


# op: (formula over a norm, ours, activations, weights, and what a backward reads and writes, in
# tensors as large as an activation: of a sum, one gradient serves both operands).
OPS = {
    "norm": (norm_with, norm_with(our_norm), 1, 1, (2, 1)),
    "add": (add_with, our_add, 2, 1, (3, 1)),
    "sandwich": (sandwich_with, our_sandwich, 2, 2, (4, 2)),
    "heads": (heads_with, our_heads, 2, 2, (2, 1)),
}


def peers(op: str) -> dict[str, Callable[..., Any]]:
    """Kernels of other packages, where they are installed and have the op."""
    found: dict[str, Callable[..., Any]] = {}
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    except ImportError:
        pass
    else:
        if op == "norm":
            found["liger"] = lambda x, w: (
                LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
            )
        if op == "add":
            found["liger"] = lambda x, r, w: LigerFusedAddRMSNormFunction.apply(
                x, r, w, EPS, 0.0, "llama", False
            )
    try:
        from quack import rmsnorm
    except ImportError:
        pass
    else:
        if op == "norm":
            found["quack"] = lambda x, w: (rmsnorm(x, w, eps=EPS),)
        if op == "add":
            found["quack"] = lambda x, r, w: rmsnorm(x, w, residual=r, eps=EPS, prenorm=True)
    return found


def contenders(op: str) -> dict[str, Callable[..., Any]]:
    torch._dynamo.reset()
    formula, ours, *_ = OPS[op]
    return {
        "normfuse": ours,
        "inductor": torch.compile(formula(llama_norm), dynamic=False),
        "aten": formula(aten_norm),
        **peers(op),
    }


def leaves(
    op: str, width: int, rows: int, model: str | None, device: torch.device
) -> tuple[list[Any], list[Any]]:
    """The tensors that want gradients, and those that do not."""

    def learned(*shape, mean=0.0):
        return (torch.randn(shape, device=device) + mean).bfloat16().requires_grad_()

    if op == "heads":
        num_q, num_k, dim = HEADS[model]
        tables = [torch.randn(1, 1, rows, dim, device=device).bfloat16() for _ in range(2)]
        heads = [learned(1, rows, num, dim) for num in (num_q, num_k)]
        return [*heads, learned(dim, mean=1.0), learned(dim, mean=1.0)], tables
    _, _, activations, weights, _ = OPS[op]
    return [learned(rows, width) for _ in range(activations)] + [
        learned(width, mean=1.0) for _ in range(weights)
    ], []


def elements_of(op: str, inputs: list[Any]) -> int:
    """Of one tensor that a backward reads: the activation, or q and k together."""
    return inputs[0].numel() + (inputs[1].numel() if op == "heads" else 0)


def check(name: str, op: str, function: Callable[..., Any], tensors: Any, rest: Any) -> None:
    """The gradients may err by twice eager's error against float64, plus a rounding."""
    formula, device = OPS[op][0], tensors[0].device

    def gradients(function, tensors, rest):
        results = function(*tensors, *rest)
        generator = torch.Generator(device).manual_seed(1)
        upstream = [
            torch.randn(y.shape, device=device, generator=generator).bfloat16().to(y.dtype)
            for y in results
        ]
        return torch.autograd.grad(results, tensors, upstream)

    found = gradients(function, tensors, rest)
    eager = gradients(formula(llama_norm), tensors, rest)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = gradients(formula(exact_norm), wide, [tensor.double() for tensor in rest])
    for one, other, truth in zip(found, eager, exact, strict=True):
        rounding = torch.finfo(one.dtype).eps * truth.abs()
        allowed = 2 * (other.double() - truth).abs().amax() + rounding
        worst = ((one.double() - truth).abs() / allowed).max().item()
        assert worst <= 1, f"{name} errs by {worst:.2f} times what is allowed in {op}"


def backward(results: Any, tensors: Any, upstream: Any) -> Sequence[torch.Tensor]:
    return torch.autograd.grad(results, tensors, upstream, retain_graph=True)


def recorded(function: Callable[..., Any], sets: list[Any], rotation: Rotation, clock: Clock):
    """The backwards of all sets; the forwards run outside of what is recorded."""
    # A backward runs on the stream of its forward, and must be on the one that is captured.
    is_cuda = isinstance(clock, CudaClock)
    with torch.cuda.stream(clock._stream) if is_cuda else nullcontext():
        runs = []
        for tensors, rest in sets:
            results = tuple(function(*tensors, *rest))
            runs.append((results, tensors, [torch.randn_like(y) for y in results]))
        for _ in range(2):
            backward(*runs[0])
    clock.synchronize()
    recording = clock.record(backward, runs, rotation.cycles, [None] * len(runs))
    return recording, runs  # a recording reads what the runs hold


def best_copy(op: str, elements: int, rotation: Rotation, clock: Clock) -> Recording:
    """The copy that reads and writes as many tensors as a backward, with its best tile.

    It reads three at most: in place of 4 and 2 for a sandwich, 2 and 1 of twice the length.
    """
    num_read, num_written = OPS[op][-1]
    parts = 2 if num_read > 3 else 1
    num_read, num_written = num_read // parts, num_written // parts
    sets = [
        tuple(
            torch.ones(elements * parts, dtype=torch.bfloat16, device=clock.device)
            for _ in range(num_read)
        )
        for _ in range(rotation.num_sets)
    ]
    trials: list[tuple[float, Recording]] = []
    for call in copies(num_written, clock.device).values():
        call(*sets[0])
        trial = clock.record(call, sets, rotation.cycles, [None] * len(sets))
        trials.append((min(clock.samples(trial, rotation, 3)), (trial, sets)))
    return min(trials, key=lambda trial: trial[0])[1]


def cell(op: str, width: int, rows: int, model: str | None, clock: Clock) -> dict[str, Any]:
    """Microseconds of every contender."""
    tensors, rest = leaves(op, width, rows, model, clock.device)
    elements = elements_of(op, tensors)
    size = 2 * sum(OPS[op][-1]) * elements
    rotation, _ = clock.rotations(size)
    others = [leaves(op, width, rows, model, clock.device) for _ in range(rotation.num_sets - 1)]
    sets = [(tensors, rest), *others]
    kept, failures = {}, {}
    with clock.session():
        for name, function in contenders(op).items():
            try:
                if rows <= CHECKED_ROWS:
                    check(name, op, function, tensors, rest)
                kept[name] = recorded(function, sets, rotation, clock)
            except Exception as error:
                if name in ("normfuse", "inductor"):
                    raise
                failures[name] = one_line(error)
        kept["copy"] = best_copy(op, elements, rotation, clock)
        timings = measure(clock, {name: one for name, (one, _) in kept.items()}, rotation)
    times = {name: timing.us for name, timing in timings.items()}
    spread = {name: timing.spread for name, timing in timings.items()}
    row = {"op": op, "model": model, "width": width, "rows": rows, "sets": rotation.num_sets}
    return {**row, **times, "spread": spread, "bytes": size, "failures": failures}


def cells(arguments: argparse.Namespace) -> list[tuple[str, int, int, str | None]]:
    """Heads first, which are few; then width by width, so that a time limit cuts whole widths."""
    heads = [
        ("heads", dim, rows, name) for name, (*_, dim) in HEADS.items() for rows in arguments.rows
    ]
    rest = [
        (op, width, rows, None)
        for width, op, rows in product(arguments.widths, OPS, arguments.rows)
        if op != "heads"
    ]
    return [one for one in heads + rest if one[0] in arguments.ops]


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(OPS), choices=list(OPS))
    parser.add_argument("--widths", nargs="+", type=int, default=[4096, 5376, 2816, 8192])
    parser.add_argument("--rows", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a dry run")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parsed(argv)
    torch._functorch.config.donated_buffer = False  # a graph is gone through more than once
    torch._dynamo.config.recompile_limit = 1000
    clock = CudaClock() if arguments.device == "cuda" else DryClock()
    ceiling = clock.copy_gb_s()
    record = {
        **environment(command_of("benchmarks/backward.py", argv)),
        "unit": "us of GPU time, median",
        "copy_gb_s": ceiling,
        "is_dry": arguments.device == "cpu",
        "rows": [],
        "left_out": [],
        "failed": [],
    }
    began = time.monotonic()
    for one in track(cells(arguments), description="measuring"):
        if time.monotonic() - began > arguments.time_limit:
            record["left_out"].append(one)
            continue
        try:
            row = cell(*one, clock)
        except Exception as error:
            record["failed"].append({"cell": one, "error": one_line(error)})
            continue
        row["limit"] = row["bytes"] / ceiling / 1e3
        row["speedup"] = row["inductor"] / row["normfuse"]
        record["rows"].append(row)
        save(record, arguments.out)
    save(record, arguments.out)
    show(record)
    if record["failed"]:
        raise SystemExit(
            "\n".join(f"failed: {one['cell']}: {one['error']}" for one in record["failed"])
        )


def show(record: dict[str, Any]) -> None:
    rows = record["rows"]
    every = ("normfuse", "inductor", "aten", "liger", "quack", "copy", "limit")
    names = [name for name in every if any(name in row for row in rows)]
    table = Table("op", "width x rows", *(f"{name} us" for name in names), "speedup")
    for row in rows:
        table.add_row(
            row["op"],
            f"{row['width']} x {row['rows']}",
            *(f"{row[name]:.1f}" if name in row else "-" for name in names),
            f"{row['speedup']:.2f}x",
        )
    Console(width=110).print(table)
    if record["is_dry"]:
        print("a dry run: the gradients are checked, the times are made up")
    if record["left_out"]:
        print(f"left out by --time-limit: {len(record['left_out'])} cells")
    if rows:
        mean = statistics.geometric_mean(row["speedup"] for row in rows)
        print(f"geometric mean over Inductor: {mean:.3f}x")


def save(record: dict[str, Any], out: Path | None) -> None:
    """Written after every cell, so that an interrupted run keeps what it has."""
    if out is not None:
        out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
