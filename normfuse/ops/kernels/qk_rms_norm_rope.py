"""Per-head RMSNorm of queries and keys, then rotary embedding, over rows; one launch for all.

    rstd = 1 / sqrt(mean(x^2) + eps)
    n    = x * rstd * (weight + offset)
    y_a  = n_a * cos_a - n_b * sin_a        for every pair (a, b) of columns that turn
    y_b  = n_b * cos_b + n_a * sin_b
    y_c  = n_c                              for the others

Backward: the pairs of grad_y turn back,

    g_a = grad_a * cos_a + grad_b * sin_b
    g_b = grad_b * cos_b - grad_a * sin_a

and then as for RMSNorm, with unit = x * rstd and h = g * (weight + offset):

    grad_x      = rstd * (h - unit * mean(h * unit))
    grad_weight = sum over rows of g * unit

The columns of a row that turn are held as two tiles, of the a and of the b of all pairs, so that no
lane needs its neighbour's value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.chunks import row_of
from normfuse.ops.kernels.row import (
    added,
    load_held,
    multiplied,
    normalised,
    root_of_total,
    rounded,
    squares,
    step,
    store_inverse_root,
)
from normfuse.ops.kernels.rows import is_empty
from normfuse.ops.kernels.slots import (
    NO_SLOT,
    SLOTS,
    HeadsLaunch,
    Slot,
    Tables,
    equally_laid_out,
)
from normfuse.ops.kernels.tile import device_of, eager

if TYPE_CHECKING:
    from normfuse.ops.rotation import Rotation
    from normfuse.ops.rounding import RoundingPlan


@triton.jit
def _turned(left, cos, right, sin, SIGN: tl.constexpr, TURN: tl.constexpr):
    """left * cos + SIGN * right * sin, each step rounded to the promoted type."""
    TYPE: tl.constexpr = step(TURN, "product")
    ON: tl.constexpr = step(TURN, "on")
    first = multiplied(rounded(left, TYPE), rounded(cos, TYPE), TYPE, True, ON)
    second = multiplied(rounded(right, TYPE), rounded(sin, TYPE), TYPE, True, ON)
    return rounded(added(first, second, SIGN, TYPE, ON), step(TURN, "out"))


@triton.jit
def _load_pairs(
    ptr, stride, is_row,
    ROWS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """Both columns of every pair, held; `ptr` is each row's first column that turns, or None."""
    if ptr is not None:
        if step(TURN, "layout") == "half":
            pair = tl.arange(0, PAIRS)[None, :]
            turns = is_row & (pair < DIM // 2)
            a = load_held(ptr + pair * stride, turns)
            b = load_held(ptr + (pair + DIM // 2) * stride, turns)
        else:
            col = tl.arange(0, 2 * PAIRS)[None, :]
            both = load_held(ptr + col * stride, is_row & (col < DIM))
            a, b = tl.split(tl.reshape(both, [ROWS, PAIRS, 2]))
        return a, b


@triton.jit
def _store_pairs(
    ptr, a, b, is_row,
    ROWS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    if step(TURN, "layout") == "half":
        pair = tl.arange(0, PAIRS)[None, :]
        turns = is_row & (pair < DIM // 2)
        tl.store(ptr + pair, a, mask=turns)
        tl.store(ptr + pair + DIM // 2, b, mask=turns)
    else:
        col = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.reshape(tl.join(a, b), [ROWS, 2 * PAIRS])
        tl.store(ptr + col, both, mask=is_row & (col < DIM))


@triton.jit
def _other_columns(DIM: tl.constexpr, START: tl.constexpr, OTHERS: tl.constexpr):
    """The columns that do not turn, those before and those after, (1, OTHERS)."""
    cols = tl.arange(0, OTHERS)[None, :]
    if DIM > 0:
        cols = tl.where(cols < START, cols, cols + DIM)
    return cols


@triton.jit
def _load_row(
    ptr, is_row,
    N: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, START: tl.constexpr,
    PAIRS: tl.constexpr, OTHERS: tl.constexpr, TURN: tl.constexpr,
):  # fmt: skip
    """A tuple: both columns of every pair that turns, then the others; empty without `ptr`."""
    pieces = ()
    if ptr is not None:
        if DIM > 0:
            a, b = _load_pairs(ptr + START, 1, is_row, ROWS, DIM, PAIRS, TURN)
            pieces = (a, b)
        if DIM < N:
            cols = _other_columns(DIM, START, OTHERS)
            pieces = pieces + (load_held(ptr + cols, is_row & (cols < N)),)
    return pieces


@triton.jit
def _piece(pieces, index: tl.constexpr):
    """One of a row's pieces; None if it has none."""
    if len(pieces) > 0:
        return pieces[index]


@triton.jit
def _load_angles(
    ptr, stride, is_row,
    ROWS: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr, PAIRS: tl.constexpr,
    TURN: tl.constexpr,
):  # fmt: skip
    """What a table holds for both columns of every pair; `ptr` is where each row's begins."""
    if COLS == DIM:
        a, b = _load_pairs(ptr, stride, is_row, ROWS, DIM, PAIRS, TURN)
    else:
        pair = tl.arange(0, PAIRS)[None, :]
        a = load_held(ptr + pair * stride, is_row & (pair < DIM // 2))
        b = a
    return a, b


@triton.jit
def _root(
    pieces,
    N: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """The root of each row, (ROWS, 1); None where nothing is normalised."""
    if PLAN != "":
        total = tl.zeros([ROWS, 1], tl.float64 if step(PLAN, "compute") == "f64" else tl.float32)
        if DIM > 0:
            total += tl.sum(squares(pieces[0], PLAN) + squares(pieces[1], PLAN), 1, keep_dims=True)
        if DIM < N:
            total += tl.sum(squares(pieces[2 if DIM > 0 else 0], PLAN), axis=1, keep_dims=True)
        return root_of_total(total, None, N, EPS, PLAN)


@triton.jit
def _normed(x, root, weight, OFFSET: tl.constexpr, PLAN: tl.constexpr):
    """x normalised, or as it is where there is no plan."""
    if PLAN != "":
        x = normalised(x, root, weight, OFFSET, PLAN, False)
    return x


@triton.jit
def _rows(
    tile, x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, rstd_ptr,
    num_rows, size_middle, size_inner,
    stride_x_outer, stride_x_middle, stride_x_inner,
    stride_table_outer, stride_table_middle, stride_table_inner, stride_next, stride_table,
    N: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr,
    DIM: tl.constexpr, COLS: tl.constexpr,
    START: tl.constexpr, PAIRS: tl.constexpr, OTHERS: tl.constexpr, TURN: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """GROUPS times ROWS rows of one tensor. DIM columns from START on turn; PLAN "" is no norm.

    Where there are several groups, `stride_next` leads from any row to the next, and all turn by
    the same angles. PAIRS and OTHERS are tile widths.
    """
    row = tile.to(tl.int64) * (ROWS * GROUPS) + tl.arange(0, ROWS)[:, None]
    is_row = row < num_rows
    outer = row // size_inner // size_middle
    middle = row // size_inner % size_middle
    inner = row % size_inner
    x_ptr += outer * stride_x_outer + middle * stride_x_middle + inner * stride_x_inner
    y_ptr += row * N
    # What the last step needs is asked for before anyone waits for a statistic.
    xs = ()
    for group in tl.static_range(GROUPS):
        rows_ptr = x_ptr + group * ROWS * stride_next
        xs = xs + (_load_row(rows_ptr, is_row, N, ROWS, DIM, START, PAIRS, OTHERS, TURN),)
    if DIM > 0:
        table = outer * stride_table_outer + middle * stride_table_middle
        table += inner * stride_table_inner
        cos_a, cos_b = _load_angles(
            cos_ptr + table, stride_table, is_row, ROWS, DIM, COLS, PAIRS, TURN
        )
        sin_a, sin_b = _load_angles(
            sin_ptr + table, stride_table, is_row, ROWS, DIM, COLS, PAIRS, TURN
        )
    weight_ptr = row_of(weight_ptr, row, 0)
    weights = _load_row(weight_ptr, is_row, N, ROWS, DIM, START, PAIRS, OTHERS, TURN)
    PASSED: tl.constexpr = 2 if DIM > 0 else 0  # which piece does not turn
    for group in tl.static_range(GROUPS):
        root = _root(xs[group], N, ROWS, DIM, EPS, PLAN)
        rows_ptr = y_ptr + group * ROWS * N
        if DIM > 0:
            a, b = xs[group][0], xs[group][1]
            first = rounded(_normed(a, root, _piece(weights, 0), OFFSET, PLAN), step(TURN, "in"))
            second = rounded(_normed(b, root, _piece(weights, 1), OFFSET, PLAN), step(TURN, "in"))
            y_a = _turned(first, cos_a, second, sin_a, -1.0, TURN)
            y_b = _turned(second, cos_b, first, sin_b, 1.0, TURN)
            _store_pairs(rows_ptr + START, y_a, y_b, is_row, ROWS, DIM, PAIRS, TURN)
        if DIM < N:
            y = _normed(xs[group][PASSED], root, _piece(weights, PASSED), OFFSET, PLAN)
            cols = _other_columns(DIM, START, OTHERS)
            tl.store(rows_ptr + cols, y, mask=is_row & (cols < N))
        if PLAN != "":
            store_inverse_root(rstd_ptr, root, row + group * ROWS, num_rows, PLAN)


@triton.jit
def qk_rms_norm_rope_kernel(
    cos_ptr, sin_ptr, stride_table,
    x_1_ptr, weight_1_ptr, y_1_ptr, rstd_1_ptr, num_rows_1, size_middle_1, size_inner_1,
    stride_x_outer_1, stride_x_middle_1, stride_x_inner_1,
    stride_table_outer_1, stride_table_middle_1, stride_table_inner_1, stride_next_1,
    x_2_ptr, weight_2_ptr, y_2_ptr, rstd_2_ptr, num_rows_2, size_middle_2, size_inner_2,
    stride_x_outer_2, stride_x_middle_2, stride_x_inner_2,
    stride_table_outer_2, stride_table_middle_2, stride_table_inner_2, stride_next_2,
    x_3_ptr, weight_3_ptr, y_3_ptr, rstd_3_ptr, num_rows_3, size_middle_3, size_inner_3,
    stride_x_outer_3, stride_x_middle_3, stride_x_inner_3,
    stride_table_outer_3, stride_table_middle_3, stride_table_inner_3, stride_next_3,
    COLS: tl.constexpr,
    N_1: tl.constexpr, ROWS_1: tl.constexpr, GROUPS_1: tl.constexpr,
    DIM_1: tl.constexpr, START_1: tl.constexpr,
    PAIRS_1: tl.constexpr, OTHERS_1: tl.constexpr, TURN_1: tl.constexpr,
    EPS_1: tl.constexpr, OFFSET_1: tl.constexpr, PLAN_1: tl.constexpr,
    N_2: tl.constexpr, ROWS_2: tl.constexpr, GROUPS_2: tl.constexpr,
    DIM_2: tl.constexpr, START_2: tl.constexpr,
    PAIRS_2: tl.constexpr, OTHERS_2: tl.constexpr, TURN_2: tl.constexpr,
    EPS_2: tl.constexpr, OFFSET_2: tl.constexpr, PLAN_2: tl.constexpr,
    N_3: tl.constexpr, ROWS_3: tl.constexpr, GROUPS_3: tl.constexpr,
    DIM_3: tl.constexpr, START_3: tl.constexpr,
    PAIRS_3: tl.constexpr, OTHERS_3: tl.constexpr, TURN_3: tl.constexpr,
    EPS_3: tl.constexpr, OFFSET_3: tl.constexpr, PLAN_3: tl.constexpr,
):  # fmt: skip
    """The first programs take the rows of the first tensor, the next those of the second."""
    tile = tl.program_id(0)
    end_1 = tl.cdiv(num_rows_1, ROWS_1 * GROUPS_1)
    end_2 = end_1 + tl.cdiv(num_rows_2, ROWS_2 * GROUPS_2)
    if tile < end_1:
        _rows(
            tile, x_1_ptr, weight_1_ptr, cos_ptr, sin_ptr, y_1_ptr, rstd_1_ptr,
            num_rows_1, size_middle_1, size_inner_1,
            stride_x_outer_1, stride_x_middle_1, stride_x_inner_1,
            stride_table_outer_1, stride_table_middle_1, stride_table_inner_1,
            stride_next_1, stride_table,
            N_1, ROWS_1, GROUPS_1, DIM_1, COLS, START_1, PAIRS_1, OTHERS_1, TURN_1,
            EPS_1, OFFSET_1, PLAN_1,
        )  # fmt: skip
    if N_2 > 0:
        if (tile >= end_1) & (tile < end_2):
            _rows(
                tile - end_1, x_2_ptr, weight_2_ptr, cos_ptr, sin_ptr, y_2_ptr, rstd_2_ptr,
                num_rows_2, size_middle_2, size_inner_2,
                stride_x_outer_2, stride_x_middle_2, stride_x_inner_2,
                stride_table_outer_2, stride_table_middle_2, stride_table_inner_2,
                stride_next_2, stride_table,
                N_2, ROWS_2, GROUPS_2, DIM_2, COLS, START_2, PAIRS_2, OTHERS_2, TURN_2,
                EPS_2, OFFSET_2, PLAN_2,
            )  # fmt: skip
    if N_3 > 0:
        if tile >= end_2:
            _rows(
                tile - end_2, x_3_ptr, weight_3_ptr, cos_ptr, sin_ptr, y_3_ptr, rstd_3_ptr,
                num_rows_3, size_middle_3, size_inner_3,
                stride_x_outer_3, stride_x_middle_3, stride_x_inner_3,
                stride_table_outer_3, stride_table_middle_3, stride_table_inner_3,
                stride_next_3, stride_table,
                N_3, ROWS_3, GROUPS_3, DIM_3, COLS, START_3, PAIRS_3, OTHERS_3, TURN_3,
                EPS_3, OFFSET_3, PLAN_3,
            )  # fmt: skip


def launch(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[RoundingPlan],
    rotations: Sequence[Rotation | None],
    *,
    stores: Sequence[bool] | None = None,
    tile: HeadsLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor | None]:
    """n <= 3 tensors (..., N_i), their weights (N_i,) or None -> their results, and their n rstd.

    Args:
        xs: rows of any strides, of up to 4 dimensions, that fit a program whole.
        weights: any of the four floating types.
        cos: broadcasts against every x that turns; None if none does.
        sin: the same.
        eps: added to the means of the squares.
        offsets: added to the weights.
        plans: where the norms round.
        rotations: how the norms turn, None where one does not.
        stores: for each of the 2 n results, whether it is wanted; else it is None. Every norm that
            has an rstd wanted is computed.
        tile: by default the one for these widths and types.
        wrap: how a compiler sees the launch; `torch.library.wrap_triton`.
    """
    num = len(xs)
    assert 1 <= num <= SLOTS, f"one launch takes up to {SLOTS} tensors, got {num}"
    stores = stores or [True] * (2 * num)
    tables = None if cos is None or sin is None else equally_laid_out(cos, sin)
    tile = tile or HeadsLaunch.for_slots(xs, rotations, plans)
    slots = [
        Slot.of(x, weight, tables, tuple(norm), rotation, tile=tile, store_rstd=store)
        for x, weight, *norm, rotation, store in zip(
            xs, weights, eps, offsets, plans, rotations, stores[num:], strict=True
        )
    ]
    filled = [slot for x, slot in zip(xs, slots, strict=True) if not is_empty(x)]
    if filled:
        launch_slots(filled, tables, tile, xs[0], wrap)
    return [slot.finished() for slot in slots] + [slot.rstd for slot in slots]


def launch_slots(
    slots: list[Slot],
    tables: Tables | None,
    tile: HeadsLaunch,
    x: torch.Tensor,
    wrap: Callable[[Any], Any],
) -> None:
    """Launch the kernel for up to three slots, on the device of `x`."""
    cos, sin = tables or (None, None)
    padded = slots + [NO_SLOT] * (SLOTS - len(slots))
    constants: dict[str, Any] = {"COLS": 0 if cos is None else cos.shape[-1]}
    for number, slot in enumerate(padded, start=1):
        constants |= {f"{name}_{number}": value for name, value in slot.constants.items()}
    with device_of(x, wrap):
        wrap(qk_rms_norm_rope_kernel)[(sum(slot.num_tiles for slot in slots),)](
            cos,
            sin,
            1 if cos is None else cos.stride(-1),
            *(argument for slot in padded for argument in slot.arguments),
            **constants,
            num_warps=tile.num_warps,
        )
