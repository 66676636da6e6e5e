"""Gradients of what sequences of rows share, such as a scale: sums over rows in two stages.

Each program of the first stage adds up rows of one sequence; `sum_sequences_kernel` adds up the
programs of each sequence, in a fixed order. What all rows share, such as a weight, is shared by
one sequence of them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.rows import known
from normfuse.ops.kernels.tile_backward import PARTIAL_COLS, PARTIAL_ROWS, BackwardLaunch

# The programs of a sequence where the number of sequences is symbolic.
MANY_SEQUENCES = 16


@triton.jit
def _sum_sequence(
    partial_ptr, grad_ptr, sequence, num_partials, cols,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    partial_ptr += sequence.to(tl.int64) * num_partials * N
    sums = tl.zeros([ROWS, BLOCK], partial_ptr.dtype.element_ty)
    for start in range(0, num_partials, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < num_partials) & (cols < N)
        sums += tl.load(partial_ptr + row.to(tl.int64) * N + cols, mask=mask, other=0.0)
    at = grad_ptr + sequence.to(tl.int64) * N + cols
    tl.store(at, tl.sum(sums, axis=0, keep_dims=True), mask=cols < N)


@triton.jit
def sum_sequences_kernel(
    partial_1_ptr, grad_1_ptr, num_sequences_1, num_partials_1,
    partial_2_ptr, grad_2_ptr, num_sequences_2, num_partials_2,
    partial_3_ptr, grad_3_ptr, num_sequences_3, num_partials_3,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Up to three gradients, of which each sequence is the sum of its num_partials rows.

    The order of the additions depends on the number of partial sums alone.
    """
    NUM_BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    sequence = tl.program_id(0) // NUM_BLOCKS
    cols = tl.program_id(0) % NUM_BLOCKS * BLOCK + tl.arange(0, BLOCK)[None, :]
    if sequence < num_sequences_1:
        _sum_sequence(partial_1_ptr, grad_1_ptr, sequence, num_partials_1, cols, N, ROWS, BLOCK)
    second = sequence - num_sequences_1
    if partial_2_ptr is not None:
        if (second >= 0) & (second < num_sequences_2):
            _sum_sequence(partial_2_ptr, grad_2_ptr, second, num_partials_2, cols, N, ROWS, BLOCK)
    third = second - num_sequences_2
    if partial_3_ptr is not None:
        if third >= 0:
            _sum_sequence(partial_3_ptr, grad_3_ptr, third, num_partials_3, cols, N, ROWS, BLOCK)


class Sequences(NamedTuple):
    """The rows of x as `num` sequences of `rows`, each of which `programs` share."""

    num: Any
    rows: Any
    programs: int

    @classmethod
    def of(cls, sizes: Sequence[Any], depth: int, tile: BackwardLaunch) -> Sequences:
        """Rows of `sizes`, outermost first, with a sequence for each place of the first `depth`."""
        num, rows = math.prod(sizes[:depth]), math.prod(sizes[depth:])
        programs = triton.cdiv(tile.programs, num) if isinstance(num, int) else MANY_SEQUENCES
        if isinstance(rows, int):
            programs = min(programs, triton.cdiv(rows, tile.rows))
        return cls(num, rows, programs)


class PartialSums(NamedTuple):
    """A gradient of `num` sequences, and `num_partials` rows of sums for each: (..., N)."""

    partial: torch.Tensor
    grad: torch.Tensor
    num: Any
    num_partials: Any


def sum_up(
    sums: Sequence[PartialSums], width: int, sequences: Sequences, wrap: Callable[[Any], Any]
) -> None:
    """Stage two: every gradient of sequences, in one launch."""
    if not sums:
        return
    # Few programs of a sequence, as of many sequences, leave the threads to the columns.
    rows = PARTIAL_COLS if sequences.programs <= PARTIAL_COLS else PARTIAL_ROWS
    block = PARTIAL_ROWS * PARTIAL_COLS // rows
    slots = [item for one in sums for item in one] + [None, None, 0, 0] * (3 - len(sums))
    num = sum(one.num for one in sums)
    wrap(sum_sequences_kernel)[(triton.cdiv(width, block) * num,)](
        *slots, N=width, ROWS=rows, BLOCK=block, num_warps=4
    )


def partial_sums(
    value: torch.Tensor,
    kept: Sequence[Any],
    summed: Sequence[Any],
    programs: int,
    tile: BackwardLaunch,
    dtype: torch.dtype,
) -> PartialSums:
    """For a value with rows of the sizes `kept`, each of as many sequences as `summed` says."""
    num, num_partials = math.prod(kept), math.prod(summed) * programs
    size = (num * num_partials, value.shape[-1])
    new = value.new_empty if tile.held else value.new_zeros
    return PartialSums(new(size, dtype=dtype), value.new_empty(value.shape), num, num_partials)


def depth_of(value: torch.Tensor, x: torch.Tensor, order: tuple[int, ...]) -> int | None:
    """How many outer dimensions `value` has rows for, if sequences share them; None if not."""
    sizes = [1] * (x.dim() - value.dim()) + list(value.shape)
    has_rows = [not known(sizes[dim] == 1) for dim in order]
    depth = sum(has_rows)
    is_prefix = all(has_rows[:depth]) and (depth < len(order) or not order)
    return depth if is_prefix else None
