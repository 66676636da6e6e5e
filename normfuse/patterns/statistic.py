"""The grammar of an RMS statistic, stated once: root(mean(h * h) + eps), for every spelling of it.

    squares   = h ** 2  |  h * h  |  h.square()
    mean      = squares.mean(-1)  |  squares.sum(-1) / N  |  squares.sum(-1) * (1 / N)
              |  squares.sum(-1), which makes an L2 norm of it
    variance  = mean + eps  |  eps + mean  |  mean
    root      = rsqrt(variance)  |  variance ** -0.5  |  1 / sqrt(variance)
              |  sqrt(variance), which divides
              |  max(sqrt(variance), eps), which divides, of an L2 norm

A new spelling is one line here. `find_statistic` reads leniently, so that every candidate gets a
site in the report; `read_statistic` then insists, and declines with a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import Node

from normfuse.ops.rounding import FLOATS, L2
from normfuse.patterns.decline import Decline
from normfuse.patterns.micro_ops import (
    Kind,
    MicroOp,
    Operand,
    dtype,
    fake_of,
    kind_of,
    micro_op,
    same_sizes,
    source_of,
    spelling,
    tensor,
    width_of,
)


@dataclass(frozen=True)
class Statistic:
    """One RMS statistic of the squared value `h` (..., N).

    Attributes:
        h: the value that is squared.
        root: the node that holds rsqrt(variance), or sqrt(variance) where that divides.
        kind: the root of `RoundingPlan.root`.
        mean: the mean of `RoundingPlan.mean`.
        eps: a number, or the node of a SymFloat or of a tensor of one element.
        nodes: everything from the square to the root.
    """

    h: Node
    root: Node
    kind: str
    mean: str
    eps: Operand
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Candidate:
    """A root over a reduction of squares, before anything else about it is known."""

    root: Node
    reduction: Node
    squares: Node


def find_statistic(node: Node) -> Candidate | None:
    """The candidate whose (inverse) square root is `node`."""
    op = spelling(node) if kind_of(node) in _ROOTS else None
    if op is None or not _is_root(op) or tensor(node) is None:
        return None
    current: Operand = op.operands[0]
    reduction = None
    while (op := spelling(current)) is not None and tensor(current) is not None:
        if op.kind in (Kind.MEAN, Kind.SUM):
            if op.dims is None or reduction is not None:
                return None
            reduction = cast(Node, current)
            current = op.operands[0]
        elif reduction is not None and _is_square(op):
            return Candidate(node, reduction, cast(Node, current))
        elif op.kind in (Kind.CAST, Kind.VIEW) or (reduction is None and op.kind in _ON_A_MEAN):
            current = _reducing_operand(op)
        else:
            return None
    return None


def _is_square(op: MicroOp) -> bool:
    if op.kind is Kind.MUL:
        return op.operands[0] is op.operands[1]
    return op.kind is Kind.POW and op.operands[1] == 2


_ON_A_MEAN = (Kind.ADD, Kind.MUL, Kind.DIV, Kind.CLAMP)


def _reducing_operand(op: MicroOp) -> Operand:
    """The operand on whose side the reduction is: `eps + mean` has it on the right."""
    if op.kind not in (Kind.ADD, Kind.MUL):
        return op.operands[0]
    left, right = op.operands
    right_op = spelling(right)
    is_left_constant = not isinstance(left, Node) or spelling(left) is None
    return right if is_left_constant and right_op is not None else left


_ROOTS = (Kind.RSQRT, Kind.SQRT, Kind.POW)


def _is_root(op: MicroOp) -> bool:
    return op.kind in (Kind.RSQRT, Kind.SQRT) or (
        op.kind is Kind.POW and op.operands[1] in (-0.5, 0.5)
    )


def read_statistic(candidate: Candidate) -> Statistic:
    """The statistic of a candidate.

    Raises:
        Decline: it is not the mean of squares over the last axis plus eps, in one type, or it
            stands inside a transform of torch.func.
    """
    path = _path(candidate.root, candidate.squares)
    for node in path:
        fake_of(node)
    h = _squared_value(candidate)
    _check_one_type(path, h)
    _check_rows(path, candidate.reduction, h)
    variance = micro_op(candidate.root).operands[0]  # type: ignore[union-attr]
    mean, eps = _mean_and_eps(variance)
    kind = _mean_kind(mean, candidate, h)
    _check_private(path)
    return Statistic(h, candidate.root, _root_kind(candidate.root), kind, eps, path)


def _squared_value(candidate: Candidate) -> Node:
    h = micro_op(candidate.squares).operands[0]  # type: ignore[union-attr]
    assert isinstance(h, Node)
    value: Node | None = h
    while (inner := source_of(value, Kind.CAST)) is not None:
        value = inner
    op = micro_op(value)
    if op is not None and op.kind is Kind.SUB and _reads_mean(op.operands[1]):
        raise Decline(
            "a mean is subtracted before the squares: this is a LayerNorm, not an RMSNorm"
        )
    reduction = micro_op(candidate.reduction)
    rank = fake_of(candidate.squares).dim()
    assert reduction is not None
    if reduction.dims != (rank - 1,):
        raise Decline(
            f"the squares are reduced over dimensions {list(reduction.dims or ())} of {rank}, "
            "not over the last one alone"
        )
    return h


def _reads_mean(operand: Operand) -> bool:
    op = micro_op(operand)
    while op is not None and op.kind in (Kind.CAST, Kind.VIEW):
        op = micro_op(op.operands[0])
    return op is not None and op.kind is Kind.MEAN


def _mean_and_eps(variance: Operand) -> tuple[Operand, Operand]:
    op = micro_op(variance)
    if op is not None and op.kind is Kind.CLAMP:
        raise Decline("eps bounds the mean from below (clamp or maximum) instead of being added")
    if op is None or op.kind is not Kind.ADD:
        return variance, 0.0
    mean = _reducing_operand(op)  # of one row, the mean is one number, too
    eps = op.operands[1] if mean is op.operands[0] else op.operands[0]
    if is_one_number(eps):
        return mean, eps
    raise Decline("what is added to the mean of the squares is not one number, so it is no eps")


def is_one_number(eps: Operand) -> bool:
    """A number, the node of a SymFloat, or a tensor of one element."""
    if not isinstance(eps, Node):
        return True
    fake = tensor(eps)
    if fake is None:
        return True  # a SymFloat: `dynamic=True` makes a module's eps an input of the graph
    return fake.numel() == 1 and fake.dim() <= 1 and fake.is_floating_point()


def _mean_kind(mean: Operand, candidate: Candidate, h: Node) -> str:
    mean = _unviewed(mean)
    width = width_of(h)
    if width is None:
        raise Decline("the width of the normalised axis is symbolic: mark that dimension static")
    reduction = micro_op(candidate.reduction)
    assert reduction is not None
    if mean is candidate.reduction:
        if reduction.kind is Kind.MEAN:
            return "mean"
        return L2
    op = micro_op(mean)
    operands = () if op is None else tuple(_unviewed(operand) for operand in op.operands)
    if op is None or candidate.reduction not in operands or reduction.kind is not Kind.SUM:
        raise Decline("more than an eps stands between the mean of the squares and its root")
    left, right = operands
    number = right if left is candidate.reduction else left
    if op.kind is Kind.DIV and left is candidate.reduction and number == width:
        return "sum_divided"
    if op.kind is Kind.MUL and isinstance(number, float) and math.isclose(number * width, 1.0):
        return "sum_scaled"
    raise Decline(f"the sum of the squares is not divided by the width of the last axis, {width}")


def _unviewed(value: Operand) -> Operand:
    """A value before its views, of which `_check_rows` has seen that they keep the rows."""
    while (inner := source_of(value, Kind.VIEW)) is not None:
        value = inner
    return value


def _root_kind(root: Node) -> str:
    op = micro_op(root)
    assert op is not None
    if op.kind is Kind.RSQRT:
        return "rsqrt"
    if op.kind is Kind.POW and op.operands[1] == -0.5:
        return "pow"
    return "sqrt"


def _path(root: Node, squares: Node) -> tuple[Node, ...]:
    """The nodes from the root back to the squares."""
    path = [root]
    while path[-1] is not squares:
        op = spelling(path[-1])
        assert op is not None
        current = _reducing_operand(op) if op.kind in _ON_A_MEAN else op.operands[0]
        assert isinstance(current, Node)
        path.append(current)
    return tuple(path)


def _check_one_type(path: tuple[Node, ...], h: Node) -> None:
    compute = dtype(h)
    if compute not in FLOATS:
        raise Decline(f"the statistic is computed in {compute}, which no kernel has")
    for node in path:
        if dtype(node) != compute:
            raise Decline(
                f"the statistic changes type on its way, from {compute} to {dtype(node)}: "
                "its roundings cannot be read exactly"
            )


def _check_rows(path: tuple[Node, ...], reduction: Node, h: Node) -> None:
    """Views on the way may take the reduced axis away and put it back, and nothing else."""
    shape = fake_of(h).shape
    start = path.index(reduction) + 1
    for node in path[start:]:
        if not same_sizes(fake_of(node).shape, shape):
            raise Decline(
                f"the squares of {_text(shape)} are summed as {_text(fake_of(node).shape)}: "
                "they are reshaped before their mean"
            )
    for node in path[:start]:
        if not any(same_sizes(fake_of(node).shape, one) for one in (shape[:-1], (*shape[:-1], 1))):
            raise Decline(
                f"the mean of the squares of {_text(shape)} has shape "
                f"{_text(fake_of(node).shape)} on its way: that is not one number per row"
            )


def _text(shape: Sequence[object]) -> str:
    return str(tuple(shape))


def _check_private(path: tuple[Node, ...]) -> None:
    for node in path[1:]:
        users = [user for user in node.users if user.target not in _ASSERTIONS]
        if len(users) != 1:
            raise Decline("an intermediate of the statistic has another user, which no op returns")


_ASSERTIONS = (torch.ops.aten._assert_tensor_metadata.default,)
