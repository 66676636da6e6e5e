"""The only module that touches `torch._inductor`: its hooks, its options, tracing for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_origin

import torch
import torch._inductor.config as inductor_config
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import custom_graph_pass, list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.virtualized import V
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from normfuse.passes.accesses import remember_accesses

remember_accesses()

HOOKS = (
    "pre_grad_custom_pass",
    "joint_custom_pre_pass",
    "joint_custom_post_pass",
    "post_grad_custom_post_pass",
)

# Absent in torch 2.11.
_InferenceAware: Any = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)


def digest_of_sources(root: Path) -> str:
    """A digest of the code and tables below a directory, wherever that directory is."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.suffix in (".py", ".json"):
            digest.update(str(path.relative_to(root)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


# What Inductor's caches must know about us. Taken now, with the import: code that is edited before
# the first compilation is not the code that runs.
SOURCES = digest_of_sources(Path(__file__).parent.parent)


@dataclass(frozen=True)
class Hook(CustomGraphPass):
    """A pass of ours with the identity that Inductor's caches ask for.

    Attributes:
        function: the pass.
        identity: what it does, its options included.
        state: what else its result depends on, asked for anew with each graph.
    """

    function: Callable[[Graph], None]
    identity: str
    state: Callable[[], str] = str

    def __call__(self, graph: Graph) -> None:
        self.function(graph)

    def uuid(self) -> Any:
        return ("normfuse", SOURCES, self.identity, self.state())


@dataclass(frozen=True)
class Chain(CustomGraphPass):
    """Several passes in one hook; torch 2.11 and 2.12 take no list there."""

    passes: tuple[Any, ...]

    def __call__(self, graph: Graph, is_inference: bool = False) -> None:
        for one in self.passes:
            if _InferenceAware is not None and isinstance(one, _InferenceAware):
                one(graph, is_inference)
            else:
                one(graph)

    def uuid(self) -> Any:
        """None, which bypasses the caches, if a pass of the user's has no identity."""
        ids = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if None in ids else ("chain", *ids)


if _InferenceAware is not None:

    @dataclass(frozen=True)
    class InferenceAwareChain(Chain, _InferenceAware):  # type: ignore[misc]
        """A chain with a member that wants to know whether the graph is for inference."""


def chained(hook: str, ours: Hook, options: dict[str, Any]) -> CustomGraphPass:
    """Our pass behind those that the user has put in the same hook, by options or configuration."""
    theirs = _theirs(hook, options)
    if theirs is None:
        return ours
    passes = (*(theirs if isinstance(theirs, (list, tuple)) else (theirs,)), ours)
    if _InferenceAware is not None and any(isinstance(one, _InferenceAware) for one in passes):
        return InferenceAwareChain(passes)
    return Chain(passes)


def has_pass(hook: str, options: dict[str, Any]) -> bool:
    """Whether the user has a pass in a hook, by options or configuration."""
    return _theirs(hook, options) is not None


def _theirs(hook: str, options: dict[str, Any]) -> Any:
    return options.get(hook, getattr(inductor_config, hook))


def mode_options(mode: str | None) -> dict[str, Any]:
    """Inductor's options of a mode of `torch.compile`.

    Raises:
        ValueError: there is no such mode.
    """
    if mode is None:
        return {}
    valid = list_mode_options()
    if mode not in valid:
        raise ValueError(
            f"mode must be one of {', '.join(valid)}, got {mode!r}: choose one of them"
        )
    return dict(valid[mode])


def check_options(options: dict[str, Any], ours: Iterable[str] = ()) -> None:
    """Every option must be one of Inductor's, and of its type.

    Args:
        options: names, with underscores, and values.
        ours: names of our own options, to suggest where one is misspelled.

    Raises:
        ValueError: there is no such option; with the closest names.
        TypeError: a value of another type than the option has.
    """
    known = inductor_config.get_config_copy()
    for name, value in options.items():
        if name not in known:
            close = ", ".join(get_close_matches(name, [*ours, *known], 3))
            raise ValueError(
                f"an option must start with 'normfuse.' or be one of Inductor's, got {name!r}: "
                f"did you mean {close or 'one of torch._inductor.list_options()'}?"
            )
        wanted: Any = inductor_config.get_type(name)  # type: ignore[attr-defined]
        # As in torch, unions and other generic types are not looked into.
        if get_origin(wanted) is None and not isinstance(value, wanted):
            raise TypeError(
                f"the option {name} of Inductor must be {wanted.__name__}, got {value!r}: "
                f"pass for example {known[name]!r}"
            )


def compile_graph(
    graph_module: GraphModule, example_inputs: Sequence[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Inductor, with these options on top of its configuration."""
    return _callable(compile_fx(graph_module, list(example_inputs), config_patches=patches))


def interpret_graph(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    patches: dict[str, Any],
    finished: Callable[[GraphModule], None] | None = None,
) -> Callable[..., Any]:
    """The graph as Inductor would generate code for it, run node by node instead."""
    from torch._inductor.compile_fx import _recursive_post_grad_passes

    def inner_compile(inner: GraphModule, inputs: Sequence[Any], **keywords: Any) -> Any:
        is_inference = not (keywords.get("is_backward") or _is_training_forward(keywords))
        # A backward is compiled when it first runs, outside of what compile_fx has set up.
        fake_mode = _mode_of([node.meta.get("val") for node in inner.graph.nodes])
        with V.set_fake_mode(fake_mode or FakeTensorMode(allow_non_fake_inputs=True)):
            _recursive_post_grad_passes(inner, is_inference=is_inference)
        if finished is not None and not keywords.get("is_backward"):
            finished(inner)
        return _boxed(inner)

    compiled = compile_fx(
        graph_module,
        list(example_inputs),
        inner_compile=inner_compile,
        config_patches={**patches, "force_disable_caches": True},
    )
    return _callable(compiled)


def _callable(compiled: Any) -> Callable[..., Any]:
    assert callable(compiled), "compile_fx returns a function unless it is asked for a package"
    return cast(Callable[..., Any], compiled)


def _is_training_forward(keywords: dict[str, Any]) -> bool:
    return not keywords.get("is_inference", True)


def _boxed(graph_module: GraphModule) -> Callable[[list[Any]], Any]:
    def run(arguments: list[Any]) -> Any:
        values = list(arguments)
        arguments.clear()
        return graph_module.forward(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def trace(function: Callable[..., Any], inputs: Sequence[Any], *, functional: bool) -> GraphModule:
    """The ATen graph of a function, decomposed as Inductor wants it.

    Args:
        function: takes tensors and symbolic numbers, returns a tuple of tensors and Nones.
        inputs: fake values.
        functional: trace without mutation, so that a kernel's launch becomes a functional node.
    """

    def functionalised(*values: Any) -> Any:
        with FunctionalTensorMode():
            results = function(*[to_fun(value) for value in values])
            return [from_fun(value) for value in results]

    mode = _mode_of(inputs)
    # Inductor names its kernels after the ATen operations that this context notes.
    with preserve_node_meta(), mode if mode is not None else nullcontext():
        traced = make_fx(
            functionalised if functional else function, decomposition_table=select_decomp_table()
        )(*inputs)
    traced.graph.eliminate_dead_code()
    return traced


def _mode_of(values: Sequence[Any]) -> AbstractContextManager[Any] | None:
    for value in values:
        mode = getattr(value, "fake_mode", None)
        if mode is not None:
            return mode  # type: ignore[no-any-return]
    return None


def is_training(graph: Graph) -> bool:
    """Whether a graph after autograd holds a backward too."""
    return any(
        node.op == "placeholder" and str(node.target).startswith("tangents") for node in graph.nodes
    )


def put_in_order(graph: Graph) -> None:
    """Give nodes that are new the place that Inductor gave the others, in a graph for inference.

    It moves what a node needs right before it, unless the configuration says otherwise.
    """
    from torch._inductor.fx_passes import post_grad

    reorder = getattr(post_grad, "reorder_for_locality", None)
    if reorder is not None and inductor_config.reorder_for_locality:
        reorder(graph)


def kernel_of(node: Node) -> str | None:
    """The name of the Triton kernel that a node launches without mutation; None if it does not."""
    if node.target is not triton_kernel_wrap.triton_kernel_wrapper_functional:
        return None
    number = cast(int, node.kwargs["kernel_idx"])
    kernel: Any = triton_kernel_wrap.kernel_side_table.get_kernel(number)
    return str(getattr(kernel, "fn", kernel).__name__)  # below the tuner that torch puts around it


def calls_python() -> bool:
    """Whether the code that is being compiled can call an op that is written in Python."""
    return not (V.aot_compilation or inductor_config.cpp_wrapper)


def keep_artifact(name: str, graph: Graph) -> None:
    """Write a graph into the log of `TORCH_TRACE`, which tlparse shows, if there is one."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"normfuse_{name}", "encoding": "string"},
        payload_fn=lambda: graph.python_code("self").src.strip(),
    )


def reset() -> None:
    """Drop recorded CUDA graphs, as `backend="inductor"` does on `torch._dynamo.reset()`."""
    from torch._inductor.cudagraph_trees import reset_cudagraph_trees

    reset_cudagraph_trees()


def hint(number: Any) -> Any:
    """The value that a symbolic number had when it was traced, without a guard on it.

    What is no symbolic number stays as it is; without such a value, as after `nonzero`, it is 1.
    """
    if not isinstance(number, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return number
    value = number.node.hint
    return 1 if value is None else value


def bounds(number: Any) -> tuple[int, int, int]:
    """The lowest value of a symbolic whole number, its hint, and its highest; no guard on it."""
    if not isinstance(number, torch.SymInt):
        return number, number, number
    known = number.node.shape_env.bound_sympy(number.node.expr)
    return _finite(known.lower, 0), int(hint(number)), _finite(known.upper, 2**62)


def _finite(bound: Any, otherwise: int) -> int:
    return int(bound) if bound.is_Integer else otherwise
