"""The formulas in float64, and how far from them a result may be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from normfuse.ops.qk_rms_norm_rope import qk_rms_norm_rope_reference
from normfuse.ops.residual_sum import Scales
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import RoundingPlan


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset), in float64."""
    x = x.double()
    unit = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return unit if weight is None else unit * (weight.double() + offset)


def qk_rms_norm_rope(
    xs: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: Sequence[float],
    offsets: Sequence[float],
    _plans: Sequence[str],
    rotations: Sequence[str],
) -> list[torch.Tensor]:
    """The op's own formula on the same operands in float64, without any rounding of theirs."""
    wide = torch.float64
    turns = [Rotation.parse(rotation) for rotation in rotations]
    return qk_rms_norm_rope_reference(
        *([tensor.double() for tensor in tensors] for tensors in (xs, weights)),
        *(table.double() for table in (cos, sin)),
        eps,
        offsets,
        [str(RoundingPlan.once(wide, wide))] * len(xs),
        [str(replace(turn, dtype=wide, out=wide)) for turn in turns if turn is not None],
    )


def gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    groups: int,
    gate_first: bool,
    activation: str,
) -> torch.Tensor:
    """A gate before or after a norm of groups, in float64."""
    gate = gate.double()
    factor = gate.sigmoid() if activation == "sigmoid" else gate * gate.sigmoid()
    value = x.double() * factor if gate_first else x
    rows = value.unflatten(-1, (groups, x.shape[-1] // groups))
    if weight is not None and weight.shape != rows.shape[-1:]:
        weight = weight.unflatten(-1, rows.shape[-2:])
    y = rms_norm(rows, weight, eps, offset).flatten(-2)
    return y if gate_first else y * factor


def modulated_rms_norm(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    scale_offset: float,
) -> torch.Tensor:
    """A norm times `scale + scale_offset`, plus shift, in float64."""
    y = rms_norm(x, weight, eps, offset) * (scale.double() + scale_offset)
    return y if shift is None else y + shift.double()


def residual_sum(branch: torch.Tensor, residual: torch.Tensor, scales: Scales) -> torch.Tensor:
    """(residual + branch * branch_scale) * total_scale, in float64."""
    branch_scale = _factor(scales.branch, scales.branch_tensor)
    total_scale = _factor(scales.total, scales.total_tensor)
    return (residual.double() + branch.double() * branch_scale) * total_scale


def _factor(number: float | None, tensor: torch.Tensor | None) -> float | torch.Tensor:
    number = 1.0 if number is None else number
    return number if tensor is None else number * tensor.double()


def assert_as_close_as_eager(
    result: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor
) -> None:
    """`result` may err by twice eager's own error against `exact`, plus one rounding to its type.

    The rounding is half a unit in the last place: a share of the value, or of the smallest one.
    """
    assert (result.shape, result.dtype) == (eager.shape, eager.dtype)
    limits = torch.finfo(result.dtype)
    rounding = 0.5 * limits.eps * exact.abs() + 0.5 * limits.smallest_normal * limits.eps
    error = (result.double() - exact).abs()
    allowed = 2 * (eager.double() - exact).abs().amax() + rounding if exact.numel() else rounding
    assert (error <= allowed).all(), (
        f"the error must be at most twice eager's own plus one rounding, got "
        f"{(error / allowed).nan_to_num(torch.inf).max():.3g} times that: look at the roundings"
    )
