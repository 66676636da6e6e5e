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
# One row is worked on, and two or three are on their way: with one, a program waits for it. On an
# H200 the gradients of a sandwich took 1.05 to 1.8 times as long with two stages as with three
# (benchmarks/results/backward_launches_h200.json).
STAGES, MOST_STAGES = 3, 4
# Of rows on their way, a multiprocessor has more than this while its programs work on others: what
# the memory delivers in the time of a request, twice over. Fewer programs wait for the memory, and
# more write partial sums for nothing: where a fourth stage does instead of another program, it is
# up to 11 % faster (backward_stages_h200.json).
BYTES_AHEAD = 56 * 1024
ROWS_EACH = 4  # at least, of a program, where a multiprocessor has several
# From so many rows of a program on, programs of a multiprocessor that read two operands drift
# apart: the older is served first, and the younger ends alone. One program with two rows at once,
# which its warps work on side by side, is 5 to 9 % faster, and slower than two for fewer rows or
# more operands (backward_together_h200.json).
PAIRED_ROWS_EACH, PAIRED_OPERANDS = 96, 2
# What a program may keep of rows on their way where no GPU says: an H100's. Sums that warps
# exchange take some of it, too.
SHARED_MEMORY, EXCHANGED = 227 * 1024, 8 * 1024

# By the bytes of an element: how many of a chunk a lane takes, and how many chunks of a row it
# holds in a kernel of one norm; of two, or of two things in the same registers; and of these where
# 512 threads share a row, and the registers. No held row spills on sm_90 or gfx942
# (tests/kernels/test_cross_compile_backward.py).
LANES = {2: (8, (3, 4, 2)), 4: (4, (4, 3, 3)), 8: (2, (4, 2, 2))}
# The same of three norms or four, whose threads need so many registers that 256 take all there are.
MANY_NORMS = {2: (4, 4), 4: (4, 3), 8: (2, 3)}

