"""How the rows of a backward kernel are shared out, and how its partial sums are added up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from normfuse.ops.kernels.row_backward import sum_partials_kernel
from normfuse.ops.kernels.rows import num_rows
from normfuse.ops.kernels.tile import WARP_SIZE

if TYPE_CHECKING:
    from normfuse.ops.residual_sum import Scales
    from normfuse.ops.rounding import RoundingPlan

# The multiprocessors of an H100 or H200. Every GPU gets a multiple of this many programs: the order
# in which gradients are summed, and so their bits, depend on the shape alone.
PROGRAMS = 132
WARPS = 16  # that the programs of a multiprocessor have together

# By the bytes of an element: how many of a chunk a lane takes, and how many chunks of a row it
# holds in a kernel of one norm, or of two. No held row spills registers on sm_90 or gfx942
# (tests/kernels/test_cross_compile_backward.py).
LANES = {2: (8, (3, 2)), 4: (4, (4, 3)), 8: (2, (4, 2))}
# The same of three norms or four, whose threads need so many registers that 256 take all there are.
MANY_NORMS = {2: (4, 4), 4: (4, 3), 8: (2, 3)}

# A program of `sum_partials_kernel`: 16 columns are 64 bytes of float32.
PARTIAL_ROWS, PARTIAL_COLS = 128, 16


@dataclass(frozen=True)
class BackwardLaunch:
    """Persistent programs, each of which takes every `programs`-th tile of rows.

    Attributes:
        rows: of a tile.
        block: columns of a chunk of a row.
        chunks: of a row.
        held: whether a program holds whole rows, and the sums of the weight's gradient, in its
            registers; else it goes through a row chunk by chunk, and adds the sums up in memory.
        num_warps: of a program.
        programs: at most as many as there are tiles.
    """

    rows: int
    block: int
    chunks: int
    held: bool
    num_warps: int
    programs: int

    @classmethod
    def for_shape(
        cls,
        cols: int,
        num_rows: Any,
        dtype: torch.dtype,
        *,
        norms: int = 1,
        warp_size: int = WARP_SIZE,
    ) -> BackwardLaunch:
        """The launch for rows of `cols` elements.

        Args:
            cols: elements of a row.
            num_rows: may be symbolic.
            dtype: the widest type of the operands and of the sums.
            norms: how many norms have a row in the registers at once.
            warp_size: lanes of a warp.
        """
        lane, most, choices = _choices(dtype.itemsize, norms)
        if cols <= 64 * lane:
            block = triton.next_power_of_2(cols)
            rows, chunks, threads = 256 * lane // block, 1, 128
        else:
            fitting = [t for t in choices if triton.cdiv(cols, t * lane) <= most]
            threads = fitting[0] if fitting else choices[-1]
            block = threads * lane
            rows, chunks = 1, triton.cdiv(cols, block)
        held = chunks <= most
        num_tiles = (num_rows + rows - 1) // rows
        programs = _num_programs(num_rows, threads // 32, num_tiles)
        return cls(rows, block, chunks, held, threads // warp_size, programs)

    def constants(self) -> dict[str, Any]:
        """The constants of a kernel."""
        return {
            "ROWS": self.rows,
            "BLOCK": self.block,
            "CHUNKS": self.chunks if self.held else 1,
            "HELD": self.held,
        }


def _choices(itemsize: int, norms: int) -> tuple[int, int, tuple[int, ...]]:
    """Elements of a lane, chunks that are held of a row, and how many threads may share it."""
    if norms > 2:
        return *MANY_NORMS[itemsize], (128, 256)
    lane, chunks = LANES[itemsize]
    return lane, chunks[norms - 1], (128, 256, 512)


def launch_for(
    x: torch.Tensor, grad: torch.Tensor | None, plan: RoundingPlan, *, norms: int = 1
) -> BackwardLaunch:
    """The launch for a norm of x (..., N) and the gradient of its result."""
    dtype = x.dtype if grad is None else torch.promote_types(x.dtype, grad.dtype)
    if plan.compute == torch.float64:
        dtype = plan.compute
    return BackwardLaunch.for_shape(x.shape[-1], num_rows(x), dtype, norms=norms)


def _num_programs(num_rows: Any, warps: int, num_tiles: Any) -> int:
    """More programs for more rows, so that writing partial sums stays a small part of it."""
    if not isinstance(num_rows, int):
        return PROGRAMS  # symbolic: a program without rows adds zeros
    each = max(1, min(WARPS // warps, num_rows // 2048))
    return min(PROGRAMS * each, num_tiles)


def scale_constants(scales: Scales | None) -> dict[str, Any]:
    """The numbers of a residual sum's factors."""
    branch, total = (None, None) if scales is None else scales[2:]
    return {
        "BRANCH_SCALE": None if branch is None else float(branch),
        "TOTAL_SCALE": None if total is None else float(total),
    }


def offset_of(weight: torch.Tensor | None, offset: float) -> float:
    """What is added to a weight; the ones that stand for an absent weight stay ones."""
    return 0.0 if weight is None else float(offset)


def partial_sums(
    weight: torch.Tensor | None, tile: BackwardLaunch, dtype: torch.dtype
) -> torch.Tensor | None:
    """(programs, N) for stage one to fill; None for a weight without a gradient."""
    if weight is None:
        return None
    size = (tile.programs, weight.shape[-1])
    return weight.new_empty(size, dtype=dtype) if tile.held else weight.new_zeros(size, dtype=dtype)


def no_gradients(weights: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """The gradients of weights where there are no rows."""
    return [None if weight is None else torch.zeros_like(weight) for weight in weights]


def sum_partials(
    partials: Sequence[torch.Tensor | None],
    weights: Sequence[torch.Tensor | None],
    wrap: Callable[[Any], Any],
) -> list[torch.Tensor | None]:
    """Stage two, one launch for up to four weights: (programs, N) -> (N,) in the weight's type."""
    grads: list[torch.Tensor | None] = []
    slots: list[Any] = []
    widths: list[int] = []
    for partial, weight in zip(partials, weights, strict=True):
        if partial is None or weight is None:
            grads.append(None)
            continue
        grads.append(weight.new_empty(weight.shape))
        slots += [partial, grads[-1], partial.shape[0]]
        widths.append(weight.shape[0])
    if not widths:
        return grads
    num_absent = 4 - len(widths)
    grid = (triton.cdiv(max(widths), PARTIAL_COLS), len(widths))
    n_1, n_2, n_3, n_4 = widths + [0] * num_absent
    wrap(sum_partials_kernel)[grid](
        *slots,
        *[None, None, 0] * num_absent,
        N_1=n_1,
        N_2=n_2,
        N_3=n_3,
        N_4=n_4,
        ROWS=PARTIAL_ROWS,
        BLOCK=PARTIAL_COLS,
        num_warps=4,
    )
    return grads
