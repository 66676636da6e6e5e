"""The gradients of RMSNorm with a modulation, over rows.

With unit = x * rstd, n = unit * (weight + offset) and g = grad_y * (scale + scale_offset):

    grad_x      = rstd * (g_unit - unit * mean(g_unit * unit))      g_unit = g * (weight + offset)
    grad_scale  = grad_y * n, summed over the rows that share a row of scale
    grad_shift  = grad_y, likewise
    grad_weight = sum over rows of g * unit

Rows that share a row of scale or shift, and follow each other, are a sequence: a program takes rows
of one sequence only and adds their gradients up; `sequences_backward.py` adds up the programs. In a
sequence the weight's sum is (scale + scale_offset) times that of grad_y * unit, and the scale's is
(weight + offset) times it, so that one sum serves both.

A scale that has a row for each of x has its gradient stored row by row. So does one that is shared
otherwise, such as one row for each position, in float32; torch then sums its rows. The gradient of
such a shift is plain torch altogether.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.constants import NAMES
from normfuse.ops.kernels.row import row_of_tile, row_start
from normfuse.ops.kernels.row_backward import (
    add_to_partial,
    load_rstd,
    load_weight,
    load_wide,
    norm_gradient,
    store_partial,
    weighted,
    wide_type,
    zeros,
)
from normfuse.ops.kernels.rows import (
    addressed,
    as_vector,
    copied_into,
    is_empty,
    known,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.sequences_backward import Sequences, depth_of, partial_sums, sum_up
from normfuse.ops.kernels.tile import device_of, eager
from normfuse.ops.kernels.tile_backward import BackwardLaunch, offset_of, shared_memory

if TYPE_CHECKING:
    from normfuse.ops.rounding import RoundingPlan


# How many tiles of a row are in shared memory for each row on its way: of x, gradient, scale and
# weight, 5.5 as Triton compiles it (tests/kernels/test_cross_compile_gated_backward.py).
OPERANDS = 6


@triton.jit
def _store_gradients(
    grad_y, x, scale, weight, rstd, mean, grad_x_ptr, grad_scale_ptr, cols, mask,
    SCALE_OFFSET: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the gradients of x and of a scale of each row; returns g and unit."""
    grad = weighted(grad_y, scale, SCALE_OFFSET, WIDE)
    unit = x * rstd
    if grad_x_ptr is not None:
        grad_unit = weighted(grad, weight, OFFSET, WIDE)
        tl.store(grad_x_ptr + cols, norm_gradient(grad_unit, unit, rstd, mean), mask=mask)
    if grad_scale_ptr is not None:
        tl.store(grad_scale_ptr + cols, grad_y * weighted(unit, weight, OFFSET, WIDE), mask=mask)
    return grad, unit


