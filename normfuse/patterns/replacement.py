"""Puts one op in the place of a norm and of what surrounds it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from normfuse.patterns.decline import Decline
from normfuse.patterns.micro_ops import fake_of, same_sizes
from normfuse.patterns.rule import (
    Context,
    emit,
    erase,
    existing_result,
    insertion_point,
    result,
)


def replace_chain(
    context: Context,
    op: torch._ops.OpOverload,
    arguments: tuple[Any, ...],
    fakes: tuple[torch.Tensor, torch.Tensor],
    *,
    norm: Node,
    last: Node,
    nodes: Iterable[Node],
) -> Node:
    """Replace `nodes` by an op that returns the value of `last` and the inverse root of `norm`.

    Raises:
        Decline: a result would be laid out otherwise than eager's, or an operand is known too late.
    """
    rstd = existing_result(norm, 1)
    for fake, old in zip(fakes, (last, rstd), strict=True):
        if old is not None:
            _check_layout(fake, fake_of(old))
    operands = [argument for argument in arguments if isinstance(argument, Node)]
    before = insertion_point(operands, norm, () if rstd is None else rstd.users)
    fused = emit(context, op, arguments, fakes, before=before, like=norm)
    if rstd is not None:
        rstd.replace_all_uses_with(result(context, fused, 1))
    last.replace_all_uses_with(result(context, fused, 0))
    erase(context, (norm, *nodes))
    return fused


def _check_layout(fake: torch.Tensor, old: torch.Tensor) -> None:
    if not same_sizes(fake.shape, old.shape):
        raise Decline("the inverse root of a group is used in another shape")
    if not same_sizes(fake.stride(), old.stride()):
        raise Decline(
            f"eager's result has the strides {tuple(old.stride())}, and the op's would have "
            f"{tuple(fake.stride())}"
        )
