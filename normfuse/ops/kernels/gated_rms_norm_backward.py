"""The gradients of RMSNorm with a gate, over rows: each group of columns is a row.

Gate last, with unit = x * rstd, n = unit * (weight + offset) and g = grad_y * act(gate):

    grad_x      = rstd * (g_unit - unit * mean(g_unit * unit))      g_unit = g * (weight + offset)
    grad_gate   = grad_y * n * act'(gate)
    grad_weight = sum over rows of g * unit

Gate first, with value = x * act(gate), unit = value * rstd and grad_value as grad_x above, for
g = grad_y:

    grad_x      = grad_value * act(gate)
    grad_gate   = grad_value * x * act'(gate)
    grad_weight = sum over rows of grad_y * unit

Where groups have weights of their own, a program takes rows of one group only, so that it adds up
one weight's gradient. Rows too wide for registers are read twice, the second time from the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.chunks import fenced
from normfuse.ops.kernels.constants import NAMES, target
from normfuse.ops.kernels.row import row_of_tile, row_start
from normfuse.ops.kernels.row_backward import (
    add_to_partial,
    load_held_weight,
    load_rstd,
    load_weight,
    load_wide,
    norm_gradient,
    store_partial,
    weight_at,
    weighted,
    wide_type,
    zeros,
)
from normfuse.ops.kernels.rows import (
    addressed,
    as_vector,
    copied_into,
    is_empty,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.tile import device_of, eager
from normfuse.ops.kernels.tile_backward import (
    BackwardLaunch,
    no_gradients,
    offset_of,
    partial_sums,
    shared_memory,
    sum_partials,
)

if TYPE_CHECKING:
    from normfuse.ops.rounding import RoundingPlan


# How many tiles of a row are in shared memory for each row on its way: of x, gate, gradient and
# weight, 4.7 as Triton compiles it (tests/kernels/test_cross_compile_gated_backward.py).
OPERANDS = 5


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    """act(gate) and act'(gate), where s * (1 + gate * (1 - s)) is s + act(gate) * (1 - s)."""
    sigmoid = tl.sigmoid(gate)
    if ACTIVATION == "sigmoid":
        factor = sigmoid
        slope = sigmoid * (1.0 - sigmoid)
    else:
        factor = gate * sigmoid
        slope = sigmoid + factor * (1.0 - sigmoid)
    return factor, slope


@triton.jit
def _through_gate(grad_y, x, factor, GATE_FIRST: tl.constexpr):
    """The gradient of the norm's result, and what is normalised."""
    if GATE_FIRST:
        grad = grad_y
        value = x * factor
    else:
        grad = grad_y * factor
        value = x
    return grad, value


