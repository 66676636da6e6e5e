"""RMSNorm with a gate, over rows: each group of columns is a row.

    rstd = 1 / sqrt(mean(x^2) + eps)                   gate last
    y    = x * rstd * (weight + offset) * act(gate)

    value = x * act(gate)                              gate first
    rstd  = 1 / sqrt(mean(value^2) + eps)
    y     = value * rstd * (weight + offset)

Backward, gate last, with n = x * rstd * (weight + offset):

    grad_gate = grad_y * n * act'(gate)
    grad_x    = that of the norm, for grad_y * act(gate)

Gate first, with grad_value that of the norm for grad_y:

    grad_gate = grad_value * x * act'(gate)
    grad_x    = grad_value * act(gate)
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
    narrowed,
    num_tiles,
    row_of,
    says,
    store_tile,
    tile_at,
)
from normfuse.ops.kernels.constants import NAMES, norm_constants
from normfuse.ops.kernels.row import (
    gated,
    normalised,
    root_of,
    row_index,
    row_start,
    squares,
    step,
    store_inverse_root,
    widened,
    zero_sums,
)
from normfuse.ops.kernels.rows import (
    addressed,
    as_vector,
    copied_into,
    empty_product,
    is_empty,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.tile import Launch, device_of, eager

if TYPE_CHECKING:
    from normfuse.ops.gating import Gating
    from normfuse.ops.rounding import RoundingPlan


@triton.jit
def _value(
    xs,
    gates,
    x_ptr,
    gate_ptr,
    is_row,
    index,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATING: tl.constexpr,
    PLAN: tl.constexpr,
):
    """What is normalised."""
    value = tile_at(xs, x_ptr, is_row, index, N, BLOCK, READS, "held")
    if GATE_FIRST:
        gate = tile_at(gates, gate_ptr, is_row, index, N, BLOCK, READS, "held")
        value = gated(value, gate, GATING, step(PLAN, "on"))
    return value


@triton.jit
def _store_result(
    value,
    root,
    gates,
    weights,
    gate_ptr,
    weight_ptr,
    y_ptr,
    is_row,
    index,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATING: tl.constexpr,
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
):
    weight = tile_at(weights, weight_ptr, None, index, N, BLOCK, READS, "ahead")
    y = normalised(value, root, weight, OFFSET, PLAN, False)
    if not GATE_FIRST:
        gate = tile_at(gates, gate_ptr, is_row, index, N, BLOCK, READS, "ahead")
        y = gated(y, gate, GATING, step(PLAN, "on"))
    store_tile(y_ptr, y, is_row, index, N, BLOCK, READS)


@triton.jit
def gated_rms_norm_kernel(
    x_ptr,
    gate_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    size_x_middle,
    size_x_inner,
    stride_x_outer,
    stride_x_middle,
    stride_x_inner,
    size_gate_middle,
    size_gate_inner,
    stride_gate_outer,
    stride_gate_middle,
    stride_gate_inner,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    VALUE: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    GATING: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
):
    row = row_index(ROWS)
    is_row = row < num_rows
    x_ptr += row_start(
        row, size_x_middle, size_x_inner, stride_x_outer, stride_x_middle, stride_x_inner
    )
    gate_ptr += row_start(
        row,
        size_gate_middle,
        size_gate_inner,
        stride_gate_outer,
        stride_gate_middle,
        stride_gate_inner,
    )
    y_ptr += row * N
    # The groups of one x follow each other.
    weight_ptr = row_of(weight_ptr, row % WEIGHTS, N if WEIGHTS > 1 else 0)
    GATE_READ: tl.constexpr = "held" if GATE_FIRST else "ahead"
    xs = load_tiles(x_ptr, is_row, N, BLOCK, READS, "held")
    gates = load_tiles(gate_ptr, is_row, N, BLOCK, READS, GATE_READ)
    weights = load_tiles(weight_ptr, None, N, BLOCK, READS, "ahead")
    sums = zero_sums(ROWS, BLOCK, PLAN)
    values = ()
    if says(READS, "held"):
        for index in tl.static_range(num_tiles(N, BLOCK)):
            value = _value(
                xs, gates, x_ptr, gate_ptr, is_row, index, N, BLOCK, READS, GATE_FIRST, GATING, PLAN
            )
            values = values + (narrowed(value, VALUE),)
            sums += squares(value, PLAN)
    else:  # a loop at run time: unrolled, so many tiles would run out of registers
        for index in range(num_tiles(N, BLOCK)):
            value = _value(
                xs, gates, x_ptr, gate_ptr, is_row, index, N, BLOCK, READS, GATE_FIRST, GATING, PLAN
            )
            sums += squares(value, PLAN)
    root = root_of(sums, None, N, EPS, PLAN)
    values, gates, weights = fenced(values, READS), fenced(gates, READS), fenced(weights, READS)
    if says(READS, "held"):
        for index in tl.static_range(num_tiles(N, BLOCK)):
            _store_result(
                widened(values[index]), root, gates, weights, gate_ptr, weight_ptr, y_ptr,
                is_row, index, N, BLOCK, READS, GATE_FIRST, GATING, OFFSET, PLAN,
            )  # fmt: skip
    else:
        for index in range(num_tiles(N, BLOCK)):
            value = _value(
                xs, gates, x_ptr, gate_ptr, is_row, index, N, BLOCK, READS, GATE_FIRST, GATING, PLAN
            )
            _store_result(
                value, root, gates, weights, gate_ptr, weight_ptr, y_ptr,
                is_row, index, N, BLOCK, READS, GATE_FIRST, GATING, OFFSET, PLAN,
            )  # fmt: skip
    store_inverse_root(rstd_ptr, root, row, num_rows, PLAN)


def launch(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    groups: int,
    gate_first: bool,
    activation: str,
    plan: RoundingPlan,
    gating: Gating,
    *,
    store_rstd: bool = True,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x, gate (..., N), weight (N,), (N / groups,) or None -> y (..., N), rstd or None.

    `y` is laid out as the product of eager. `store_rstd`, `tile` and `wrap` as in
    `rms_norm.launch`.
    """
    is_fresh = not gate_first or torch.promote_types(x.dtype, gating.factor) != gating.product
    y = empty_product(x, gate, plan.out if gate_first else gating.out, is_fresh=is_fresh)
    width = x.shape[-1] // groups
    rows_of_x, rows_of_gate, rows_of_y = (
        tensor if groups == 1 else tensor.unflatten(-1, (groups, width)) for tensor in (x, gate, y)
    )
    rstd = None
    if store_rstd:
        rstd = x.new_empty((*rows_of_x.shape[:-1], 1), dtype=plan.compute)
    if is_empty(x):
        return y, rstd
    order = row_order(rows_of_y, rstd)
    if order is None:
        again = partial(launch, store_rstd=store_rstd, tile=tile, wrap=wrap)
        norm = (eps, offset, groups, gate_first, activation, plan, gating)
        return copied_into((y, rstd), again(x.contiguous(), gate.contiguous(), weight, *norm))
    rows_of_x, strides_x = addressed(rows_of_x, order, rows_of_y)
    rows_of_gate, strides_gate = addressed(rows_of_gate, order, rows_of_y)
    compute = torch.promote_types(gating.product, plan.compute)
    tile = tile or Launch.for_shape(width, x.dtype, compute, op="gated_rms_norm")
    with device_of(x, wrap):
        wrap(gated_rms_norm_kernel)[tile.grid(num_rows(rows_of_y))](
            rows_of_x,
            rows_of_gate,
            as_vector(weight),
            y,
            rstd,
            num_rows(rows_of_y),
            *strides_x,
            *strides_gate,
            **tile.constants(width, num_rows(rows_of_y)),
            VALUE=NAMES[gating.out if gate_first else x.dtype],
            WEIGHTS=1 if weight is None else weight.shape[0] // width,
            GATE_FIRST=int(gate_first),
            GATING=f"activation={activation} {gating}",
            **norm_constants(plan, eps, offset),
            num_warps=tile.num_warps,
        )
    return y, rstd
