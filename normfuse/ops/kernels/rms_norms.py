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

from normfuse.ops.kernels.constants import plan_text
from normfuse.ops.kernels.row import (
    load_held,
    normalised,
    root_of,
    row_index,
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

HELD = 2  # rows in registers: x, and the result that is made of it


@triton.jit
def _store_norm(
    x,
    root,
    weight_ptr,
    y_ptr,
    row,
    cols,
    mask,
    N: tl.constexpr,
    OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
    PLAN: tl.constexpr,
):
    if y_ptr is not None:
        OUT: tl.constexpr = step(PLAN, "out")
        y = normalised(x, root, weight_ptr, cols, N, OFFSET, PLAN, False)
        y = scaled(y, None, SCALE, OUT, OUT, False)
        tl.store(y_ptr + row * N + cols, y, mask=mask)


@triton.jit
def _store_norms(
    x,
    root,
    weight_1_ptr,
    weight_2_ptr,
    weight_3_ptr,
    weight_4_ptr,
    y_1_ptr,
    y_2_ptr,
    y_3_ptr,
    y_4_ptr,
    row,
    cols,
    mask,
    N: tl.constexpr,
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
    _store_norm(x, root, weight_1_ptr, y_1_ptr, row, cols, mask, N, OFFSET_1, SCALE_1, PLAN_1)
    _store_norm(x, root, weight_2_ptr, y_2_ptr, row, cols, mask, N, OFFSET_2, SCALE_2, PLAN_2)
    _store_norm(x, root, weight_3_ptr, y_3_ptr, row, cols, mask, N, OFFSET_3, SCALE_3, PLAN_3)
    _store_norm(x, root, weight_4_ptr, y_4_ptr, row, cols, mask, N, OFFSET_4, SCALE_4, PLAN_4)


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
    outer = row // size_inner // size_middle
    middle = row // size_inner % size_middle
    inner = row % size_inner
    x_ptr += outer * stride_x_outer + middle * stride_x_middle + inner * stride_x_inner
    all_cols = tl.arange(0, BLOCK)[None, :]
    if BLOCK >= N:
        mask = (row < num_rows) & (all_cols < N)
        x = load_held(x_ptr + all_cols, mask)
        root = root_of(squares(x, PLAN_1), None, N, EPS, PLAN_1)
        _store_norms(
            x, root, weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
            y_1_ptr, y_2_ptr, y_3_ptr, y_4_ptr, row, all_cols, mask, N,
            OFFSET_1, OFFSET_2, OFFSET_3, OFFSET_4, SCALE_1, SCALE_2, SCALE_3, SCALE_4,
            PLAN_1, PLAN_2, PLAN_3, PLAN_4,
        )  # fmt: skip
    else:
        sums = zero_sums(ROWS, BLOCK, PLAN_1)
        for start in range(0, N, BLOCK):
            mask = (row < num_rows) & (start + all_cols < N)
            sums += squares(load_held(x_ptr + start + all_cols, mask), PLAN_1)
        root = root_of(sums, None, N, EPS, PLAN_1)
        for start in range(0, N, BLOCK):
            cols = start + all_cols
            mask = (row < num_rows) & (cols < N)
            x = load_held(x_ptr + cols, mask)
            _store_norms(
                x, root, weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
                y_1_ptr, y_2_ptr, y_3_ptr, y_4_ptr, row, cols, mask, N,
                OFFSET_1, OFFSET_2, OFFSET_3, OFFSET_4, SCALE_1, SCALE_2, SCALE_3, SCALE_4,
                PLAN_1, PLAN_2, PLAN_3, PLAN_4,
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
    dtype = torch.promote_types(x.dtype, plans[0].compute)
    tile = tile or Launch.for_shape(x.shape[-1], dtype, held=HELD)
    with device_of(x, wrap):
        wrap(rms_norms_kernel)[tile.grid(num_rows(x))](
            x,
            *_filled([as_vector(weight) for weight in weights]),
            *_filled(ys),
            rstd,
            num_rows(x),
            *strides,
            N=x.shape[-1],
            ROWS=tile.rows,
            BLOCK=tile.block,
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
