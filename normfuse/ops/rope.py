"""Rotary embedding of queries and keys that nobody normalises: Llama, Mistral, Qwen 2, GLM 4.

y_i = rotated(x_i; cos, sin), each head alone. It is `qk_rms_norm_rope` without its norms.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from normfuse.ops.one_launch import obstacle_to_one_launch
from normfuse.ops.registration import register
from normfuse.ops.rotation import (
    Rotation,
    checked_rotations,
    empty_result,
    rotated,
    rotated_backward,
    table_gradients,
)
from normfuse.ops.validation import check_activation

SCHEMA = "rope(Tensor[] xs, Tensor cos, Tensor sin, str[] rotations) -> Tensor[]"


class RoPE(NamedTuple):
    """Turned queries and keys."""

    q: torch.Tensor
    k: torch.Tensor


def rope_reference(
    xs: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, rotations: Sequence[str]
) -> list[torch.Tensor]:
    """The meaning: n tensors (..., N_i), tables that broadcast against each -> the same, turned."""
    turns = parsed_rotations(rotations)
    return [rotated(x, cos, sin, turn) for x, turn in zip(xs, turns, strict=True)]


def rope_fake(
    xs: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, rotations: Sequence[str]
) -> list[torch.Tensor]:
    return [empty_result(x, turn) for x, turn in zip(xs, parsed_rotations(rotations), strict=True)]


def parsed_rotations(rotations: Sequence[str]) -> list[Rotation]:
    """The rotations of an op, which all turn."""
    turns = [Rotation.parse(rotation) for rotation in rotations]
    if None in turns:
        raise ValueError(
            f"every rotation must turn, got {list(rotations)}: leave out what is not turned"
        )
    return [turn for turn in turns if turn is not None]


def _cuda(
    xs: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, rotations: Sequence[str]
) -> Any:
    if obstacle_to_one_launch(xs) is not None:
        return rope_reference(xs, cos, sin, rotations)
    from normfuse.ops.kernels.rope import launch

    return launch(xs, cos, sin, parsed_rotations(rotations))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[torch.Tensor]) -> None:
    xs, cos, sin, rotations = inputs
    ctx.save_for_backward(cos, sin, *(xs if any(ctx.needs_input_grad[1:3]) else ()))
    ctx.rotations, ctx.dtypes = rotations, [x.dtype for x in xs]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[torch.Tensor | None]) -> Any:
    """In operations of torch, which Inductor fuses; tables learn only where they ask for it."""
    cos, sin, *xs = ctx.saved_tensors
    grad_xs: list[torch.Tensor | None] = []
    grad_tables = [torch.zeros_like(cos), torch.zeros_like(sin)]
    for index, (grad, turn) in enumerate(zip(grads, parsed_rotations(ctx.rotations), strict=True)):
        if grad is None:
            grad_xs.append(None)
            continue
        wide = grad.to(torch.promote_types(torch.float32, grad.dtype))
        grad_xs.append(rotated_backward(wide, cos, sin, turn).to(ctx.dtypes[index]))
        if xs:
            found = table_gradients(wide, xs[index], cos, sin, turn)
            grad_tables = [a + b for a, b in zip(grad_tables, found, strict=True)]
    return grad_xs, *(grad_tables if xs else (None, None)), None


ROPE = register(
    SCHEMA,
    reference=rope_reference,
    fake=rope_fake,
    cuda=_cuda,
    setup_context=_setup_context,
    backward=_backward,
)


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layout: str = "half",
    rotary_dim: int | None = None,
) -> RoPE:
    """Rotary embedding of every head of q and k, in one launch.

    Args:
        q: (..., D), float16, bfloat16, float32 or float64; heads of any stride.
        k: (..., D), any of these types.
        cos: (..., R) or (..., R / 2), broadcasting against q and k; R is `rotary_dim`. R / 2
            columns hold one angle for each pair of columns.
        sin: the shape and type of cos.
        layout: `"half"` turns columns j and j + R / 2 together, `"interleaved"` and `"complex"`
            neighbours; "complex" rounds as a product of complex numbers does.
        rotary_dim: how many of the first columns turn; by default all.

    Returns:
        `RoPE(q, k)`, each with the shape, layout and type of its input.

    Raises:
        TypeError, ValueError: a type, shape or device does not fit.
    """
    check_activation("q", q)
    check_activation("k", k)
    named = [("q", q, q.dtype), ("k", k, k.dtype)]
    return RoPE(*ROPE([q, k], cos, sin, checked_rotations(named, cos, sin, layout, rotary_dim)))
