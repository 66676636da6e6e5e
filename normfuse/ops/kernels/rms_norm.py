"""RMSNorm over rows.

    rstd = 1 / sqrt(mean(x^2) + eps)
    y    = x * rstd * (weight + offset)

Backward, with unit = x * rstd and g = grad_y * (weight + offset):

    grad_x      = rstd * (g - unit * mean(g * unit))
    grad_weight = sum over rows of grad_y * unit
"""

from __future__ import annotations

from collections.abc import Callable
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
from normfuse.ops.kernels.constants import norm_constants
from normfuse.ops.kernels.row import (
    normalised,
    root_of,
    row_index,
    row_start,
    squares,
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


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    eps_ptr,
    y_ptr,
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
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
):
    row = row_index(ROWS)
    is_row = row < num_rows
    x_ptr += row_start(
        row, size_middle, size_inner, stride_x_outer, stride_x_middle, stride_x_inner
    )
    y_ptr += row * N
    weight_ptr = row_of(weight_ptr, row, 0)
    xs = load_tiles(x_ptr, is_row, N, BLOCK, READS, "held")
    weights = load_tiles(weight_ptr, None, N, BLOCK, READS, "ahead")
    sums = zero_sums(ROWS, BLOCK, PLAN)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
        sums += squares(x, PLAN)
    root = root_of(sums, eps_ptr, N, EPS, PLAN)
    xs, weights = fenced(xs, READS), fenced(weights, READS)
    for index in tl.static_range(num_tiles(N, BLOCK)):
        x = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
        weight = tile_at(weights, weight_ptr, None, index, N, BLOCK, READS, "ahead")
        y = normalised(x, root, weight, OFFSET, PLAN, False)
        store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)
    store_inverse_root(rstd_ptr, root, row, num_rows, PLAN)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps_tensor: torch.Tensor | None,
    eps: float,
    offset: float,
    plan: RoundingPlan,
    *,
    store_rstd: bool = True,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (..., N), weight (N,) or None -> y (..., N) in `plan.out`, rstd (..., 1) in `plan.compute`.

    Args:
        x: rows of any strides.
        weight: any of the four floating types.
        eps_tensor: one element, replaces `eps`.
        eps: added to the mean of the squares.
        offset: added to the weight.
        plan: where the norm rounds.
        store_rstd: whether to store rstd; else it is None.
        tile: by default the one for this width and type.
        wrap: how a compiler sees the launch; `torch.library.wrap_triton`.
    """
    y = torch.empty_like(x, dtype=plan.out)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=plan.compute) if store_rstd else None
    if is_empty(x):
        return y, rstd
    order = row_order(y, rstd)
    if order is None:
        again = partial(launch, store_rstd=store_rstd, tile=tile, wrap=wrap)
        values = again(x.contiguous(), weight, eps_tensor, eps, offset, plan)
        return copied_into((y, rstd), values)
    x, strides = addressed(x, order, y)
    tile = tile or Launch.for_shape(x.shape[-1], x.dtype, plan.compute, op="rms_norm")
    with device_of(x, wrap):
        wrap(rms_norm_kernel)[tile.grid(num_rows(x))](
            x,
            as_vector(weight),
            eps_tensor,
            y,
            rstd,
            num_rows(x),
            *strides,
            **tile.constants(x.shape[-1], num_rows(x)),
            **norm_constants(plan, eps, offset),
            num_warps=tile.num_warps,
        )
    return y, rstd
