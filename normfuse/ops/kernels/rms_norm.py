"""RMSNorm over rows.

    rstd = 1 / sqrt(mean(x^2) + eps)
    y    = x * rstd * (weight + offset)

Backward, with unit = x * rstd and g = grad_y * (weight + offset):

    grad_x      = rstd * (g - unit * mean(g * unit))
    grad_weight = sum over rows of grad_y * unit
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from normfuse.ops.kernels.constants import norm_constants
from normfuse.ops.kernels.row import (
    load_held,
    normalised,
    root_of,
    row_index,
    squares,
    store_inverse_root,
    zero_sums,
)
from normfuse.ops.kernels.rows import (
    addressed,
    as_vector,
    copied_into,
    is_empty,
    num_rows,
    row_order,
)
from normfuse.ops.kernels.tile import Launch, device_of, eager

if TYPE_CHECKING:
    from normfuse.ops.rounding import RoundingPlan


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    eps_ptr,
    y_ptr,
    rstd_ptr,
    num_rows,
    size_middle,
    size_inner,
    stride_x_outer,
    stride_x_middle,
    stride_x_inner,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    PLAN: tl.constexpr,
):
    row = row_index(ROWS)
    outer = row // size_inner // size_middle
    middle = row // size_inner % size_middle
    inner = row % size_inner
    x_ptr += outer * stride_x_outer + middle * stride_x_middle + inner * stride_x_inner
    y_ptr += row * N
    cols = tl.arange(0, BLOCK)[None, :]
    if BLOCK >= N:
        mask = (row < num_rows) & (cols < N)
        x = load_held(x_ptr + cols, mask)
        root = root_of(squares(x, PLAN), eps_ptr, N, EPS, PLAN)
        y = normalised(
            x, root, weight_ptr, cols,
            N, OFFSET, PLAN, False,
        )  # fmt: skip
        tl.store(y_ptr + cols, y, mask=mask)
    else:
        sums = zero_sums(ROWS, BLOCK, PLAN)
        for start in range(0, N, BLOCK):
            mask = (row < num_rows) & (start + cols < N)
            sums += squares(load_held(x_ptr + start + cols, mask), PLAN)
        root = root_of(sums, eps_ptr, N, EPS, PLAN)
        for start in range(0, N, BLOCK):
            mask = (row < num_rows) & (start + cols < N)
            x = load_held(x_ptr + start + cols, mask)
            y = normalised(x, root, weight_ptr, start + cols, N, OFFSET, PLAN, False)
            tl.store(y_ptr + start + cols, y, mask=mask)
    store_inverse_root(rstd_ptr, root, row, num_rows, PLAN)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps_tensor: torch.Tensor | None,
    eps: float,
    offset: float,
    plan: RoundingPlan,
    *,
    store_rstd: bool = True,
    tile: Launch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (..., N), weight (N,) or None -> y (..., N) in `plan.out`, rstd (..., 1) in `plan.compute`.

    Args:
        x: rows of any strides.
        weight: any of the four floating types.
        eps_tensor: one element, replaces `eps`.
        eps: added to the mean of the squares.
        offset: added to the weight.
        plan: where the norm rounds.
        store_rstd: whether to store rstd; else it is None.
        tile: by default the one for this width and type.
        wrap: how a compiler sees the launch; `torch.library.wrap_triton`.
    """
    y = torch.empty_like(x, dtype=plan.out)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=plan.compute) if store_rstd else None
    if is_empty(x):
        return y, rstd
    order = row_order(y, rstd)
    if order is None:
        again = partial(launch, store_rstd=store_rstd, tile=tile, wrap=wrap)
        values = again(x.contiguous(), weight, eps_tensor, eps, offset, plan)
        return copied_into((y, rstd), values)
    x, strides = addressed(x, order, y)
    tile = tile or Launch.for_shape(x.shape[-1], torch.promote_types(x.dtype, plan.compute))
    with device_of(x, wrap):
        wrap(rms_norm_kernel)[tile.grid(num_rows(x))](
            x,
            as_vector(weight),
            eps_tensor,
            y,
            rstd,
            num_rows(x),
            *strides,
            N=x.shape[-1],
            ROWS=tile.rows,
            BLOCK=tile.block,
            **norm_constants(plan, eps, offset),
            num_warps=tile.num_warps,
        )
    return y, rstd
