"""L2 norm: y = x / sqrt(sum(x^2) + eps), or x / max(sqrt(sum(x^2)), eps), over the last axis.

Linear attention normalises its queries and keys so: Qwen3-Next multiplies by the inverse root, Kimi
Linear divides by the root. `torch.nn.functional.normalize`, of cosine attention and of embeddings,
is the second form, which a plan that is `bounded` asks for. It is a weightless RMSNorm whose sum is
not divided by N, and shares its reference and its kernel.
"""

from __future__ import annotations

from typing import Any

import torch

from normfuse.ops.registration import register
from normfuse.ops.rms_norm import gradients, rms_norm_fake, rms_norm_reference
from normfuse.ops.rms_norm_backward import norm_gradients
from normfuse.ops.rounding import L2, RoundingPlan
from normfuse.ops.validation import check_activation, check_eps

SCHEMA = "l2_norm(Tensor x, Tensor? eps_tensor, float eps, str plan) -> (Tensor y, Tensor rstd)"


def l2_norm_reference(
    x: torch.Tensor, eps_tensor: torch.Tensor | None, eps: float, plan: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The meaning: x (..., N) -> y (..., N) in `plan.out`, rstd (..., 1); `plan.mean` is "sum"."""
    return rms_norm_reference(x, None, eps_tensor, eps, 0.0, plan)


def l2_norm_fake(
    x: torch.Tensor, eps_tensor: torch.Tensor | None, eps: float, plan: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return rms_norm_fake(x, None, eps_tensor, eps, 0.0, plan)


def _cuda(x: torch.Tensor, eps_tensor: torch.Tensor | None, eps: float, plan: str) -> Any:
    from normfuse.ops.kernels.l2_norm import launch

    return launch(x, None, eps_tensor, eps, 0.0, RoundingPlan.parse(plan))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, eps_tensor, eps, plan = inputs
    ctx.save_for_backward(x, output[1], eps_tensor)
    ctx.eps, ctx.plan = eps, plan
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: torch.Tensor | None, grad_rstd: torch.Tensor | None) -> Any:
    x, rstd, eps_tensor = ctx.saved_tensors
    if RoundingPlan.parse(ctx.plan).bounded:
        bound = ctx.eps if eps_tensor is None else eps_tensor
        return _bounded_gradient(grad_y, grad_rstd, x, rstd, bound), None, None, None
    grads = gradients(grad_y, grad_rstd, x, None, rstd, 0.0, ctx.plan, (True, False))
    return grads[0], None, None, None


def _bounded_gradient(
    grad_y: torch.Tensor | None,
    grad_rstd: torch.Tensor | None,
    x: torch.Tensor,
    rstd: torch.Tensor,
    bound: float | torch.Tensor,
) -> torch.Tensor:
    """A row whose root is the bound is divided by a constant; the others as they ever are.

    In operations of torch, which Inductor fuses: no op of its own knows the bound.
    """
    grad_x, _ = norm_gradients(grad_y, grad_rstd, x, None, rstd, 0.0, mean=L2)
    wide = grad_x.dtype
    divided = torch.zeros_like(grad_x) if grad_y is None else grad_y.to(wide) * rstd.to(wide)
    length = torch.linalg.vector_norm(x.to(wide), dim=-1, keepdim=True)
    return torch.where(length < bound, divided, grad_x).to(x.dtype)


L2_NORM = register(
    SCHEMA,
    reference=l2_norm_reference,
    fake=l2_norm_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def l2_norm(
    x: torch.Tensor, eps: float = 1e-6, *, plan: RoundingPlan | None = None
) -> torch.Tensor:
    """L2 norm over the last axis: x / sqrt(sum(x^2) + eps), or x / max(sqrt(sum(x^2)), eps).

    Args:
        x: (..., N), float16, bfloat16, float32 or float64; rows of any stride.
        eps: added to the sum of the squares, or what the root is at least, if `plan.bounded`.
        plan: where the roundings fall; by default once, at the end. Its mean must be "sum".

    Returns:
        (..., N) in `plan.out`, by default the type of x.

    Raises:
        TypeError, ValueError: a type or shape does not fit.
    """
    check_activation("x", x)
    check_eps("eps", eps)
    steps = plan or RoundingPlan.once(x.dtype, None).with_mean(L2)
    if steps.mean != L2 or steps.weight is not None:
        raise ValueError(
            f"plan must be weightless with the mean 'sum', got '{steps}': "
            "build it with RoundingPlan(..., mean='sum')"
        )
    y: torch.Tensor = L2_NORM(x, None, eps, str(steps))[0]
    return y
