"""Tensors of any strides as rows of one width: the host's side of a kernel's addressing.

A kernel writes row r of every result at r * N. The rows are therefore counted in the order in
which the results lie in memory, and an input is addressed by that order. Sizes and strides may be
symbolic: nothing here adds a guard.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch._prims_common import compute_elementwise_output_strides


class RowStrides(NamedTuple):
    """Where row r begins: r is split into (outer, middle, inner), each with its stride."""

    size_middle: int
    size_inner: int
    stride_outer: int
    stride_middle: int
    stride_inner: int


def known(condition: Any) -> bool:
    """Whether a condition on sizes or strides certainly holds."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def hint(number: Any) -> int:
    """The value that a symbolic number had when it was traced; 0 if it had none. Adds no guard."""
    return (number.node.hint or 0) if isinstance(number, torch.SymInt) else number


def num_rows(x: torch.Tensor) -> int:
    return math.prod(x.shape[:-1])


def is_empty(x: torch.Tensor) -> bool:
    """Whether there is certainly no row; a symbolic number of rows is taken to be positive."""
    return known(num_rows(x) == 0)


def empty_sum(
    branch: torch.Tensor, residual: torch.Tensor, dtype: torch.dtype, *, is_fresh: bool
) -> torch.Tensor:
    """An uninitialised tensor laid out as torch lays out `residual + branch`.

    `is_fresh`: the sum reads a new tensor made from `branch`, not `branch`, which may be a view.
    """
    if all(known(a == b) for a, b in zip(branch.stride(), residual.stride(), strict=True)):
        return torch.empty_like(residual, dtype=dtype)
    branch = torch.empty_like(branch) if is_fresh else branch
    strides = compute_elementwise_output_strides(residual, branch)
    return torch.empty_strided(residual.shape, strides, dtype=dtype, device=residual.device)


def empty_product(
    value: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype, *, is_fresh: bool
) -> torch.Tensor:
    """An uninitialised tensor laid out as torch lays out `value * f(factor)`.

    `is_fresh`: the product reads a new tensor made from `value`, not `value`, which may be a view.
    """
    if all(known(a == b) for a, b in zip(value.stride(), factor.stride(), strict=True)):
        return torch.empty_like(value, dtype=dtype)
    value = torch.empty_like(value) if is_fresh else value
    return empty_sum(factor, value, dtype, is_fresh=True)


