"""What normfuse does to a model, and why not more; nothing is kept, and a CPU is enough."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from normfuse.backend import patches
from normfuse.capturing import fresh
from normfuse.passes import inductor
from normfuse.passes.recorder import Recorder
from normfuse.report import Report


def explain(model: Any, *args: Any, **kwargs: Any) -> Report:
    """Capture a model with these inputs, rewrite it, and report every norm.

    The model runs once, node by node, without code generation. Its own compiled code and caches are
    left alone.

    Args:
        model: a module or function.
        *args: its inputs.
        **kwargs: its keyword inputs.

    Returns:
        The report; `print(report)` shows it as a table.
    """
    return explain_with(model, args, kwargs)


def explain_with(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Report:
    """`explain`, with the mode and options that `torch.compile` would get."""
    recorder = Recorder()
    settings = patches(mode, options, recorder)

    def backend(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
        return inductor.interpret_graph(graph_module, example_inputs, settings)

    compiled: Callable[..., Any] = torch.compile(fresh(model), backend=backend)
    known = Counter(counters["graph_break"])
    compiled(*args, **(kwargs or {}))
    report = recorder.report()
    report.notes += _graph_breaks(Counter(counters["graph_break"]) - known)
    return report


def _graph_breaks(reasons: Counter[str]) -> Iterator[str]:
    """Why Dynamo gave up a graph, in its own words; no chain reaches over such a place."""
    for reason in reasons:
        yield "graph break: " + reason.partition("\n")[0]


def assert_fused(model: Any, *args: Any, min_coverage: float = 1.0, **kwargs: Any) -> Report:
    """Fail unless enough norms of a model are fused; for the tests of those who depend on it.

    Args:
        model: a module or function.
        *args: its inputs.
        min_coverage: the share of norms that must be fused, from 0 to 1.
        **kwargs: its keyword inputs.

    Returns:
        The report.

    Raises:
        AssertionError: fewer are fused, or there is none at all; the message holds the report.
        ValueError: `min_coverage` is not between 0 and 1.
    """
    if not 0 <= min_coverage <= 1:
        raise ValueError(
            f"min_coverage must be between 0 and 1, got {min_coverage}: pass a share, such as 0.99"
        )
    report = explain(model, *args, **kwargs)
    if report.num_sites == 0 and min_coverage > 0:
        raise AssertionError(f"at least one norm must be found, got none:\n{report}")
    if report.coverage < min_coverage:
        raise AssertionError(
            f"at least {min_coverage:.1%} of the norms must be fused, got {report.coverage:.1%}:\n"
            f"{report}"
        )
    return report
