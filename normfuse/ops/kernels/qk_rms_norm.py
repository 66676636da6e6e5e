"""Norms side by side, forward: the kernel of `qk_rms_norm_rope` with nothing turned.

    rstd = 1 / sqrt(mean(x^2) + eps)
    y    = x * rstd * (weight + offset)

Backward: as in rms_norm.py, for each tensor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from normfuse.ops.kernels import qk_rms_norm_rope
from normfuse.ops.kernels.tile import eager

if TYPE_CHECKING:
    from normfuse.ops.destinations import Writes
    from normfuse.ops.rounding import RoundingPlan


def launch(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    eps: Sequence[float],
    offsets: Sequence[float],
    plans: Sequence[RoundingPlan],
    *,
    stores: Sequence[bool] | None = None,
    writes: Writes | None = None,
    wrap: Callable[[Any], Any] = eager,
) -> list[torch.Tensor | None]:
    """Up to three tensors (..., N_i) -> their norms, and their rstd; see `qk_rms_norm_rope`."""
    rotations = [None] * len(xs)
    how: dict[str, Any] = {"stores": stores, "writes": writes, "wrap": wrap}
    return qk_rms_norm_rope.launch(xs, weights, None, None, eps, offsets, plans, rotations, **how)
