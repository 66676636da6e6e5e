"""Joins two ops on norms that stand side by side in one attention, so that one launch does both."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.amp import autocast_mode
from torch.autograd import grad_mode
from torch.fx import Node

from normfuse.ops import QK_RMS_NORM, QK_RMS_NORM_ROPE, RMS_NORM
from normfuse.ops.one_launch import MAX_NORMS
from normfuse.ops.rounding import RoundingPlan
from normfuse.patterns.columns import chain_of, value_key
from normfuse.patterns.micro_ops import Kind, MicroOp, fake_of, micro_op, same_sizes, tensor
from normfuse.patterns.mutation import written_by
from normfuse.patterns.rule import Context, emit, erase, existing_result, fakes_of, result

aten = torch.ops.aten

MAX_DISTANCE = 80  # nodes between two norms of one attention; the longest in use is 30
MAX_ARRANGEMENTS = 40  # of a projection, before its norm; residuals would lead through all layers

_REARRANGEMENTS: set[Any] = {
    *("transpose", "permute", "chunk", "split", "narrow", "unbind", "select", "unflatten"),
    *("contiguous", "squeeze", "swapaxes", "view", "reshape", "flatten"),
    *(operator.getitem, torch.transpose, torch.permute, torch.chunk, torch.split, torch.narrow),
    *(torch.unbind, torch.squeeze, torch.view_as_real, torch.view_as_complex, torch.flatten),
    *(aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.split.Tensor),
    *(aten.split_with_sizes.default, aten.select.int, aten.unbind.int, aten.squeeze.dim),
}
_CONCATENATIONS: set[Any] = {
    *(torch.cat, torch.concat, torch.concatenate, torch.stack),
    *(aten.cat.default, aten.stack.default),
}
_PROJECTIONS: set[Any] = {
    *(torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, operator.matmul, "matmul"),
    *(aten.linear.default, aten.mm.default, aten.bmm.default, aten.matmul.default),
}
# What may wait for the second norm, beside micro-operations: what a rotation is made of, and the
# second projection of a query of low rank, as DeepSeek's.
_MOVABLE: set[Any] = {
    *_REARRANGEMENTS,
    *_CONCATENATIONS,
    *_PROJECTIONS,
    *(operator.neg, torch.neg, torch.negative, "neg", aten.neg.default),
    *(torch.clone, "clone", aten.clone.default),
}

# What nothing may be moved past: a projection has another type behind it, or no gradient.
_MODES: set[Any] = {
    torch._C._set_grad_enabled,
    *(grad_mode._enter_inference_mode, grad_mode._exit_inference_mode),
    *(autocast_mode._enter_autocast, autocast_mode._exit_autocast),
}


@dataclass(frozen=True)
class Part:
    """The norms of one op, in lists: what `qk_rms_norm_rope` takes, one entry for each."""

    node: Node
    xs: list[Node]
    weights: list[Node]
    tables: list[Node]
    eps: list[float]
    offsets: list[float]
    plans: list[str]
    rotations: list[str]

    @classmethod
    def of(cls, node: Node) -> Part | None:
        """The norms of an op; None if it is another op, or one that cannot stand in a list."""
        args: Any = node.args
        if node.target is RMS_NORM:
            x, weight, eps_tensor, eps, offset, plan = args
            if eps_tensor is not None or isinstance(eps, Node):
                return None
            weights = [] if weight is None else [weight]
            return cls(node, [x], weights, [], [eps], [offset], [plan], ["none"])
        if node.target is QK_RMS_NORM:
            xs, weights, eps, offsets, plans = args
            return cls(node, xs, weights, [], eps, offsets, plans, ["none"] * len(xs))
        if node.target is QK_RMS_NORM_ROPE:
            xs, weights, cos, sin, *rest = args
            return cls(node, xs, weights, [cos, sin], *rest)
        return None

    @property
    def num(self) -> int:
        return len(self.xs)

    @property
    def norms(self) -> list[tuple[Node, Node | None]]:
        """The input of each, and its weight."""
        weights = iter(self.weights)
        plans = map(RoundingPlan.parse, self.plans)
        pairs = zip(self.xs, plans, strict=True)
        return [(x, None if plan.weight is None else next(weights)) for x, plan in pairs]


def previous_part(node: Node) -> Part | None:
    """The norms of the op of ours that stands before `node`."""
    for _ in range(MAX_DISTANCE):
        node = node.prev
        if node.op == "root":
            return None
        if getattr(node.target, "namespace", "") == "normfuse":
            return Part.of(node)
    return None


def stand_side_by_side(left: Part, right: Part) -> bool:
    """Whether the norms belong to one attention: projections of one value, turned alike."""
    if left.num + right.num > MAX_NORMS:
        return False
    if left.tables and right.tables:
        pairs = zip(left.tables, right.tables, strict=True)
        return all(value_key(a) == value_key(b) for a, b in pairs)
    if fake_of(left.xs[0]).device != fake_of(right.xs[0]).device:
        return False
    if left.xs[0] is right.xs[-1]:
        return True
    source = projected(left.xs[0])
    return source is not None and source is projected(right.xs[-1])


def projected(x: Node) -> Node | None:
    """What a value is a projection of; None if it is none."""
    x = _unarranged(x)
    if x.target in _PROJECTIONS and isinstance(x.args[0], Node):
        return _unarranged(x.args[0])
    return None


def _unarranged(x: Node) -> Node:
    for _ in range(MAX_ARRANGEMENTS):
        source = _source(x)
        if source is None:
            break
        x = source
    return x


def _source(x: Node) -> Node | None:
    """What a value is a view, slice, cast, multiple, concatenation or rotation of."""
    if x.op not in ("call_function", "call_method") or not x.args:
        return None
    if getattr(x.args[0], "target", None) in (RMS_NORM, QK_RMS_NORM, QK_RMS_NORM_ROPE):
        return None
    if x.target in _CONCATENATIONS:
        parts: Any = x.args[0]  # of a rotation, each is made of the same value
        first = parts[0] if isinstance(parts, (list, tuple)) and parts else parts
        return first if isinstance(first, Node) else None
    op = micro_op(x)
    if x.target in _REARRANGEMENTS or (op is not None and op.kind in (Kind.CAST, Kind.VIEW)):
        return x.args[0] if isinstance(x.args[0], Node) else None
    if op is not None and op.kind in (Kind.MUL, Kind.ADD, Kind.SUB):
        return _main_operand(x, op)
    return None


def _main_operand(x: Node, op: MicroOp) -> Node | None:
    """What is scaled, turned or gets a bias; None of a residual, which leads through all layers."""
    shape = fake_of(x).shape
    whole = [
        operand
        for operand in op.operands
        if isinstance(operand, Node)
        and (fake := tensor(operand)) is not None
        and same_sizes(fake.shape, shape)
    ]
    projections = [operand for operand in whole if operand.target in _PROJECTIONS]
    if projections or not whole:
        return projections[0] if projections else None
    kinds = [found.kind for found in map(micro_op, whole) if found is not None]
    is_residual = op.kind is not Kind.MUL and len(whole) == 2 and Kind.MUL not in kinds
    return None if is_residual else whole[0]


def join(left: Part, right: Part, context: Context) -> Node | None:
    """One op for both, at the place of the second; None where the second needs the first.

    Raises:
        Decline: something changes a value in between.
    """
    late = _dependents(left.node, right.node)
    if late is None or any(node in late for node in right.node.all_input_nodes):
        return None
    if not all(_is_movable(node) for node in late):
        return None
    tables = [node for table in left.tables + right.tables for node in chain_of(table)]
    context.mutations.forbid_between((left.node, *tables, *late, right.node))
    parts = (left, right)
    ys = [fakes_of(context, part.node)[: part.num] for part in parts]
    rstds = [fakes_of(context, part.node)[part.num :] for part in parts]
    tables = left.tables or right.tables
    rotations = [[*left.rotations, *right.rotations]] if tables else []
    fused = emit(
        context,
        QK_RMS_NORM_ROPE if tables else QK_RMS_NORM,
        (
            [*left.xs, *right.xs],
            [*left.weights, *right.weights],
            *tables,
            [*left.eps, *right.eps],
            [*left.offsets, *right.offsets],
            [*left.plans, *right.plans],
            *rotations,
        ),
        (*ys[0], *ys[1], *rstds[0], *rstds[1]),
        before=right.node,
        like=left.node,
    )
    num, first = left.num + right.num, 0
    for part in parts:
        for index in range(2 * part.num):
            old = existing_result(part.node, index)
            new = first + index if index < part.num else num + first + index - part.num
            if old is not None:
                old.replace_all_uses_with(result(context, fused, new))
        first += part.num
    _move_behind(fused, late)
    erase(context, (left.node, right.node))
    return fused


def _dependents(left: Node, right: Node) -> list[Node] | None:
    """The nodes between two that need the first, in order; None if they are too far apart.

    Nor may the mode change in between, such as autocast.
    """
    reached = {left}
    late: list[Node] = []
    node = left.next
    for _ in range(MAX_DISTANCE):
        if node is right:
            return late
        if node.target in _MODES:
            return None
        if any(operand in reached for operand in node.all_input_nodes):
            reached.add(node)
            late.append(node)
        node = node.next
    return None


def _is_movable(node: Node) -> bool:
    is_known = node.target in _MOVABLE or micro_op(node) is not None
    return is_known and not written_by(node)


def _move_behind(fused: Node, late: list[Node]) -> None:
    """`late` in the same order behind the results of `fused`."""
    anchor = fused
    while anchor.next.target is operator.getitem and anchor.next.args[0] is fused:
        anchor = anchor.next
    for node in late:
        anchor.append(node)
        anchor = node
