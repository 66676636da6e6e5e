"""A model whose ops are all inline has, node for node, the graph that Inductor makes without us."""

import functools
from itertools import zip_longest

import pytest
import torch

from normfuse.backend import patches
from normfuse.capturing import fresh
from normfuse.cli import tiny_models
from normfuse.passes import inductor
from normfuse.passes.recognise import is_op
from tests import rotary

# Norms alone, with sums and scales, and with the heads' RoPE: `olmo2` has whole projections before
# its RoPE. Heads that are normalised before they are transposed, as in Qwen 3, are so afterwards.
pytest.importorskip("transformers", reason="has the architectures")

MODELS = ("llama", "phi3", "gpt_oss", "granite", "gemma", "gemma2", "gemma3_text", "glm4", "olmo2")
HALVES = ("gpt_oss",)  # turn one after the other, and whole in the plain form of `rope`


def final_graph(model, inputs, options):
    """What code is generated from, for inference."""
    seen = []
    interpret = functools.partial(
        inductor.interpret_graph, patches=options, finished=lambda module: seen.append(module.graph)
    )
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(fresh(model), backend=interpret, dynamic=False)(**inputs)
    (graph,) = seen
    return graph


def steps(graph):
    """Every operation and the shapes of its operands.

    Products with one are left out: torch 2.15 drops them, but not what an op stands for.
    """
    return [
        (str(node.target), [shape_of(one) for one in node.all_input_nodes])
        for node in graph.nodes
        if node.op == "call_function" and not is_product_with_one(node)
    ]


def is_product_with_one(node):
    return node.target is torch.ops.aten.mul.Tensor and 1.0 in node.args[1:]


def shape_of(node):
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


@pytest.mark.guarantee
@pytest.mark.parametrize("name", MODELS)
def test_the_plain_forms_stand_where_the_model_had_them(name):
    """Inductor fuses by the order of the nodes: elsewhere they would become other kernels."""
    model, config = tiny_models.build(name, torch.bfloat16)
    inputs = tiny_models.example_inputs(model, config)
    plain = final_graph(model, inputs, {})
    ours = {"normfuse.skip": ("rope",) if name in HALVES else ()}
    inline = final_graph(model, inputs, patches(None, {"normfuse.lowering": "inline", **ours}))
    ops = final_graph(model, inputs, patches(None, {"normfuse.lowering": "op", **ours}))

    assert any(is_op(node) for node in ops.nodes), "there is something to be inline"
    for number, (one, other) in enumerate(zip_longest(steps(inline), steps(plain))):
        assert one == other, f"node {number}"


@pytest.mark.guarantee
def test_complex_tables_stay_whole():
    """Inductor has no code for complex numbers: a table that is put together is a call more."""
    inputs = dict(zip(("x", "cos", "sin"), (rotary.hidden_states(), *rotary.tables()), strict=True))
    model = rotary.Attention(rotary.SPELLINGS["llama4"]).bfloat16()
    plain = final_graph(model, inputs, {})
    inline = final_graph(model, inputs, patches(None, {"normfuse.lowering": "inline"}))

    def calls(graph):
        names = ("aten.complex", "view_as_complex", "view_as_real")
        targets = [str(node.target) for node in graph.nodes]
        return [sum(name in target for target in targets) for name in names]

    tables, *turns = calls(plain)
    assert (tables, turns) == (2, [2, 2]), "one table each for q and k"
    assert calls(inline) == [1, *turns]


def test_a_complex_number_that_is_returned_is_no_input():
    """It may be written to afterwards."""

    class PutTogether(rotary.Attention):
        def forward(self, x, cos, sin, table):
            parts = torch.view_as_real(table)
            return super().forward(x, cos, sin), torch.complex(parts[..., 0], parts[..., 1])

    inputs = dict(zip(("x", "cos", "sin"), (rotary.hidden_states(), *rotary.tables()), strict=True))
    inputs["table"] = torch.randn(3, dtype=torch.complex64)
    options = patches(None, {"normfuse.lowering": "inline"})
    graph = final_graph(PutTogether().bfloat16(), inputs, options)

    _, returned = graph.output_node().args[0]
    assert returned.op != "placeholder"


def test_an_order_that_the_user_gave_the_nodes_stays():
    model, config = tiny_models.build("gemma3_text", torch.bfloat16)
    inputs = tiny_models.example_inputs(model, config)
    orders = []

    def note(graph):
        orders.append([node.name for node in graph.nodes])

    options = patches(None, {"normfuse.lowering": "inline", "post_grad_custom_post_pass": note})
    final = [node.name for node in final_graph(model, inputs, options).nodes]

    (before,) = orders
    kept = [name for name in before if name in set(final)]
    assert [name for name in final if name in set(kept)] == kept
