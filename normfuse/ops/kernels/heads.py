"""Rows of heads on the device: read, normalised, turned, and written where they belong.

The columns of a row that turn are held as two tiles, of the a and of the b of all pairs, so that no
lane needs its neighbour's value.
"""

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
    row_numbers,
    squares,
    step,
    store_inverse_root,
)


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
    N: tl.constexpr, ROWS: tl.constexpr, JOINT: tl.constexpr, DIM: tl.constexpr,
    EPS: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """The root of each row, (ROWS, 1), or of all, (1, 1); None where nothing is normalised."""
    if PLAN != "":
        total = tl.zeros([ROWS, 1], tl.float64 if step(PLAN, "compute") == "f64" else tl.float32)
        if DIM > 0:
            total += tl.sum(squares(pieces[0], PLAN) + squares(pieces[1], PLAN), 1, keep_dims=True)
        if DIM < N:
            total += tl.sum(squares(pieces[2 if DIM > 0 else 0], PLAN), axis=1, keep_dims=True)
        if JOINT > 1:
            total = tl.sum(total, axis=0, keep_dims=True)
        return root_of_total(total, None, N * JOINT, EPS, PLAN)


@triton.jit
def _normed(x, root, weight, OFFSET: tl.constexpr, PLAN: tl.constexpr):
    """x normalised, or as it is where there is no plan."""
    if PLAN != "":
        x = normalised(x, root, weight, OFFSET, PLAN, False)
    return x


@triton.jit
def _along_axis(outer, middle, inner, PLACE: tl.constexpr):
    """The number of each row along the axis that is placed."""
    if step(PLACE, "axis") == "outer":
        number = outer
    elif step(PLACE, "axis") == "middle":
        number = middle
    elif step(PLACE, "axis") == "inner":
        number = inner
    else:
        number = outer * 0
    return number


@triton.jit
def _place(position, number, size_place, is_row, PLACE: tl.constexpr):
    """Where along its axis each row of a result goes, and whether it is a row and there is room.

    A negative position counts from the end, as in a subscript of torch.
    """
    place = position.to(tl.int64)
    if step(PLACE, "from") == "first":
        place += number
    place = tl.where(place < 0, place + size_place, place)
    has_room = (place >= 0) & (place < size_place)
    return place, is_row & has_room


@triton.constexpr_function
def rows_of_program(ROWS, GROUPS, JOINT):
    """How many rows a program takes: groups of them, or the heads of one token."""
    return ROWS * GROUPS if JOINT == 1 else JOINT


@triton.jit
def _rows(tile, num_rows, size_middle, size_inner, ROWS: tl.constexpr, PROGRAM: tl.constexpr):
    """The first rows of a program, (ROWS, 1), and their numbers along three axes."""
    row = tile.to(tl.int64) * PROGRAM + tl.arange(0, ROWS)[:, None]
    is_row = row < num_rows
    outer, middle, inner = row_numbers(row, size_middle, size_inner, num_rows)
    return row, is_row, outer, middle, inner


@triton.jit
def _heads_of_token(token, num_rows, size_middle, ROWS: tl.constexpr, JOINT: tl.constexpr):
    """The same for the heads of one token along the inner axis: they share the other numbers."""
    outer, middle, _ = row_numbers(token.to(tl.int64), size_middle, 1, num_rows)
    inner = tl.arange(0, ROWS)[:, None].to(tl.int64)
    row = token.to(tl.int64) * JOINT + inner
    return row, inner < JOINT, outer, middle, inner


