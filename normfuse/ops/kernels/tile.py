"""How much of the rows one program takes, and with how many threads."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

from normfuse.ops.kernels.constants import target
from normfuse.ops.kernels.launches import (
    LAUNCHES,
    MANY_ROWS,
    MIDDLE_ROWS,
    ODD_LAUNCHES,
    ROWS_HELD,
    Entry,
)
from normfuse.ops.kernels.rows import known

# Lanes of a warp: 64 on the CDNA chips of AMD that we compile for.
WARP_SIZE = 64 if torch.version.hip else 32
MAX_THREADS = 1024
VECTOR_BYTES = 16  # of a row that a thread has in one tile, as many as it loads at once
# The widest row that stays in registers, half of it in float64; wider ones are read again for each
# step. No kernel spills on sm_90 on either side of it (tests/kernels/test_cross_compile.py).
WIDEST_HELD = 32768


@dataclass(frozen=True)
class Launch:
    """How a program takes `rows` rows: in tiles of `block` columns, with `num_warps` warps.

    These three decide the order in which a row is summed. They depend on the width and the type,
    never on the number of rows, so that a row's bits do not depend on its batch. How rows are read,
    in the words of `chunks.py`, changes no bit and may depend on it.

    Attributes:
        rows: rows of a program.
        block: columns of a tile, a power of two.
        num_warps: warps of a program.
        few: how rows are read if there are fewer than `MIDDLE_ROWS`.
        middle: how they are read if there are fewer than `MANY_ROWS`.
        many: how they are read otherwise.
    """

    rows: int
    block: int
    num_warps: int
    few: str = "held"
    middle: str = "held"
    many: str = "held"

    @classmethod
    def for_shape(
        cls,
        cols: int,
        dtype: torch.dtype,
        compute: torch.dtype,
        *,
        op: str,
        warp_size: int = WARP_SIZE,
    ) -> Launch:
        """The launch of `op` for rows of `cols` elements of `dtype`: measured, or by rule."""
        compute = torch.promote_types(dtype, compute)
        if dtype.itemsize == 2 and compute != torch.float64:
            odd = ODD_LAUNCHES.get(op, ()) if cols * dtype.itemsize % VECTOR_BYTES else ()
            for entry in (*odd, *LAUNCHES.get(op, ())):
                if entry.narrowest <= cols <= entry.widest:
                    return cls.of_entry(entry, cols, warp_size)
        vector = VECTOR_BYTES // (4 if compute == torch.float64 else min(4, dtype.itemsize))
        held = ROWS_HELD.get(op, 1)
        return cls.by_rule(cols, compute, held=held, vector=vector, warp_size=warp_size)

    @classmethod
    def of_entry(cls, entry: Entry, cols: int, warp_size: int) -> Launch:
        """What an entry of the table says, for rows that may be narrower than those measured."""
        block = min(entry.block, triton.next_power_of_2(cols))
        warps = max(1, entry.num_warps * 32 // warp_size)
        return cls(entry.rows, block, warps, entry.few, entry.middle, entry.many)

    @classmethod
    def by_rule(
        cls,
        cols: int,
        dtype: torch.dtype,
        *,
        held: int = 1,
        vector: int = VECTOR_BYTES // 4,
        warp_size: int = WARP_SIZE,
    ) -> Launch:
        """16 elements of `held` rows of the type `dtype` for each thread, 8 in float64.

        A thread has `vector` elements side by side in a tile of a row that is held, and 8 of one
        that is read again, 4 in float64.

        Few rows ask for weights and residual beforehand while a thread has the registers.
        """
        is_double = dtype == torch.float64
        widest = WIDEST_HELD // 2 if is_double else WIDEST_HELD
        width = triton.next_power_of_2(cols)
        rows = min(64, 2048 // width) if width <= 512 else 1
        threads = rows * width // ((8 if is_double else 16) // held)
        threads = min(MAX_THREADS, max(warp_size, threads))
        reads = "held" if cols <= widest // held else ""
        side_by_side = vector if reads or is_double else 8
        block = min(width, max(side_by_side * threads, warp_size) // rows)
        has_room = rows == 1 and threads <= MAX_THREADS // 2
        few = f"ahead {reads}" if reads and has_room else reads
        return cls(rows, block, threads // warp_size, few, few, reads)

    def constants(self, cols: int, num_rows: Any) -> dict[str, Any]:
        """The kernel's constants for `num_rows` rows of `cols` elements; rows may be symbolic."""
        reads = f"{self._reads(num_rows)} {target()}"
        return {"N": cols, "ROWS": self.rows, "BLOCK": self.block, "READS": reads}

    def _reads(self, num_rows: Any) -> str:
        """How so many rows are read; a symbolic number may turn out to be any."""
        if known(num_rows >= MANY_ROWS):
            return self.many
        if known(num_rows < MIDDLE_ROWS):
            return self.few
        if known(num_rows >= MIDDLE_ROWS) and known(num_rows < MANY_ROWS):
            return self.middle
        return " ".join(word for word in self.few.split() if word != "streamed")

    def grid(self, num_rows: int) -> tuple[int]:
        return ((num_rows + self.rows - 1) // self.rows,)


def eager(kernel: Any) -> Any:
    """The kernel as it is: what launchers wrap with unless a compiler traces them."""
    return kernel


def device_of(x: torch.Tensor, wrap: Any) -> AbstractContextManager[Any]:
    """Makes the device of `x` the current one; a launch that is only traced touches no device."""
    return torch.cuda.device_of(x) if wrap is eager and x.is_cuda else nullcontext()
