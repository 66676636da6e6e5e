"""The weight of a norm: a plain vector behind its casts, its views and an offset."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from normfuse.ops.rounding import FLOATS
from normfuse.patterns.micro_ops import (
    Kind,
    dtype,
    fake_of,
    micro_op,
    pairs,
    source_of,
    tensor,
)


@dataclass(frozen=True)
class Weight:
    """`weight + offset`: the plain weight, and the types of the sum and of the factor.

    `copies` are the nodes between the plain weight and the factor, which the op does without.
    """

    node: Node
    offset: float
    dtypes: tuple[torch.dtype, torch.dtype]
    copies: tuple[Node, ...]


def read_weight(factor: Node, width: int) -> Weight | None:
    """`(weight.float() + 1.0).to(bf16)` -> weight, 1.0, (f32, bf16); a lone cast goes as well."""
    multiplied = dtype(factor)
    node = _unview(factor)
    inner = source_of(node, Kind.CAST)
    summed = _unview(inner) if inner is not None else node
    for candidate in (node, summed):
        op = micro_op(candidate)
        if op is None or op.kind is not Kind.ADD:
            continue
        for value, offset in pairs(op):
            if not isinstance(value, Node) or isinstance(offset, Node):
                continue
            plain = _peel_cast(value)
            if dtype(value) == dtype(candidate) and _is_vector(plain, width):
                types = (dtype(candidate), multiplied)
                return Weight(plain, float(offset), types, path_between(factor, plain))
    plain = _peel_cast(node)
    if _is_vector(plain, width):
        return Weight(plain, 0.0, (multiplied, multiplied), path_between(factor, plain))
    if not _is_vector(node, width):
        return None
    return Weight(node, 0.0, (multiplied, multiplied), path_between(factor, node))


def _peel_cast(node: Node) -> Node:
    source = source_of(_unview(node), Kind.CAST)
    return _unview(source) if source is not None else _unview(node)


def _unview(node: Node) -> Node:
    """A vector before the views that only add leading axes of size 1, or split it in groups."""
    while (source := source_of(node, Kind.VIEW)) is not None:
        before, after = fake_of(source), fake_of(node)
        if before.dim() < 1 or before.numel() != after.numel():
            break
        if before.dim() > 1 and before.shape[-1] != after.shape[-1]:
            break
        node = source
    return node


def _is_vector(node: Node, width: int) -> bool:
    fake = tensor(node)
    return fake is not None and fake.shape == (width,) and fake.dtype in FLOATS


def path_between(node: Node, source: Node) -> tuple[Node, ...]:
    """The casts, views and offsets from a node back to the value that they were made of."""
    path = []
    while node is not source:
        path.append(node)
        op = micro_op(node)
        assert op is not None
        node = next(operand for operand in op.operands if isinstance(operand, Node))
    return tuple(path)
