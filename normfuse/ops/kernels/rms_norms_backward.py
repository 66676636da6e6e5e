"""The gradients of several RMSNorms of one value, for up to four weights; what is absent is None.

With unit = x * rstd and g = sum over i of grad_y_i * scale_i * (weight_i + offset_i):

    grad_x        = rstd * (g - unit * mean(g * unit))
    grad_weight_i = sum over rows of grad_y_i * scale_i * unit

Operands are read once; rows too wide for registers twice, the second time from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.chunks import row_of
from normfuse.ops.kernels.constants import NAMES
from normfuse.ops.kernels.row import row_of_tile
from normfuse.ops.kernels.row_backward import (
    load_rstd,
    load_wide,
    norm_gradient,
    weighted,
    wide_type,
    zeros,
)
from normfuse.ops.kernels.rows import (
    addressed_by_one_stride,
    as_vector,
    copied_into,
    is_empty,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.stream_norms_backward import stream_norms
from normfuse.ops.kernels.sums_backward import load_weights, store_sums, zero_sums
from normfuse.ops.kernels.tile import device_of, eager
from normfuse.ops.kernels.tile_backward import (
    BackwardLaunch,
    launch_for,
    no_gradients,
    offset_of,
    partial_sums,
    sum_partials,
)

if TYPE_CHECKING:
    from normfuse.ops.rounding import RoundingPlan

SLOTS = 4  # no kernel argument may be a tuple, so every norm has its numbered ones


@triton.jit
def _taken(
    grad_unit, added, sums, weights, grad_ptr, unit, cols, mask, chunk,
    OFFSET: tl.constexpr, SCALE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of one norm: its gradient of the unit value, and its weight's, added to the others."""
    if grad_ptr is not None:
        grad = load_wide(grad_ptr, cols, mask, WIDE) * SCALE
        grad_unit += weighted(grad, weights[chunk], OFFSET, WIDE)
        if len(sums) > 0:
            added += (sums[chunk] + grad * unit,)
    return grad_unit, added


