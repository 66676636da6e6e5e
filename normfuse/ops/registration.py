"""How an op of ours reaches the dispatcher: one call per op, everything about it side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("normfuse", "DEF")


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define `normfuse::<schema>` and return its overload.

    Args:
        schema: the op's schema string, without the namespace; functional, no aliased results.
        reference: the meaning in plain torch; the implementation of every device but CUDA (and
            ROCm).
        fake: shapes, dtypes and strides of the results, as the reference would give them.
        cuda: the implementation on CUDA; imports its kernel when it is first called.
        setup_context: saves what `backward` needs.
        backward: the gradients, in schema order.
    """
    name = schema[: schema.index("(")]
    qualified = f"normfuse::{name}"
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.normfuse, name).default
    return overload


def register_gradient(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any],
) -> torch._ops.OpOverload:
    """Define an op that computes gradients, as `register`; it has no gradient of its own.

    Its `output_mask` says which results are wanted; the others are None, as in ATen. Where
    gradients of gradients are wanted, `needs_plain_torch` sends the caller to the formula.
    """
    name = schema[: schema.index("(")]

    def refuse(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(
            f"normfuse::{name} must not be differentiated: differentiate the op whose gradient "
            "it is, with create_graph=True"
        )

    return register(
        schema,
        reference=reference,
        fake=fake,
        cuda=cuda,
        setup_context=lambda ctx, inputs, output: None,
        backward=refuse,
    )


def needs_plain_torch() -> bool:
    """Whether a backward that runs now is itself recorded (`create_graph=True`)."""
    return torch.is_grad_enabled()
