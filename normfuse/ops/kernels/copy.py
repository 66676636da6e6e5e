"""The same bytes without the mathematics: what a kernel of so many operands and results can reach.

    y_1 = x_1 + x_2 + x_3,  y_2 = x_2,  y_3 = x_3        (as many as there are)

The benchmark measures our kernels against it. A sum costs nothing beside the memory, and makes the
compiler read every operand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

MAX_STREAMS = 3


@dataclass(frozen=True)
class CopyTile:
    """`block` elements of every stream for a program of `num_warps` warps."""

    block: int
    num_warps: int


# From 4 to 32 bytes of 16-bit elements a thread and stream; the best of them is reported.
TILES = (
    CopyTile(1024, 4),
    CopyTile(1024, 8),
    CopyTile(2048, 4),
    CopyTile(2048, 8),
    CopyTile(4096, 8),
    CopyTile(8192, 16),
)


@triton.jit
def copy_kernel(
    x_1_ptr, x_2_ptr, x_3_ptr, y_1_ptr, y_2_ptr, y_3_ptr, num_elements, BLOCK: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_elements
    x_1 = tl.load(x_1_ptr + offsets, mask=mask)
    x_2 = x_1
    x_3 = x_1
    total = x_1.to(tl.float32)
    if x_2_ptr is not None:
        x_2 = tl.load(x_2_ptr + offsets, mask=mask)
        total += x_2.to(tl.float32)
    if x_3_ptr is not None:
        x_3 = tl.load(x_3_ptr + offsets, mask=mask)
        total += x_3.to(tl.float32)
    tl.store(y_1_ptr + offsets, total, mask=mask)
    if y_2_ptr is not None:
        tl.store(y_2_ptr + offsets, x_2, mask=mask)
    if y_3_ptr is not None:
        tl.store(y_3_ptr + offsets, x_3, mask=mask)


def launch(
    xs: Sequence[torch.Tensor], num_results: int, *, tile: CopyTile = TILES[0]
) -> tuple[torch.Tensor, ...]:
    """One to three contiguous tensors of one shape and type -> so many results of the same."""
    assert 1 <= len(xs) <= MAX_STREAMS, f"a copy reads 1 to {MAX_STREAMS} tensors, got {len(xs)}"
    assert 1 <= num_results <= MAX_STREAMS, f"... and writes as many, got {num_results}"
    ys = tuple(torch.empty_like(xs[0]) for _ in range(num_results))
    num_elements = xs[0].numel()
    copy_kernel[(triton.cdiv(num_elements, tile.block),)](
        *xs,
        *(None,) * (MAX_STREAMS - len(xs)),
        *ys,
        *(None,) * (MAX_STREAMS - num_results),
        num_elements,
        BLOCK=tile.block,
        num_warps=tile.num_warps,
    )
    return ys
