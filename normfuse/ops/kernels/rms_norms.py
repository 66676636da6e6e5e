"""Several RMSNorms of one row, for up to four weights; what is absent is None.

    rstd = 1 / sqrt(mean(x^2) + eps)
    y_i  = x * rstd * (weight_i + offset_i) * scale_i

Backward, with unit = x * rstd and g = sum over i of grad_y_i * scale_i * (weight_i + offset_i):

    grad_x        = rstd * (g - unit * mean(g * unit))
    grad_weight_i = sum over rows of grad_y_i * scale_i * unit
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.chunks import (
    fenced,
    load_tiles,
    num_tiles,
    row_of,
    store_tile,
    tile_at,
)
from normfuse.ops.kernels.constants import plan_text
from normfuse.ops.kernels.row import (
    normalised,
    root_of,
    row_index,
    row_start,
    scaled,
    squares,
    step,
    store_inverse_root,
    zero_sums,
)
from normfuse.ops.kernels.rows import (
    addressed,
    as_vector,
    copied_into,
    is_empty,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.tile import Launch, device_of, eager

if TYPE_CHECKING:
    from normfuse.ops.rounding import RoundingPlan

SLOTS = (1, 2, 3, 4)  # no kernel argument may be a tuple, so every norm has its numbered ones


@triton.jit
def _store_norm(
    x,
    root,
    weights,
    weight_ptr,
    y_ptr,
    is_row,
    index,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    PLAN: tl.constexpr,
):
    if y_ptr is not None:
        OUT: tl.constexpr = step(PLAN, "out")
        weight = tile_at(weights, weight_ptr, None, index, N, BLOCK, READS, "ahead")
        y = normalised(x, root, weight, OFFSET, PLAN, False)
        y = scaled(y, None, SCALE, OUT, OUT, False)
        store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)


@triton.jit
def rms_norms_kernel(
    x_ptr,
    weight_1_ptr,
    weight_2_ptr,
    weight_3_ptr,
    weight_4_ptr,
    y_1_ptr,
    y_2_ptr,
    y_3_ptr,
    y_4_ptr,
    rstd_ptr,
    num_rows,
    size_middle,
    size_inner,
    stride_x_outer,
    stride_x_middle,
    stride_x_inner,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET_1: tl.constexpr,
    OFFSET_2: tl.constexpr,
    OFFSET_3: tl.constexpr,
    OFFSET_4: tl.constexpr,
    SCALE_1: tl.constexpr,
    SCALE_2: tl.constexpr,
    SCALE_3: tl.constexpr,
    SCALE_4: tl.constexpr,
    PLAN_1: tl.constexpr,
    PLAN_2: tl.constexpr,
    PLAN_3: tl.constexpr,
    PLAN_4: tl.constexpr,
):
    row = row_index(ROWS)
    is_row = row < num_rows
    x_ptr += row_start(
        row, size_middle, size_inner, stride_x_outer, stride_x_middle, stride_x_inner
    )
    y_1_ptr = row_of(y_1_ptr, row, N)
    y_2_ptr = row_of(y_2_ptr, row, N)
    y_3_ptr = row_of(y_3_ptr, row, N)
    y_4_ptr = row_of(y_4_ptr, row, N)
    weight_1_ptr = row_of(weight_1_ptr, row, 0)
    weight_2_ptr = row_of(weight_2_ptr, row, 0)
    weight_3_ptr = row_of(weight_3_ptr, row, 0)
    weight_4_ptr = row_of(weight_4_ptr, row, 0)
    xs = load_tiles(x_ptr, is_row, N, BLOCK, READS, "held")
    weights_1 = load_tiles(weight_1_ptr, None, N, BLOCK, READS, "ahead")
    weights_2 = load_tiles(weight_2_ptr, None, N, BLOCK, READS, "ahead")
    weights_3 = load_tiles(weight_3_ptr, None, N, BLOCK, READS, "ahead")
    weights_4 = load_tiles(weight_4_ptr, None, N, BLOCK, READS, "ahead")
    sums = zero_sums(ROWS, BLOCK, PLAN_1)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
        sums += squares(x, PLAN_1)
    root = root_of(sums, None, N, EPS, PLAN_1)
    xs = fenced(xs, READS)
    weights_1, weights_2 = fenced(weights_1, READS), fenced(weights_2, READS)
    weights_3, weights_4 = fenced(weights_3, READS), fenced(weights_4, READS)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
        _store_norm(
            x, root, weights_1, weight_1_ptr, y_1_ptr, is_row, index,
            N, BLOCK, READS, OFFSET_1, SCALE_1, PLAN_1,
        )  # fmt: skip
        _store_norm(
            x, root, weights_2, weight_2_ptr, y_2_ptr, is_row, index,
            N, BLOCK, READS, OFFSET_2, SCALE_2, PLAN_2,
        )  # fmt: skip
        _store_norm(
            x, root, weights_3, weight_3_ptr, y_3_ptr, is_row, index,
            N, BLOCK, READS, OFFSET_3, SCALE_3, PLAN_3,
        )  # fmt: skip
        _store_norm(
            x, root, weights_4, weight_4_ptr, y_4_ptr, is_row, index,
            N, BLOCK, READS, OFFSET_4, SCALE_4, PLAN_4,
        )  # fmt: skip
    store_inverse_root(rstd_ptr, root, row, num_rows, PLAN_1)


def launch(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | None],
    eps: float,
    offsets: Sequence[float],
    scales: Sequence[float],
    plans: Sequence[RoundingPlan],
    *,
    stored: Sequence[bool] | None = None,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor | None]:
    """x (..., N), weights (N,) or None -> one y (..., N) in each `plan.out`, rstd (..., 1).

    `weights`, `offsets`, `scales` and `plans` have an entry for each norm; a scale of 1.0 is none.
    `stored` says which of the results are asked for, rstd the last; the others are None. `tile` and
    `wrap` as in `rms_norm.launch`.
    """
    stored = [True] * (len(plans) + 1) if stored is None else list(stored)
    stored[0] = stored[0] or not any(stored[:-1])  # some y says how the rows lie
    ys = [
        torch.empty_like(x, dtype=plan.out) if flag else None
        for plan, flag in zip(plans, stored, strict=False)
    ]
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=plans[0].compute) if stored[-1] else None
    if is_empty(x):
        return [*ys, rstd]
    order = row_order(*ys, rstd)
    if order is None:
        again = partial(launch, stored=stored, tile=tile, wrap=wrap)
        values = again(x.contiguous(), weights, eps, offsets, scales, plans)
        return list(copied_into((*ys, rstd), values))
    x, strides = addressed(x, order, next(y for y in ys if y is not None))
    tile = tile or Launch.for_shape(x.shape[-1], x.dtype, plans[0].compute, op="rms_norms")
    with device_of(x, wrap):
        wrap(rms_norms_kernel)[tile.grid(num_rows(x))](
            x,
            *_filled([as_vector(weight) for weight in weights]),
            *_filled(ys),
            rstd,
            num_rows(x),
            *strides,
            **tile.constants(x.shape[-1], num_rows(x)),
            EPS=float(eps),
            **_numbered("OFFSET", [float(offset) for offset in offsets]),
            **_numbered("SCALE", [None if scale == 1.0 else float(scale) for scale in scales]),
            **_numbered("PLAN", [plan_text(plan) for plan in plans]),
            num_warps=tile.num_warps,
        )
    return [*ys, rstd]


def _filled(values: list[Any]) -> list[Any]:
    assert len(values) <= len(SLOTS), f"the kernel has {len(SLOTS)} slots, got {len(values)} norms"
    return values + [None] * (len(SLOTS) - len(values))


def _numbered(name: str, values: list[Any]) -> dict[str, Any]:
    return {f"{name}_{slot}": value for slot, value in zip(SLOTS, _filled(values), strict=True)}
