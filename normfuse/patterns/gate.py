"""Reads a gate: value * act(gate), its casts, and what else follows or precedes the product."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch.fx import Node

from normfuse.ops.gating import Gating
from normfuse.ops.rounding import FLOATS, is_exact_cast
from normfuse.patterns.decline import Decline
from normfuse.patterns.micro_ops import (
    Kind,
    Operand,
    dtype,
    fake_of,
    micro_op,
    pairs,
    same_sizes,
    source_of,
    tensor,
)
from normfuse.patterns.scaling import check_promotion, uncast


@dataclass(frozen=True)
class Factor:
    """act(gate), and the casts up to the product: `node` is what multiplies.

    `gate` is the value before casts that round nothing; `computed` is the type of the activation,
    `rounded` the narrowest type that it passes through.
    """

    node: Node
    gate: Node
    activation: str
    computed: torch.dtype
    rounded: torch.dtype
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Gate:
    """A product of `value` and a factor. `nodes` are those that the op replaces."""

    value: Node
    factor: Factor
    product: Node
    nodes: tuple[Node, ...]

    def types(self, out: torch.dtype) -> Gating:
        """Where the gate rounds, for a result of type `out`."""
        factor = self.factor
        return Gating(factor.computed, factor.rounded, dtype(self.product), out)


def read_gate(product: Node) -> Gate | None:
    """The gate whose product is `product`.

    Raises:
        Decline: it is one whose roundings cannot be read, or that does not multiply element by
            element.
    """
    op = micro_op(product)
    if op is None or op.kind is not Kind.MUL or tensor(product) is None:
        return None
    for value, operand in pairs(op):
        factor = _read_factor(operand)
        if factor is None or not isinstance(value, Node) or tensor(value) is None:
            continue
        if dtype(value) not in FLOATS or value is factor.gate:  # x * sigmoid(x) is no gate
            return None
        check_promotion(product, value, factor.node)
        shapes = [fake_of(node).shape for node in (value, factor.gate)]
        if not all(same_sizes(shape, fake_of(product).shape) for shape in shapes):
            raise Decline(
                f"the gate of shape {tuple(shapes[1])} does not have the shape of what it "
                f"multiplies, {tuple(shapes[0])}"
            )
        return Gate(value, factor, product, (*factor.nodes, product))
    return None


def _read_factor(node: Operand) -> Factor | None:
    """`silu(gate.float()).to(bf16)`, or a sigmoid, or silu as `gate * sigmoid(gate)`."""
    factor, casts = node, []
    while isinstance(node, Node) and (source := source_of(node, Kind.CAST)) is not None:
        casts.append(node)
        node = source
    found = _read_activation(node)
    if found is None or not isinstance(factor, Node) or not isinstance(node, Node):
        return None
    operand, activation, nodes = found
    if dtype(operand) not in FLOATS or dtype(node) != dtype(operand):
        return None
    rounded = _rounded_through((node, *reversed(casts)), "the activation of the gate")
    gate = uncast(operand)
    return Factor(factor, gate, activation, dtype(operand), rounded, (*nodes, *casts))


def _read_activation(node: Operand) -> tuple[Node, str, tuple[Node, ...]] | None:
    op = micro_op(node)
    if op is None or not isinstance(node, Node) or tensor(node) is None:
        return None
    operand = op.operands[0]
    if op.kind in (Kind.SILU, Kind.SIGMOID) and isinstance(operand, Node):
        return operand, "silu" if op.kind is Kind.SILU else "sigmoid", (node,)
    if op.kind is Kind.MUL:
        for gate, sigmoid in pairs(op):
            if isinstance(gate, Node) and source_of(sigmoid, Kind.SIGMOID) is gate:
                assert isinstance(sigmoid, Node)
                return gate, "x_sigmoid", (sigmoid, node)
    return None


def _rounded_through(path: tuple[Node, ...], name: str) -> torch.dtype:
    """The narrowest type of a value on its way through casts, of which one may round.

    Raises:
        Decline: two do.
    """
    rounded = [dtype(path[0])]
    for source, node in pairwise(path):
        if not is_exact_cast(dtype(source), dtype(node)):
            rounded.append(dtype(node))
    if len(rounded) > 2:
        raise Decline(f"{name} is rounded twice")
    return rounded[-1]


def gate_behind(x: Node) -> tuple[Gate, torch.dtype] | None:
    """The gate whose product, cast and reshaped, is `x`; and the type to which it is rounded.

    Raises:
        Decline: something else reads the gated value.
    """
    path = [x]
    while (gate := read_gate(path[-1])) is None:
        source = source_of(path[-1], Kind.CAST) or source_of_reshape(path[-1])
        if source is None:
            return None
        path.append(source)
    if any(len(node.users) != 1 for node in path):
        raise Decline("the gated value has another user, which no op returns")
    out = _rounded_through(tuple(reversed(path)), "the gated value")
    return replace(gate, nodes=(*gate.nodes, *path[:-1])), out


def source_of_reshape(node: Node) -> Node | None:
    """What a node is a view of that keeps every element, in order."""
    source = source_of(node, Kind.VIEW)
    if source is None or not same_sizes((fake_of(source).numel(),), (fake_of(node).numel(),)):
        return None
    return source