@triton.jit
def _products(
    grad_y, x, gate, weight,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What the mean of a row sums, for one tile."""
    factor, _ = _activated(gate, ACTIVATION)
    grad, value = _through_gate(grad_y, x, factor, GATE_FIRST)
    return weighted(grad, weight, OFFSET, WIDE) * value


@triton.jit
def _store_gradients(
    grad_y, x, gate, weight, rstd, mean, grad_x_ptr, grad_gate_ptr, cols, mask,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the gradients of x and gate; returns what it adds to the weight's."""
    factor, slope = _activated(gate, ACTIVATION)
    grad, value = _through_gate(grad_y, x, factor, GATE_FIRST)
    unit = value * rstd
    grad_value = norm_gradient(weighted(grad, weight, OFFSET, WIDE), unit, rstd, mean)
    if GATE_FIRST:
        grad_x = grad_value * factor
        grad_gate = grad_value * x * slope
    else:
        grad_x = grad_value
        grad_gate = grad_y * weighted(unit, weight, OFFSET, WIDE) * slope
    if grad_x_ptr is not None:
        tl.store(grad_x_ptr + cols, grad_x, mask=mask)
    if grad_gate_ptr is not None:
        tl.store(grad_gate_ptr + cols, grad_gate, mask=mask)
    return grad * unit


@triton.jit
def _held_row(
    sums, weights, weight_ptr, grad_y_ptr, x_ptr, gate_ptr, grad_x_ptr, grad_gate_ptr,
    rstd, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
    ON: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read once; returns the sums of the weight's gradient with its own."""
    TYPE: tl.constexpr = wide_type(WIDE)
    products = zeros(ROWS, BLOCK, WIDE)
    grads = ()
    xs = ()
    gates = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        grad = tl.load(grad_y_ptr + cols, mask=mask, other=0.0)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        gate = tl.load(gate_ptr + cols, mask=mask, other=0.0)
        grads += (grad,)  # held in the narrow type in which they come
        xs += (x,)
        gates += (gate,)
        products += _products(
            grad.to(TYPE), x.to(TYPE), gate.to(TYPE),
            weight_at(weights, weight_ptr, cols, chunk, N, ROWS),
            GATE_FIRST, ACTIVATION, OFFSET, WIDE,
        )  # fmt: skip
    mean = tl.sum(products, axis=1, keep_dims=True) * rstd * (1.0 / N)
    # Else the compiler keeps their float32 forms and activations, in many more registers.
    grads, xs, gates = fenced(grads, ON), fenced(xs, ON), fenced(gates, ON)
    added = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        addend = _store_gradients(
            grads[chunk].to(TYPE), xs[chunk].to(TYPE), gates[chunk].to(TYPE),
            weight_at(weights, weight_ptr, cols, chunk, N, ROWS), rstd, mean,
            grad_x_ptr, grad_gate_ptr, cols, is_row & (cols < N),
            GATE_FIRST, ACTIVATION, OFFSET, WIDE,
        )  # fmt: skip
        added += (sums[chunk] + addend,)
    return added


@triton.jit
def _stream_row(
    partial_ptr, weight_ptr, grad_y_ptr, x_ptr, gate_ptr, grad_x_ptr, grad_gate_ptr,
    rstd, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    GATE_FIRST: tl.constexpr, ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read twice, chunk by chunk; the sums stay in memory."""
    products = zeros(ROWS, BLOCK, WIDE)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        products += _products(
            load_wide(grad_y_ptr, cols, mask, WIDE), load_wide(x_ptr, cols, mask, WIDE),
            load_wide(gate_ptr, cols, mask, WIDE), load_weight(weight_ptr, cols, N),
            GATE_FIRST, ACTIVATION, OFFSET, WIDE,
        )  # fmt: skip
    mean = tl.sum(products, axis=1, keep_dims=True) * rstd * (1.0 / N)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        addend = _store_gradients(
            load_wide(grad_y_ptr, cols, mask, WIDE), load_wide(x_ptr, cols, mask, WIDE),
            load_wide(gate_ptr, cols, mask, WIDE), load_weight(weight_ptr, cols, N),
            rstd, mean, grad_x_ptr, grad_gate_ptr, cols, mask,
            GATE_FIRST, ACTIVATION, OFFSET, WIDE,
        )  # fmt: skip
        if partial_ptr is not None:
            add_to_partial(partial_ptr, addend, cols, mask, N)


@triton.jit
def gated_rms_norm_backward_kernel(
    grad_y_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, grad_x_ptr, grad_gate_ptr, partial_ptr,
    num_rows,
    size_grad_y_middle, size_grad_y_inner,
    stride_grad_y_outer, stride_grad_y_middle, stride_grad_y_inner,
    size_x_middle, size_x_inner, stride_x_outer, stride_x_middle, stride_x_inner,
    size_gate_middle, size_gate_inner, stride_gate_outer, stride_gate_middle, stride_gate_inner,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, STAGES: tl.constexpr, WEIGHTS: tl.constexpr, GATE_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr, ON: tl.constexpr,
):  # fmt: skip
    """Program p takes rows of weight p % WEIGHTS, every num_programs / WEIGHTS-th tile of them."""
    which = tl.program_id(0) % WEIGHTS
    if weight_ptr is not None:
        weight_ptr += which * N
    all_cols = tl.arange(0, BLOCK)[None, :]
    sums = ()
    weights = ()
    for chunk in tl.static_range(CHUNKS):
        sums += (zeros(ROWS, BLOCK, WIDE),)
        if ROWS > 1:
            weights += (load_held_weight(weight_ptr, chunk * BLOCK + all_cols, N, ROWS),)
    num_tiles = tl.cdiv(num_rows // WEIGHTS, ROWS)
    step = tl.num_programs(0) // WEIGHTS
    for tile in tl.range(tl.program_id(0) // WEIGHTS, num_tiles, step, num_stages=STAGES):
        row = row_of_tile(tile, ROWS) * WEIGHTS + which
        is_row = row < num_rows
        rstd = load_rstd(rstd_ptr, row, num_rows, WIDE)
        grad_y_row = grad_y_ptr + row_start(
            row, size_grad_y_middle, size_grad_y_inner,
            stride_grad_y_outer, stride_grad_y_middle, stride_grad_y_inner,
        )  # fmt: skip
        x_row = x_ptr + row_start(
            row, size_x_middle, size_x_inner, stride_x_outer, stride_x_middle, stride_x_inner
        )
        gate_row = gate_ptr + row_start(
            row, size_gate_middle, size_gate_inner,
            stride_gate_outer, stride_gate_middle, stride_gate_inner,
        )  # fmt: skip
        grad_x_row = None if grad_x_ptr is None else grad_x_ptr + row * N
        grad_gate_row = None if grad_gate_ptr is None else grad_gate_ptr + row * N
        if HELD:
            sums = _held_row(
                sums, weights, weight_ptr, grad_y_row, x_row, gate_row, grad_x_row, grad_gate_row,
                rstd, is_row, all_cols,
                N, ROWS, BLOCK, CHUNKS, GATE_FIRST, ACTIVATION, OFFSET, WIDE, ON,
            )  # fmt: skip
        else:
            _stream_row(
                partial_ptr, weight_ptr, grad_y_row, x_row, gate_row, grad_x_row, grad_gate_row,
                rstd, is_row, all_cols,
                N, ROWS, BLOCK, GATE_FIRST, ACTIVATION, OFFSET, WIDE,
            )  # fmt: skip
    if HELD and partial_ptr is not None:
        for chunk in tl.static_range(CHUNKS):
            # The sums of neighbouring programs, one of each weight, make a row of all columns.
            store_partial(partial_ptr, sums[chunk], chunk * BLOCK + all_cols, N)


def launch(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    groups: int,
    gate_first: bool,
    activation: str,
    plan: RoundingPlan,
    output_mask: Sequence[bool],
    *,
    tile: BackwardLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """grad_y, x, gate (..., N), weight (N,), (N / groups,) or None -> gradients of the last three.

    Args:
        grad_y: rows of any strides, any of the four floating types.
        x: the same.
        gate: the same.
        weight: any of the four types.
        rstd: contiguous, as the norm returns it: (..., 1), or (..., groups, 1).
        offset: added to the weight.
        groups: of the columns.
        gate_first: whether the gate multiplies x, or the norm.
        activation: of the gate.
        plan: the norm's; its statistic's type, at least float32, is that of the sums.
        output_mask: which of the gradients are wanted.
        tile: by default the one for this shape and type; its programs are those of one weight.
        wrap: as in `rms_norm_backward.launch`.
    """
    results = (
        torch.empty_like(x) if output_mask[0] else None,
        torch.empty_like(gate) if output_mask[1] else None,
    )
    learned = weight if output_mask[2] else None
    if is_empty(x):
        return *results, no_gradients([learned])[0]
    norm = (weight, learned, rstd, offset, groups, gate_first, activation, plan)
    return *results, _launch((grad_y, x, gate), *norm, results, tile, wrap)


def _launch(
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weight: torch.Tensor | None,
    learned: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    groups: int,
    gate_first: bool,
    activation: str,
    plan: RoundingPlan,
    results: tuple[torch.Tensor | None, ...],
    tile: BackwardLaunch | None,
    wrap: Callable[[Any], Any],
) -> torch.Tensor | None:
    """Fills `results`, the gradients of x and gate; returns that of `learned`, the weight."""
    order = row_order(*(r if r is None else _rows(r, groups) for r in results), rstd)
    if order is None:
        dense = tuple(None if r is None else torch.empty_like(r).contiguous() for r in results)
        grad_y, x, gate = (operand.contiguous() for operand in operands)
        norm = (weight, learned, rstd.contiguous(), offset, groups, gate_first, activation, plan)
        grad_weight = _launch((grad_y, x, gate), *norm, dense, tile, wrap)
        copied_into(results, dense)
        return grad_weight
    x = _rows(operands[1], groups)
    like = next((_rows(r, groups) for r in results if r is not None), x.contiguous())
    (grad_y, strides_grad_y), (x, strides_x), (gate, strides_gate) = (
        addressed(_rows(operand, groups), order, like) for operand in operands
    )
    width, dtype = x.shape[-1], torch.promote_types(plan.compute, torch.float32)
    weights = 1 if weight is None else weight.shape[0] // width
    tile = tile or _tile_for(grad_y, x, gate, plan, weights)
    partial = partial_sums(learned, tile, dtype)
    with device_of(x, wrap):
        wrap(gated_rms_norm_backward_kernel)[(tile.programs * weights,)](
            *(grad_y, x, gate),
            as_vector(weight),
            rstd,
            *results,
            partial,
            num_rows(x),
            *strides_grad_y,
            *strides_x,
            *strides_gate,
            N=width,
            **tile.constants(),
            WEIGHTS=weights,
            GATE_FIRST=int(gate_first),
            ACTIVATION=activation,
            OFFSET=offset_of(weight, offset),
            WIDE=NAMES[dtype],
            ON=target(),
            num_warps=tile.num_warps,
        )
        return sum_partials([partial], [learned], wrap)[0]


def _rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """(..., N) -> (..., groups, N / groups); unchanged for one group."""
    return x if groups == 1 else x.unflatten(-1, (groups, x.shape[-1] // groups))


def _tile_for(
    grad_y: torch.Tensor, x: torch.Tensor, gate: torch.Tensor, plan: RoundingPlan, weights: int
) -> BackwardLaunch:
    """The launch for the rows of x, whose programs `weights` share."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, gate.dtype), grad_y.dtype)
    if plan.compute == torch.float64:
        dtype = plan.compute
    # With the gate, a row takes the registers of two norms.
    sizes: Any = {"norms": 2, "operands": OPERANDS, "shared_memory": shared_memory(x.device)}
    tile = BackwardLaunch.for_shape(x.shape[-1], num_rows(x), dtype, **sizes)
    return replace(tile, programs=triton.cdiv(tile.programs, weights))
