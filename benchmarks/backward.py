"""Backward of norms on a GPU: ours against Inductor, `F.rms_norm`, Liger and QuACK.

    python benchmarks/backward.py --out benchmarks/results/backward_h200.json

Only the backward is timed, as GPU time of replayed CUDA graphs. A graph holds one backward for each
of several sets of tensors, so many that a replay goes through more than three times the L2 cache:
everything is cold. Contenders take turns, and medians are kept. Their gradients are first compared
with float64: an error above the bound of the tests stops the run. `limit` is the time that a copy
of the same bytes takes, by the bandwidth measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from rich.table import Table

import normfuse

EPS = 1e-6
COLD_BYTES = 200 * 2**20
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


# op: (formula over a norm, ours, activations, weights, streams that a backward reads and writes).
OPS = {
    "norm": (norm_with, norm_with(our_norm), 1, 1, 3),
    "add": (add_with, our_add, 2, 1, 4),
    "sandwich": (sandwich_with, our_sandwich, 2, 2, 6),
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
    if op == "heads":
        return {"normfuse": our_heads, "inductor": torch.compile(heads_with(llama_norm))}
    formula, ours, *_ = OPS[op]
    return {
        "normfuse": ours,
        "inductor": torch.compile(formula(llama_norm), dynamic=False),
        "aten": formula(aten_norm),
        **peers(op),
    }


def leaves(op: str, width: int, rows: int, model: str | None) -> tuple[list[Any], list[Any]]:
    """The tensors that want gradients, and those that do not."""

    def learned(*shape, mean=0.0):
        return (torch.randn(shape, device="cuda") + mean).bfloat16().requires_grad_()

    if op == "heads":
        num_q, num_k, dim = HEADS[model]
        tables = [torch.randn(1, 1, rows, dim, device="cuda").bfloat16() for _ in range(2)]
        heads = [learned(1, rows, num, dim) for num in (num_q, num_k)]
        return [*heads, learned(dim, mean=1.0), learned(dim, mean=1.0)], tables
    _, _, activations, weights, _ = OPS[op]
    return [learned(rows, width) for _ in range(activations)] + [
        learned(width, mean=1.0) for _ in range(weights)
    ], []


def bytes_of(op: str, inputs: list[Any]) -> int:
    """What a backward has to read and write."""
    if op == "heads":
        return 3 * 2 * (inputs[0].numel() + inputs[1].numel())
    return OPS[op][-1] * 2 * inputs[0].numel()


def check(name: str, op: str, function: Callable[..., Any], tensors: Any, rest: Any) -> None:
    """The gradients may err by twice eager's error against float64, plus a rounding."""
    formula = heads_with if op == "heads" else OPS[op][0]

    def gradients(function, tensors, rest):
        results = function(*tensors, *rest)
        generator = torch.Generator("cuda").manual_seed(1)
        upstream = [
            torch.randn(y.shape, device="cuda", generator=generator).bfloat16().to(y.dtype)
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


def graph_of(function: Callable[..., Any], sets: list[Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one backward for each set; the forwards run outside of it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs = []
        for tensors, rest in sets:
            results = function(*tensors, *rest)
            runs.append((results, tensors, [torch.randn_like(y) for y in results]))
        for run in runs[:1] * 2:
            torch.autograd.grad(*run, retain_graph=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for run in runs:
            torch.autograd.grad(*run, retain_graph=True)
    graph.keep = runs  # type: ignore[attr-defined]
    return graph


def replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def cell(op: str, width: int, rows: int, model: str | None, rounds: int) -> dict[str, Any]:
    tensors, rest = leaves(op, width, rows, model)
    size = bytes_of(op, tensors)
    num_sets = max(3, -(-COLD_BYTES // size)) if size < COLD_BYTES else 2
    sets = [(tensors, rest)] + [leaves(op, width, rows, model) for _ in range(num_sets - 1)]
    graphs, failures = {}, {}
    for name, function in contenders(op).items():
        try:
            if rows <= 4096:
                check(name, op, function, tensors, rest)
            graphs[name] = graph_of(function, sets)
        except Exception as error:
            if name in ("normfuse", "inductor"):
                raise
            failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            times[name].append(replay_us(graph) / num_sets)
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    row = {"op": op, "model": model, "width": width, "rows": rows, "sets": num_sets, **medians}
    return {**row, "bytes": size, **({"failures": failures} if failures else {})}


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    graph = torch.cuda.CUDAGraph()
    target.copy_(source)
    with torch.cuda.graph(graph):
        target.copy_(source)
    best = statistics.median(replay_us(graph) for _ in range(20))
    return 2 * 4 * source.numel() / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=[*OPS, "heads"])
    parser.add_argument("--widths", nargs="+", type=int, default=[2816, 5376, 8192])
    parser.add_argument("--rows", nargs="+", type=int, default=[2048, 16384])
    parser.add_argument("--rounds", type=int, default=22)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # a graph is gone through more than once
    torch._dynamo.config.recompile_limit = 1000
    bandwidth = copy_bandwidth()
    cells = [
        (op, width, rows, model)
        for op in arguments.ops
        for rows in arguments.rows
        for width, model in (
            [(dim, name) for name, (*_, dim) in HEADS.items()]
            if op == "heads"
            else [(width, None) for width in arguments.widths]
        )
    ]
    measured: list[dict[str, Any]] = []
    for one in track(cells, description="measuring"):
        row = cell(*one, arguments.rounds)
        row["limit"] = row["bytes"] / bandwidth
        row["speedup"] = row["inductor"] / row["normfuse"]
        measured.append(row)
        save(measured, bandwidth, arguments.out)
        torch.cuda.empty_cache()
    show(measured)


def show(rows: list[dict[str, Any]]) -> None:
    names = [
        n for n in ("normfuse", "inductor", "aten", "liger", "quack") if any(n in r for r in rows)
    ]
    table = Table("op", "width x rows", *(f"{name} us" for name in names), "limit us", "speedup")
    for row in rows:
        table.add_row(
            row["op"],
            f"{row['width']} x {row['rows']}",
            *(f"{row[name]:.1f}" if name in row else "-" for name in names),
            f"{row['limit']:.1f}",
            f"{row['speedup']:.2f}x",
        )
    Console(width=110).print(table)
    mean = statistics.geometric_mean(row["speedup"] for row in rows)
    print(f"geometric mean over Inductor: {mean:.3f}x")


def save(rows: list[dict[str, Any]], bandwidth: float, out: Path | None) -> None:
    """Written after every cell, so that an interrupted run keeps what it has."""
    if out is None:
        return
    import triton

    environment = {
        "command": "python benchmarks/backward.py " + " ".join(sys.argv[1:]),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "normfuse": normfuse.__version__,
        "unit": "us of GPU time, median",
        "copy_gb_per_s": bandwidth / 1e3,
    }
    out.write_text(json.dumps({**environment, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
