"""The residual sum of a chain: total = (residual + branch * branch_scale) * total_scale.

Granite scales the branch by a number, Gemma 4 the sum by a buffer of one element; either factor may
be missing. Every step rounds to the type that torch promotes its operands to, as eager does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

SCALE_SCHEMA = (
    "Tensor? branch_scale_tensor, Tensor? total_scale_tensor, "
    "float? branch_scale, float? total_scale"
)


class Scales(NamedTuple):
    """The factors of a residual sum, in schema order; None where the model has none.

    A tensor factor has one element. Where a number and a tensor are both given, the number
    multiplies first.
    """

    branch_tensor: torch.Tensor | None = None
    total_tensor: torch.Tensor | None = None
    branch: float | None = None
    total: float | None = None

    @classmethod
    def of(cls, branch: float | torch.Tensor | None, total: float | torch.Tensor | None) -> Scales:
        """Factors as users pass them: each a number, a tensor of one element or None."""
        branch_tensor = branch if isinstance(branch, torch.Tensor) else None
        total_tensor = total if isinstance(total, torch.Tensor) else None
        return cls(
            branch_tensor,
            total_tensor,
            None if isinstance(branch, torch.Tensor) else branch,
            None if isinstance(total, torch.Tensor) else total,
        )

    def learn(self) -> bool:
        """Whether a factor wants a gradient."""
        return any(
            t is not None and t.requires_grad for t in (self.branch_tensor, self.total_tensor)
        )

    def scale_branch(self) -> bool:
        """Whether the branch has a factor."""
        return self.branch is not None or self.branch_tensor is not None

    def scale_total(self) -> bool:
        """Whether the sum has a factor."""
        return self.total is not None or self.total_tensor is not None


class SumGradients(NamedTuple):
    """Gradients of a residual sum; those of branch and residual are not rounded yet."""

    branch: torch.Tensor
    residual: torch.Tensor
    branch_tensor: torch.Tensor | None
    total_tensor: torch.Tensor | None


def scaled(value: torch.Tensor, number: float | None, tensor: torch.Tensor | None) -> torch.Tensor:
    """`value` times the number, times the tensor, where present."""
    if number is not None:
        value = value * number
    return value if tensor is None else value * tensor


def residual_sum(branch: torch.Tensor, residual: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The meaning: branch (..., N), residual (..., N) -> total (..., N)."""
    total = residual + scaled(branch, scales.branch, scales.branch_tensor)
    return scaled(total, scales.total, scales.total_tensor)


def residual_sum_backward(
    grad_total: torch.Tensor,
    branch: torch.Tensor | None,
    residual: torch.Tensor | None,
    scales: Scales,
) -> SumGradients:
    """Gradients for `grad_total` (..., N), in the type in which gradients accumulate.

    Those of the factors need branch and residual; without these, they are None.
    """
    grad_sum = scaled(grad_total, scales.total, scales.total_tensor)
    grad_branch = scaled(grad_sum, scales.branch, scales.branch_tensor)
    if branch is None or residual is None:
        return SumGradients(grad_branch, grad_sum, None, None)
    grad_total_tensor = grad_branch_tensor = None
    if scales.total_tensor is not None:
        unscaled = scaled(
            residual + scaled(branch, scales.branch, scales.branch_tensor), scales.total, None
        )
        grad_total_tensor = _reduced(grad_total * unscaled, scales.total_tensor)
    if scales.branch_tensor is not None:
        grad_branch_tensor = _reduced(
            grad_sum * scaled(branch, scales.branch, None), scales.branch_tensor
        )
    return SumGradients(grad_branch, grad_sum, grad_branch_tensor, grad_total_tensor)


def _reduced(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return gradient.sum().reshape(scale.shape).to(scale.dtype)
