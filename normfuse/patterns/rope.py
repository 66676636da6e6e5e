"""q, k -> RoPE, without a norm before it  =>  normfuse::rope, both in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from normfuse.ops import ROPE
from normfuse.ops.one_launch import MAX_NORMS
from normfuse.ops.rounding import FLOATS
from normfuse.patterns.columns import MOVES, RESHAPES, TO_COMPLEX, chain_of, value_key
from normfuse.patterns.micro_ops import fake_of, tensor
from normfuse.patterns.rotary import Rotary, laid_out, negations, read_rotary, tables_of
from normfuse.patterns.rule import Context, Rule, emit, erase, fakes_of, result

aten = torch.ops.aten

MAX_DISTANCE = 80  # nodes between the embeddings of one attention; the longest in use is 30
# After autograd, from a head to the columns that are taken apart: a cast, a view as pairs.
_TAKEN_APART = MOVES | TO_COMPLEX
_CASTS: set[Any] = {aten._to_copy.default, torch.ops.prims.convert_element_type.default}
_ON_THE_WAY = RESHAPES | _CASTS
_STEPS = 3


def may_turn(x: Node) -> bool:
    """Whether a rotary embedding may begin at a value: its columns are taken apart at once."""
    value = x
    for _ in range(_STEPS):
        if any(user.target in _TAKEN_APART for user in value.users):
            break
        if len(value.users) != 1:
            return False
        (value,) = value.users
        if value.target not in _ON_THE_WAY:
            return False
    else:
        return False
    fake = tensor(x)
    if fake is None or fake.dtype not in FLOATS or fake.dim() < 2:
        return False
    return isinstance(fake.shape[-1], int) and fake.shape[-1] % 2 == 0


def _apply(node: Node, context: Context) -> Node | None:
    """The op for the embedding of one value, and of those before it that turn by its tables."""
    rotary = read_rotary(node, context.keys) if may_turn(node) else None
    if rotary is None:
        return None
    context.mutations.forbid_between((node, *rotary.nodes, *negations(rotary)))
    rotation = str(laid_out(rotary, fake_of(node)))
    tables = tables_of(rotary, context)
    made = [table for table in tables if table not in (rotary.cos.node, rotary.sin.node)]
    left = _previous(node, rotary.last, tables, context)
    if left is not None:
        fused = _joined(left, node, rotary, rotation, context)
    else:
        fakes = (fake_of(rotary.last),)
        arguments = ([node], *tables, [rotation])
        fused = emit(context, ROPE, arguments, fakes, before=rotary.last, like=rotary.last)
    index = len(fakes_of(context, fused)) - 1
    rotary.last.replace_all_uses_with(result(context, fused, index))
    erase(context, (*rotary.nodes, *made))
    return fused


def _previous(x: Node, last: Node, tables: list[Node], context: Context) -> Node | None:
    """The op of the same attention that stands before an embedding and can take x, too."""
    node = last
    for _ in range(MAX_DISTANCE):
        node = node.prev
        if node.op == "root":
            return None
        if node.target is ROPE:
            args: Any = node.args
            xs, *theirs, _ = args
            pairs = zip(theirs, tables, strict=True)
            keys = context.keys
            turn_alike = all(value_key(a, keys) == value_key(b, keys) for a, b in pairs)
            fits = len(xs) < MAX_NORMS and fake_of(x).device == fake_of(xs[0]).device
            return node if turn_alike and fits and x < node else None
    return None


def _joined(left: Node, x: Node, rotary: Rotary, rotation: str, context: Context) -> Node:
    """The op with one value more, in its place."""
    args: Any = left.args
    xs, cos, sin, rotations = args
    chains = (*chain_of(rotary.cos.node), *chain_of(rotary.sin.node))
    context.mutations.forbid_between((left, *chains, *rotary.nodes))
    fakes = (*fakes_of(context, left), fake_of(rotary.last))
    arguments = ([*xs, x], cos, sin, [*rotations, rotation])
    fused = emit(context, ROPE, arguments, fakes, before=left, like=left)
    for index in range(len(xs)):
        result(context, left, index).replace_all_uses_with(result(context, fused, index))
    erase(context, (left,))
    return fused


RULE = Rule(
    name="rope",
    before="q, k -> RoPE (half, interleaved, complex, partial), without a norm",
    families="Llama, Mistral, Qwen 2, Phi 3, GLM 4, Granite",
    apply=_apply,
)
