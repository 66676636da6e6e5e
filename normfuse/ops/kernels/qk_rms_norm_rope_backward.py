"""The gradients of per-head norms of queries and keys, turned or not, over rows; one launch.

The pairs of grad_y turn back,

    g_a = grad_a * cos_a + grad_b * sin_b
    g_b = grad_b * cos_b - grad_a * sin_a

and then, with unit = x * rstd and h = g * (weight + offset):

    grad_x      = rstd * (h - unit * mean(h * unit))
    grad_weight = sum over rows of g * unit

Columns are held as parts: the a and the b of the pairs that turn, and the others. The sums of a
weight's gradient keep the shape of a tile until the last of a program's rows is read. Where no rstd
was kept, it is computed anew from the row, which is held anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels import rms_norm_backward
from normfuse.ops.kernels.row import row_of_tile, row_start, step
from normfuse.ops.kernels.row_backward import (
    load_held_weight,
    load_wide,
    norm_gradient,
    sum_of_rows,
    weighted,
    wide_type,
    zeros,
)
from normfuse.ops.kernels.slots import equally_laid_out
from normfuse.ops.kernels.slots_backward import PROGRAMS, launch_slots
from normfuse.ops.kernels.tile import eager

if TYPE_CHECKING:
    from normfuse.ops.rotation import Rotation
    from normfuse.ops.rounding import RoundingPlan

MAX_WIDTH = 1024  # of rows that do not turn; wider ones have a kernel that holds them in chunks


STAGES = tl.constexpr(3)  # one tile is worked on, and two are on their way


@triton.jit
def _turned_back(
    grad_a, grad_b, cos_ptr, sin_ptr, stride_table, pair, cols_a, cols_b, mask,
    DIM: tl.constexpr, COLS: tl.constexpr, START: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of both halves; a table of DIM columns holds an angle for each."""
    at_a = pair if COLS != DIM else cols_a - START
    cos_a = load_wide(cos_ptr, at_a * stride_table, mask, WIDE)
    sin_a = load_wide(sin_ptr, at_a * stride_table, mask, WIDE)
    cos_b, sin_b = cos_a, sin_a
    if COLS == DIM:
        cos_b = load_wide(cos_ptr, (cols_b - START) * stride_table, mask, WIDE)
        sin_b = load_wide(sin_ptr, (cols_b - START) * stride_table, mask, WIDE)
    return grad_a * cos_a + grad_b * sin_b, grad_b * cos_b - grad_a * sin_a


@triton.jit
def _inverse_root(xs, is_row, SHARE: tl.constexpr, EPS: tl.constexpr):
    """The rstd of each row from its parts; 0 for rows that are not there, whatever eps is."""
    squares = tl.sum(xs[0] * xs[0], axis=1, keep_dims=True)
    for part in tl.static_range(1, len(xs)):
        squares += tl.sum(xs[part] * xs[part], axis=1, keep_dims=True)
    return tl.where(is_row, 1.0 / tl.sqrt(squares * SHARE + EPS), 0.0)


