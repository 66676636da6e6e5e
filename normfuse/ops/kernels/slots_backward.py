"""The host's side of one tensor in the launch of `qk_rms_norm_rope_backward`: its slot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton

from normfuse.ops.kernels.constants import NAMES, text
from normfuse.ops.kernels.rows import as_vector, is_empty, num_rows, row_order
from normfuse.ops.kernels.slots import SLOTS, Tables
from normfuse.ops.kernels.tile import WARP_SIZE, device_of
from normfuse.ops.kernels.tile_backward import no_gradients, offset_of, sum_partials

if TYPE_CHECKING:
    from normfuse.ops.rotation import Rotation
    from normfuse.ops.rounding import RoundingPlan

LEVELS = 3  # of leading dimensions, the most that a kernel addresses

# A tile of 8 KiB of x, where rows are no wider, and two vectors of it for each thread. With half of
# both, and sums over rows by `tl.sum`, the gradients of Qwen 3's heads took 1.3 times as long on an
# H200 (backward_h200.json, and that of commit c77c132). Half a tile where what is read
# beside it is so wide that a GPU with 99 KiB of shared memory could not hold the rows to come.
TILE_BYTES, BYTES_OF_A_THREAD = 8192, 32
MOST_BYTES = 6  # that are read for a byte of x, itself included

# Programs of 8 warps: two for each of the 132 multiprocessors that tile_backward.py speaks of.
PROGRAMS = 2 * 132


@dataclass(frozen=True)
class BackwardSlot:
    """One x of a launch: its arguments and constants, in the kernel's order.

    Attributes:
        grad_x: the result, or None if it is not wanted.
        rows: the rows that the kernel writes, copied into `grad_x` where they do not lie in order.
        partial: (programs, N), what each program's rows add to the weight's gradient.
        weight: the one that learns, or None.
        num_programs: that take rows of this x.
        threads: that share a tile.
        arguments: pointers, sizes and strides.
        constants: without the slot's number.
    """

    grad_x: torch.Tensor | None
    rows: torch.Tensor | None
    partial: torch.Tensor | None
    weight: torch.Tensor | None
    num_programs: int
    threads: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        grad: torch.Tensor,
        weight: torch.Tensor | None,
        rstd: torch.Tensor | None,
        tables: Tables | None,
        norm: tuple[float, float, RoundingPlan, Rotation | None],
        wants: tuple[bool, bool],
        programs: int,
    ) -> BackwardSlot:
        """The slot of x (..., N); `norm` is (eps, offset, plan, rotation).

        `wants` says it for x and weight. Without an `rstd` the kernel computes it anew.
        """
        eps, offset, plan, rotation = norm
        dtype = torch.promote_types(plan.compute, torch.float32)
        grad_x = torch.empty_like(x) if wants[0] else None
        rows = grad_x
        order = row_order(rows) if rows is not None else tuple(range(x.dim() - 1))
        if order is None:
            rows, order = torch.empty_like(x).contiguous(), tuple(range(x.dim() - 1))
        x, grad = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, grad))
        widths = _widths(x.shape[-1], rotation)
        width = widths.pop("tile")
        table = tables[0] if tables is not None and rotation is not None else None
        num_tile_rows = max(1, tile_elements(x, grad, table) // width)
        num_programs = programs
        if isinstance(num_rows(x), int):
            num_programs = min(programs, triton.cdiv(num_rows(x), num_tile_rows))
        learned = weight if wants[1] else None
        partial = None
        if learned is not None:
            partial = learned.new_empty((num_programs, x.shape[-1]), dtype=dtype)
        arguments = (
            x,
            grad,
            as_vector(weight),
            rstd,
            rows,
            partial,
            num_rows(x),
            num_programs,
            *_sizes(x, order)[1:],
            *_strides(x, order),
            *_strides(grad, order),
            *_strides(rstd, order),
            *_strides(None if table is None else _expanded(table, x), order),
        )
        constants = {
            "N": x.shape[-1],
            "ROWS": num_tile_rows,
            **widths,
            "TURN": "" if rotation is None else text({"layout": rotation.layout}),
            "SHARE": 1.0 if plan.mean == "sum" else 1.0 / x.shape[-1],
            "EPS": float(eps),
            "OFFSET": offset_of(weight, offset),
            "WIDE": NAMES[dtype],
        }
        threads = num_tile_rows * width * x.dtype.itemsize // BYTES_OF_A_THREAD
        return cls(grad_x, rows, partial, learned, num_programs, threads, arguments, constants)

    def finished(self) -> torch.Tensor | None:
        """The gradient of x, once the kernel is launched."""
        if self.grad_x is None or self.grad_x is self.rows:
            return self.grad_x
        assert self.rows is not None
        return self.grad_x.copy_(self.rows)


NO_SLOT = BackwardSlot(
    None,
    None,
    None,
    None,
    0,
    0,
    (None,) * 6 + (0, 0, 1, 1) + (0,) * 12,
    {
        "N": 0,
        "ROWS": 1,
        "DIM": 0,
        "START": 0,
        "PAIRS": 1,
        "OTHERS": 1,
        "TURN": "",
        "SHARE": 1.0,
        "EPS": 0.0,
        "OFFSET": 0.0,
        "WIDE": "f32",
    },
)


def tile_elements(x: torch.Tensor, grad: torch.Tensor, table: torch.Tensor | None) -> int:
    """How many elements of x a program takes at once, where its rows are no wider."""
    size = x.dtype.itemsize
    read = size + grad.dtype.itemsize + (0 if table is None else 2 * table.dtype.itemsize)
    return TILE_BYTES // size // (1 if read <= MOST_BYTES * size else 2)


def _widths(width: int, rotation: Rotation | None) -> dict[str, int]:
    """The columns that turn, and the widths of the tiles of pairs and of other columns."""
    dim = 0 if rotation is None else rotation.dim
    pairs = triton.next_power_of_2(dim // 2) if dim else 1
    others = triton.next_power_of_2(width - dim) if width > dim else 1
    used = (2 * pairs if dim else 0) + (others if width > dim else 0)
    return {
        "DIM": dim,
        "START": 0 if rotation is None else rotation.start,
        "PAIRS": pairs,
        "OTHERS": others,
        "tile": triton.next_power_of_2(used),
    }


def _sizes(x: torch.Tensor, order: tuple[int, ...]) -> list[Any]:
    return ([x.shape[dim] for dim in order] + [1] * LEVELS)[:LEVELS]


def _strides(tensor: torch.Tensor | None, order: tuple[int, ...]) -> list[Any]:
    """Strides of the leading dimensions in order; absent ones are inner ones of size 1."""
    strides = [] if tensor is None else [tensor.stride(dim) for dim in order]
    return (strides + [0] * LEVELS)[:LEVELS]


def _expanded(table: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The table with the rows of x: strides of 0 where one row of it serves many."""
    return table.expand(*x.shape[:-1], table.shape[-1])


