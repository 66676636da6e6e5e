"""How much of the rows one program takes, and with how many threads."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

from normfuse.ops.kernels.constants import target

# Lanes of a warp: 64 on the CDNA chips of AMD that we compile for.
WARP_SIZE = 64 if torch.version.hip else 32
MAX_THREADS = 1024
VECTOR = 8  # elements of a row that a thread has in one tile: 16 bytes of a 16-bit type
# The widest row that stays in registers, half of it in float64: beyond, kernels would spill on
# sm_90 (tests/kernels/test_cross_compile.py).
WIDEST_HELD = 32768


@dataclass(frozen=True)
class Launch:
    """How a program takes `rows` rows: in tiles of `block` columns, with `num_warps` warps.

    It depends on the width and the type, never on the number of rows, so that a row's bits do not
    depend on its batch.

    Attributes:
        rows: rows of a program.
        block: columns of a tile, a power of two.
        num_warps: warps of a program.
        reads: how rows are read, in the words of `chunks.py`.
    """

    rows: int
    block: int
    num_warps: int
    reads: str = "held"

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
        """The tile for rows of `cols` elements held in `dtype`.

        `held` is how many rows a program has in its registers at once: more threads share them.
        `widest` is the width up to which rows stay in registers, by default `WIDEST_HELD` or half
        of it.
        """
        is_double = dtype == torch.float64
        widest = widest or (WIDEST_HELD // 2 if is_double else WIDEST_HELD)
        reads = ["held"] if cols <= widest // held else []
        reads.append(target())
        width = triton.next_power_of_2(cols)
        rows = min(64, 2048 // width) if width <= 512 else 1
        per_thread = (8 if is_double else 16) // held
        threads = min(MAX_THREADS, max(warp_size, rows * width // per_thread))
        block = min(width, max(VECTOR * threads, warp_size) // rows)
        return cls(rows, block, threads // warp_size, " ".join(reads))

    def constants(self, cols: int) -> dict[str, Any]:
        """The kernel's constants for rows of `cols` elements."""
        return {"N": cols, "ROWS": self.rows, "BLOCK": self.block, "READS": self.reads}

    def grid(self, num_rows: int) -> tuple[int]:
        return ((num_rows + self.rows - 1) // self.rows,)


def eager(kernel: Any) -> Any:
    """The kernel as it is: what launchers wrap with unless a compiler traces them."""
    return kernel


def device_of(x: torch.Tensor, wrap: Any) -> AbstractContextManager[Any]:
    """Makes the device of `x` the current one; a launch that is only traced touches no device."""
    return torch.cuda.device_of(x) if wrap is eager and x.is_cuda else nullcontext()
