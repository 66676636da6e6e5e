"""Several tensors in one launch: each has a slot, a run of programs with its own rows and plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

from normfuse.ops.kernels.constants import NAMES, norm_constants, target, text
from normfuse.ops.kernels.launches import HEADS, JOINT_HEADS, MANY_PROGRAMS
from normfuse.ops.kernels.rows import (
    Layout,
    Neighbours,
    ResultStrides,
    addressed_with,
    as_vector,
    hint,
    is_empty,
    known,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.tile import MAX_THREADS, WARP_SIZE

if TYPE_CHECKING:
    from normfuse.ops.destinations import Destination
    from normfuse.ops.rotation import Rotation
    from normfuse.ops.rounding import RoundingPlan

SLOTS = 3

Tables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Slot:
    """One tensor of a launch: its arguments and constants, in the kernel's order.

    Attributes:
        y: the result, or None if it is only written elsewhere.
        rows: y itself, or rows in order that are copied into it where y's do not lie in order.
        there: where the result is written besides, or instead.
        rstd: (..., 1), or None if nobody wants it.
        arguments: pointers, sizes and strides.
        constants: without the slot's number.
        num_tiles: how many programs it takes.
    """

    y: torch.Tensor | None
    rows: torch.Tensor | None
    there: torch.Tensor | None
    rstd: torch.Tensor | None
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_tiles: Any

    @classmethod
    def of(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        tables: Tables | None,
        norm: tuple[float, float, RoundingPlan] | None,
        rotation: Rotation | None,
        *,
        tile: HeadsLaunch,
        store_rstd: bool,
        destination: Destination | None = None,
    ) -> Slot:
        """The slot of x (..., N); `norm` is (eps, offset, plan), None where x only turns, or less.

        A result that is only written elsewhere has no rstd.
        """
        axis, joint = joint_heads(weight)
        y, rows, rstd, order, layout = _results(x, axis, norm, rotation, destination, store_rstd)
        table = tables[0] if tables is not None and rotation is not None else None
        x, strides, neighbours, there = addressed_with(x, table, order, rows, layout, axis)
        widths = _widths(x.shape[-1], rotation)
        num_rows_tile, groups, num_tiles = _tiles(x, joint, widths["tile"], tile, neighbours)
        turn = "" if rotation is None or table is None else _turn(rotation, table.dtype)
        constants = {
            "N": x.shape[-1],
            "ROWS": num_rows_tile,
            "GROUPS": groups,
            "JOINT": joint,
            **{name: width for name, width in widths.items() if name != "tile"},
            "TURN": turn,
            **_norm_constants(norm),
            **_place_constants(layout, there),
        }
        weight = as_vector(weight) if axis is None or weight is None else weight.contiguous()
        arguments = (x, weight, rows, rstd, num_rows(x), *strides, neighbours.stride)
        place = _place(layout, there)
        memory = None if destination is None else place[0]
        return cls(y, rows, memory, rstd, arguments + place, constants, num_tiles)

    def finished(self) -> torch.Tensor | None:
        """The result, once the kernel is launched."""
        if self.y is None or self.rows is None or self.rows is self.y:
            return self.y
        return self.y.copy_(self.rows)


def joint_heads(weight: torch.Tensor | None) -> tuple[int | None, int]:
    """The axis of the heads that one norm spans, counted from the end, and how many they are.

    A weight of one axis is that of each row alone; one of several is (H, 1, ..., N).
    """
    if weight is None or weight.dim() < 2:
        return None, 1
    return -weight.dim(), weight.shape[0]


def _tiles(
    x: torch.Tensor, joint: int, width: int, tile: HeadsLaunch, neighbours: Neighbours
) -> tuple[int, int, Any]:
    """Rows of a tile, tiles of a program, and programs."""
    if joint > 1:
        return triton.next_power_of_2(joint), 1, num_rows(x) // joint
    num_rows_tile = max(1, tile.elements // width)
    groups = tile.groups_of(num_rows_tile, num_rows(x), neighbours)
    num_rows_program = num_rows_tile * groups
    return num_rows_tile, groups, (num_rows(x) + num_rows_program - 1) // num_rows_program


class _Results(NamedTuple):
    """Where the rows of x are written: `y`, `rows` and `rstd` as in `Slot`.

    Attributes:
        order: of the axes of rows and rstd.
        layout: where they are written besides, or instead.
    """

    y: torch.Tensor | None
    rows: torch.Tensor | None
    rstd: torch.Tensor | None
    order: tuple[int, ...]
    layout: Layout | None


def _results(
    x: torch.Tensor,
    axis: int | None,
    norm: tuple[float, float, RoundingPlan] | None,
    rotation: Rotation | None,
    destination: Destination | None,
    store_rstd: bool,
) -> _Results:
    out = rotation.out if rotation is not None else norm[-1].out if norm else x.dtype
    layout = None if destination is None else destination.layout(x, out)
    if destination is not None and not destination.kept:
        assert not store_rstd, "a result that is only written elsewhere has no rstd"
        return _Results(None, None, None, _order_of(x), layout)
    is_contiguous = rotation is not None and rotation.is_contiguous
    how = torch.contiguous_format if is_contiguous else torch.preserve_format
    y = torch.empty_like(x, dtype=out, memory_format=how)
    compute = norm[-1].compute if store_rstd and norm is not None else None
    if axis is not None:
        return _joint_results(x, y, axis, compute, layout)
    rstd = None if compute is None else x.new_empty((*x.shape[:-1], 1), dtype=compute)
    order = row_order(y, rstd)
    if order is not None:
        return _Results(y, y, rstd, order, layout)
    rows = torch.empty_like(x, dtype=out, memory_format=torch.contiguous_format)
    # Without rows any order will do: their strides say nothing.
    order = tuple(range(x.dim() - 1)) if is_empty(x) else row_order(rows)
    assert order is not None
    return _Results(y, rows, rstd, order, layout)


def _joint_results(
    x: torch.Tensor, y: torch.Tensor, axis: int, compute: torch.dtype | None, layout: Layout | None
) -> _Results:
    """Those of heads that share a norm, which are taken in the order of x, a token at a time."""
    rstd, order = None, _order_of(x)
    if compute is not None:
        tokens = [size for dim, size in enumerate(x.shape[:-1]) if dim != x.dim() + axis]
        rstd = x.new_empty((*tokens, 1, 1), dtype=compute).movedim(-2, axis)
    if row_order(y) == order:
        return _Results(y, y, rstd, order, layout)
    if layout is None:
        return _Results(y, None, rstd, order, Layout(y, y.stride()[:-1]))
    return _Results(y, torch.empty_like(x, dtype=y.dtype), rstd, order, layout)


def _order_of(x: torch.Tensor) -> tuple[int, ...]:
    """The axes in which the rows of x lie, outermost first, as far as they lie in any order."""
    order = row_order(torch.empty_like(x, device="meta"))
    return tuple(range(x.dim() - 1)) if order is None else order


def _place(layout: Layout | None, there: ResultStrides | None) -> tuple[Any, ...]:
    """Where rows are written besides: memory, positions and strides; None if they are not."""
    if layout is None or there is None:
        return (None,) * 10
    placed: tuple[Any, ...] = (None,) * 4
    if layout.positions is not None:
        stride = 0 if layout.counts_up else layout.positions.stride(0)
        placed = (layout.positions, stride, layout.places, layout.stride)
    strides = there.outer, there.middle, there.inner, there.next, layout.copy_stride
    return (layout.memory, *placed, *strides)


def _place_constants(layout: Layout | None, there: ResultStrides | None) -> dict[str, Any]:
    if layout is None or there is None:
        return {"PLACE": "", "COPIES": 0}
    place = ""
    if layout.positions is not None:
        place = text({"axis": there.level, "from": "first" if layout.counts_up else "each"})
    return {"PLACE": place, "COPIES": layout.copies}


def _norm_constants(norm: tuple[float, float, RoundingPlan] | None) -> dict[str, Any]:
    if norm is None:
        return {"EPS": 0.0, "OFFSET": 0.0, "PLAN": ""}
    eps, offset, plan = norm
    return norm_constants(plan, eps, offset)


NO_SLOT = Slot(
    None,
    None,
    None,
    None,
    (None,) * 4 + (0, 1, 1) + (0,) * 7 + (None,) * 10,
    {
        "N": 0,
        "ROWS": 1,
        "GROUPS": 1,
        "JOINT": 1,
        "DIM": 0,
        "START": 0,
        "PAIRS": 1,
        "OTHERS": 1,
        "TURN": "",
        **_norm_constants(None),
        **_place_constants(None, None),
    },
    0,
)


@dataclass(frozen=True)
class HeadsLaunch:
    """How a program takes the rows of one of its tensors.

    The tile decides the order in which a row is summed. It depends on the widths and the types
    alone, as `tile.Launch` does. How many tiles a program takes changes no bit.

    Attributes:
        elements: of a tile: as many rows as make it up.
        num_warps: warps of a program.
        groups: tiles that a program takes at most; they share what they read of the tables.
        programs: how many there must be for a program to take more than one.
    """

    elements: int
    num_warps: int
    groups: int = 1
    programs: int = MANY_PROGRAMS

    @classmethod
    def for_widths(
        cls, widths: Sequence[int], plans: Sequence[RoundingPlan], *, is_joint: bool = False
    ) -> HeadsLaunch:
        """The launch for tiles of these widths; `is_joint` if one of them holds a joint norm."""
        width = max(widths)
        is_double = any(plan.compute == torch.float64 for plan in plans)
        if not is_double and is_joint and width in JOINT_HEADS:
            return cls(width, max(1, JOINT_HEADS[width] * 32 // WARP_SIZE))
        if not is_double and width in HEADS:
            elements, warps, groups = HEADS[width]
            return cls(elements, max(1, warps * 32 // WARP_SIZE), groups)
        elements = max(2048, width)
        threads = elements // (8 if is_double else 16)
        return cls(elements, min(MAX_THREADS, max(WARP_SIZE, threads)) // WARP_SIZE)

    def groups_of(self, num_rows_tile: int, num_rows: Any, neighbours: Neighbours) -> int:
        """How many tiles a program takes of `num_rows` rows, a power of two.

        Several only where it stays among neighbours that turn by the same angles, and where there
        are programs enough for the GPU; if `num_rows` is symbolic, it is as many as were traced.
        """

        def fits(groups: int) -> bool:
            rows = num_rows_tile * groups
            return known(neighbours.size % rows == 0) and hint(num_rows) >= self.programs * rows

        groups = self.groups if neighbours.share_table else 1
        while groups > 1 and not fits(groups):
            groups //= 2
        return groups


def equally_laid_out(cos: torch.Tensor, sin: torch.Tensor) -> Tables:
    """Both tables with the same strides, which a kernel is passed once."""
    if cos.stride() == sin.stride() and cos.dtype == sin.dtype:
        return cos, sin
    dtype = torch.promote_types(cos.dtype, sin.dtype)
    return cos.to(dtype).contiguous(), sin.to(dtype).contiguous()


def width_of_tile(x: torch.Tensor, weight: torch.Tensor | None, rotation: Rotation | None) -> int:
    """The columns of a tile that holds a row of x, or the rows of a joint norm."""
    joint = joint_heads(weight)[1]
    return int(_widths(x.shape[-1], rotation)["tile"] * triton.next_power_of_2(joint))


def _widths(width: int, rotation: Rotation | None) -> dict[str, int]:
    """The columns that turn, and the widths of the tiles of pairs and of other columns."""
    dim = 0 if rotation is None else rotation.dim
    pairs = triton.next_power_of_2(dim // 2) if dim else 0
    others = triton.next_power_of_2(width - dim) if width > dim else 0
    return {
        "DIM": dim,
        "START": 0 if rotation is None else rotation.start,
        "PAIRS": pairs,
        "OTHERS": others,
        "tile": triton.next_power_of_2(2 * pairs + others),
    }


def _turn(rotation: Rotation, table: torch.dtype) -> str:
    product = torch.promote_types(rotation.dtype, table)
    return text(
        {
            "layout": rotation.layout,
            "in": NAMES[rotation.dtype],
            "product": NAMES[product],
            "out": NAMES[rotation.out],
            "on": target(),
        }
    )