def launch_slots(
    kernel: Any,
    norms: Sequence[tuple[Any, ...]],
    wants: Sequence[tuple[bool, bool]],
    tables: Tables | None,
    programs: int,
    wrap: Callable[[Any], Any],
) -> list[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Both stages for up to three norms; the gradients of each x and weight.

    A norm is (x, grad, weight, rstd, eps, offset, plan, rotation); a gradient not wanted is None.
    """
    xs = [norm[0] for norm in norms]
    shares = _shares(xs, programs)
    slots = [
        BackwardSlot.of(*norm[:4], tables, norm[4:], wanted, share)
        for norm, wanted, share in zip(norms, wants, shares, strict=True)
    ]
    filled = [slot for x, slot in zip(xs, slots, strict=True) if not is_empty(x)]
    sums: list[torch.Tensor | None] = []
    if filled:
        padded = filled + [NO_SLOT] * (SLOTS - len(filled))
        cos, sin = tables or (None, None)
        constants: dict[str, Any] = {"COLS": 0 if cos is None else cos.shape[-1]}
        for number, slot in enumerate(padded, start=1):
            constants |= {f"{name}_{number}": value for name, value in slot.constants.items()}
        threads = max(slot.threads for slot in filled)
        with device_of(xs[0], wrap):
            wrap(kernel)[(sum(slot.num_programs for slot in filled),)](
                cos,
                sin,
                1 if cos is None else cos.stride(-1),
                *(argument for slot in padded for argument in slot.arguments),
                **constants,
                num_warps=min(512, max(128, threads)) // WARP_SIZE,
            )
            sums = sum_partials([s.partial for s in filled], [s.weight for s in filled], wrap)
    remaining = iter(sums)
    return [
        (slot.finished(), no_gradients([slot.weight])[0] if is_empty(x) else next(remaining))
        for x, slot in zip(xs, slots, strict=True)
    ]


def _shares(xs: Sequence[torch.Tensor], programs: int) -> list[int]:
    """How many programs take the rows of each, by the numbers of their elements."""
    sizes = [x.numel() for x in xs]
    if not all(isinstance(size, int) for size in sizes):
        return [max(1, programs // len(xs))] * len(xs)
    return [max(1, programs * size // max(1, sum(sizes))) for size in sizes]
