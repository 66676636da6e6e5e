"""Graphs as text, short enough for a snapshot, and the rewritten block as a callable."""

import copy

import torch
from torch._inductor.compile_fx import _recursive_post_grad_passes, compile_fx
from torch._inductor.virtualized import V
from torch.fx import GraphModule

from normfuse.backend import patches
from normfuse.passes import inductor

STAGES = {
    "pre_grad_custom_pass": "before autograd",
    "joint_custom_pre_pass": "after autograd",
    "post_grad_custom_post_pass": "lowered",
}


def after_each_pass(block, *inputs, dynamic=False, **options):
    """The graph after each of our passes, one line a node, headed by the stage.

    A stage that leaves the graph of the stage before as it was says so.
    """
    texts = {}

    def show(stage):
        def note(graph):
            texts[stage] = render(graph)

        return note

    ours = patches(None, {f"normfuse.{name}": value for name, value in options.items()})
    hooks = {
        hook: inductor.Chain((ours[hook], inductor.Hook(show(stage), stage)))
        for hook, stage in STAGES.items()
    }

    def backend(graph_module, example_inputs):
        return inductor.interpret_graph(graph_module, example_inputs, {**ours, **hooks})

    with torch.no_grad():
        torch.compile(block, backend=backend, dynamic=dynamic)(*inputs)
    if texts["lowered"] == texts["after autograd"]:
        texts["lowered"] = "    the same"
    return "".join(f"{stage}:\n{texts[stage]}\n" for stage in STAGES.values())


def ops_in(text):
    """The names of our ops in a graph's code, in its order."""
    lines = [line for line in text.splitlines() if "torch.ops.normfuse." in line]
    return [line.split("normfuse.")[1].split(".")[0] for line in lines]


def render(graph):
    """One line a node, without placeholders: `name = op(arguments)`."""
    return "\n".join(
        f"    {_line(node)}" for node in graph.nodes if node.op not in ("placeholder", "get_attr")
    )


def _line(node):
    arguments = [_text(argument) for argument in node.args]
    arguments += [f"{name}={_text(value)}" for name, value in node.kwargs.items()]
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    return f"{node.name} = {_target(node)}({', '.join(arguments)})"


def _target(node):
    if node.op == "call_method":
        return f"Tensor.{node.target}"
    return str(node.target) if hasattr(node.target, "namespace") else node.target.__name__


def _text(value):
    if isinstance(value, torch.fx.Node):
        return value.name.replace("l_self_modules_", "").replace("_parameters_", "_").strip("_")
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_text(item) for item in value) + ")"
    return repr(value)


def graphs_for_code(model, call, *, recorder=None, **options):
    """The graphs that Inductor generates code for, all sites launches, as `call` compiles them.

    What runs are the graphs before Inductor's last passes: there is no GPU to run the launches.
    """
    graphs = []

    def inner_compile(inner, fakes, **keywords):
        runs = GraphModule(inner, copy.deepcopy(inner.graph))
        values = [node.meta.get("val") for node in inner.graph.nodes]
        mode = next(one.fake_mode for one in values if isinstance(one, torch.Tensor))
        with V.set_fake_mode(mode):
            _recursive_post_grad_passes(inner, is_inference=keywords.get("is_inference", False))
        graphs.append(inner.graph)
        return inductor._boxed(runs)

    ours = patches(None, {"normfuse.lowering": "triton"}, recorder)
    ours = {**ours, "force_disable_caches": True}

    def backend(graph_module, fakes):
        return compile_fx(
            graph_module, list(fakes), inner_compile=inner_compile, config_patches=ours
        )

    call(torch.compile(model, backend=backend, **options))
    return graphs
