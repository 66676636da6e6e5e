"""A site with its pointwise neighbours, cut out of its graph: what is compiled to measure it."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from normfuse.ops import QK_RMS_NORM, QK_RMS_NORM_ROPE, ROPE
from normfuse.ops.joint import num_joint
from normfuse.ops.rounding import SHORT
from normfuse.passes import inductor
from normfuse.passes.destinations import Copies
from normfuse.passes.kinds import is_pointwise, is_view, op_name
from normfuse.tuning import Key, Rows, minor

MAX_NEIGHBOURS = 16  # on each side: the whole of RoPE behind a q and k that are normed before it
_MAX_SEARCH = 64  # nodes looked at to tell whether an operand depends on the site


@dataclass(frozen=True)
class Spec:
    """A tensor as the graph recorded it, every symbolic number at its hint."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, value: torch.Tensor) -> Spec:
        shape, stride = (
            tuple(inductor.hint(number) for number in numbers)
            for numbers in (value.shape, value.stride())
        )
        return cls(shape, stride, value.dtype, value.device)

    @property
    def span(self) -> int:
        """Elements of the storage that the tensor reaches."""
        if 0 in self.shape:
            return 0
        steps = zip(self.shape, self.stride, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)


@dataclass(frozen=True)
class Region:
    """A site and its neighbours as a graph of their own, which holds the op.

    Attributes:
        key: what a measurement of it holds for.
        rows: of all activations together.
        neighbours: "before mul", "after add", ..., sorted.
        module: takes the inputs, returns a tuple of what leaves the region.
        inputs: what it takes.
        makes_copies: whether copies are in it that the launch makes; else it makes none.
        by_tables: the same without what makes tables in it; None if nothing does.
    """

    key: Key
    rows: int
    neighbours: tuple[str, ...]
    module: GraphModule
    inputs: tuple[Spec, ...]
    makes_copies: bool = False
    by_tables: Region | None = None


def key_of(node: Node, device_name: str, copies: tuple[str, ...] = ()) -> Key:
    """What measurements of a site hold for, with the words for copies that its launch makes."""
    activations = _activations(node)
    words = [leaf for leaf in tree_leaves(node.args) if isinstance(leaf, (str, bool, int))]
    if _lacks_grad_total(node):
        words.append("no grad_total")  # which is as large as the other activations
    if _makers_of_tables(node):
        words.append("makes its tables")  # another question than that of tables that are there
    words += _joint_norms(node)
    words += copies
    return Key(
        device_name,
        minor(torch.__version__),
        op_name(node.target),
        tuple(str(word) for word in words),
        tuple(int(inductor.hint(x.shape[-1])) for x in activations),
        SHORT.get(activations[0].dtype, str(activations[0].dtype)),
    )


def _joint_norms(node: Node) -> list[str]:
    """A word for each norm that runs over all heads of a token, as the shape of its weight says."""
    if node.target not in (QK_RMS_NORM, QK_RMS_NORM_ROPE):
        return []
    weights: Any = node.args[1]
    counts = [num_joint(_value(weight)) for weight in weights]
    return [f"over {count} heads" for count in counts if count > 1]


def normalised_widths(key: Key) -> set[int]:
    """The widths of a key, and those of the rows that its norms over several heads normalise."""
    counts = [re.fullmatch(r"over (\d+) heads", word) for word in key.parameters]
    joint = {int(count[1]) * width for count in counts if count for width in key.widths}
    return joint.union(key.widths)


def _lacks_grad_total(node: Node) -> bool:
    """Whether a gradient has no second one to add: nobody reads the sum behind the last norm."""
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return "grad_total" in names and node.args[names.index("grad_total")] is None


def rows_of(node: Node) -> Rows:
    """How many rows a site has; a symbolic number is neither evaluated nor guarded."""
    total: Any = 0
    for x in _activations(node):
        rows: Any = 1
        for size in x.shape[:-1]:
            rows = rows * size
        total = total + rows
    return Rows(*inductor.bounds(total))


def neighbours_of(node: Node) -> tuple[str, ...]:
    """The names of a site's pointwise neighbours, sorted; views cost nothing and have none."""
    before, after = [*_before(node), *_makers_of_tables(node)], _after(node)
    return _names(before, after)


def cut_out(node: Node, device_name: str, copies: Copies | None = None) -> Region:
    """The region of a site, with copies that its launch makes, at the hints of symbolic numbers."""
    makers = _makers_of_tables(node)
    key = key_of(node, device_name, () if copies is None else copies.words)
    alone = _region(node, key, copies, [])
    return replace(_region(node, key, copies, makers), by_tables=alone) if makers else alone


def _region(node: Node, key: Key, copies: Copies | None, makers: list[Node]) -> Region:
    before, after = [*_before(node), *makers], _after(node)
    results = [user for user in node.users if user.target is operator.getitem and user.users]
    copying = copies.nodes if copies is not None else ()
    inside = {*before, node, *results, *after, *copying}
    graph = Graph()
    environment: dict[Node, Node] = {}
    inputs: list[Spec] = []
    for old in (one for one in node.graph.nodes if one in inside):
        for operand in old.all_input_nodes:
            if operand in environment or not isinstance(_value(operand), torch.Tensor):
                continue
            environment[operand] = graph.placeholder(f"input_{len(inputs)}")
            inputs.append(Spec.of(_value(operand)))
        environment[old] = _copy(graph, old, environment)
    written = {old.args[1] for old in copying if old.target is torch.ops.aten.copy_.default}
    leaving = [
        old
        for old in inside.difference(makers)
        if old not in (node, *written) and any(user not in inside for user in old.users)
    ]
    leaving.sort(key=list(environment).index)
    graph.output(tuple(environment[old] for old in leaving))
    module = GraphModule(torch.nn.Module(), _placeholders_first(graph))
    what = key, rows_of(node).typical, _names(before, after), module, tuple(inputs)
    return Region(*what, makes_copies=copies is not None)


