"""Per-head RMSNorm of queries and keys, then rotary embedding, over rows; one launch for all.

    rstd = 1 / sqrt(mean(x^2) + eps)
    n    = x * rstd * (weight + offset)
    y_a  = n_a * cos_a - n_b * sin_a        for every pair (a, b) of columns that turn
    y_b  = n_b * cos_b + n_a * sin_b
    y_c  = n_c                              for the others

Backward: the pairs of grad_y turn back,

    g_a = grad_a * cos_a + grad_b * sin_b
    g_b = grad_b * cos_b - grad_a * sin_a

and then as for RMSNorm, with unit = x * rstd and h = g * (weight + offset):

    grad_x      = rstd * (h - unit * mean(h * unit))
    grad_weight = sum over rows of g * unit
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.heads import head_rows, rows_of_program
from normfuse.ops.kernels.rows import is_empty
from normfuse.ops.kernels.slots import (
    NO_SLOT,
    SLOTS,
    HeadsLaunch,
    Slot,
    Tables,
    equally_laid_out,
    joint_heads,
    width_of_tile,
)
from normfuse.ops.kernels.tile import device_of, eager

if TYPE_CHECKING:
    from normfuse.ops.destinations import Writes
    from normfuse.ops.rotation import Rotation
    from normfuse.ops.rounding import RoundingPlan


@triton.jit
def qk_rms_norm_rope_kernel(
    cos_ptr, sin_ptr, stride_table,
    x_1_ptr, weight_1_ptr, y_1_ptr, rstd_1_ptr, num_rows_1, size_middle_1, size_inner_1,
    stride_x_outer_1, stride_x_middle_1, stride_x_inner_1,
    stride_table_outer_1, stride_table_middle_1, stride_table_inner_1, stride_next_1,
    there_1_ptr, position_1_ptr, stride_position_1, size_place_1, stride_place_1,
    stride_there_outer_1, stride_there_middle_1, stride_there_inner_1,
    stride_there_next_1, stride_copy_1,
    x_2_ptr, weight_2_ptr, y_2_ptr, rstd_2_ptr, num_rows_2, size_middle_2, size_inner_2,
    stride_x_outer_2, stride_x_middle_2, stride_x_inner_2,
    stride_table_outer_2, stride_table_middle_2, stride_table_inner_2, stride_next_2,
    there_2_ptr, position_2_ptr, stride_position_2, size_place_2, stride_place_2,
    stride_there_outer_2, stride_there_middle_2, stride_there_inner_2,
    stride_there_next_2, stride_copy_2,
    x_3_ptr, weight_3_ptr, y_3_ptr, rstd_3_ptr, num_rows_3, size_middle_3, size_inner_3,
    stride_x_outer_3, stride_x_middle_3, stride_x_inner_3,
    stride_table_outer_3, stride_table_middle_3, stride_table_inner_3, stride_next_3,
    there_3_ptr, position_3_ptr, stride_position_3, size_place_3, stride_place_3,
    stride_there_outer_3, stride_there_middle_3, stride_there_inner_3,
    stride_there_next_3, stride_copy_3,
    COLS: tl.constexpr,
    N_1: tl.constexpr, ROWS_1: tl.constexpr, GROUPS_1: tl.constexpr,
    JOINT_1: tl.constexpr, DIM_1: tl.constexpr, START_1: tl.constexpr,
    PAIRS_1: tl.constexpr, OTHERS_1: tl.constexpr, TURN_1: tl.constexpr,
    EPS_1: tl.constexpr, OFFSET_1: tl.constexpr, PLAN_1: tl.constexpr,
    PLACE_1: tl.constexpr, COPIES_1: tl.constexpr,
    N_2: tl.constexpr, ROWS_2: tl.constexpr, GROUPS_2: tl.constexpr,
    JOINT_2: tl.constexpr, DIM_2: tl.constexpr, START_2: tl.constexpr,
    PAIRS_2: tl.constexpr, OTHERS_2: tl.constexpr, TURN_2: tl.constexpr,
    EPS_2: tl.constexpr, OFFSET_2: tl.constexpr, PLAN_2: tl.constexpr,
    PLACE_2: tl.constexpr, COPIES_2: tl.constexpr,
    N_3: tl.constexpr, ROWS_3: tl.constexpr, GROUPS_3: tl.constexpr,
    JOINT_3: tl.constexpr, DIM_3: tl.constexpr, START_3: tl.constexpr,
    PAIRS_3: tl.constexpr, OTHERS_3: tl.constexpr, TURN_3: tl.constexpr,
    EPS_3: tl.constexpr, OFFSET_3: tl.constexpr, PLAN_3: tl.constexpr,
    PLACE_3: tl.constexpr, COPIES_3: tl.constexpr,
):  # fmt: skip
    """The first programs take the rows of the first tensor, the next those of the second."""
    tile = tl.program_id(0)
    end_1 = tl.cdiv(num_rows_1, rows_of_program(ROWS_1, GROUPS_1, JOINT_1))
    end_2 = end_1 + tl.cdiv(num_rows_2, rows_of_program(ROWS_2, GROUPS_2, JOINT_2))
    if tile < end_1:
        head_rows(
            tile, x_1_ptr, weight_1_ptr, cos_ptr, sin_ptr, y_1_ptr, rstd_1_ptr,
            num_rows_1, size_middle_1, size_inner_1,
            stride_x_outer_1, stride_x_middle_1, stride_x_inner_1,
            stride_table_outer_1, stride_table_middle_1, stride_table_inner_1,
            stride_next_1,
            there_1_ptr, position_1_ptr, stride_position_1, size_place_1, stride_place_1,
            stride_there_outer_1, stride_there_middle_1, stride_there_inner_1,
            stride_there_next_1, stride_copy_1, stride_table,
            N_1, ROWS_1, GROUPS_1, JOINT_1, DIM_1, COLS, START_1, PAIRS_1, OTHERS_1,
            TURN_1, EPS_1, OFFSET_1, PLAN_1, PLACE_1, COPIES_1,
        )  # fmt: skip
    if N_2 > 0:
        if (tile >= end_1) & (tile < end_2):
            head_rows(
                tile - end_1, x_2_ptr, weight_2_ptr, cos_ptr, sin_ptr, y_2_ptr, rstd_2_ptr,
                num_rows_2, size_middle_2, size_inner_2,
                stride_x_outer_2, stride_x_middle_2, stride_x_inner_2,
                stride_table_outer_2, stride_table_middle_2, stride_table_inner_2,
                stride_next_2,
                there_2_ptr, position_2_ptr, stride_position_2, size_place_2, stride_place_2,
                stride_there_outer_2, stride_there_middle_2, stride_there_inner_2,
                stride_there_next_2, stride_copy_2, stride_table,
                N_2, ROWS_2, GROUPS_2, JOINT_2, DIM_2, COLS, START_2, PAIRS_2, OTHERS_2,
                TURN_2, EPS_2, OFFSET_2, PLAN_2, PLACE_2, COPIES_2,
            )  # fmt: skip
    if N_3 > 0:
        if tile >= end_2:
            head_rows(
                tile - end_2, x_3_ptr, weight_3_ptr, cos_ptr, sin_ptr, y_3_ptr, rstd_3_ptr,
                num_rows_3, size_middle_3, size_inner_3,
                stride_x_outer_3, stride_x_middle_3, stride_x_inner_3,
                stride_table_outer_3, stride_table_middle_3, stride_table_inner_3,
                stride_next_3,
                there_3_ptr, position_3_ptr, stride_position_3, size_place_3, stride_place_3,
                stride_there_outer_3, stride_there_middle_3, stride_there_inner_3,
                stride_there_next_3, stride_copy_3, stride_table,
                N_3, ROWS_3, GROUPS_3, JOINT_3, DIM_3, COLS, START_3, PAIRS_3, OTHERS_3,
                TURN_3, EPS_3, OFFSET_3, PLAN_3, PLACE_3, COPIES_3,
            )  # fmt: skip


def launch(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[RoundingPlan],
    rotations: Sequence[Rotation | None],
    *,
    stores: Sequence[bool] | None = None,
    writes: Writes | None = None,
    tile: HeadsLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor | None]:
    """n <= 3 tensors (..., N_i), their weights (N_i,) or None -> their results, and their n rstd.

    Args:
        xs: rows of any strides, of up to 4 dimensions, that fit a program whole.
        weights: any of the four floating types; (H, 1, ..., N_i) for a norm over all heads.
        cos: broadcasts against every x that turns; None if none does.
        sin: the same.
        eps: added to the means of the squares.
        offsets: added to the weights.
        plans: where the norms round.
        rotations: how the norms turn, None where one does not.
        stores: for each of the 2 n results, whether it is wanted; else it is None. Every norm that
            has an rstd wanted is computed.
        writes: what is written elsewhere, too; the memory of it follows the others.
        tile: by default the one for these widths and types.
        wrap: how a compiler sees the launch; `torch.library.wrap_triton`.
    """
    num = len(xs)
    stores = stores or [True] * (2 * num)
    norms = zip(xs, weights, eps, offsets, plans, rotations, stores[num : 2 * num], strict=True)
    heads = [
        Heads(x, weight, tuple(norm), rotation, store)
        for x, weight, *norm, rotation, store in norms
    ]
    slots = launch_heads(heads, cos, sin, writes, tile, wrap)
    results = [slot.finished() for slot in slots[:num]]
    return results + [slot.rstd for slot in slots[:num]] + written(slots)


class Heads(NamedTuple):
    """One tensor (..., N) of a launch: its norm (eps, offset, plan) and its rotation, if any."""

    x: torch.Tensor
    weight: torch.Tensor | None
    norm: tuple[float, float, RoundingPlan] | None
    rotation: Rotation | None
    store_rstd: bool = False


def launch_heads(
    heads: Sequence[Heads],
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    writes: Writes | None,
    tile: HeadsLaunch | None,
    wrap: Callable[[Any], Any],
) -> list[Slot]:
    """Launch the kernel for up to three tensors, those that only join it included."""
    plans = [one.norm[-1] for one in heads if one.norm is not None]
    widths = [width_of_tile(one.x, one.weight, one.rotation) for one in heads]
    is_joint = any(joint_heads(one.weight)[1] > 1 for one in heads)
    tile = tile or HeadsLaunch.for_widths(widths, plans, is_joint=is_joint)
    results, others = writes or ((None,) * len(heads), ())
    joining = [Heads(x, None, None, None) for x, _ in others]
    destinations = (*results[: len(heads)], *(destination for _, destination in others))
    assert 1 <= len(destinations) <= SLOTS, (
        f"one launch takes up to {SLOTS} tensors, got {len(destinations)}"
    )
    tables = None if cos is None or sin is None else equally_laid_out(cos, sin)
    slots = []
    for one, destination in zip([*heads, *joining], destinations, strict=True):
        x, weight, norm, rotation, store_rstd = one
        how: dict[str, Any] = {"tile": tile, "store_rstd": store_rstd, "destination": destination}
        slots.append(Slot.of(x, weight, tables, norm, rotation, **how))
    filled = [
        slot for one, slot in zip([*heads, *joining], slots, strict=True) if not is_empty(one.x)
    ]
    if filled:
        _launch_slots(filled, tables, heads[0].x, tile, wrap)
    return slots


def written(slots: Sequence[Slot]) -> list[torch.Tensor | None]:
    """The memory of what a launch wrote elsewhere."""
    return [slot.there for slot in slots if slot.there is not None]


def _launch_slots(
    slots: list[Slot],
    tables: Tables | None,
    x: torch.Tensor,
    tile: HeadsLaunch,
    wrap: Callable[[Any], Any],
) -> None:
    """On the device of x."""
    cos, sin = tables or (None, None)
    padded = slots + [NO_SLOT] * (SLOTS - len(slots))
    constants: dict[str, Any] = {"COLS": 0 if cos is None else cos.shape[-1]}
    for number, slot in enumerate(padded, start=1):
        constants |= {f"{name}_{number}": value for name, value in slot.constants.items()}
    with device_of(x, wrap):
        wrap(qk_rms_norm_rope_kernel)[(sum(slot.num_tiles for slot in slots),)](
            cos,
            sin,
            1 if cos is None else cos.stride(-1),
            *(argument for slot in padded for argument in slot.arguments),
            **constants,
            num_warps=tile.num_warps,
        )