@triton.jit
def _held_row(
    sums_1, sums_2, sums_3, sums_4, weights_1, weights_2, weights_3, weights_4,
    grad_1_ptr, grad_2_ptr, grad_3_ptr, grad_4_ptr, x_ptr, grad_x_ptr, rstd, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    SHARE: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, OFFSET_3: tl.constexpr, OFFSET_4: tl.constexpr,
    SCALE_1: tl.constexpr, SCALE_2: tl.constexpr, SCALE_3: tl.constexpr, SCALE_4: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read once; returns the sums of the weights' gradients with its own."""
    TYPE: tl.constexpr = wide_type(WIDE)
    products = zeros(ROWS, BLOCK, WIDE)
    added_1 = ()
    added_2 = ()
    added_3 = ()
    added_4 = ()
    xs = ()
    grads = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        unit = x.to(TYPE) * rstd
        grad = zeros(ROWS, BLOCK, WIDE)
        grad, added_1 = _taken(
            grad, added_1, sums_1, weights_1, grad_1_ptr, unit, cols, mask, chunk,
            OFFSET_1, SCALE_1, WIDE,
        )  # fmt: skip
        grad, added_2 = _taken(
            grad, added_2, sums_2, weights_2, grad_2_ptr, unit, cols, mask, chunk,
            OFFSET_2, SCALE_2, WIDE,
        )  # fmt: skip
        grad, added_3 = _taken(
            grad, added_3, sums_3, weights_3, grad_3_ptr, unit, cols, mask, chunk,
            OFFSET_3, SCALE_3, WIDE,
        )  # fmt: skip
        grad, added_4 = _taken(
            grad, added_4, sums_4, weights_4, grad_4_ptr, unit, cols, mask, chunk,
            OFFSET_4, SCALE_4, WIDE,
        )  # fmt: skip
        xs += (x,)  # held in the narrow type in which it comes
        grads += (grad,)
        products += grad * unit
    if grad_x_ptr is not None:
        mean = tl.sum(products, axis=1, keep_dims=True) * SHARE
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * BLOCK + all_cols
            unit = xs[chunk].to(TYPE) * rstd
            grad_x = norm_gradient(grads[chunk], unit, rstd, mean)
            tl.store(grad_x_ptr + cols, grad_x, mask=is_row & (cols < N))
    return added_1, added_2, added_3, added_4


@triton.jit
def rms_norms_backward_kernel(
    x_ptr, grad_1_ptr, grad_2_ptr, grad_3_ptr, grad_4_ptr,
    weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr, rstd_ptr,
    grad_x_ptr, partial_1_ptr, partial_2_ptr, partial_3_ptr, partial_4_ptr,
    num_rows, stride_x_row,
    stride_grad_1_row, stride_grad_2_row, stride_grad_3_row, stride_grad_4_row,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, STAGES: tl.constexpr, SHARE: tl.constexpr,
    OFFSET_1: tl.constexpr, OFFSET_2: tl.constexpr, OFFSET_3: tl.constexpr, OFFSET_4: tl.constexpr,
    SCALE_1: tl.constexpr, SCALE_2: tl.constexpr, SCALE_3: tl.constexpr, SCALE_4: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Each program takes every num_programs-th tile of rows; SHARE is 1 / N, or 1 for an L2 norm"""
    all_cols = tl.arange(0, BLOCK)[None, :]
    if HELD:
        sums_1 = zero_sums(partial_1_ptr, ROWS, BLOCK, CHUNKS, WIDE)
        sums_2 = zero_sums(partial_2_ptr, ROWS, BLOCK, CHUNKS, WIDE)
        sums_3 = zero_sums(partial_3_ptr, ROWS, BLOCK, CHUNKS, WIDE)
        sums_4 = zero_sums(partial_4_ptr, ROWS, BLOCK, CHUNKS, WIDE)
        weights_1 = load_weights(grad_1_ptr, weight_1_ptr, all_cols, N, ROWS, BLOCK, CHUNKS)
        weights_2 = load_weights(grad_2_ptr, weight_2_ptr, all_cols, N, ROWS, BLOCK, CHUNKS)
        weights_3 = load_weights(grad_3_ptr, weight_3_ptr, all_cols, N, ROWS, BLOCK, CHUNKS)
        weights_4 = load_weights(grad_4_ptr, weight_4_ptr, all_cols, N, ROWS, BLOCK, CHUNKS)
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        row = row_of_tile(tile, ROWS)
        rstd = load_rstd(rstd_ptr, row, num_rows, WIDE)
        x_row = x_ptr + row * stride_x_row
        grad_1_row = grad_1_ptr + row * stride_grad_1_row
        grad_2_row = row_of(grad_2_ptr, row, stride_grad_2_row)
        grad_3_row = row_of(grad_3_ptr, row, stride_grad_3_row)
        grad_4_row = row_of(grad_4_ptr, row, stride_grad_4_row)
        grad_x_row = row_of(grad_x_ptr, row, N)
        if HELD:
            sums_1, sums_2, sums_3, sums_4 = _held_row(
                sums_1, sums_2, sums_3, sums_4, weights_1, weights_2, weights_3, weights_4,
                grad_1_row, grad_2_row, grad_3_row, grad_4_row, x_row, grad_x_row,
                rstd, row < num_rows, all_cols, N, ROWS, BLOCK, CHUNKS, SHARE,
                OFFSET_1, OFFSET_2, OFFSET_3, OFFSET_4, SCALE_1, SCALE_2, SCALE_3, SCALE_4, WIDE,
            )  # fmt: skip
        else:
            stream_norms(
                partial_1_ptr, partial_2_ptr, partial_3_ptr, partial_4_ptr,
                weight_1_ptr, weight_2_ptr, weight_3_ptr, weight_4_ptr,
                grad_1_row, grad_2_row, grad_3_row, grad_4_row, x_row, grad_x_row,
                rstd, row < num_rows, all_cols, N, ROWS, BLOCK, SHARE,
                OFFSET_1, OFFSET_2, OFFSET_3, OFFSET_4, SCALE_1, SCALE_2, SCALE_3, SCALE_4, WIDE,
            )  # fmt: skip
    if HELD:
        store_sums(partial_1_ptr, sums_1, all_cols, N, BLOCK, CHUNKS)
        store_sums(partial_2_ptr, sums_2, all_cols, N, BLOCK, CHUNKS)
        store_sums(partial_3_ptr, sums_3, all_cols, N, BLOCK, CHUNKS)
        store_sums(partial_4_ptr, sums_4, all_cols, N, BLOCK, CHUNKS)


def launch(
    x: torch.Tensor,
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    rstd: torch.Tensor,
    offsets: Sequence[float],
    scales: Sequence[float],
    plan: RoundingPlan,
    output_mask: Sequence[bool],
    *,
    tile: BackwardLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor]:
    """x, n <= 4 gradients (..., N), weights (N,) or None -> wanted gradients of x, then weights.

    `weights`, `offsets` and `scales` have an entry for each norm, the mask one for x before them.
    `plan` has the statistic of all; the rest as in `rms_norm_backward.launch`.
    """
    grad_x = torch.empty_like(x) if output_mask[0] else None
    learned = [w if flag else None for w, flag in zip(weights, output_mask[1:], strict=True)]
    if is_empty(x):
        sums = no_gradients(learned)
    else:
        norms = (weights, learned, rstd, offsets, scales, plan)
        sums = _launch(x, grads, *norms, grad_x, tile, wrap)
    return [grad for grad in (grad_x, *sums) if grad is not None]


def _launch(
    x: torch.Tensor,
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    learned: Sequence[torch.Tensor | None],
    rstd: torch.Tensor,
    offsets: Sequence[float],
    scales: Sequence[float],
    plan: RoundingPlan,
    grad_x: torch.Tensor | None,
    tile: BackwardLaunch | None,
    wrap: Callable[[Any], Any],
) -> list[torch.Tensor | None]:
    """Fills `grad_x`; returns the gradients of the weights that learn."""
    order = row_order(grad_x, rstd)
    if order is None:
        dense = None if grad_x is None else torch.empty_like(grad_x).contiguous()
        operands = (x.contiguous(), [grad.contiguous() for grad in grads])
        norms = (weights, learned, rstd, offsets, scales, plan)
        sums = _launch(*operands, *norms, dense, tile, wrap)
        copied_into((grad_x,), (dense,))
        return sums
    like = x.contiguous() if grad_x is None else grad_x
    pairs = [addressed_by_one_stride(operand, order, like) for operand in (x, *grads)]
    dtype = torch.promote_types(plan.compute, torch.float32)
    widest = max(grads, key=lambda grad: grad.dtype.itemsize)
    tile = tile or launch_for(x, widest, plan, norms=len(grads), operands=1 + len(grads))
    partials = [partial_sums(weight, tile, dtype) for weight in learned]
    with device_of(x, wrap):
        wrap(rms_norms_backward_kernel)[(tile.programs,)](
            pairs[0][0],
            *_filled([grad for grad, _ in pairs[1:]], None),
            *_filled([as_vector(weight) for weight in weights], None),
            rstd,
            grad_x,
            *_filled(partials, None),
            num_rows(x),
            pairs[0][1],
            *_filled([stride for _, stride in pairs[1:]], 0),
            N=x.shape[-1],
            **tile.constants(),
            SHARE=1.0 if plan.mean == "sum" else 1.0 / x.shape[-1],
            **_numbered("OFFSET", list(map(offset_of, weights, offsets))),
            **_numbered("SCALE", [float(scale) for scale in scales]),
            WIDE=NAMES[dtype],
            num_warps=tile.num_warps,
        )
        return sum_partials(partials, learned, wrap)


def _filled(values: list[Any], absent: Any) -> list[Any]:
    assert len(values) <= SLOTS, f"the kernel has {SLOTS} slots, got {len(values)} norms"
    return values + [absent] * (SLOTS - len(values))


def _numbered(name: str, values: list[Any]) -> dict[str, Any]:
    filled = enumerate(_filled(values, None), start=1)
    return {f"{name}_{number}": value for number, value in filled}
