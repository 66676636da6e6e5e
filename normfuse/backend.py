"""`torch.compile(model, backend="normfuse")`: Inductor with our passes in its hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from normfuse.passes import inductor, pipeline
from normfuse.passes.recorder import Recorder
from normfuse.settings import NAMES, PREFIX, Settings
from normfuse.tuning import MARGIN

# The tested range: the lowest version that the tests have run on, and the first that they have not.
TESTED_TORCH = ((2, 11), (2, 16))


def normfuse(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend; Dynamo finds it through the entry point group `torch_dynamo_backends`.

    Args:
        graph_module: the graph that Dynamo captured.
        example_inputs: its inputs.
        mode: a mode of `torch.compile`, as with `backend="inductor"`.
        options: our options under the prefix `normfuse.`, beside Inductor's own.

    Raises:
        ValueError, TypeError: an unknown option or value.
    """
    return inductor.compile_graph(graph_module, example_inputs, patches(mode, options))


normfuse.reset = inductor.reset  # type: ignore[attr-defined]


def options(
    mode: str | None = None,
    *,
    lowering: str = "auto",
    numerics: str = "exact",
    rules: Iterable[str] | None = None,
    skip: Iterable[str] = (),
    tune: str | None = None,
    margin: float = MARGIN,
    check: str = "off",
    **inductor_options: Any,
) -> dict[str, Any]:
    """Options for `torch.compile(model, options=normfuse.options())`, on `backend="inductor"`.

    Args:
        mode: a mode of `torch.compile`; torch takes no mode beside options, so it is folded in.
        lowering: "auto", "triton", "inline" or "op".
        numerics: "exact" or "fast".
        rules: names of the rules to keep; None keeps all.
        skip: rule names or globs of module paths to leave alone.
        tune: "off", "cached" or "compile": which measurements "auto" goes by.
        margin: the share by which the kernel must be faster in a measurement.
        check: "off", "sample" or "all": the calls on which fused sites are compared with their
            inline form; `normfuse.check_report()` says what came out.
        **inductor_options: options of Inductor's, such as `max_autotune=True`; write dots as in
            `**{"triton.cudagraphs": True}`.

    Raises:
        ValueError, TypeError: an unknown option or value.
    """
    settings = Settings.of(
        lowering=lowering,
        numerics=numerics,
        rules=rules,
        skip=skip,
        tune=tune,
        margin=margin,
        check=check,
    )
    return _patches(settings, mode, inductor_options, NAMES)


def patches(
    mode: str | None,
    options: Mapping[str, Any] | None,
    recorder: Recorder | None = None,
) -> dict[str, Any]:
    """What `torch.compile`'s mode and options mean for Inductor, with our passes added."""
    settings, rest = Settings.split(options)
    return _patches(settings, mode, rest, [PREFIX + name for name in NAMES], recorder)


def _patches(
    settings: Settings,
    mode: str | None,
    inductor_options: dict[str, Any],
    ours: Iterable[str],
    recorder: Recorder | None = None,
) -> dict[str, Any]:
    _warn_outside_tested_range()
    inductor_options = {name.replace("-", "_"): v for name, v in inductor_options.items()}
    inductor.check_options(inductor_options, ours)
    merged = {**inductor.mode_options(mode), **inductor_options}
    return {**merged, **pipeline(settings, merged, recorder)}


_warned = False


def _warn_outside_tested_range() -> None:
    global _warned
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    low, high = TESTED_TORCH
    if not low <= version < high and not _warned:
        _warned = True
        warnings.warn(
            f"normfuse is tested with torch >= {low[0]}.{low[1]} and < {high[0]}.{high[1]}, "
            f"this is {torch.__version__}: check the report of normfuse.explain(model, ...)",
            stacklevel=3,
        )
