"""The forms of gradients: their references, and launches of their kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from normfuse.ops.add_rms_norm_backward import (
    ADD_RMS_NORM_BACKWARD,
    add_rms_norm_backward_reference,
)
from normfuse.ops.dual_rms_norm_add_backward import (
    DUAL_RMS_NORM_ADD_BACKWARD,
    dual_rms_norm_add_backward_reference,
    for_launch_of_dual,
)
from normfuse.ops.dual_rms_norm_add_rms_norm_backward import (
    DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD,
    dual_rms_norm_add_rms_norm_backward_reference,
)
from normfuse.ops.gated_rms_norm_backward import (
    GATED_RMS_NORM_BACKWARD,
    gated_rms_norm_backward_reference,
)
from normfuse.ops.modulated_rms_norm_backward import (
    MODULATED_RMS_NORM_BACKWARD,
    modulated_rms_norm_backward_reference,
)
from normfuse.ops.qk_rms_norm_rope_backward import (
    QK_RMS_NORM_ROPE_BACKWARD,
    for_launch,
    qk_rms_norm_rope_backward_reference,
)
from normfuse.ops.residual_sum import Scales
from normfuse.ops.rms_norm_add_backward import (
    RMS_NORM_ADD_BACKWARD,
    rms_norm_add_backward_reference,
)
from normfuse.ops.rms_norm_add_rms_norm_backward import (
    RMS_NORM_ADD_RMS_NORM_BACKWARD,
    gathered,
    rms_norm_add_rms_norm_backward_reference,
)
from normfuse.ops.rms_norm_backward import RMS_NORM_BACKWARD, rms_norm_backward_reference
from normfuse.ops.rms_norms_backward import (
    RMS_NORMS_BACKWARD,
    for_launch_of_norms,
    rms_norms_backward_reference,
)
from normfuse.ops.rounding import RoundingPlan

BACKWARD_REFERENCES: dict[Any, Callable[..., Any]] = {
    RMS_NORM_BACKWARD: rms_norm_backward_reference,
    RMS_NORMS_BACKWARD: rms_norms_backward_reference,
    DUAL_RMS_NORM_ADD_BACKWARD: dual_rms_norm_add_backward_reference,
    DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD: dual_rms_norm_add_rms_norm_backward_reference,
    ADD_RMS_NORM_BACKWARD: add_rms_norm_backward_reference,
    RMS_NORM_ADD_BACKWARD: rms_norm_add_backward_reference,
    RMS_NORM_ADD_RMS_NORM_BACKWARD: rms_norm_add_rms_norm_backward_reference,
    QK_RMS_NORM_ROPE_BACKWARD: qk_rms_norm_rope_backward_reference,
    GATED_RMS_NORM_BACKWARD: gated_rms_norm_backward_reference,
    MODULATED_RMS_NORM_BACKWARD: modulated_rms_norm_backward_reference,
}


def _launch_rms_norm_backward(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norm_backward import launch

    grad_y, x, weight, rstd, offset, plan, mask = arguments
    steps, wanted = RoundingPlan.parse(plan), _both(mask, used)
    return launch(grad_y, x, weight, rstd, offset, steps, wanted, wrap=wrap)


def _launch_rms_norms_backward(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norms_backward import launch

    return launch(*for_launch_of_norms(arguments), wrap=wrap)


def _launch_dual_backward(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.dual_rms_norm_add_backward import launch

    operands = for_launch_of_dual((*arguments[:-1], _both(arguments[-1], used)))
    return launch(*operands, wrap=wrap)


def _launch_add_rms_norm_backward(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.add_rms_norm_backward import launch

    grad_y, grad_total, total, weight, rstd, *scales = arguments[:9]
    offset, plan, x_dtype, residual_dtype, mask = arguments[9:]
    norm = weight, rstd, Scales(*scales), offset, RoundingPlan.parse(plan)
    dtypes = (x_dtype, residual_dtype)
    return launch(grad_y, grad_total, total, *norm, dtypes, _both(mask, used), wrap=wrap)


def _launch_rms_norm_add_backward(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.rms_norm_add_backward import launch

    grad_total, x, weight, rstd, *scales = arguments[:8]
    offset, plan, residual_dtype, mask = arguments[8:]
    norm = weight, rstd, Scales(*scales), offset, RoundingPlan.parse(plan)
    return launch(grad_total, x, *norm, residual_dtype, _both(mask, used), wrap=wrap)


def _launch_rms_norm_add_rms_norm_backward(
    wrap: Any, used: tuple[bool, ...], *arguments: Any
) -> Any:
    from normfuse.ops.kernels.rms_norm_add_rms_norm_backward import launch

    operands = gathered((*arguments[:-1], _both(arguments[-1], used)))
    return launch(*operands, wrap=wrap)


def _launch_qk_rms_norm_rope_backward(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.qk_rms_norm_rope_backward import launch

    return launch(*for_launch(arguments), wrap=wrap)


def _launch_gated_rms_norm_backward(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.gated_rms_norm_backward import launch

    grad_y, x, gate, weight, rstd, *gated, plan, mask = arguments
    offset, groups, gate_first, activation = gated
    norm = weight, rstd, offset, groups, gate_first, activation, RoundingPlan.parse(plan)
    return launch(grad_y, x, gate, *norm, _both(mask, used), wrap=wrap)


def _launch_modulated_rms_norm_backward(wrap: Any, used: tuple[bool, ...], *arguments: Any) -> Any:
    from normfuse.ops.kernels.modulated_rms_norm_backward import launch

    grad_y, x, scale, shift, weight, rstd, offset, scale_offset, plan, mask = arguments
    norm = weight, rstd, offset, scale_offset, RoundingPlan.parse(plan)
    return launch(grad_y, x, scale, shift, *norm, _both(mask, used), wrap=wrap)


def _both(mask: Sequence[bool], used: tuple[bool, ...]) -> list[bool]:
    """The gradients that are asked for and read."""
    return [wanted and read for wanted, read in zip(mask, used, strict=True)]


BACKWARD_LAUNCHES: dict[Any, Callable[..., Any]] = {
    RMS_NORM_BACKWARD: _launch_rms_norm_backward,
    RMS_NORMS_BACKWARD: _launch_rms_norms_backward,
    DUAL_RMS_NORM_ADD_BACKWARD: _launch_dual_backward,
    DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD: _launch_dual_backward,
    ADD_RMS_NORM_BACKWARD: _launch_add_rms_norm_backward,
    RMS_NORM_ADD_BACKWARD: _launch_rms_norm_add_backward,
    RMS_NORM_ADD_RMS_NORM_BACKWARD: _launch_rms_norm_add_rms_norm_backward,
    QK_RMS_NORM_ROPE_BACKWARD: _launch_qk_rms_norm_rope_backward,
    GATED_RMS_NORM_BACKWARD: _launch_gated_rms_norm_backward,
    MODULATED_RMS_NORM_BACKWARD: _launch_modulated_rms_norm_backward,
}