@triton.jit
def head_rows(
    tile, x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, rstd_ptr,
    num_rows, size_middle, size_inner,
    stride_x_outer, stride_x_middle, stride_x_inner,
    stride_table_outer, stride_table_middle, stride_table_inner, stride_next,
    there_ptr, position_ptr, stride_position, size_place, stride_place,
    stride_there_outer, stride_there_middle, stride_there_inner, stride_there_next, stride_copy,
    stride_table,
    N: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, JOINT: tl.constexpr,
    DIM: tl.constexpr, COLS: tl.constexpr,
    START: tl.constexpr, PAIRS: tl.constexpr, OTHERS: tl.constexpr, TURN: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr, PLAN: tl.constexpr,
    PLACE: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """GROUPS times ROWS rows of one tensor. DIM columns from START on turn; PLAN "" is no norm.

    Where there are several groups, `stride_next` leads from any row to the next, and all turn by
    the same angles. Where JOINT is not 1, it is the number of heads of a token; they are the rows
    of a program, have one statistic, and turn by the same angles. PAIRS and OTHERS are tile widths.

    Results lie one after the other; COPIES of each are written `there`, where its strides and a
    PLACE say. Either may be None.
    """
    if JOINT > 1:
        row, is_row, outer, middle, inner = _heads_of_token(
            tile, num_rows, size_middle, ROWS, JOINT
        )
    else:
        row, is_row, outer, middle, inner = _rows(
            tile, num_rows, size_middle, size_inner, ROWS, ROWS * GROUPS
        )
    x_ptr += outer * stride_x_outer + middle * stride_x_middle + inner * stride_x_inner
    stored = is_row
    if y_ptr is not None:
        y_ptr += row * N
    if there_ptr is not None:
        there_ptr += outer * stride_there_outer + middle * stride_there_middle
        there_ptr += inner * stride_there_inner
    if PLACE != "":
        number = _along_axis(outer, middle, inner, PLACE)
        if JOINT > 1:
            number += inner * 0  # one for each row
        # Asked for first, needed last. Here, since torch takes an operand of a function for one
        # that is written, if what is written depends on the result.
        if step(PLACE, "from") == "first":
            position = tl.load(position_ptr)
        else:
            position = tl.load(position_ptr + number * stride_position, mask=is_row, other=0)
    # What the last step needs is asked for before anyone waits for a statistic.
    xs = ()
    for group in tl.static_range(GROUPS):
        rows_ptr = x_ptr + group * ROWS * stride_next
        xs = xs + (_load_row(rows_ptr, is_row, N, ROWS, DIM, START, PAIRS, OTHERS, TURN),)
    if DIM > 0:
        table = outer * stride_table_outer + middle * stride_table_middle
        if JOINT > 1:
            ANGLES: tl.constexpr = 1
            has_angles = tl.full([1, 1], 1, tl.int1)
        else:
            ANGLES: tl.constexpr = ROWS
            has_angles = is_row
            table += inner * stride_table_inner
        cos_a, cos_b = _load_angles(
            cos_ptr + table, stride_table, has_angles, ANGLES, DIM, COLS, PAIRS, TURN
        )
        sin_a, sin_b = _load_angles(
            sin_ptr + table, stride_table, has_angles, ANGLES, DIM, COLS, PAIRS, TURN
        )
    if JOINT > 1:
        weight_ptr = row_of(weight_ptr, inner, N)
    else:
        weight_ptr = row_of(weight_ptr, row, 0)
    weights = _load_row(weight_ptr, is_row, N, ROWS, DIM, START, PAIRS, OTHERS, TURN)
    PASSED: tl.constexpr = 2 if DIM > 0 else 0  # which piece does not turn
    if PLACE != "":
        place, stored = _place(position, number, size_place, is_row, PLACE)
        there_ptr += place * stride_place
    for group in tl.static_range(GROUPS):
        root = _root(xs[group], N, ROWS, JOINT, DIM, EPS, PLAN)
        if y_ptr is not None:
            rows_ptr = y_ptr + group * ROWS * N
        if there_ptr is not None:
            there = there_ptr + group * ROWS * stride_there_next
        if DIM > 0:
            a, b = xs[group][0], xs[group][1]
            first = rounded(_normed(a, root, _piece(weights, 0), OFFSET, PLAN), step(TURN, "in"))
            second = rounded(_normed(b, root, _piece(weights, 1), OFFSET, PLAN), step(TURN, "in"))
            y_a = _turned(first, cos_a, second, sin_a, -1.0, TURN)
            y_b = _turned(second, cos_b, first, sin_b, 1.0, TURN)
            if y_ptr is not None:
                _store_pairs(rows_ptr + START, y_a, y_b, is_row, ROWS, DIM, PAIRS, TURN)
            for copy in tl.static_range(COPIES):
                copy_ptr = there + START if copy == 0 else there + START + copy * stride_copy
                _store_pairs(copy_ptr, y_a, y_b, stored, ROWS, DIM, PAIRS, TURN)
        if DIM < N:
            y = _normed(xs[group][PASSED], root, _piece(weights, PASSED), OFFSET, PLAN)
            cols = _other_columns(DIM, START, OTHERS)
            if y_ptr is not None:
                tl.store(rows_ptr + cols, y, mask=is_row & (cols < N))
            for copy in tl.static_range(COPIES):
                copy_ptr = there if copy == 0 else there + copy * stride_copy
                tl.store(copy_ptr + cols, y, mask=stored & (cols < N))
        if PLAN != "":
            statistic = tile + tl.zeros([1, 1], tl.int64) if JOINT > 1 else row + group * ROWS
            store_inverse_root(rstd_ptr, root, statistic, num_rows, PLAN)
    if PLACE != "":
        # Last, since nothing may be read across it. It ends the program where Inductor lets its
        # own kernels do so.
        tl.device_assert(stored | (is_row == 0), "a position is out of the bounds of its cache")
