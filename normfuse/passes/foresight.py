"""`lowering="auto"`: which norms stay as they are, asked before anything is rewritten.

A site whose kernel cannot win would only be taken apart again by the last pass, into operations
that are the model's own but for their order. Left alone, it is compiled as if we were not there,
and so is its gradient in training. Whatever a measurement could favour is taken: the last pass,
which sees the neighbours of each site, has the final word.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from normfuse.passes import choice, inductor, lower
from normfuse.passes.recognise import Recognise
from normfuse.passes.recorder import Place, Recorder
from normfuse.patterns.micro_ops import spelling, tensor
from normfuse.patterns.statistic import Candidate
from normfuse.settings import Settings


def recognise_what_may_win(
    graph: Graph,
    fake_key: str,
    settings: Settings,
    *,
    training: bool = False,
    recorder: Recorder | None = None,
) -> None:
    """Recognise and compose on one graph, but for the sites that no measurement favours.

    In inference these are those of a width at which no kernel won anything: a site that loses at a
    width where others win costs nothing but the order of its operations. In training, where it
    would keep Inductor from its own choice of what to save, each is looked at by itself.

    Args:
        graph: before recognition.
        fake_key: as in `Recognise`.
        settings: with `lowering="auto"`.
        training: whether gradients flow; then the backward must have been measured, too.
        recorder: gets what was done, and why a site was left; None in ordinary compilations.
    """
    names = [choice.device_name(device) for device in _devices(graph, fake_key)]
    if recorder is None and not choice.may_win(names, settings):
        return
    recognise = Recognise(fake_key, settings, recorder)
    if settings.tune == "compile":  # whatever is not known yet will be measured
        recognise(graph)
        if fake_key == "val":
            recognise.turn(graph)
    elif training:
        hopeless = _hopeless_sites(graph, recognise, settings)
        Recognise(fake_key, settings)(graph, lambda site: _root(site) in hopeless)
    else:
        widths = choice.widths_won(names, settings)
        recognise(graph, lambda site: not widths.may_include(_width(site)))
        if fake_key == "val" and widths.turned:
            recognise.turn(graph, lambda value: _last_size(value) not in widths.turned)


def _devices(graph: Graph, fake_key: str) -> set[torch.device]:
    """Those of a graph for which there are kernels."""
    values = (node.meta.get(fake_key) for node in graph.nodes)
    devices = {value.device for value in values if isinstance(value, torch.Tensor)}
    return {device for device in devices if device.type in lower.KERNEL_DEVICES}


def _root(site: Candidate | Node) -> Node:
    return site if isinstance(site, Node) else site.root


def _width(site: Candidate | Node) -> int:
    """The size of the normalised axis, which the result of a vector's length has no more."""
    width = _last_size(_first(site) if isinstance(site, Node) else site.squares)
    assert width is not None
    return width


def _last_size(node: Node) -> int | None:
    """The size of the last axis; None for what is no tensor, or has no axis."""
    value = tensor(node)
    return int(inductor.hint(value.shape[-1])) if value is not None and value.dim() else None


def _first(call: Node) -> Node:
    op = spelling(call)
    assert op is not None
    assert isinstance(op.operands[0], Node)
    return op.operands[0]


def _hopeless_sites(graph: Graph, recognise: Recognise, settings: Settings) -> frozenset[Node]:
    """The roots of the statistics that no measurement favours, found by rewriting a copy."""
    copy = Graph(graph.owning_module)
    copied: dict[Node, Node] = {}
    copy.output(copy.graph_copy(graph, copied))
    originals = {new: old for old, new in copied.items()}
    hopeless: list[Node] = []
    for op, roots in recognise(copy).items():
        reason = _why_hopeless(op, recognise.fake_key, settings)
        if reason is not None:
            hopeless += roots
            if recognise.recorder is not None:
                recognise.recorder.lowered(Place.of(op), "inline", reason)
    return frozenset(originals[node] for node in hopeless)


def _why_hopeless(op: Node, fake_key: str, settings: Settings) -> str | None:
    """None also where something may stand in the kernel's way: much is settled by autograd."""
    for operand in op.all_input_nodes:  # of the copy: the key of a site is read from there
        operand.meta["val"] = operand.meta[fake_key]
    return lower.foreign_device(op) or choice.why_hopeless_in_training(op, settings)
