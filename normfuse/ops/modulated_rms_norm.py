"""RMSNorm, then a modulation by the conditioning: norm(x) * (1 + scale) + shift.

The adaptive norm (AdaRMS, adaLN) of diffusion heads such as VibeVoice's. Scale and shift mostly
belong to a whole sequence, and broadcast over its rows.
"""

from __future__ import annotations

from typing import Any

import torch

from normfuse.ops.modulated_rms_norm_backward import (
    MODULATED_RMS_NORM_BACKWARD,
    modulated_gradients,
)
from normfuse.ops.modulation import Modulation, modulated
from normfuse.ops.registration import needs_plain_torch, register
from normfuse.ops.rms_norm import (
    check_plan,
    rms_norm_fake,
    rms_norm_reference,
)
from normfuse.ops.rounding import RoundingPlan
from normfuse.ops.validation import (
    check_activation,
    check_broadcast,
    check_eps,
    check_weight,
)

SCHEMA = (
    "modulated_rms_norm(Tensor x, Tensor scale, Tensor? shift, Tensor? weight, float eps,"
    " float offset, float scale_offset, str plan, str modulation) -> (Tensor y, Tensor rstd)"
)


def modulated_rms_norm_reference(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    scale_offset: float,
    plan: str,
    modulation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning: x (..., N), weight (N,) or None -> y (..., N), rstd (..., 1).

    `scale` and `shift` have N columns and broadcast to x.
    """
    y, rstd = rms_norm_reference(x, weight, None, eps, offset, plan)
    return modulated(y, scale, shift, scale_offset, Modulation.parse(modulation)), rstd


def modulated_rms_norm_fake(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    scale_offset: float,
    plan: str,
    modulation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    y, rstd = rms_norm_fake(x, weight, None, eps, offset, plan)
    return modulated(y, scale, shift, scale_offset, Modulation.parse(modulation)), rstd


def _cuda(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    *arguments: Any,
) -> Any:
    from normfuse.ops.kernels.modulated_rms_norm import launch

    eps, offset, scale_offset, plan, modulation = arguments
    types = RoundingPlan.parse(plan), Modulation.parse(modulation)
    return launch(x, scale, shift, weight, eps, offset, scale_offset, *types)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, scale, shift, weight, *norm = inputs
    ctx.save_for_backward(x, scale, weight, output[1])
    ctx.shift = None if shift is None else (shift.shape, shift.dtype)  # its values are not needed
    ctx.norm = norm
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: torch.Tensor | None, grad_rstd: torch.Tensor | None) -> Any:
    x, scale, weight, rstd = ctx.saved_tensors
    _, offset, scale_offset, plan, _ = ctx.norm
    mask, shift = ctx.needs_input_grad[:4], None
    if ctx.shift is not None and mask[2]:
        shape, dtype = ctx.shift
        shift = x.new_empty(1, dtype=dtype).expand(shape)
    norm = (x, scale, shift, weight, rstd, offset, scale_offset)
    if grad_y is not None and grad_rstd is None and not needs_plain_torch():
        grads = MODULATED_RMS_NORM_BACKWARD(grad_y, *norm, plan, list(mask))
    else:
        grads = modulated_gradients(grad_y, grad_rstd, *norm, mask)
    return *grads, *(None,) * 5


MODULATED_RMS_NORM = register(
    SCHEMA,
    reference=modulated_rms_norm_reference,
    fake=modulated_rms_norm_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def modulated_rms_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    scale_offset: float = 1.0,
    plan: RoundingPlan | None = None,
    modulation: Modulation | None = None,
) -> torch.Tensor:
    """RMSNorm(x) * (scale + scale_offset) + shift.

    Args:
        x: (..., N), float16, bfloat16, float32 or float64; rows of any stride.
        scale: (N,) or more, broadcasts to x over its rows: (B, 1, N) for x of (B, S, N). Any of
            these types. It is read where it lies, and never expanded in memory.
        shift: as scale, or None.
        weight: (N,) or None for a weightless norm.
        eps: added to the mean of the squares.
        offset: added to the weight; 1.0 for Gemma's norms.
        scale_offset: added to the scale.
        plan: where the norm rounds; by default once, at the end of it all.
        modulation: where the modulation rounds; by default once, at the end of it all.

    Returns:
        (..., N) in `modulation.out`, by default the type of x.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    check_activation("x", x)
    check_broadcast("scale", scale, x)
    if shift is not None:
        check_broadcast("shift", shift, x)
    check_weight("weight", weight, x)
    check_eps("eps", eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    plan = plan or RoundingPlan.once(wide, None if weight is None else weight.dtype)
    check_plan("plan", plan, weight)
    types = modulation or Modulation.once(x.dtype)
    y: torch.Tensor = MODULATED_RMS_NORM(
        x, scale, shift, weight, eps, offset, scale_offset, str(plan), str(types)
    )[0]
    return y
