"""The gradients of RMSNorm and residual add: the kernel of `rms_norm_backward` with a sum last."""

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
    grad_total: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    scales: Scales,
    offset: float,
    plan: RoundingPlan,
    residual_dtype: torch.dtype,
    output_mask: Sequence[bool],
    *,
    tile: BackwardLaunch | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """grad_total, x (..., N), weight (N,), rstd (..., 1) -> gradients of x, residual and weight."""
    grad_x = torch.empty_like(x) if output_mask[0] else None
    grad_residual = torch.empty_like(x, dtype=residual_dtype) if output_mask[1] else None
    learned = weight if output_mask[2] else None
    beside = Sum("last", scales)
    norm = (weight, learned, rstd, offset, plan)
    results = (grad_x, grad_residual)
    grad_weight = launch_beside(beside, grad_total, x, *norm, results, tile, wrap)
    return grad_x, grad_residual, grad_weight
