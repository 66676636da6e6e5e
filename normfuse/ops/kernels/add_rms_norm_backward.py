"""The gradients of residual add and RMSNorm: the kernel of `rms_norm_backward` with a sum first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from normfuse.ops.kernels.rms_norm_backward import Sum, launch_beside
from normfuse.ops.kernels.tile import eager

if TYPE_CHECKING:
    from normfuse.ops.kernels.tile_backward import BackwardLaunch
    from normfuse.ops.residual_sum import Scales
    from normfuse.ops.rounding import RoundingPlan


def launch(
    grad_y: torch.Tensor,
    grad_total: torch.Tensor | None,
    total: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    scales: Scales,
    offset: float,
    plan: RoundingPlan,
    dtypes: tuple[torch.dtype, torch.dtype],
    output_mask: Sequence[bool],
    *,
    tile: BackwardLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """grad_y, grad_total, total (..., N) -> gradients of x and residual in `dtypes`, and weight."""
    grads = tuple(
        torch.empty_like(total, dtype=dtype) if is_wanted else None
        for dtype, is_wanted in zip(dtypes, output_mask, strict=False)
    )
    learned = weight if output_mask[2] else None
    beside = Sum("first", scales, grad_total)
    norm = (weight, learned, rstd, offset, plan)
    grad_weight = launch_beside(beside, grad_y, total, *norm, (grads[0], grads[1]), tile, wrap)
    return grads[0], grads[1], grad_weight
