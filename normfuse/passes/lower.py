"""Turns each normfuse op into what runs: a Triton launch, plain operations, or the op itself."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from normfuse.ops import lowering as forms
from normfuse.passes import inductor
from normfuse.passes.choice import choose
from normfuse.passes.recognise import is_op
from normfuse.passes.recorder import Place, Recorder
from normfuse.settings import Settings

log = logging.getLogger("normfuse")

KERNEL_DEVICES = ("cuda",)  # ROCm calls itself that, too


@dataclass(frozen=True)
class Lower:
    """The last pass: chooses a form for every op and splices it in.

    A form is traced once for each signature (op, numbers, shapes, strides, types, results in use)
    and copied to the sites that share it, so that the cost grows slowly with the number of layers.
    """

    settings: Settings
    recorder: Recorder | None = None
    _traced: dict[Any, GraphModule] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, graph: Graph) -> None:
        self._traced.clear()
        counts: dict[str, int] = {}
        # Every choice sees the neighbours of its site as they are before anything is spliced in.
        chosen = [(node, *self.form_of(node)) for node in graph.nodes if is_op(node)]
        for node, lowering, reason in chosen:
            counts[lowering] = counts.get(lowering, 0) + 1
            if self.recorder is not None:
                self.recorder.lowered(Place.of(node), lowering, reason)
            if lowering != "op":
                self._splice(node, lowering)
        if counts:
            log.info("lowered %s", ", ".join(f"{n} as {name}" for name, n in counts.items()))

    def form_of(self, node: Node) -> tuple[str, str | None]:
        """The form for one op, and why, where that is not what was asked for."""
        wanted = self.settings.lowering
        device = _operands(node)[0].meta["val"].device
        if wanted in ("op", "inline"):
            return wanted, None
        if device.type not in KERNEL_DEVICES:
            return "inline", f"the activations are on {device.type}, and the kernels are for CUDA"
        obstacle = forms.obstacle_to_kernel(node.target, _values(node.args))
        if obstacle is not None:
            return "inline", obstacle
        return choose(node, self.settings, device) if wanted == "auto" else ("triton", None)

    def _splice(self, node: Node, lowering: str) -> None:
        used = tuple(
            any(user.args[1] == index and user.users for user in node.users)
            for index in range(len(node.meta["val"]))
        )
        tensors = _operands(node)
        key = (node.target, lowering, used, str(tree_map(_signature, node.args)))
        if key not in self._traced:
            self._traced[key] = _trace(node, lowering, used)
        results = _copy(self._traced[key], tensors, node)
        for user in list(node.users):
            if user.users:
                replacement = results[cast(int, user.args[1])]
                assert replacement is not None
                user.replace_all_uses_with(replacement)
            node.graph.erase_node(user)
        node.graph.erase_node(node)


def _operands(node: Node) -> list[Node]:
    """The node arguments in order, those inside lists too, each as often as it is passed."""
    return [argument for argument in tree_flatten(node.args)[0] if isinstance(argument, Node)]


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


def _trace(node: Node, lowering: str, used: tuple[bool, ...]) -> GraphModule:
    """The graph of one form; its placeholders are the node arguments of the op, in order."""
    arguments, structure = tree_flatten(node.args)
    form: Callable[..., Any] = (
        forms.kernel_form(node.target, used)
        if lowering == "triton"
        else forms.inline_form(node.target)
    )

    def function(*values: Any) -> Any:
        remaining = iter(values)
        filled = [next(remaining) if isinstance(a, Node) else a for a in arguments]
        return form(*tree_unflatten(filled, structure))

    inputs = [operand.meta["val"] for operand in _operands(node)]
    return inductor.trace(function, inputs, functional=lowering == "triton")


def _copy(traced: GraphModule, inputs: list[Node], node: Node) -> list[Node | None]:
    """Copy a traced form before `node`; returns its results' nodes, None for those not computed."""
    environment: dict[Node, Any] = {}
    remaining = iter(inputs)
    copied = []
    for source in traced.graph.nodes:
        if source.op == "placeholder":
            environment[source] = next(remaining)
        elif source.op == "output":
            results = source.args[0]
        else:
            with node.graph.inserting_before(node):
                copy = node.graph.node_copy(source, lambda inner: environment[inner])
            _renew_meta(copy, node)
            environment[source] = copy
            copied.append(copy)
    found = [environment[item] if isinstance(item, Node) else None for item in results]
    for copy in reversed(copied):
        if not copy.users and copy not in found:
            node.graph.erase_node(copy)
    return found


def _renew_meta(copy: Node, origin: Node) -> None:
    """A fresh fake value, so that copies of a form never look like aliases; the origin's place."""
    for key in ("nn_module_stack", "stack_trace"):
        if key in origin.meta:
            copy.meta[key] = origin.meta[key]
    arguments, keywords = map_arg((copy.args, copy.kwargs), lambda inner: inner.meta["val"])
    with inductor.fake_mode_of(origin):
        copy.meta["val"] = copy.target(*arguments, **keywords)  # type: ignore[operator]
    if isinstance(copy.target, torch._ops.HigherOrderOperator):
        copy.meta["eager_input_vals"] = (arguments, keywords)
