"""How much of the rows one program takes, and with how many threads."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

# Lanes of a warp: 64 on the CDNA chips of AMD that we compile for.
WARP_SIZE = 64 if torch.version.hip else 32
MAX_THREADS = 1024
# The widest row that a program takes at once, half of it in float64: the last widths at which
# no kernel spills registers on sm_90 (tests/kernels/test_cross_compile.py). At 65536 rms_norm would
# spill 128 bytes a thread and the sandwich 456; a kernel that holds two rows would at 32768.
MAX_BLOCK = 32768


@dataclass(frozen=True)
class Launch:
    """A tile of `rows` x `block` elements for `num_warps` warps.

    It depends on the width and the type, never on the number of rows, so that a row's bits do not
    depend on its batch.
    """

    rows: int
    block: int
    num_warps: int

    @classmethod
    def for_shape(
        cls,
        cols: int,
        dtype: torch.dtype,
        *,
        held: int = 1,
        warp_size: int = WARP_SIZE,
        widest: int | None = None,
    ) -> Launch:
        """The tile for rows of `cols` elements held in `dtype`; rows too wide go in chunks.

        `held` is how many rows a program has in its registers at once: more threads share them.
        `widest` is the width up to which rows do not go in chunks, by default `MAX_BLOCK` or half
        of it.
        """
        is_double = dtype == torch.float64
        block = triton.next_power_of_2(cols)
        if block > (widest or (MAX_BLOCK // 2 if is_double else MAX_BLOCK) // held):
            block = (4096 if is_double else 8192) // held
        rows = min(64, 2048 // block) if block <= 512 else 1
        elements_per_thread = (8 if is_double else 16) // held
        threads = min(MAX_THREADS, max(warp_size, rows * block // elements_per_thread))
        return cls(rows, block, threads // warp_size)

    def grid(self, num_rows: int) -> tuple[int]:
        return ((num_rows + self.rows - 1) // self.rows,)


def eager(kernel: Any) -> Any:
    """The kernel as it is: what launchers wrap with unless a compiler traces them."""
    return kernel


def device_of(x: torch.Tensor, wrap: Any) -> AbstractContextManager[Any]:
    """Makes the device of `x` the current one; a launch that is only traced touches no device."""
    return torch.cuda.device_of(x) if wrap is eager and x.is_cuda else nullcontext()
