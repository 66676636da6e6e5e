"""What the tests of backward kernels share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.float64 import assert_as_close_as_eager


def rstd_of(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """The inverse root that a norm of x saves: float32, or float64 of float64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide.square().mean(-1, keepdim=True) + eps).rsqrt()


def assert_errs_no_more_than(reference: Callable[..., Any], grads: Any, *arguments: Any) -> None:
    """`grads` err as little as the reference, against the reference in float64.

    The reference is a sum in float32 that is rounded once, so this is what the types allow.
    """
    plain, exact = reference(*arguments), reference(*map(_wide, arguments))
    for grad, expected, value in zip(grads, plain, exact, strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None:
            assert_as_close_as_eager(grad, expected, value)


def _wide(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_wide(value) for value in argument]
    if isinstance(argument, torch.dtype):
        return torch.float64
    return argument.double() if isinstance(argument, torch.Tensor) else argument
