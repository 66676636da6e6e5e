"""The sites of a model as regions to measure, each once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule
from torch.utils._pytree import tree_leaves

from normfuse.backend import patches
from normfuse.capturing import fresh
from normfuse.cli.errors import UsageError
from normfuse.cli.subject import Subject
from normfuse.passes import choice, inductor
from normfuse.passes.destinations import copies_behind
from normfuse.passes.lower import Lower
from normfuse.passes.recognise import is_op
from normfuse.passes.region import Region, cut_out
from normfuse.settings import Settings
from normfuse.tuning import bucket

_HOOK = "post_grad_custom_post_pass"


def regions_of(subject: Subject, *, training: bool = False) -> list[Region]:
    """The regions of a model whose kernels could be taken; the model runs once.

    Args:
        subject: the model and its inputs.
        training: with gradients, and then backward from its results; else in inference.

    Raises:
        UsageError: no result wants a gradient, in training.
    """
    found: list[Region] = []

    launch = Lower(Settings("triton"))

    def collect(graph: Graph) -> None:
        for node in filter(is_op, graph.nodes):
            if launch.form_of(node)[0] == "triton":
                device = node.all_input_nodes[0].meta["val"].device
                # The copies that its launch can make, and the site alone: in another graph
                # somebody else may read what is copied.
                copies = copies_behind(node)
                for made in [None] if copies is None else [copies, None]:
                    found.append(cut_out(node, choice.device_name(device), made))

    ours = patches(None, {"normfuse.lowering": "inline"})
    ours[_HOOK] = inductor.Chain((inductor.Hook(collect, "collect"), ours[_HOOK]))

    def backend(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        return inductor.interpret_graph(graph_module, example_inputs, ours)

    with torch.set_grad_enabled(training), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's and the model's
        results = torch.compile(fresh(subject.model), backend=backend, dynamic=False)(
            *subject.args, **subject.kwargs
        )
        if training:
            _backward(results, subject.title)
    return unique(found)


def _backward(results: Any, title: str) -> None:
    tensors = [x for x in tree_leaves(results) if isinstance(x, torch.Tensor) and x.requires_grad]
    if not tensors:
        raise UsageError(
            f"{title} must return a tensor that wants a gradient, got none: "
            "leave parameters trainable, or leave out --training"
        )
    torch.autograd.backward(tensors, [torch.ones_like(x) for x in tensors])


def unique(regions: Iterable[Region]) -> list[Region]:
    """Of the regions that one measurement speaks for, the one with the most results."""
    kept: dict[Any, Region] = {}
    for one in regions:
        place = (one.key, bucket(one.rows), one.neighbours)
        if place not in kept or _num_results(one) > _num_results(kept[place]):
            kept[place] = one
    return list(kept.values())


def _num_results(one: Region) -> int:
    (results,) = one.module.graph.output_node().args
    assert isinstance(results, (tuple, list))
    return len(results)