# A program of `sum_partials_kernel`: 16 columns are 64 bytes of float32. Where a multiprocessor has
# several programs, it takes all their sums at once (backward_sums_h200.json).
PARTIAL_ROWS, MANY_PARTIAL_ROWS, PARTIAL_COLS = 128, 512, 16


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
        stages: of the loop over held rows: all but one are rows that are on their way meanwhile.
    """

    rows: int
    block: int
    chunks: int
    held: bool
    num_warps: int
    programs: int
    stages: int = STAGES

    @classmethod
    def for_shape(
        cls,
        cols: int,
        num_rows: Any,
        dtype: torch.dtype,
        *,
        norms: int = 1,
        operands: int = 2,
        warp_size: int = WARP_SIZE,
        shared_memory: int = SHARED_MEMORY,
    ) -> BackwardLaunch:
        """The launch for rows of `cols` elements.

        Args:
            cols: elements of a row.
            num_rows: may be symbolic.
            dtype: the widest type of the operands and of the sums.
            norms: how many norms have a row in the registers at once.
            operands: how many tiles of such a row a loop loads, those of weights included if it
                loads them, too.
            warp_size: lanes of a warp.
            shared_memory: the bytes that a program may have; decides in how many stages rows are
                read, which changes no bit.
        """
        rows, block, chunks, threads, held = _tile(cols, dtype.itemsize, norms)
        row_bytes = block * chunks * dtype.itemsize * operands
        programs, stages = num_programs(num_rows, rows, rows * row_bytes)
        if rows == 1 and held and operands <= PAIRED_OPERANDS and _drift(num_rows, programs):
            rows, threads = 2, 2 * threads
            programs, stages = num_programs(num_rows, rows, rows * row_bytes)
        left = max(0, shared_memory - EXCHANGED)
        stages = min(stages, 1 + left // (rows * row_bytes))
        return cls(rows, block, chunks, held, threads // warp_size, programs, stages)

    def constants(self) -> dict[str, Any]:
        """The constants of a kernel."""
        return {
            "ROWS": self.rows,
            "BLOCK": self.block,
            "CHUNKS": self.chunks if self.held else 1,
            "HELD": self.held,
            "STAGES": self.stages if self.held else 1,
        }


def _tile(cols: int, itemsize: int, norms: int) -> tuple[int, int, int, int, bool]:
    """Rows of a tile, columns of a chunk, chunks of a row, threads; whether rows are held."""
    lane, choices = _choices(itemsize, norms)
    if cols <= 64 * lane:
        block = triton.next_power_of_2(cols)
        return 256 * lane // block, block, 1, 128, True
    if cols <= 128 * lane and norms <= 2:
        # Half of the warps for each of two rows: up to 10 % faster (backward_together_h200.json).
        return 2, 64 * lane, triton.cdiv(cols, 64 * lane), 128, True
    fitting = [t for t, most in choices.items() if triton.cdiv(cols, t * lane) <= most]
    threads, held = (fitting[0], True) if fitting else (max(choices), False)
    return 1, threads * lane, triton.cdiv(cols, threads * lane), threads, held


def _drift(num_rows: Any, programs: Any) -> bool:
    """Whether several programs of a multiprocessor have so many rows that they drift apart."""
    if not isinstance(num_rows, int):
        return False
    return bool(programs > PROGRAMS and num_rows >= PAIRED_ROWS_EACH * 2 * PROGRAMS)


def _choices(itemsize: int, norms: int) -> tuple[int, dict[int, int]]:
    """Elements of a lane, and how many chunks of a row are held by so many threads that share it"""
    if norms > 2:
        lane, most = MANY_NORMS[itemsize]
        return lane, {128: most, 256: most}
    lane, (of_one, of_two, of_two_shared) = LANES[itemsize]
    if norms == 1:
        return lane, {128: of_one, 256: of_one, 512: of_one}
    return lane, {128: of_two, 256: of_two, 512: of_two_shared}


def launch_for(
    x: torch.Tensor,
    grad: torch.Tensor | None,
    plan: RoundingPlan,
    *,
    norms: int = 1,
    operands: int = 2,
) -> BackwardLaunch:
    """The launch for a norm of x (..., N) and the gradient of its result."""
    dtype = x.dtype if grad is None else torch.promote_types(x.dtype, grad.dtype)
    if plan.compute == torch.float64:
        dtype = plan.compute
    sizes: Any = {"norms": norms, "operands": operands, "shared_memory": shared_memory(x.device)}
    return BackwardLaunch.for_shape(x.shape[-1], num_rows(x), dtype, **sizes)


def shared_memory(device: torch.device) -> int:
    """The bytes that a program may have on a device."""
    if device.type != "cuda":
        return SHARED_MEMORY
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


def num_programs(num_rows: Any, rows: int, tile_bytes: int) -> tuple[Any, int]:
    """As many programs as keep the memory busy, and in how many stages each loads its rows.

    Few programs with another stage rather than more programs, and never so many that few rows make
    more partial sums.

    Args:
        num_rows: may be symbolic.
        rows: of a tile.
        tile_bytes: what is read of a tile.
    """
    if not isinstance(num_rows, int):
        each, programs = 1, PROGRAMS  # symbolic: a program without rows adds zeros
    else:
        num_tiles = (num_rows + rows - 1) // rows
        busy = BYTES_AHEAD // ((MOST_STAGES - 1) * tile_bytes) + 1
        each = max(1, min(busy, num_tiles // (ROWS_EACH * PROGRAMS)))
        programs = min(PROGRAMS * each, num_tiles)
    is_busy = each * (STAGES - 1) * tile_bytes > BYTES_AHEAD
    return programs, STAGES if is_busy else MOST_STAGES


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
    most = max(slots[2::3])
    grid = (triton.cdiv(max(widths), PARTIAL_COLS), len(widths))
    n_1, n_2, n_3, n_4 = widths + [0] * num_absent
    wrap(sum_partials_kernel)[grid](
        *slots,
        *[None, None, 0] * num_absent,
        N_1=n_1,
        N_2=n_2,
        N_3=n_3,
        N_4=n_4,
        ROWS=PARTIAL_ROWS if most <= PROGRAMS else MANY_PARTIAL_ROWS,
        BLOCK=PARTIAL_COLS,
        num_warps=4,
    )
    return grads
