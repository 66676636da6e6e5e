"""The pipeline: which pass runs at which of Inductor's hooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph

from normfuse import tuning
from normfuse.passes import inductor
from normfuse.passes.foresight import recognise_what_may_win
from normfuse.passes.lower import IN_ORDER, Lower
from normfuse.passes.recognise import Recognise, is_op
from normfuse.passes.recompute import recompute_tables
from normfuse.passes.recorder import Recorder
from normfuse.settings import Settings


def pipeline(
    settings: Settings, options: dict[str, Any], recorder: Recorder | None = None
) -> dict[str, Any]:
    """Inductor options that hold our passes, behind those of the user.

    Args:
        settings: our options.
        options: the user's own Inductor options, whose passes are kept.
        recorder: gets what was done to each site.
    """
    settings = settings.under(options)
    is_alone = not inductor.has_pass("post_grad_custom_post_pass", options)
    passes = (
        ("pre_grad_custom_pass", _BeforeAutograd(settings, recorder)),
        ("joint_custom_pre_pass", _AfterAutograd(settings, recorder, is_alone)),
        ("joint_custom_post_pass", recompute_tables),
        ("post_grad_custom_post_pass", _LowerAll(Lower(settings, recorder), recorder)),
    )
    measured = settings.lowering == "auto" and settings.tune != "off"
    state = _digest_of_tables if measured else str
    return {
        hook: inductor.chained(hook, inductor.Hook(function, f"{hook} {settings}", state), options)
        for hook, function in passes
    }


def _digest_of_tables() -> str:
    """What the choices depend on besides sources and options."""
    return tuning.tables().digest()


def _erase_assertions(graph: Graph) -> None:
    """What torch.export notes at each cast reads a value, and would end every chain there.

    Inductor erases it too, only later: types and devices are those that were traced.
    """
    assertion = torch.ops.aten._assert_tensor_metadata.default
    for node in graph.find_nodes(op="call_function", target=assertion):
        graph.erase_node(node)


def _wants_gradients(graph: Graph) -> bool:
    """Whether a graph before autograd will get a backward."""
    inputs = (node.meta.get("example_value") for node in graph.find_nodes(op="placeholder"))
    return torch.is_grad_enabled() and any(
        isinstance(value, torch.Tensor) and value.requires_grad for value in inputs
    )


@dataclass(frozen=True)
class _BeforeAutograd:
    """Recognise on Dynamo's graph, where a training graph still shows its true roundings."""

    settings: Settings
    recorder: Recorder | None

    def __call__(self, graph: Graph) -> None:
        if self.recorder is not None:
            self.recorder.start(graph.python_code("self").src.strip())
        inductor.keep_artifact("before", graph)
        _erase_assertions(graph)
        training = _wants_gradients(graph)
        if self.settings.lowering == "auto" and (self.recorder is None or training):
            recognise_what_may_win(
                graph, "example_value", self.settings, training=training, recorder=self.recorder
            )
        else:
            Recognise("example_value", self.settings, self.recorder)(graph)
        inductor.keep_artifact("recognised_before_autograd", graph)


@dataclass(frozen=True)
class _AfterAutograd:
    """Recognise again on ATen, for inference: in-place spellings are functional by now.

    Attributes:
        settings: our options.
        recorder: gets what was done to each site.
        is_alone: no pass of the user's runs before the last of ours, so that the order of the nodes
            is still Inductor's.
    """

    settings: Settings
    recorder: Recorder | None
    is_alone: bool

    def __call__(self, graph: Graph) -> None:
        if inductor.is_training(graph):
            return
        if self.recorder is not None:
            self.recorder.reconsider()
        _erase_assertions(graph)
        if self.settings.lowering == "auto" and self.recorder is None:
            recognise_what_may_win(graph, "val", self.settings)
        else:
            recognise = Recognise("val", self.settings, self.recorder)
            recognise(graph)
            recognise.turn(graph)
        for node in filter(is_op, graph.nodes if self.is_alone else ()):
            node.meta[IN_ORDER] = True
        inductor.keep_artifact("recognised_after_autograd", graph)


@dataclass(frozen=True)
class _LowerAll:
    """Lower, then note the graph as code is generated from it."""

    lower: Lower
    recorder: Recorder | None

    def __call__(self, graph: Graph) -> None:
        self.lower(graph)
        inductor.keep_artifact("after", graph)
        if self.recorder is not None:
            self.recorder.finish(graph.python_code("self").src.strip())
