"""For tests of rewrites: the rewritten graph as a callable, run node by node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from normfuse.backend import patches
from normfuse.capturing import fresh
from normfuse.passes import inductor
from normfuse.settings import NAMES, PREFIX


def capture(model: Any, *args: Any, **options: Any) -> Callable[..., Any]:
    """The graph that reaches Inductor's code generation, after our passes, run node by node.

    Inductor's generated code rounds differently from eager in many other operations; this does not.

    Args:
        model: a module or function.
        *args: inputs to capture it with; with none, the first call captures.
        **options: our options without their prefix, such as `lowering="op"`, and Inductor's own.

    Returns:
        A callable with the inputs and results of the model.

    Raises:
        ValueError, TypeError: an unknown option or value.
    """
    settings = patches(None, _prefixed(options))

    def backend(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        return inductor.interpret_graph(graph_module, example_inputs, settings)

    compiled = torch.compile(fresh(model), backend=backend)
    if args:
        compiled(*args)
    return compiled


def _prefixed(options: dict[str, Any]) -> dict[str, Any]:
    return {PREFIX + name if name in NAMES else name: value for name, value in options.items()}
