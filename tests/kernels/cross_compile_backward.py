"""Compiles the backward kernels for a GPU that is not here, as `cross_compile` does the others."""

from __future__ import annotations

from typing import Any

import torch
import triton

from normfuse.ops.kernels import (
    dual_rms_norm_add_backward,
    qk_rms_norm_rope_backward,
    rms_norm_add_rms_norm_backward,
    rms_norm_backward,
    rms_norms_backward,
)
from normfuse.ops.kernels.tile_backward import BackwardLaunch
from normfuse.ops.residual_sum import Scales
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import RoundingPlan
from tests.kernels.cross_compile import TARGETS, _building_for, _source

STEMS = ("rms_norm_backward", "add_rms_norm_backward", "rms_norm_add_rms_norm_backward")
# Kernels of several norms, and how many these are; the dual ones are one kernel.
MANY_NORMS = {
    "rms_norms_backward": 3,
    "dual_rms_norm_add_backward": 3,
    "dual_rms_norm_add_rms_norm_backward": 4,
}
NUM_ROWS = 4096


class _Recorder:
    """Stands where kernels are launched, and keeps what each was launched with."""

    def __init__(self) -> None:
        self.launches: dict[str, tuple[Any, int]] = {}

    def __call__(self, kernel: Any) -> Any:
        def record(*arguments: Any, num_warps: int, **constants: Any) -> None:
            runtime = dict(zip(kernel.arg_names, arguments, strict=False))
            source = _source(kernel, runtime, constants)
            self.launches[kernel.__name__] = (source, num_warps)

        return _Launcher(record)


class _Launcher:
    def __init__(self, record: Any) -> None:
        self.record = record

    def __getitem__(self, grid: Any) -> Any:
        return self.record


def compile_backward(
    stem: str, width: int, dtype: torch.dtype, target: str, num_rows: int = NUM_ROWS
) -> dict[str, Any]:
    """What Triton makes of the two kernels of one op on rows of `width`, by their names."""
    gpu, recorder = TARGETS[target], _Recorder()
    x = torch.empty(num_rows, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    plan = RoundingPlan.once(dtype, dtype)
    rstd = torch.empty(num_rows, 1, dtype=plan.compute, device="meta")
    norms = 2 if stem.count("norm") == 2 else 1
    operands = {"rms_norm_backward": 2, "add_rms_norm_backward": 3}.get(stem, 4)
    sizes: Any = {"norms": norms, "operands": operands, "warp_size": gpu.warp_size}
    tile = BackwardLaunch.for_shape(width, num_rows, dtype, **sizes)
    settings: Any = {"tile": tile, "wrap": recorder}
    if norms == 2:
        both = ((weight, rstd, 1.0, plan),) * 2
        rms_norm_add_rms_norm_backward.launch(
            x, x, x, x, both, Scales(), dtype, [True] * 4, **settings
        )
    else:
        beside = rms_norm_backward.Sum("first", Scales(), x) if "add" in stem else None
        norm = (weight, weight, rstd, 1.0, plan)
        rms_norm_backward.launch_beside(
            beside or rms_norm_backward.Sum(), x, x, *norm, (x, None), tile, recorder
        )
    return {
        name: triton.compile(source, target=gpu, options={"num_warps": num_warps})
        for name, (source, num_warps) in recorder.launches.items()
    }


def compile_norms(
    stem: str, width: int, dtype: torch.dtype, target: str, count: int | None = None
) -> Any:
    """What Triton makes of the gradients of several norms, `count` of them if not as in Gemma 4."""
    gpu, recorder = TARGETS[target], _Recorder()
    x = torch.empty(NUM_ROWS, width, dtype=dtype, device="meta")
    weight = torch.empty(width, dtype=dtype, device="meta")
    plan = RoundingPlan.once(dtype, dtype)
    rstd = torch.empty(NUM_ROWS, 1, dtype=plan.compute, device="meta")
    norms = count or MANY_NORMS[stem]
    operands = {"dual_rms_norm_add_backward": 3}.get(stem, norms + 1)
    sizes: Any = {"norms": norms, "operands": operands, "warp_size": gpu.warp_size}
    tile = BackwardLaunch.for_shape(width, NUM_ROWS, dtype, **sizes)
    settings: Any = {"tile": tile, "wrap": recorder}
    with _building_for(gpu):
        if stem == "rms_norms_backward":
            numbers = [1.0] * norms, [0.5] * norms, plan, [True] * (norms + 1)
            rms_norms_backward.launch(x, [x] * norms, [weight] * norms, rstd, *numbers, **settings)
        else:
            operands = [x] * 5 if norms == 4 else [None, x, x, x, None]
            scales = Scales(total_tensor=torch.empty(1, dtype=dtype, device="meta"))
            dual_rms_norm_add_backward.launch(
                operands, [(weight, rstd, 1.0, plan)] * norms, scales, dtype,
                [True] * (3 + norms), **settings,
            )  # fmt: skip
    source, num_warps = next(iter(recorder.launches.values()))
    return triton.compile(source, target=gpu, options={"num_warps": num_warps})


def compile_heads(
    width: int,
    layout: str,
    target: str,
    dtype: torch.dtype = torch.bfloat16,
    table_dtype: torch.dtype = torch.bfloat16,
) -> Any:
    """What Triton makes of the gradients of q, k and v heads of `width`; q and k turn."""
    gpu, recorder = TARGETS[target], _Recorder()
    heads = torch.empty(2, 512, 8, width, dtype=dtype, device="meta").transpose(1, 2)
    weight = torch.empty(width, dtype=dtype, device="meta")
    table = torch.empty(2, 1, 512, width, dtype=table_dtype, device="meta")
    plans = [RoundingPlan.once(dtype, dtype)] * 2 + [RoundingPlan.once(dtype, None)]
    turns = [Rotation(layout, width, dtype, dtype)] * 2 + [None]
    qk_rms_norm_rope_backward.launch(
        [heads] * 3, [heads] * 3, [weight, weight, None], [None] * 3, table, table,
        [1e-6] * 3, [1.0] * 3, plans, turns, [True] * 3, [True, True, False], wrap=recorder,
    )  # fmt: skip
    source, num_warps = recorder.launches["qk_rms_norm_rope_backward_kernel"]
    num_warps = num_warps * 32 // gpu.warp_size
    return triton.compile(source, target=gpu, options={"num_warps": num_warps})
