"""Turns each normfuse op into what runs: a Triton launch, plain operations, or the op itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_map

from normfuse.ops import ROPE
from normfuse.ops import lowering as forms
from normfuse.ops.destinations import Writes
from normfuse.passes import inductor
from normfuse.passes.check import add_check
from normfuse.passes.choice import choose
from normfuse.passes.destinations import Copies, copies_behind, needed_before
from normfuse.passes.form import Form, operands_of
from normfuse.passes.kinds import is_view
from normfuse.passes.memory import share_operands, write_over_gradients
from normfuse.passes.recognise import is_op
from normfuse.passes.recorder import Place, Recorder
from normfuse.settings import Settings

log = logging.getLogger("normfuse")

# In the meta data of ops in graphs for inference, whose nodes Inductor has put in order and nobody
# after it. An op of several norms waited for the last of its operands; its plain form need
# not, and Inductor fuses by the order of the nodes.
IN_ORDER = "normfuse_in_order"

_SELECTS = {torch.select, torch.ops.aten.select.int}
_PAIRS = {torch.view_as_real, torch.ops.aten.view_as_real.default}

KERNEL_DEVICES = ("cuda",)  # ROCm calls itself that, too


@dataclass(frozen=True)
class Lower:
    """The last pass: chooses a form for every op and splices it in.

    A form is traced once for each signature (op, numbers, shapes, strides, types, results in use)
    and copied to the sites that share it, so that the cost grows slowly with the number of layers.

    Attributes:
        settings: which forms.
        recorder: gets what was chosen; None in ordinary compilations.
        only: asked once for each site, in the order of the graphs; where it says no, the site is
            inline. None leaves every site to the settings.
        makes_copies: whether launches make what copies they can; not where one is measured alone.
    """

    settings: Settings
    recorder: Recorder | None = None
    only: Callable[[Node], bool] | None = None
    makes_copies: bool = True

    def __call__(self, graph: Graph) -> None:
        traced: dict[Any, Form] = {}
        counts: dict[str, int] = {}
        # Every choice sees the neighbours of its site as they are before anything is spliced in.
        chosen = [(node, *self.form_of(node)) for node in graph.nodes if is_op(node)]
        is_in_order = any(IN_ORDER in node.meta for node, *_ in chosen)
        were_there = set(graph.nodes)
        for node, lowering, reason in chosen:
            counts[lowering] = counts.get(lowering, 0) + 1
            if lowering != "inline" and self.settings.check_interval is not None:
                add_check(node, self.settings.check_interval)
            is_copying = lowering == "triton" and self.makes_copies
            copies = copies_behind(node) if is_copying else None
            self._note(node, lowering, reason, copies)
            if lowering != "op":
                _splice(node, lowering, copies, traced)
        if "inline" in counts:
            _leave_tables_whole(graph)
            _skip_views_there_and_back(graph, were_there)
            if is_in_order:
                inductor.put_in_order(graph)
        if "triton" in counts:
            share_operands(graph)
            write_over_gradients(graph)
        if counts:
            log.info("lowered %s", ", ".join(f"{n} as {name}" for name, n in counts.items()))

    def _note(self, node: Node, lowering: str, reason: str | None, copies: Copies | None) -> None:
        """Tell the recorder what becomes of an op, and why."""
        if self.recorder is None:
            return
        sentences = (reason, None if copies is None else copies.sentence)
        why = "; ".join(filter(None, sentences)) or None
        if node.target is ROPE:
            self.recorder.lowered_embedding(lowering, why)
        else:
            self.recorder.lowered(Place.of(node), lowering, why)

    def form_of(self, node: Node) -> tuple[str, str | None]:
        """The form for one op, and why, where that is not what was asked for."""
        wanted = self.settings.lowering
        if self.only is not None and not self.only(node):
            return "inline", "left out"
        if wanted in ("op", "inline"):
            return wanted, None
        reason = obstacle(node)
        if reason is not None:
            return "inline", reason
        return choose(node, self.settings) if wanted == "auto" else ("triton", None)


def obstacle(node: Node) -> str | None:
    """Why an op cannot become a launch of its kernel; None if it can."""
    return foreign_device(node) or forms.obstacle_to_kernel(node.target, _values(node.args))


def foreign_device(node: Node) -> str | None:
    """The sentence about activations for whose device there are no kernels; None if there are."""
    kind = operands_of(node)[0].meta["val"].device.type
    if kind in KERNEL_DEVICES:
        return None
    return f"the activations are on {kind}, and the kernels are for CUDA"


def _splice(node: Node, lowering: str, copies: Copies | None, traced: dict[Any, Form]) -> None:
    num = len(node.meta["val"])
    writes = None if copies is None else copies.writes(num)
    replaced = {cast(int, user.args[1]): user for user in node.users if user.users}
    if copies is not None:
        replaced = {number: user for number, user in replaced.items() if copies.is_kept(number)}
        replaced |= copies.replaced(num)
        for needed in needed_before(node, copies) or ():
            node.prepend(needed)
    used = [number in replaced for number in range(max([num - 1, *replaced]) + 1)]
    key = (node.target, lowering, *used, str(tree_map(_signature, (node.args, writes))))
    if key not in traced:
        traced[key] = _form(node, lowering, tuple(used), writes)
    arguments = node.args if writes is None else (*node.args, writes)
    results = traced[key].copy_before(node, arguments, replaced)
    for number, old in replaced.items():
        replacement = results[number]
        assert replacement is not None
        old.replace_all_uses_with(replacement)
    for unused in (*reversed(copies.nodes if copies is not None else ()), *list(node.users), node):
        if not unused.users and not unused.is_impure():
            node.graph.erase_node(unused)


def _leave_tables_whole(graph: Graph) -> None:
    """A complex table that was taken apart for an op, and that its plain form puts together again.

    Inductor generates no code for complex numbers: that would be one call more for every table. One
    that anything but a product reads stays: it might be returned, and must be no input then.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.complex.default):
        (whole, first), (other, second) = map(_part_of, node.args)
        is_table = all(user.target is torch.ops.aten.mul.Tensor for user in node.users)
        if is_table and whole is not None and whole is other and (first, second) == (0, 1):
            node.replace_all_uses_with(whole)
            parts = node.all_input_nodes
            for unused in (node, *parts, *dict.fromkeys(part.args[0] for part in parts)):
                if not unused.users:
                    graph.erase_node(unused)


