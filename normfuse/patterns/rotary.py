"""Reads a rotary embedding of one value, whatever its spelling: x * cos + partners(x) * sin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_arg

from normfuse.ops.rotation import Rotation, empty_result, partners
from normfuse.ops.rounding import FLOATS
from normfuse.patterns.columns import Columns, Keys, Reader, Table, Term
from normfuse.patterns.decline import Decline
from normfuse.patterns.micro_ops import fake_mode, fake_of, same_layout, same_sizes
from normfuse.patterns.rule import Context

MAX_NODES = 40  # of one embedding; the longest spelling in use takes 14


@dataclass(frozen=True)
class Rotary:
    """One value that turns: `last` holds the result, `nodes` are all from the first to the last."""

    rotation: Rotation
    cos: Table
    sin: Table
    last: Node
    nodes: tuple[Node, ...]


@unset_fake_temporarily()
def read_rotary(x: Node, keys: Keys | None = None) -> Rotary | None:
    """How `x` (..., D) turns, if all that becomes of it is one rotary embedding.

    `keys` are kept for other values of the graph, as in `value_key`. The numbers of columns must be
    real; passes after autograd run in a mode that makes fakes.
    """
    if not isinstance(fake_of(x).shape[-1], int):
        return None
    reader = Reader(x, keys)
    followed = _follow(x, reader)
    for node in reversed(followed):
        value = reader.values[node]
        if isinstance(value, Columns) and same_sizes(fake_of(node).shape, fake_of(x).shape):
            inside = _behind(node, followed)
            if not all(user in inside for n in (x, *inside) if n is not node for user in n.users):
                continue
            found = _rotation(value, fake_of(node).dtype)
            if found is not None:
                return Rotary(*found, node, tuple(inside))
    return None


def _follow(x: Node, reader: Reader) -> list[Node]:
    """The nodes made of columns of x alone, in the order of the graph."""
    followed: list[Node] = []
    waiting = set(x.users)
    seen: set[Node] = set()
    while waiting and len(seen) < MAX_NODES:
        node = min(waiting)
        waiting.discard(node)
        seen.add(node)
        if reader.read(node):
            followed.append(node)
            waiting |= set(node.users) - seen
    return followed


def _behind(last: Node, followed: list[Node]) -> list[Node]:
    """Those of the nodes that `last` is made of, itself among them."""
    wanted = {last}
    for node in reversed(followed):
        if node in wanted:
            wanted |= set(node.all_input_nodes)
    return [node for node in followed if node in wanted]


@dataclass(frozen=True)
class _Numbers:
    """The numbers of a term, as lists: comparing them is quicker than comparing tensors."""

    source: list[int]
    table: list[int]

    @classmethod
    def of(cls, term: Term) -> _Numbers:
        return cls(term.source.flatten().tolist(), term.table.flatten().tolist())


def _rotation(value: Columns, out: torch.dtype) -> tuple[Rotation, Table, Table] | None:
    tables = [table for table in value.terms if table is not None]
    if len(tables) != 2 or value.dtype is None:
        return None
    fakes = [fake_of(table.node) for table in tables]
    if fakes[0].dtype != fakes[1].dtype or not same_sizes(fakes[0].shape, fakes[1].shape):
        return None  # a kernel addresses both in one way
    terms = {key: _Numbers.of(term) for key, term in value.terms.items()}
    width = len(terms[tables[0]].source)
    passed = terms[None].source if None in terms else [0] * width
    for cos, sin in (tables, tables[::-1]):
        turning = [column for column, number in enumerate(terms[cos].table) if number]
        if not turning or len(turning) % 2:
            continue
        columns = slice(turning[0], turning[0] + len(turning))
        whole = [sum(pair) for pair in zip(terms[cos].source, passed, strict=True)]
        if whole != list(range(1, width + 1)) or any(passed[columns]):
            continue
        for is_back in (False, True):
            layout = _layout(terms[cos], terms[sin], columns, is_back=is_back)
            if layout is None or not _is_only_at(terms[sin], columns):
                continue
            if cos.part:
                if is_back or cos.part != "real" or layout != "interleaved":
                    continue  # no op turns halves as complex numbers do
                layout = "complex"
            rotation = Rotation(layout, len(turning), value.dtype, out, start=turning[0])
            return rotation, cos, replace(sin, is_negated=is_back)
    return None


def _is_only_at(term: _Numbers, columns: slice) -> bool:
    return not any(term.source[: columns.start] + term.source[columns.stop :])


def _layout(cos: _Numbers, sin: _Numbers, columns: slice, *, is_back: bool) -> str | None:
    """Which columns turn together, back or not; the tables serve columns, or pairs of them."""
    dim = columns.stop - columns.start
    if cos.table[columns] != sin.table[columns]:
        return None
    pairs = list(range(1, dim // 2 + 1))
    by_pair = {"half": pairs + pairs, "interleaved": [pair for pair in pairs for _ in range(2)]}
    numbers = torch.arange(columns.start + 1, columns.stop + 1, dtype=torch.int32)
    for layout, angles in by_pair.items():
        turned = partners(-numbers if is_back else numbers, layout).tolist()
        at = cos.table[columns]
        if sin.source[columns] == turned and (at == angles or at == list(range(1, dim + 1))):
            return layout
    return None


def laid_out(rotary: Rotary, x: torch.Tensor) -> Rotation:
    """The rotation, with the layout that eager gives its result."""
    last = fake_of(rotary.last)
    for is_contiguous in (False, True):
        rotation = replace(rotary.rotation, is_contiguous=is_contiguous)
        if same_layout(_empty_result(x, rotation, rotary.last), last):
            return rotation
    raise Decline("the result is laid out neither as the normalised value nor contiguously")


def _empty_result(x: torch.Tensor, rotation: Rotation, node: Node) -> torch.Tensor:
    if not all(isinstance(size, int) for size in (*x.shape, *x.stride())):
        with fake_mode(node):
            return empty_result(x, rotation)
    with unset_fake_temporarily():  # fakes take ten times as long
        x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        return empty_result(x, rotation)


def negations(rotary: Rotary) -> set[Node]:
    """What stands between the tables and the nodes that turn: a write behind it is not its own."""
    tables = {rotary.cos.node, rotary.sin.node}
    read = {operand for node in rotary.nodes for operand in node.all_input_nodes}
    between = read.difference(rotary.nodes)
    return {one for one in between if not tables.isdisjoint(one.all_input_nodes)}


def tables_of(rotary: Rotary, context: Context) -> list[Node]:
    """The nodes of cos and sin, before the last of the nodes that turn; see `_table`."""
    return [_table(table, rotary.last, context) for table in (rotary.cos, rotary.sin)]


def _table(table: Table, before: Node, context: Context) -> Node:
    """The node of cos or sin; a negative and a part of a complex table are nodes of their own.

    A conjugate that is only marked as one is written out first, as eager's product does: the
    imaginary part is negated, and nothing is rounded.

    Raises:
        Decline: it is complex, and neither of two float32 nor of two float64.
    """
    node, fake = table.node, fake_of(table.node)
    if fake.dtype in FLOATS:
        return insert(torch.neg, (node,), before, context) if table.is_negated else node
    if fake.dtype not in (torch.complex64, torch.complex128):
        raise Decline(f"the table of the embedding is {fake.dtype}, which no rotation has")
    if fake.is_conj():
        node = insert(torch.resolve_conj, (node,), before, context)
    pairs = insert(torch.view_as_real, (node,), before, context)
    return insert(torch.select, (pairs, -1, 0 if table.part == "real" else 1), before, context)


def insert(
    function: Callable[..., torch.Tensor],
    arguments: tuple[Any, ...],
    before: Node,
    context: Context,
) -> Node:
    """A new node that calls a function on a tensor, and on numbers.

    It stands where the table is read, not where it is made: a write may come in between.
    """
    with context.graph.inserting_before(before):
        made = context.graph.call_function(function, arguments)
    with fake_mode(before):
        made.meta[context.fake_key] = function(*map_arg(arguments, fake_of))
    return made