@triton.jit
def _held_row(
    sums, shift_sums, weight_ptr, scale_ptr, grad_y_ptr, x_ptr, grad_x_ptr, grad_scale_ptr,
    rstd, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    IS_SHARED: tl.constexpr, SCALE_OFFSET: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read once; returns both sums with its own.

    Weight and scale come from the cache: held, they would leave too few registers.
    """
    TYPE: tl.constexpr = wide_type(WIDE)
    products = zeros(ROWS, BLOCK, WIDE)
    xs = ()
    grads = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        x = tl.load(x_ptr + cols, mask=mask, other=0.0)
        grad_y = tl.load(grad_y_ptr + cols, mask=mask, other=0.0)
        xs += (x,)  # held in the narrow type in which they come
        grads += (grad_y,)
        scale = load_wide(scale_ptr, cols, mask, WIDE)
        grad = weighted(grad_y.to(TYPE), scale, SCALE_OFFSET, WIDE)
        products += weighted(grad, load_weight(weight_ptr, cols, N), OFFSET, WIDE) * x.to(TYPE)
    mean = tl.sum(products, axis=1, keep_dims=True) * rstd * (1.0 / N)
    added = ()
    shift_added = ()
    for chunk in tl.static_range(CHUNKS):
        cols = chunk * BLOCK + all_cols
        mask = is_row & (cols < N)
        grad_y = grads[chunk].to(TYPE)
        grad, unit = _store_gradients(
            grad_y, xs[chunk].to(TYPE), load_wide(scale_ptr, cols, mask, WIDE),
            load_weight(weight_ptr, cols, N), rstd, mean, grad_x_ptr, grad_scale_ptr,
            cols, mask, SCALE_OFFSET, OFFSET, WIDE,
        )  # fmt: skip
        added += (sums[chunk] + (grad_y if IS_SHARED else grad) * unit,)
        shift_added += (shift_sums[chunk] + grad_y,)
    return added, shift_added


@triton.jit
def _stream_row(
    scale_partial_ptr, shift_partial_ptr, partial_ptr,
    weight_ptr, scale_ptr, grad_y_ptr, x_ptr, grad_x_ptr, grad_scale_ptr, rstd, is_row, all_cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    SCALE_OFFSET: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of rows, read twice, chunk by chunk; the sums stay in memory."""
    products = zeros(ROWS, BLOCK, WIDE)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        scale = load_wide(scale_ptr, cols, mask, WIDE)
        grad = weighted(load_wide(grad_y_ptr, cols, mask, WIDE), scale, SCALE_OFFSET, WIDE)
        grad_unit = weighted(grad, load_weight(weight_ptr, cols, N), OFFSET, WIDE)
        products += grad_unit * load_wide(x_ptr, cols, mask, WIDE)
    mean = tl.sum(products, axis=1, keep_dims=True) * rstd * (1.0 / N)
    for start in range(0, N, BLOCK):
        cols = start + all_cols
        mask = is_row & (cols < N)
        grad_y = load_wide(grad_y_ptr, cols, mask, WIDE)
        weight = load_weight(weight_ptr, cols, N)
        grad, unit = _store_gradients(
            grad_y, load_wide(x_ptr, cols, mask, WIDE), load_wide(scale_ptr, cols, mask, WIDE),
            weight, rstd, mean, grad_x_ptr, grad_scale_ptr, cols, mask, SCALE_OFFSET, OFFSET, WIDE,
        )  # fmt: skip
        if scale_partial_ptr is not None:
            addend = grad_y * weighted(unit, weight, OFFSET, WIDE)
            add_to_partial(scale_partial_ptr, addend, cols, mask, N)
        if shift_partial_ptr is not None:
            add_to_partial(shift_partial_ptr, grad_y, cols, mask, N)
        if partial_ptr is not None:
            add_to_partial(partial_ptr, grad * unit, cols, mask, N)


@triton.jit
def modulated_rms_norm_backward_kernel(
    grad_y_ptr, x_ptr, scale_ptr, weight_ptr, rstd_ptr,
    grad_x_ptr, grad_scale_ptr, scale_partial_ptr, shift_partial_ptr, partial_ptr,
    num_rows, num_programs,
    size_grad_y_middle, size_grad_y_inner,
    stride_grad_y_outer, stride_grad_y_middle, stride_grad_y_inner,
    size_x_middle, size_x_inner, stride_x_outer, stride_x_middle, stride_x_inner,
    size_scale_middle, size_scale_inner,
    stride_scale_outer, stride_scale_middle, stride_scale_inner,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    HELD: tl.constexpr, STAGES: tl.constexpr, IS_SHARED: tl.constexpr,
    SCALE_OFFSET: tl.constexpr, OFFSET: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Each sequence of num_rows rows has num_programs programs; IS_SHARED if it has one scale."""
    first = (tl.program_id(0) // num_programs).to(tl.int64) * num_rows
    start = tl.program_id(0) % num_programs
    all_cols = tl.arange(0, BLOCK)[None, :]
    sums = ()
    shift_sums = ()
    for _chunk in tl.static_range(CHUNKS):
        sums += (zeros(ROWS, BLOCK, WIDE),)
        shift_sums += (zeros(ROWS, BLOCK, WIDE),)
    # Hoisted out of the loop, addresses would take the registers of wide rows: they spill.
    for tile in tl.range(
        start, tl.cdiv(num_rows, ROWS), num_programs, num_stages=STAGES, disable_licm=True
    ):
        place = row_of_tile(tile, ROWS)
        is_row = place < num_rows
        rstd = load_rstd(rstd_ptr + first, place, num_rows, WIDE)
        row = first + place
        grad_y_row = grad_y_ptr + row_start(
            row, size_grad_y_middle, size_grad_y_inner,
            stride_grad_y_outer, stride_grad_y_middle, stride_grad_y_inner,
        )  # fmt: skip
        x_row = x_ptr + row_start(
            row, size_x_middle, size_x_inner, stride_x_outer, stride_x_middle, stride_x_inner
        )
        scale_row = scale_ptr + row_start(
            row, size_scale_middle, size_scale_inner,
            stride_scale_outer, stride_scale_middle, stride_scale_inner,
        )  # fmt: skip
        grad_x_row = None if grad_x_ptr is None else grad_x_ptr + row * N
        grad_scale_row = None if grad_scale_ptr is None else grad_scale_ptr + row * N
        if HELD:
            sums, shift_sums = _held_row(
                sums, shift_sums, weight_ptr, scale_row, grad_y_row, x_row,
                grad_x_row, grad_scale_row, rstd, is_row, all_cols,
                N, ROWS, BLOCK, CHUNKS, IS_SHARED, SCALE_OFFSET, OFFSET, WIDE,
            )  # fmt: skip
        else:
            _stream_row(
                scale_partial_ptr, shift_partial_ptr, partial_ptr, weight_ptr, scale_row,
                grad_y_row, x_row, grad_x_row, grad_scale_row, rstd, is_row, all_cols,
                N, ROWS, BLOCK, SCALE_OFFSET, OFFSET, WIDE,
            )  # fmt: skip
    if HELD:
        scale_row = scale_ptr + row_start(
            first, size_scale_middle, size_scale_inner,
            stride_scale_outer, stride_scale_middle, stride_scale_inner,
        )  # fmt: skip
        for chunk in tl.static_range(CHUNKS):
            cols = chunk * BLOCK + all_cols
            if scale_partial_ptr is not None:
                total = weighted(sums[chunk], load_weight(weight_ptr, cols, N), OFFSET, WIDE)
                store_partial(scale_partial_ptr, total, cols, N)
            if shift_partial_ptr is not None:
                store_partial(shift_partial_ptr, shift_sums[chunk], cols, N)
            if partial_ptr is not None:
                total = sums[chunk]
                if IS_SHARED:
                    scale = load_wide(scale_row, cols, cols < N, WIDE)
                    total = weighted(total, scale, SCALE_OFFSET, WIDE)
                store_partial(partial_ptr, total, cols, N)


def launch(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    scale_offset: float,
    plan: RoundingPlan,
    output_mask: Sequence[bool],
    *,
    tile: BackwardLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor | None, ...]:
    """grad_y, x (..., N), scale and shift that broadcast to it -> gradients of all but grad_y.

    Args:
        grad_y: rows of any strides, any of the four floating types.
        x: the same.
        scale: the same.
        shift: only its shape and type are read; None if its gradient is not wanted.
        weight: (N,), any of the four types, or None.
        rstd: (..., 1), contiguous, as the norm returns it.
        offset: added to the weight.
        scale_offset: added to the scale.
        plan: the norm's; its statistic's type, at least float32, is that of the sums.
        output_mask: which of the gradients of x, scale, shift and weight are wanted.
        tile: by default the one for this shape and type; its programs are those of one sequence.
        wrap: as in `rms_norm_backward.launch`.
    """
    operands = (x, scale, shift, weight)
    wanted = [o if is_wanted else None for o, is_wanted in zip(operands, output_mask, strict=True)]
    grad_x = None if wanted[0] is None else torch.empty_like(x)
    if is_empty(x):
        return grad_x, *(None if o is None else o.new_zeros(o.shape) for o in wanted[1:])
    order = row_order(grad_x, rstd)
    if order is None:
        dense = (x.contiguous(), scale, shift, weight, rstd.contiguous())
        numbers = (offset, scale_offset, plan, output_mask)
        grads = launch(grad_y.contiguous(), *dense, *numbers, tile=tile, wrap=wrap)
        return *copied_into((grad_x,), grads[:1]), *grads[1:]
    norm = (weight, rstd, offset, scale_offset, plan)
    return grad_x, *_launch(grad_y, x, scale, norm, order, grad_x, wanted[1:], tile, wrap)


def _launch(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    norm: tuple[torch.Tensor | None, torch.Tensor, float, float, RoundingPlan],
    order: tuple[int, ...],
    grad_x: torch.Tensor | None,
    wanted: Sequence[torch.Tensor | None],
    tile: BackwardLaunch | None,
    wrap: Callable[[Any], Any],
) -> tuple[torch.Tensor | None, ...]:
    """Fills `grad_x`; returns the gradients of scale, shift and weight that are wanted."""
    wide = torch.promote_types(norm[-1].compute, torch.float32)
    sizes = [x.shape[dim] for dim in order]
    depths = [None if value is None else depth_of(value, x, order) for value in wanted]
    depth = max((one for one in depths if one is not None), default=0)
    if tile is None:
        tile = _tile_for(grad_y, x, scale, norm[-1])
        sequences = Sequences.of(sizes, depth, tile)
    else:
        sequences = Sequences(math.prod(sizes[:depth]), math.prod(sizes[depth:]), tile.programs)
    sums = [
        None if value is None or one is None
        else partial_sums(value, sizes[:one], sizes[one:depth], sequences.programs, tile, wide)
        for value, one in zip(wanted, depths, strict=True)
    ]  # fmt: skip
    by_row, is_whole, scale_depth = None, _has_every_row(scale, x), depth_of(scale, x, order)
    if wanted[0] is not None and sums[0] is None:
        by_row = x.new_empty(x.shape, dtype=scale.dtype if is_whole else wide)
    is_shared = scale_depth is not None and scale_depth <= depth
    results = (grad_x, by_row, *(None if one is None else one.partial for one in sums))
    with device_of(x, wrap):
        _launch_rows(grad_y, x, scale, norm, order, results, sequences, tile, is_shared, wrap)
        sum_up([one for one in sums if one is not None], x.shape[-1], sequences, wrap)
    grads = [None if one is None else one.grad for one in sums]
    if by_row is not None:
        grads[0] = by_row if is_whole else _summed(by_row, scale)
    if wanted[1] is not None and sums[1] is None:
        grads[1] = _summed(grad_y.to(wide), wanted[1])
    return tuple(grads)


def _launch_rows(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    scale: torch.Tensor,
    norm: tuple[torch.Tensor | None, torch.Tensor, float, float, RoundingPlan],
    order: tuple[int, ...],
    results: Sequence[torch.Tensor | None],
    sequences: Sequences,
    tile: BackwardLaunch,
    is_shared: bool,
    wrap: Callable[[Any], Any],
) -> None:
    """The pass over the rows: the gradients of x and of a scale of each row, and all sums."""
    weight, rstd, offset, scale_offset, plan = norm
    like = x.contiguous() if results[0] is None else results[0]
    pairs = [addressed(value, order, like) for value in (grad_y, x, scale.expand(x.shape))]
    wrap(modulated_rms_norm_backward_kernel)[(sequences.num * sequences.programs,)](
        *(value for value, _ in pairs),
        as_vector(weight),
        rstd,
        *results,
        sequences.rows,
        sequences.programs,
        *(number for _, strides in pairs for number in strides),
        N=x.shape[-1],
        **tile.constants(),
        IS_SHARED=int(is_shared),
        SCALE_OFFSET=float(scale_offset),
        OFFSET=offset_of(weight, offset),
        WIDE=NAMES[torch.promote_types(plan.compute, torch.float32)],
        num_warps=tile.num_warps,
    )


def _has_every_row(value: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether `value` has the shape of x."""
    pairs = zip(value.shape, x.shape, strict=False)
    return value.dim() == x.dim() and all(known(a == b) for a, b in pairs)


def _summed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`value` summed over the rows that share one of `like`, in its type."""
    return like.new_empty(like.shape).copy_(value.sum_to_size(like.shape))


def _tile_for(
    grad_y: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, plan: RoundingPlan
) -> BackwardLaunch:
    """The launch for the rows of x."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, scale.dtype), grad_y.dtype)
    if plan.compute == torch.float64:
        dtype = plan.compute
    # Two sums are held: a row takes the registers of two norms.
    sizes: Any = {"norms": 2, "operands": OPERANDS, "shared_memory": shared_memory(x.device)}
    return BackwardLaunch.for_shape(x.shape[-1], num_rows(x), dtype, **sizes)
