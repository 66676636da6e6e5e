"""Reads a chain's residual sum: (residual + branch * branch_scale) * total_scale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch.fx import Node

from normfuse.ops.rounding import FLOATS
from normfuse.patterns.micro_ops import Kind, Operand, fake_of, micro_op, pairs, same_sizes, tensor


@dataclass(frozen=True)
class Scale:
    """A factor for all rows: a number, the node of a SymFloat, or of a one-element tensor."""

    number: Operand | None = None
    tensor: Node | None = None


NO_SCALE = Scale()


@dataclass(frozen=True)
class ResidualSum:
    """One residual sum; `total` is the node that holds its value, the last of its `nodes`."""

    branch: Node
    residual: Node
    branch_scale: Scale
    total_scale: Scale
    total: Node
    nodes: tuple[Node, ...]

    def scales(self) -> tuple[Node | None, Node | None, Operand | None, Operand | None]:
        """The factors in the order of the ops' schemas."""
        return (
            self.branch_scale.tensor,
            self.total_scale.tensor,
            self.branch_scale.number,
            self.total_scale.number,
        )


def read_sum(total: Node) -> ResidualSum | None:
    """The sum whose value is `total`; None if that is no sum of two tensors of its shape."""
    unscaled = scaled_by(total)
    if unscaled is not None and len(unscaled[0].users) == 1:
        inner = _read_add(unscaled[0])
        if inner is not None:
            return replace(inner, total_scale=unscaled[1], total=total, nodes=(*inner.nodes, total))
    return _read_add(total)


def _read_add(total: Node) -> ResidualSum | None:
    op = micro_op(total)
    if op is None or op.kind is not Kind.ADD:
        return None
    if not all(_has_shape_of(operand, total) for operand in op.operands):
        return None
    if not _is_promoted(total, *op.operands):
        return None
    for branch, residual in reversed(pairs(op)):
        branch, residual = cast(Node, branch), cast(Node, residual)
        unscaled = scaled_by(branch)
        if unscaled is not None and len(branch.users) == 1:
            value, scale = unscaled
            return ResidualSum(value, residual, scale, NO_SCALE, total, (branch, total))
    residual, branch = op.operands
    branch, residual = cast(Node, branch), cast(Node, residual)
    return ResidualSum(branch, residual, NO_SCALE, NO_SCALE, total, (total,))


def sum_after(branch: Node) -> ResidualSum | None:
    """The sum that `branch` goes into, if it goes nowhere else."""
    if len(branch.users) != 1:
        return None
    (user,) = branch.users
    scale, value = NO_SCALE, branch
    nodes: tuple[Node, ...] = ()
    unscaled = scaled_by(user)
    if unscaled is not None and len(user.users) == 1:
        scale, nodes, value = unscaled[1], (user,), user
        (user,) = user.users
    op = micro_op(user)
    if (
        op is None
        or op.kind is not Kind.ADD
        or not all(_has_shape_of(o, user) for o in op.operands)
    ):
        return None
    left, right = op.operands
    if left is right or not _is_promoted(user, left, right):
        return None
    residual = right if left is value else left
    assert isinstance(residual, Node)
    found = ResidualSum(branch, residual, scale, NO_SCALE, user, (*nodes, user))
    return with_total_scale(found)


def with_total_scale(found: ResidualSum) -> ResidualSum:
    """The sum with the factor that multiplies it, where that is its only user."""
    if len(found.total.users) != 1:
        return found
    (user,) = found.total.users
    unscaled = scaled_by(user)
    if unscaled is None:
        return found
    return replace(found, total_scale=unscaled[1], total=user, nodes=(*found.nodes, user))


def scaled_by(node: Node) -> tuple[Node, Scale] | None:
    """`value * 0.22` or `value * buffer[1]` -> value and its factor."""
    op = micro_op(node)
    if op is None or op.kind is not Kind.MUL:
        return None
    for value, factor in pairs(op):
        if not _has_shape_of(value, node) or not _is_promoted(node, value, factor):
            continue
        assert isinstance(value, Node)
        if not isinstance(factor, Node):
            return value, Scale(number=float(factor))
        fake = tensor(factor)
        if fake is None:
            return value, Scale(number=factor)
        if same_sizes(fake.shape, (1,) * fake.dim()) and fake.dim() <= 1 and fake.dtype in FLOATS:
            return (value, Scale(tensor=factor)) if _is_beside(factor, value) else None
    return None


def _is_beside(factor: Node, value: Node) -> bool:
    return fake_of(factor).device == fake_of(value).device


def _has_shape_of(operand: Operand, node: Node) -> bool:
    left = tensor(operand) if isinstance(operand, Node) else None
    right = tensor(node)
    if left is None or right is None or right.dim() == 0 or left.dtype not in FLOATS:
        return False
    return same_sizes(left.shape, right.shape)


def _is_promoted(node: Node, left: Operand, right: Operand) -> bool:
    """Whether a node has the type that torch gives its operands; under autocast it may not."""
    fakes: list[Any] = []
    for operand in (left, right):
        fake = tensor(operand)
        fakes.append(1.0 if fake is None else fake)
    return fake_of(node).dtype == torch.result_type(*fakes)
