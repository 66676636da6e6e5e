"""What a rule is, and how it writes to a graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from normfuse.ops.rounding import RoundingPlan
from normfuse.patterns.decline import Decline
from normfuse.patterns.micro_ops import (
    fake_mode,
    fake_value,
    micro_op,
    same_layout,
    same_sizes,
    tensor,
    transform_of,
)
from normfuse.patterns.mutation import Mutations, written_by


@dataclass(frozen=True)
class Context:
    """One graph that is being rewritten.

    Attributes:
        graph: the graph.
        mutations: its in-place writes.
        fake_key: the metadata key of fake tensors, "example_value" before autograd and "val" after
            it.
        numerics: "exact" or "fast".
        erased: the nodes that rules have removed so far, ops of ours among them.
        keys: those that `columns.value_key` has found so far, where a rule keeps them.
    """

    graph: Graph
    mutations: Mutations
    fake_key: str
    numerics: str = "exact"
    erased: list[Node] = field(default_factory=list)
    keys: dict[Node, Any] = field(default_factory=dict)

    @property
    def is_after_autograd(self) -> bool:
        """Whether no gradient will be asked for: graphs for training are rewritten before it."""
        return self.fake_key == "val"

    def plan(self, plan: RoundingPlan) -> str:
        """The plan as an op carries it."""
        return str(plan.fast() if self.numerics == "fast" else plan)


@dataclass(frozen=True)
class Rule:
    """This shape of graph becomes this op, unless there is a reason against it.

    Attributes:
        name: the op's name, and the rule's name in the options `normfuse.rules` and
            `normfuse.skip`.
        before: the chain in words, as the README shows it.
        families: model families that have the chain.
        apply: rewrites the chain that ends in the given node. Returns the new op node, None if the
            node is no part of such a chain, and raises `Decline` if it is one that must not be
            rewritten.
    """

    name: str
    before: str
    families: str
    apply: Callable[[Node, Context], Node | None]


def emit(
    context: Context,
    op: torch._ops.OpOverload,
    arguments: tuple[Any, ...],
    fakes: Sequence[torch.Tensor],
    *,
    before: Node,
    like: Node,
) -> Node:
    """Insert a call of `op` before a node; it keeps the place in the model of `like`.

    Raises:
        Decline: the op's results would have other strides than `fakes`, or an operand that its
            backward needs is written to later.
    """
    operands = _nodes_in(arguments)
    context.mutations.forbid_after(before, operands)
    _check_layout(op, arguments, operands, fakes)
    with context.graph.inserting_before(before):
        node = context.graph.call_function(op, arguments)
    node.meta.update(_place(like))
    node.meta[context.fake_key] = tuple(fakes)
    return node


def _nodes_in(arguments: tuple[Any, ...]) -> list[Node]:
    """All operands, also those in lists."""
    nodes: list[Node] = []
    map_arg(arguments, nodes.append)
    return nodes


def _check_layout(
    op: torch._ops.OpOverload,
    arguments: tuple[Any, ...],
    operands: Sequence[Node],
    fakes: Sequence[torch.Tensor],
) -> None:
    """A sum has the order of axes of its first operand, which may be the branch in eager only."""
    tensors = [fake for node in operands if (fake := tensor(node)) is not None]
    first = tensors[0]
    like_first = [fake for fake in tensors if same_sizes(fake.shape, first.shape)]
    if all(same_layout(fake, first) for fake in like_first):
        return
    with fake_mode(operands[0]):
        results = op(*map_arg(arguments, fake_value))
    for ours, theirs in zip(results, fakes, strict=True):
        if not same_layout(ours, theirs):
            raise Decline(
                f"the result would have strides {tuple(ours.stride())} instead of eager's "
                f"{tuple(theirs.stride())}: its operands are laid out differently"
            )


def result(context: Context, node: Node, index: int) -> Node:
    """The node of one result of an op, made where it does not exist."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with context.graph.inserting_after(node):
        item = context.graph.call_function(operator.getitem, (node, index))
    item.meta.update(_place(node))
    item.meta[context.fake_key] = node.meta[context.fake_key][index]
    return item


def existing_result(node: Node, index: int) -> Node | None:
    """The node of one result of an op; None if nobody uses it."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index and user.users:
            return user
    return None


def fakes_of(context: Context, node: Node) -> tuple[torch.Tensor, ...]:
    """The fake results of an op node."""
    fakes: tuple[torch.Tensor, ...] = node.meta[context.fake_key]
    return fakes


def erase(context: Context, nodes: Iterable[Node]) -> None:
    """Remove those of `nodes` that nothing uses any more, and the casts that only they used."""
    waiting = sorted(set(nodes))
    while waiting:
        node = waiting.pop()
        for item in [user for user in node.users if user.target is operator.getitem]:
            if not item.users:
                item.graph.erase_node(item)
        if node.users:
            continue
        operands = node.all_input_nodes
        node.graph.erase_node(node)
        context.erased.append(node)
        idle = {operand for operand in operands if not operand.users and is_pure(operand)}
        waiting = sorted({*waiting, *idle})


def is_pure(node: Node) -> bool:
    """A micro-operation that writes nothing: it may go when nothing uses it."""
    return micro_op(node) is not None and not written_by(node)


def insertion_point(operands: Iterable[Any], earliest: Node, users: Iterable[Node]) -> Node:
    """The first node before which all operands are known; `earliest` unless an operand comes later.

    Raises:
        Decline: a user of a result comes before an operand, or the last operand is what leaves a
            transform of torch.func, whose end is yet to come.
    """
    nodes = [operand for operand in operands if isinstance(operand, Node)]
    latest = max(nodes, default=earliest)
    if latest < earliest:
        return earliest
    if any(transform_of(tensor(inner)) for inner in latest.all_input_nodes):
        raise Decline("an operand of the chain leaves a transform of torch.func after its start")
    point = latest.next
    if any(user < point for user in users):
        raise Decline("an operand of the chain is computed after the first use of its result")
    return point


_PLACE = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "fwd_nn_module_stack")


def _place(node: Node) -> dict[str, Any]:
    return {key: node.meta[key] for key in _PLACE if key in node.meta}