@triton.jit
def _rows(
    program, cos_ptr, sin_ptr, stride_table,
    x_ptr, grad_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr, num_rows, num_programs,
    size_middle, size_inner,
    stride_x_outer, stride_x_middle, stride_x_inner,
    stride_grad_outer, stride_grad_middle, stride_grad_inner,
    stride_rstd_outer, stride_rstd_middle, stride_rstd_inner,
    stride_table_outer, stride_table_middle, stride_table_inner,
    N: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr,
    START: tl.constexpr, PAIRS: tl.constexpr, OTHERS: tl.constexpr, TURN: tl.constexpr,
    SHARE: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th tile of one tensor's rows."""
    NUM_PARTS: tl.constexpr = (2 if DIM > 0 else 0) + (1 if DIM < N else 0)
    parts = ()
    inside = ()
    sums = ()
    if DIM > 0:
        pair = tl.arange(0, PAIRS)[None, :]
        is_half: tl.constexpr = step(TURN, "layout") == "half"
        cols_a = START + (pair if is_half else 2 * pair)
        parts += (cols_a, cols_a + (DIM // 2 if is_half else 1))
        inside += (pair < DIM // 2, pair < DIM // 2)
        sums += (zeros(ROWS, PAIRS, WIDE), zeros(ROWS, PAIRS, WIDE))
    if DIM < N:
        other = tl.arange(0, OTHERS)[None, :]
        parts += (tl.where(other < START, other, other + DIM),)
        inside += (other < N - DIM,)
        sums += (zeros(ROWS, OTHERS, WIDE),)
    weights = ()
    for part in tl.static_range(NUM_PARTS):
        weights += (load_held_weight(weight_ptr, parts[part], N, ROWS),)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), num_programs, num_stages=STAGES):
        row = row_of_tile(tile, ROWS)
        is_row = row < num_rows
        x_row = x_ptr + row_start(
            row, size_middle, size_inner, stride_x_outer, stride_x_middle, stride_x_inner, num_rows
        )
        grad_row = grad_ptr + row_start(
            row, size_middle, size_inner,
            stride_grad_outer, stride_grad_middle, stride_grad_inner, num_rows,
        )  # fmt: skip
        grad_x_row = None if grad_x_ptr is None else grad_x_ptr + row * N
        xs = ()
        for part in tl.static_range(NUM_PARTS):
            xs += (load_wide(x_row, parts[part], is_row & inside[part], WIDE),)
        if rstd_ptr is None:
            rstd = _inverse_root(xs, is_row, SHARE, EPS)
        else:
            rstd_row = rstd_ptr + row_start(
                row, size_middle, size_inner,
                stride_rstd_outer, stride_rstd_middle, stride_rstd_inner, num_rows,
            )  # fmt: skip
            rstd = tl.load(rstd_row, mask=is_row, other=0.0).to(wide_type(WIDE))
        grads = ()
        for part in tl.static_range(NUM_PARTS):
            grads += (load_wide(grad_row, parts[part], is_row & inside[part], WIDE),)
        if DIM > 0:
            table = row_start(
                row, size_middle, size_inner,
                stride_table_outer, stride_table_middle, stride_table_inner, num_rows,
            )  # fmt: skip
            grad_a, grad_b = _turned_back(
                grads[0], grads[1], cos_ptr + table, sin_ptr + table, stride_table,
                pair, parts[0], parts[1], is_row & inside[0], DIM, COLS, START, WIDE,
            )  # fmt: skip
            grads = (grad_a, grad_b) + ((grads[2],) if DIM < N else ())
        units = ()
        mean = zeros(ROWS, 1, WIDE)
        for part in tl.static_range(NUM_PARTS):
            unit = xs[part] * rstd
            units += (unit,)
            product = weighted(grads[part], weights[part], OFFSET, WIDE) * unit
            mean += tl.sum(product, axis=1, keep_dims=True)
        added = ()
        for part in tl.static_range(NUM_PARTS):
            added += (sums[part] + grads[part] * units[part],)
            if grad_x_ptr is not None:
                grad_unit = weighted(grads[part], weights[part], OFFSET, WIDE)
                grad_x = norm_gradient(grad_unit, units[part], rstd, mean * SHARE)
                tl.store(grad_x_row + parts[part], grad_x, mask=is_row & inside[part])
        sums = added
    if partial_ptr is not None:
        for part in tl.static_range(NUM_PARTS):
            at = partial_ptr + program.to(tl.int64) * N + parts[part]
            tl.store(at, sum_of_rows(sums[part]), mask=inside[part])


@triton.jit
def qk_rms_norm_rope_backward_kernel(
    cos_ptr, sin_ptr, stride_table,
    x_1_ptr, grad_1_ptr, weight_1_ptr, rstd_1_ptr, grad_x_1_ptr, partial_1_ptr,
    num_rows_1, num_programs_1, middle_1, inner_1,
    x_outer_1, x_middle_1, x_inner_1, grad_outer_1, grad_middle_1, grad_inner_1,
    rstd_outer_1, rstd_middle_1, rstd_inner_1, table_outer_1, table_middle_1, table_inner_1,
    x_2_ptr, grad_2_ptr, weight_2_ptr, rstd_2_ptr, grad_x_2_ptr, partial_2_ptr,
    num_rows_2, num_programs_2, middle_2, inner_2,
    x_outer_2, x_middle_2, x_inner_2, grad_outer_2, grad_middle_2, grad_inner_2,
    rstd_outer_2, rstd_middle_2, rstd_inner_2, table_outer_2, table_middle_2, table_inner_2,
    x_3_ptr, grad_3_ptr, weight_3_ptr, rstd_3_ptr, grad_x_3_ptr, partial_3_ptr,
    num_rows_3, num_programs_3, middle_3, inner_3,
    x_outer_3, x_middle_3, x_inner_3, grad_outer_3, grad_middle_3, grad_inner_3,
    rstd_outer_3, rstd_middle_3, rstd_inner_3, table_outer_3, table_middle_3, table_inner_3,
    COLS: tl.constexpr,
    N_1: tl.constexpr, ROWS_1: tl.constexpr, DIM_1: tl.constexpr, START_1: tl.constexpr,
    PAIRS_1: tl.constexpr, OTHERS_1: tl.constexpr, TURN_1: tl.constexpr,
    SHARE_1: tl.constexpr, EPS_1: tl.constexpr, OFFSET_1: tl.constexpr, WIDE_1: tl.constexpr,
    N_2: tl.constexpr, ROWS_2: tl.constexpr, DIM_2: tl.constexpr, START_2: tl.constexpr,
    PAIRS_2: tl.constexpr, OTHERS_2: tl.constexpr, TURN_2: tl.constexpr,
    SHARE_2: tl.constexpr, EPS_2: tl.constexpr, OFFSET_2: tl.constexpr, WIDE_2: tl.constexpr,
    N_3: tl.constexpr, ROWS_3: tl.constexpr, DIM_3: tl.constexpr, START_3: tl.constexpr,
    PAIRS_3: tl.constexpr, OTHERS_3: tl.constexpr, TURN_3: tl.constexpr,
    SHARE_3: tl.constexpr, EPS_3: tl.constexpr, OFFSET_3: tl.constexpr, WIDE_3: tl.constexpr,
):  # fmt: skip
    """The first programs take the rows of the first tensor, the next those of the second."""
    program = tl.program_id(0)
    if program < num_programs_1:
        _rows(
            program, cos_ptr, sin_ptr, stride_table,
            x_1_ptr, grad_1_ptr, weight_1_ptr, rstd_1_ptr, grad_x_1_ptr, partial_1_ptr,
            num_rows_1, num_programs_1, middle_1, inner_1,
            x_outer_1, x_middle_1, x_inner_1, grad_outer_1, grad_middle_1, grad_inner_1,
            rstd_outer_1, rstd_middle_1, rstd_inner_1,
            table_outer_1, table_middle_1, table_inner_1,
            N_1, ROWS_1, DIM_1, COLS, START_1, PAIRS_1, OTHERS_1, TURN_1,
            SHARE_1, EPS_1, OFFSET_1, WIDE_1,
        )  # fmt: skip
    end_2 = num_programs_1 + num_programs_2
    if N_2 > 0:
        if (program >= num_programs_1) & (program < end_2):
            _rows(
                program - num_programs_1, cos_ptr, sin_ptr, stride_table,
                x_2_ptr, grad_2_ptr, weight_2_ptr, rstd_2_ptr, grad_x_2_ptr, partial_2_ptr,
                num_rows_2, num_programs_2, middle_2, inner_2,
                x_outer_2, x_middle_2, x_inner_2, grad_outer_2, grad_middle_2, grad_inner_2,
                rstd_outer_2, rstd_middle_2, rstd_inner_2,
                table_outer_2, table_middle_2, table_inner_2,
                N_2, ROWS_2, DIM_2, COLS, START_2, PAIRS_2, OTHERS_2, TURN_2,
                SHARE_2, EPS_2, OFFSET_2, WIDE_2,
            )  # fmt: skip
    if N_3 > 0:
        if program >= end_2:
            _rows(
                program - end_2, cos_ptr, sin_ptr, stride_table,
                x_3_ptr, grad_3_ptr, weight_3_ptr, rstd_3_ptr, grad_x_3_ptr, partial_3_ptr,
                num_rows_3, num_programs_3, middle_3, inner_3,
                x_outer_3, x_middle_3, x_inner_3, grad_outer_3, grad_middle_3, grad_inner_3,
                rstd_outer_3, rstd_middle_3, rstd_inner_3,
                table_outer_3, table_middle_3, table_inner_3,
                N_3, ROWS_3, DIM_3, COLS, START_3, PAIRS_3, OTHERS_3, TURN_3,
                SHARE_3, EPS_3, OFFSET_3, WIDE_3,
            )  # fmt: skip


def launch(
    xs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    rstds: Sequence[torch.Tensor | None],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[RoundingPlan],
    rotations: Sequence[Rotation | None],
    wants_x: Sequence[bool],
    wants_weight: Sequence[bool],
    *,
    programs: int = PROGRAMS,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor]:
    """n <= 3 tensors (..., N_i), gradients like them -> the wanted gradients of xs, then weights.

    An rstd that is None is computed anew. `programs` take the rows of all; the rest as in
    `qk_rms_norm_rope.launch`.
    """
    norms = list(zip(xs, grads, weights, rstds, eps, offsets, plans, rotations, strict=True))
    wants = list(zip(wants_x, wants_weight, strict=True))
    if cos is None and None not in rstds and any(x.shape[-1] > MAX_WIDTH for x in xs):
        pairs = [
            rms_norm_backward.launch(grad, x, weight, rstd, offset, plan, wanted, wrap=wrap)
            for (x, grad, weight, rstd, _, offset, plan, _), wanted in zip(
                norms, wants, strict=True
            )
        ]
    else:
        tables = None if cos is None or sin is None else equally_laid_out(cos, sin)
        pairs = launch_slots(qk_rms_norm_rope_backward_kernel, norms, wants, tables, programs, wrap)
    return [grad for group in zip(*pairs, strict=True) for grad in group if grad is not None]