def _skip_views_there_and_back(graph: Graph, were_there: set[Node]) -> None:
    """New views that show what an op's own operands were made views of.

    A projection whose norm is joint became heads for an op, and its plain form joins them again.
    """
    for node in graph.nodes:
        if node in were_there or not is_view(node):
            continue
        source, passed = node, []
        while is_view(source):
            passed.append(source)
            source = source.args[0]
            if _shows_the_same(source, node):
                node.replace_all_uses_with(source)
                for unused in passed:
                    if not unused.users:
                        graph.erase_node(unused)
                break


def _shows_the_same(one: Node, other: Node) -> bool:
    """Whether two views of the same memory are the same, without a guard on symbolic sizes."""

    def shown(node: Node) -> tuple[Any, ...]:
        value = node.meta["val"]
        return _signature(node), str(value.storage_offset()), value.is_conj(), value.is_neg()

    return shown(one) == shown(other)


def _part_of(node: Any) -> tuple[Node | None, int]:
    """The complex node of which another is the real part, 0, or the imaginary, 1."""
    if getattr(node, "target", None) not in _SELECTS or len(node.args) != 3:
        return None, 0
    pairs, dim, index = node.args
    if pairs.target not in _PAIRS or dim not in (-1, pairs.meta["val"].dim() - 1):
        return None, 0
    return pairs.args[0], index


def _signature(argument: Any) -> Any:
    if not isinstance(argument, Node):
        return argument
    value = argument.meta["val"]
    if not isinstance(value, torch.Tensor):
        return str(value)
    return (value.dtype, value.device, str(tuple(value.shape)), str(value.stride()))


def _values(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    values: tuple[Any, ...] = map_arg(arguments, lambda node: node.meta["val"])
    return values


def _form(node: Node, lowering: str, used: tuple[bool, ...], writes: Writes | None) -> Form:
    if lowering != "triton":
        return Form.of(node.args, forms.inline_form(node.target), used, functional=False)
    launch = forms.kernel_form(node.target, used)
    if writes is None:
        return Form.of(node.args, launch, used, functional=True)

    def with_writes(*values: Any) -> Any:
        *arguments, told = values
        return launch(*arguments, writes=told)

    return Form.of((*node.args, writes), with_writes, used, functional=True)
