"""The second half of an RMSNorm: x * rstd, its casts, the weight, and the type of the result.

Everything that rounds is read from the types of the nodes, never from the names of the operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.fx import Node

from normfuse.ops.rounding import FLOATS, L2, RoundingPlan, is_exact_cast
from normfuse.patterns.decline import Decline
from normfuse.patterns.micro_ops import (
    Kind,
    Operand,
    dtype,
    fake_of,
    keeps_rows,
    kind_of,
    micro_op,
    same_sizes,
    source_of,
    tensor,
    width_of,
)
from normfuse.patterns.statistic import Statistic, is_one_number
from normfuse.patterns.weight import Weight, path_between, read_weight


@dataclass(frozen=True)
class Product:
    """The node where x meets its inverse root: `unit = x * rstd`, or `x / sqrt`.

    `bound` is what the root is at least, if anything bounds it, as in `F.normalize`. `copies` are
    the casts of x that eager reads, and that the op does without.
    """

    node: Node
    x: Node
    inverse: Node
    kind: str
    rstd: torch.dtype
    bound: Operand | None
    nodes: tuple[Node, ...]
    copies: tuple[Node, ...]


@dataclass(frozen=True)
class Scaling:
    """The whole tail of a norm, down to `last`, the node that the op replaces.

    `views` keep the last axis and lie between the product and `last`; they are applied to the op's
    result.
    """

    product: Product
    unit: tuple[torch.dtype, ...]
    weight: Weight | None
    out: torch.dtype
    last: Node
    views: tuple[Node, ...]
    nodes: tuple[Node, ...]

    def plan(self, statistic: Statistic) -> RoundingPlan:
        return RoundingPlan(
            compute=dtype(statistic.h),
            mean=statistic.mean,
            root=self.product.kind,
            rstd=self.product.rstd,
            unit=self.unit,
            weight=self.weight.dtypes if self.weight else None,
            out=self.out,
            bounded=self.product.bound is not None,
        )


def read_scaling(statistic: Statistic) -> Scaling:
    """What follows a statistic.

    Raises:
        Decline: its root does not multiply the squared value, or the weight is no row vector.
    """
    product = _read_product(statistic)
    scaling = Scaling(
        product,
        unit=(dtype(product.node),),
        weight=None,
        out=dtype(product.node),
        last=product.node,
        views=(),
        nodes=(product.node,),
    )
    longest = scaling
    is_weightless = statistic.mean == L2
    while (longer := _extend(scaling, is_weightless)) is not None:
        is_view = longer.views != scaling.views
        scaling = longer
        longest = longest if is_view else scaling
    return longest


def _read_product(statistic: Statistic) -> Product:
    others = []
    for inverse, kind, path in _inverses(statistic):
        for user in inverse.users:
            op = micro_op(user)
            if op is None or op.kind not in (Kind.MUL, Kind.DIV):
                continue
            value, root = op.operands
            if op.kind is Kind.MUL:
                value = value if root is inverse else root
            wanted = Kind.DIV if kind == "divide_by_sqrt" else Kind.MUL
            if op.kind is not wanted or (op.kind is Kind.DIV and root is not inverse):
                continue
            if _is_same_value(value, statistic.h):
                assert isinstance(value, Node)
                check_promotion(user, value, inverse)
                _check_column(inverse, statistic.h)
                x = uncast(value)
                bound, rstd = _bound_of(path, statistic), _rounded_to(statistic, path)
                copies = (*path_between(value, x), *path_between(statistic.h, x))
                return Product(user, x, inverse, kind, rstd, bound, (*path, user), copies)
            others.append(user)
    if others:
        raise Decline("the inverse root multiplies another value than the one that was squared")
    raise Decline(_why_no_product(statistic))


def _bounds(clamp: Node, root: Node) -> bool:
    op = micro_op(clamp)
    is_clamp = op is not None and op.kind is Kind.CLAMP and op.operands[0] is root
    return is_clamp and dtype(clamp) == dtype(root)


def _bound_of(path: tuple[Node, ...], statistic: Statistic) -> Operand | None:
    """What bounds the root from below on its way to x; None if nothing does."""
    clamps = [node for node in path if kind_of(node) is Kind.CLAMP]
    if not clamps:
        return None
    op = micro_op(clamps[0])
    assert op is not None
    if len(clamps) > 1 or len(op.operands) < 2 or not is_one_number(op.operands[1]):
        raise Decline("the root is clamped by more than one number from below")
    if statistic.mean != L2:
        raise Decline("the root of a mean is clamped, where an eps would be added under it")
    if isinstance(statistic.eps, Node) or statistic.eps:
        raise Decline("an eps is added under the root, and another number bounds it")
    return op.operands[1]


def _why_no_product(statistic: Statistic) -> str:
    uses = list(_uses_of_root(statistic))
    kinds = {kind_of(user) for user, _, _ in uses}
    if Kind.ADD in kinds:
        return "something is added to the root, where an eps would be added under it"
    divided = [(root, is_scaled) for user, root, is_scaled in uses if _divides_by(root, user)]
    if any(is_scaled for _, is_scaled in divided):
        return "the root is scaled before it divides: no plan has the rounding of that product"
    if Kind.CLAMP in kinds:
        return "the root is clamped, and does not divide the squared value itself"
    if any(root is not statistic.root for root, _ in divided):
        return "the root is cast or reshaped before it is inverted: its roundings cannot be read"
    return "no product of the squared value and its inverse root follows the statistic"


def _uses_of_root(statistic: Statistic) -> Iterator[tuple[Node, Node, bool]]:
    """The readers of the root and of what is made of it, what they read, whether that is scaled."""
    is_scaled, waiting = {statistic.root: False}, [statistic.root]
    while waiting:
        root = waiting.pop()
        for user in root.users:
            yield user, root, is_scaled[root]
            op = micro_op(user)
            if op is None or user in is_scaled:
                continue
            is_per_row = same_sizes([fake_of(user).numel()], [fake_of(statistic.root).numel()])
            scales = op.kind in (Kind.MUL, Kind.DIV) and is_per_row
            keeps = op.kind in (Kind.CAST, Kind.VIEW, Kind.CLAMP)
            if scales or keeps or _inverts(op.kind, op.operands):
                is_scaled[user] = is_scaled[root] or scales
                waiting.append(user)


def _divides_by(root: Node, user: Node) -> bool:
    op = micro_op(user)
    divides = op is not None and op.kind is Kind.DIV and op.operands[1] is root
    return divides or (op is not None and _inverts(op.kind, op.operands))


def _inverses(statistic: Statistic) -> Iterator[tuple[Node, str, tuple[Node, ...]]]:
    """Every node that holds the inverse root, its spelling, and the casts and views up to it."""
    h = statistic.h
    kind = "divide_by_sqrt" if statistic.kind == "sqrt" else statistic.kind
    waiting: list[tuple[Node, str, tuple[Node, ...]]] = [(statistic.root, kind, ())]
    while waiting:
        node, kind, path = waiting.pop()
        yield node, kind, path
        for user in node.users:
            op = micro_op(user)
            if op is None:
                continue
            keeps = op.kind is Kind.CAST or (op.kind is Kind.VIEW and _is_column(user, node, h))
            if keeps or (kind == "divide_by_sqrt" and _bounds(user, node)):
                waiting.append((user, kind, (*path, user)))
            elif kind == "divide_by_sqrt" and not path and _inverts(op.kind, op.operands):
                waiting.append((user, "reciprocal_sqrt", (*path, user)))


def _is_column(view: Node, source: Node, h: Node) -> bool:
    """A view of the inverse root as one number per row of h: (..., 1), or that expanded to h."""
    shape, rows = fake_of(view).shape, fake_of(h).shape
    if same_sizes(shape, (*rows[:-1], 1)):
        return True
    return same_sizes(shape, rows) and fake_of(source).dim() == len(rows)


def _check_column(inverse: Node, h: Node) -> None:
    """Without `keepdim`, an inverse root of shape (8,) would scale the columns of (8, 8)."""
    root, shape = fake_of(inverse).shape, fake_of(h).shape
    if len(root) != len(shape) and len(shape) > 1:
        raise Decline(
            f"the inverse root of shape {tuple(root)} multiplies {tuple(shape)}: "
            "that is not one number per row"
        )


def _rounded_to(statistic: Statistic, path: tuple[Node, ...]) -> torch.dtype:
    """The type to which the inverse root is rounded: the narrowest that it passes through."""
    rounded = current = dtype(statistic.root)
    for node in path:
        if not is_exact_cast(current, dtype(node)):
            if rounded != dtype(statistic.root):
                raise Decline("the inverse root is rounded twice before it multiplies")
            rounded = dtype(node)
        current = dtype(node)
    return rounded


def _inverts(kind: Kind, operands: tuple[Operand, ...]) -> bool:
    if kind is Kind.RECIPROCAL:
        return True
    if kind is Kind.DIV:
        return operands[0] in (1, 1.0)
    return kind is Kind.POW and operands[1] in (-1, -1.0)


def _is_same_value(value: Operand, h: Node) -> bool:
    return isinstance(value, Node) and tensor(value) is not None and uncast(value) is uncast(h)


def uncast(node: Node) -> Node:
    """The value before casts that round nothing: `x.float()` is x."""
    while (source := source_of(node, Kind.CAST)) is not None and is_exact_cast(
        dtype(source), dtype(node)
    ):
        node = source
    return node


def check_promotion(node: Node, left: Node, right: Node) -> None:
    expected = torch.promote_types(dtype(left), dtype(right))
    if dtype(node) != expected:
        raise Decline(
            f"a product of {dtype(left)} and {dtype(right)} has type {dtype(node)} here "
            "(autocast?): its roundings cannot be read exactly"
        )


def users_of(node: Node) -> list[Node]:
    """All users but the assertions of shapes and types that torch adds."""
    return [user for user in node.users if "_assert_" not in str(user.target)]


def _extend(scaling: Scaling, is_weightless: bool) -> Scaling | None:
    """The scaling with one more node; None at its end."""
    users = users_of(scaling.last)
    if len(users) != 1:
        return None
    (user,) = users
    op = micro_op(user)
    if op is None or dtype(user) not in FLOATS:
        return None
    if op.kind is Kind.CAST:
        return _with_cast(scaling, user)
    if op.kind is Kind.VIEW and keeps_rows(user, scaling.last):
        return replace(
            scaling, last=user, views=(*scaling.views, user), nodes=(*scaling.nodes, user)
        )
    if op.kind is Kind.MUL and scaling.weight is None and not is_weightless:
        factor = op.operands[1] if op.operands[0] is scaling.last else op.operands[0]
        return _with_weight(scaling, user, factor)
    return None


def _with_cast(scaling: Scaling, cast: Node) -> Scaling | None:
    target = dtype(cast)
    longer = replace(scaling, last=cast, out=target, nodes=(*scaling.nodes, cast))
    if target == scaling.out:
        return longer
    if scaling.weight is not None:
        formed = torch.promote_types(scaling.unit[-1], scaling.weight.dtypes[1])
        return longer if scaling.out == formed else None
    return (
        replace(longer, unit=(*scaling.unit, target)) if rounds_once(scaling.unit, target) else None
    )


def rounds_once(unit: tuple[torch.dtype, ...], target: torch.dtype) -> bool:
    """Whether casting further to `target` still leaves one rounding after the product."""
    rounded = [second for first, second in pairwise(unit) if not is_exact_cast(first, second)]
    return len(unit) < 3 and (is_exact_cast(unit[-1], target) or not rounded)


def _with_weight(scaling: Scaling, product: Node, factor: Operand) -> Scaling | None:
    if not isinstance(factor, Node) or tensor(factor) is None or dtype(factor) not in FLOATS:
        return None
    width = width_of(scaling.last)
    assert width is not None  # the statistic has been read
    shape = fake_of(factor).shape
    is_row = same_sizes(shape, (1,) * (len(shape) - 1) + (width,)) and len(shape) >= 1
    if not is_row or len(shape) > len(fake_of(product).shape):
        if (
            _is_parameter(factor)
            and len(shape) > 0
            and same_sizes(shape[-1:], (1,))
            and (not same_sizes(shape, (1,) * len(shape)))
        ):
            raise Decline(
                f"the weight of shape {tuple(shape)} is no row vector over the last axis, {width}"
            )
        return None
    check_promotion(product, scaling.last, factor)
    weight = read_weight(factor, width)
    if weight is None:
        return None
    return replace(
        scaling,
        weight=weight,
        out=dtype(product),
        last=product,
        nodes=(*scaling.nodes, product),
    )


def _is_parameter(node: Node) -> bool:
    """A graph input, up to casts, views and an offset."""
    current: Operand = node
    while (op := micro_op(current)) is not None and op.kind in (Kind.CAST, Kind.VIEW, Kind.ADD):
        current = op.operands[0] if isinstance(op.operands[0], Node) else op.operands[1]
    return isinstance(current, Node) and current.op in ("placeholder", "get_attr")