def empty_modulated(
    value: torch.Tensor, operands: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> torch.Tensor:
    """An uninitialised tensor laid out as torch lays out `f(value) * first + second`.

    The operands broadcast to `value`, and one follows the other.
    """
    result = torch.empty_like(value, device="meta")
    for operand in operands:
        strides = compute_elementwise_output_strides(result, operand.expand(value.shape))
        result = torch.empty_strided(value.shape, strides, device="meta")
    return torch.empty_strided(value.shape, result.stride(), dtype=dtype, device=value.device)


def row_order(*results: torch.Tensor | None) -> tuple[int, ...] | None:
    """The leading dimensions, outermost in memory first; None if some result has no such rows."""
    tensors = [result for result in results if result is not None]
    order: list[int] = []
    for dim in range(tensors[0].dim() - 1):
        if known(tensors[0].shape[dim] == 1):
            continue
        stride = tensors[0].stride(dim)
        smaller = [i for i, other in enumerate(order) if known(tensors[0].stride(other) < stride)]
        order.insert(smaller[0] if smaller else len(order), dim)
    return tuple(order) if all(_are_consecutive(tensor, order) for tensor in tensors) else None


def _are_consecutive(tensor: torch.Tensor, order: list[int]) -> bool:
    expected = tensor.shape[-1]
    for dim in reversed(order):
        if not known(tensor.stride(dim) == expected):
            return False
        expected = expected * tensor.shape[dim]
    return _has_unit_stride(tensor)


def _has_unit_stride(tensor: torch.Tensor) -> bool:
    return known(tensor.shape[-1] == 1) or known(tensor.stride(-1) == 1)


def _collapsed(tensor: torch.Tensor, order: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) of the leading dimensions in order; neighbours merge if one stride serves."""
    merged: list[tuple[int, int]] = []
    for dim in order:
        size, stride = tensor.shape[dim], tensor.stride(dim)
        if merged and known(merged[-1][1] == size * stride):
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    return merged


def addressed(
    x: torch.Tensor, order: tuple[int, ...], result: torch.Tensor
) -> tuple[torch.Tensor, RowStrides]:
    """`x` and where its rows begin; a copy laid out as `result` if three strides cannot say it."""
    pieces = _collapsed(x, order)
    if len(pieces) > 3 or not _has_unit_stride(x):
        x = torch.empty_like(result, dtype=x.dtype).copy_(x)
        pieces = _collapsed(x, order)
    pieces = pieces or [(1, x.shape[-1])]
    # Absent levels are inner ones of size 1, which Triton specialises away.
    (_, outer), (middle, stride_middle), (inner, stride_inner) = (pieces + [(1, 0)] * 2)[:3]
    return x, RowStrides(middle, inner, outer, stride_middle, stride_inner)


class SharedRowStrides(NamedTuple):
    """Where row r of a tensor begins, and the row of a table that belongs to it."""

    size_middle: int
    size_inner: int
    stride_outer: int
    stride_middle: int
    stride_inner: int
    table_outer: int
    table_middle: int
    table_inner: int


class Neighbours(NamedTuple):
    """Rows that lie `stride` apart, `size` at a time, and whether they share a row of the table."""

    size: int
    stride: int
    share_table: bool


class Layout(NamedTuple):
    """Where the rows of a result (..., N) lie in memory.

    Attributes:
        memory: what is written to, and what the launch returns.
        strides: of the leading axes of the result; 0 for the axis that is placed.
        axis: the leading axis whose rows go where `positions` says; None if every row has a place.
        places: how many there are along that axis.
        stride: from one place to the next.
        positions: of the rows along that axis, or of the first of them; integers.
        counts_up: whether `positions` is that of the first row, and the others follow it.
        copies: how often each row is written.
        copy_stride: from one copy to the next.
    """

    memory: torch.Tensor
    strides: tuple[Any, ...]
    axis: int | None = None
    places: Any = None
    stride: Any = None
    positions: torch.Tensor | None = None
    counts_up: bool = False
    copies: int = 1
    copy_stride: Any = None


class ResultStrides(NamedTuple):
    """Where row r of a result begins that has a layout of its own.

    Attributes:
        outer, middle, inner: the strides of its levels, 0 for one whose rows are placed.
        next: from a row to its neighbour.
        level: the one whose rows are placed: "outer", "middle", "inner", or "none" for an axis of
            one row.
    """

    outer: Any
    middle: Any
    inner: Any
    next: Any
    level: str


def addressed_with(
    x: torch.Tensor,
    table: torch.Tensor | None,
    order: tuple[int, ...],
    result: torch.Tensor | None,
    layout: Layout | None = None,
    apart: int | None = None,
) -> tuple[torch.Tensor, SharedRowStrides, Neighbours, ResultStrides | None]:
    """`x` of at most 4 dimensions and where its rows begin, also in a table that broadcasts to it.

    x is copied, laid out as `result` if there is one, where its elements do not lie side by side. A
    `layout` says where rows are written besides. An axis that is to stay `apart`, counted from the
    end, is the innermost of the order, and becomes the inner level alone.
    """
    if not _has_unit_stride(x):
        x = x.contiguous() if result is None else torch.empty_like(result, dtype=x.dtype).copy_(x)
    steps = [0] * x.dim() if table is None else _broadcast_strides(table, x.dim())
    # A level that is placed, where the strides of a result are 0, merges with no other.
    places = [0] * x.dim() if layout is None else layout.strides
    strides = list(zip(x.stride()[:-1], steps[:-1], places, strict=False))
    inner = None if apart is None else x.dim() + apart
    merged, levels = _levels(x.shape, strides, order, inner)
    assert len(merged) <= 3, f"rows of {x.dim()} dimensions have no single stride"
    size, stride, step, place = merged[-1] if merged else (1, 0, 0, 0)
    pieces = [*merged, *[(1, 0, 0, 0)] * 3][:3]
    sizes, of_x, of_table, of_result = zip(*pieces, strict=True)
    placed = levels.index(layout.axis) if layout is not None and layout.axis in levels else None
    is_placed = placed is not None and placed == len(levels) - 1
    neighbours = Neighbours(1 if is_placed else size, stride, known(step == 0))
    found = None
    if layout is not None:
        level = "none" if placed is None else ("outer", "middle", "inner")[placed]
        found = ResultStrides(*of_result, place, level)
    return x, SharedRowStrides(*sizes[1:], *of_x, *of_table), neighbours, found


def _levels(
    shape: Sequence[Any], strides: Sequence[tuple[Any, ...]], order: tuple[int, ...], apart: Any
) -> tuple[list[tuple[Any, ...]], list[int]]:
    """(size, *strides) of each level, whose axes merge if one stride serves, and its last axis.

    The axis `apart`, if there is one, is the third level, and those that are missing have no axis.
    """
    merged: list[tuple[Any, ...]] = []
    levels: list[int] = []
    for dim in order:
        size = shape[dim]
        if dim == apart:
            absent = 2 - len(merged)
            merged, levels = merged + [(1, 0, 0, 0)] * absent, levels + [-1] * absent
        outer = merged[-1][1:] if merged and dim != apart else ()
        pairs = zip(outer, strides[dim], strict=False)
        if outer and all(known(a == size * b) for a, b in pairs):
            merged[-1], levels[-1] = (merged[-1][0] * size, *strides[dim]), dim
        else:
            merged.append((size, *strides[dim]))
            levels.append(dim)
    return merged, levels


def _broadcast_strides(table: torch.Tensor, rank: int) -> list[Any]:
    """The strides of a table, 0 where it serves a whole axis of a tensor of that rank."""
    strides = [
        0 if known(size == 1) else stride
        for size, stride in zip(table.shape, table.stride(), strict=True)
    ]
    return [0] * (rank - table.dim()) + strides


def addressed_by_one_stride(
    x: torch.Tensor, order: tuple[int, ...], result: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """`x` and the stride of its rows; a copy laid out as `result` if it takes more than one."""
    pieces = _collapsed(x, order)
    if len(pieces) > 1 or not _has_unit_stride(x):
        return torch.empty_like(result, dtype=x.dtype).copy_(x), result.shape[-1]
    return x, pieces[0][1] if pieces else x.shape[-1]


def as_vector(weight: torch.Tensor | None) -> torch.Tensor | None:
    """A weight whose elements lie side by side."""
    return weight if weight is None or _has_unit_stride(weight) else weight.contiguous()


def copied_into(results: Any, values: Any) -> tuple[torch.Tensor | None, ...]:
    """`values` in the layout of `results`, whose rows do not lie one after the other."""
    return tuple(
        None if result is None else result.copy_(value)
        for result, value in zip(results, values, strict=True)
    )