def _copy(graph: Graph, old: Node, environment: dict[Node, Node]) -> Node:
    def at_hint(operand: Node) -> Any:
        return environment.get(operand, inductor.hint(_value(operand)))

    arguments, keywords = map_arg((old.args, old.kwargs), at_hint)
    arguments, keywords = tree_map(inductor.hint, (list(arguments), keywords))
    return graph.create_node(old.op, old.target, tuple(arguments), keywords)


def _placeholders_first(graph: Graph) -> Graph:
    """The same graph with its inputs in front, as compilers want it."""
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in [node for node in graph.nodes if node.op == "placeholder"]:
        first.prepend(node)
    graph.lint()
    return graph


def _value(node: Node) -> Any:
    return node.meta.get("val")


def _activations(node: Node) -> list[Any]:
    first = node.args[0]
    nodes: Any = first if isinstance(first, (list, tuple)) else [first]
    return [_value(one) for one in nodes]


def _before(node: Node) -> list[Node]:
    """Pointwise producers of values as large as an activation, and the views between them.

    Smaller ones, such as tables of cosines, are made once for many sites.
    """
    size = min(inductor.hint(x.numel()) for x in _activations(node))
    return _producers(list(node.all_input_nodes), size)


def _makers_of_tables(node: Node) -> list[Node]:
    """What an embedding without a norm makes its tables of.

    Inductor would compute the cosine of an angle anew for every head of every layer; an op reads a
    table. That is most of what it gains, and all sites together pay for it once.
    """
    if node.target is not ROPE:
        return []
    return _producers([one for one in node.args[1:3] if isinstance(one, Node)], 0)


def sites_by_tables(node: Node) -> int:
    """How many sites read the tables of an embedding without a norm, itself among them."""
    if not _makers_of_tables(node):
        return 1
    table: Node = node.args[1]  # type: ignore[assignment]
    while is_view(table):
        table = table.all_input_nodes[0]
    views = [table]
    for view in views:  # grows
        views += [user for user in view.users if is_view(user)]
    return len({user for view in views for user in view.users if user.target is node.target})


def _producers(pending: list[Node], size: int) -> list[Node]:
    """Pointwise producers of at least so many elements, and the views between them."""
    found: dict[Node, None] = {}
    while pending and sum(map(is_pointwise, found)) < MAX_NEIGHBOURS:
        producer = pending.pop(0)
        if producer in found or not (is_pointwise(producer) or is_view(producer)):
            continue
        if inductor.hint(_value(producer).numel()) >= size:
            found[producer] = None
            pending += producer.all_input_nodes
    return _without_idle_views(found)


def _without_idle_views(found: dict[Node, None]) -> list[Node]:
    """Without the views of what comes from elsewhere: it is an input with their strides."""
    kept = dict(found)
    while idle := [
        one for one in kept if is_view(one) and not any(up in kept for up in one.all_input_nodes)
    ]:
        for one in idle:
            del kept[one]
    return list(kept)


def _after(node: Node) -> list[Node]:
    """Pointwise consumers whose other operands do not wait for the site, and views between them."""
    inside: dict[Node, None] = {node: None}
    pending = [user for user in node.users if user.target is operator.getitem]
    inside |= dict.fromkeys(pending)
    num_results = len(inside)
    while pending and sum(map(is_pointwise, inside)) < MAX_NEIGHBOURS:
        for user in pending.pop(0).users:
            if user in inside or not (is_pointwise(user) or is_view(user)):
                continue
            others = [one for one in user.all_input_nodes if one not in inside]
            if not any(_depends_on(one, node) for one in others):
                inside[user] = None
                pending.append(user)
    return _without_trailing_views(list(inside)[num_results:])


def _without_trailing_views(after: list[Node]) -> list[Node]:
    """Without the views at the end, which only look at what is already there."""
    kept = dict.fromkeys(after)
    while trailing := [
        one for one in kept if is_view(one) and not any(u in kept for u in one.users)
    ]:
        for one in trailing:
            del kept[one]
    return list(kept)


def _depends_on(node: Node, site: Node) -> bool:
    """Whether a value waits for the site; where the search is long, as if it did."""
    seen: set[Node] = set()
    pending = [node]
    while pending:
        one = pending.pop()
        if one is site or len(seen) > _MAX_SEARCH:
            return True
        if one not in seen and site < one:
            seen.add(one)
            pending += one.all_input_nodes
    return False


def _names(before: list[Node], after: list[Node]) -> tuple[str, ...]:
    def names(word: str, nodes: list[Node]) -> Iterator[str]:
        return (f"{word} {op_name(node.target)}" for node in nodes if is_pointwise(node))

    return tuple(sorted((*names("before", before), *names("after", after))))
