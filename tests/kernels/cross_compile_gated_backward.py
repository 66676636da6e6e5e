"""Compiles the backward kernels of gates and modulations for a GPU that is not here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton

from normfuse.ops.kernels import gated_rms_norm_backward, modulated_rms_norm_backward
from normfuse.ops.kernels.tile_backward import BackwardLaunch
from normfuse.ops.rounding import RoundingPlan
from tests.kernels.cross_compile import TARGETS, _building_for
from tests.kernels.cross_compile_backward import NUM_ROWS, _Recorder

STEMS = (
    "gate last",
    "gate first",
    "gates of groups",
    "modulated rows",
    "modulated sequences",
)


def compile_backward(stem: str, width: int, dtype: torch.dtype, target: str) -> dict[str, Any]:
    """What Triton makes of the two kernels of one op on rows of `width`, by their names."""
    gpu, recorder = TARGETS[target], _Recorder()
    with _building_for(gpu):
        _record(stem, width, dtype, gpu.warp_size, recorder)
    return {
        name: triton.compile(source, target=gpu, options={"num_warps": num_warps})
        for name, (source, num_warps) in recorder.launches.items()
    }


def _record(stem: str, width: int, dtype: torch.dtype, warp_size: int, recorder: Any) -> None:
    groups = 8 if "groups" in stem else 1
    x = torch.empty(8, NUM_ROWS // 8, width * groups, dtype=dtype, device="meta")
    weight = x[0, 0]
    plan = RoundingPlan.once(dtype, dtype)
    rstd = torch.empty(*x.shape[:-1], groups, 1, dtype=plan.compute, device="meta")
    module = gated_rms_norm_backward if "gate" in stem else modulated_rms_norm_backward
    sizes: Any = {"norms": 2, "operands": module.OPERANDS, "warp_size": warp_size}
    tile = BackwardLaunch.for_shape(width, NUM_ROWS, dtype, **sizes)
    settings: Any = {"tile": replace(tile, programs=16), "wrap": recorder}
    if "gate" in stem:
        gate = (groups, "first" in stem, "silu", plan, [True] * 3)
        gated_rms_norm_backward.launch(x, x, x, weight, rstd, 1.0, *gate, **settings)
    else:
        scale = x if "rows" in stem else x[:, :1]
        norm = (weight, rstd[..., 0], 1.0, 1.0, plan, [True] * 4)
        modulated_rms_norm_backward.launch(x, x, scale, scale, *norm, **settings)
