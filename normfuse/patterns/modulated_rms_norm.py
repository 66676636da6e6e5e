"""x -> RMSNorm -> * (1 + scale) [-> + shift]  =>  normfuse::modulated_rms_norm."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from normfuse.ops import MODULATED_RMS_NORM, RMS_NORM, Modulation
from normfuse.ops.modulated_rms_norm import modulated_rms_norm_fake
from normfuse.ops.rounding import FLOATS
from normfuse.patterns.decline import Decline
from normfuse.patterns.micro_ops import (
    Kind,
    Operand,
    dtype,
    fake_mode,
    fake_of,
    micro_op,
    pairs,
    same_sizes,
    tensor,
)
from normfuse.patterns.replacement import replace_chain
from normfuse.patterns.rule import Context, Rule, existing_result
from normfuse.patterns.scaling import check_promotion, uncast


@dataclass(frozen=True)
class Modulated:
    """A modulation down to `last`; `types` are its roundings."""

    scale: Node
    shift: Node | None
    offset: float
    types: Modulation
    last: Node
    nodes: tuple[Node, ...]


def _apply(node: Node, context: Context) -> Node | None:
    if node.target is not RMS_NORM or node.args[2] is not None:
        return None
    y = existing_result(node, 0)
    found = None if y is None else _read_modulation(y)
    if y is None or found is None:
        return None
    nodes = (y, *found.nodes)
    context.mutations.forbid_between((node, *nodes))
    x, weight, _, eps, offset, plan = node.args
    operands = (x, found.scale, found.shift, weight)
    arguments = (*operands, eps, offset, found.offset, plan, str(found.types))
    fakes = _fake_results(arguments)
    return replace_chain(
        context, MODULATED_RMS_NORM, arguments, fakes, norm=node, last=found.last, nodes=nodes
    )


def _fake_results(arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x, scale, shift, weight = (tensor(operand) for operand in arguments[:4])
    assert x is not None
    assert scale is not None
    with torch.no_grad(), fake_mode(arguments[0]):
        return modulated_rms_norm_fake(x, scale, shift, weight, *arguments[4:])


def _read_modulation(y: Node) -> Modulated | None:
    """What follows the norm's result `y`.

    Raises:
        Decline: a scale does not give each column a factor, or widens the result.
    """
    product = _only_user(y)
    factor = None if product is None else _other_operand(product, y, Kind.MUL)
    if product is None or factor is None:
        return None
    scale, offset, total = _read_factor(factor)
    if not offset and not _repeats(scale, y):
        return None  # a product of two activations
    if not same_sizes(fake_of(product).shape, fake_of(y).shape) or not _has_columns(scale, y):
        raise Decline(
            f"a scale of shape {tuple(fake_of(scale).shape)} does not broadcast over the rows of "
            f"the norm of shape {tuple(fake_of(y).shape)}"
        )
    check_promotion(product, y, factor)
    types = Modulation(dtype(total), *(dtype(product),) * 3)
    found = Modulated(scale, None, offset, types, product, (total, factor, product))
    found = _with_shift(found, y)
    if not offset and (found.shift is None or not _repeats(found.shift, y)):
        return None
    return _with_cast(found)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other_operand(node: Node, value: Node, kind: Kind) -> Node | None:
    """What is added to `value`, or multiplies it, if that is another floating tensor."""
    op = micro_op(node)
    if op is None or op.kind is not kind or dtype(node) not in FLOATS:
        return None
    other: Operand = op.operands[1] if op.operands[0] is value else op.operands[0]
    if not isinstance(other, Node) or other is value or tensor(other) is None:
        return None
    return other if dtype(other) in FLOATS else None


def _read_factor(factor: Node) -> tuple[Node, float, Node]:
    """`1 + scale` -> scale, 1.0 and their sum; any other factor is a scale without an offset."""
    total = uncast(factor)
    op = micro_op(total)
    if op is not None and op.kind is Kind.ADD:
        for scale, offset in pairs(op):
            if isinstance(scale, Node) and not isinstance(offset, Node):
                return uncast(scale), float(offset), total
    return total, 0.0, total


def _has_columns(node: Node, y: Node) -> bool:
    """Whether a tensor has a value for each column of the norm."""
    return same_sizes(fake_of(node).shape[-1:], fake_of(y).shape[-1:])


def _repeats(node: Node, y: Node) -> bool:
    """Whether a tensor with the norm's columns is the same for several rows."""
    elements, rows = fake_of(node).shape[:-1], fake_of(y).shape[:-1]
    missing = len(rows) - len(elements)
    return _has_columns(node, y) and (missing > 0 or not same_sizes(elements, rows))


def _with_shift(found: Modulated, y: Node) -> Modulated:
    total = _only_user(found.last)
    shift = None if total is None else _other_operand(total, found.last, Kind.ADD)
    if total is None or shift is None or not _has_columns(shift, y):
        return found
    if not same_sizes(fake_of(total).shape, fake_of(y).shape):
        return found
    check_promotion(total, found.last, shift)
    types = replace(found.types, sum=dtype(total), out=dtype(total))
    nodes = (*found.nodes, total)
    return replace(found, shift=uncast(shift), types=types, last=total, nodes=nodes)


def _with_cast(found: Modulated) -> Modulated:
    cast = _only_user(found.last)
    op = micro_op(cast)
    if cast is None or op is None or op.kind is not Kind.CAST or dtype(cast) not in FLOATS:
        return found
    types = replace(found.types, out=dtype(cast))
    return replace(found, types=types, last=cast, nodes=(*found.nodes, cast))


RULE = Rule(
    name="modulated_rms_norm",
    before="x -> RMSNorm -> * (1 + scale) [-> + shift]",
    families="diffusion heads: VibeVoice; AdaRMS and adaLN, whose scale belongs to a sequence",
    apply=_apply,
)
