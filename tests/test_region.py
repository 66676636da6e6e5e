"""What is measured: a site with its pointwise neighbours, cut out of the graph around it."""

import pytest
import torch
from expecttest import TestCase
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from normfuse.ops import ADD_RMS_NORM, QK_RMS_NORM_ROPE, RMS_NORM, ROPE
from normfuse.passes import measure
from normfuse.passes.recognise import is_op
from normfuse.passes.region import (
    Spec,
    cut_out,
    key_of,
    neighbours_of,
    rows_of,
    sites_by_tables,
)
from normfuse.tuning import Rows
from tests import float64
from tests.float64 import assert_as_close_as_eager
from tests.graphs import render

LLAMA = "f32 unit=f32>bf16 weight=bf16 out=bf16"
GEMMA = "f32 unit=f32 weight=f32 out=bf16"


def norm(x, weight):
    return RMS_NORM(x, weight, None, 1e-6, 0.0, LLAMA)[0]


def add_norm(x, residual, weight):
    return ADD_RMS_NORM(x, residual, weight, None, None, None, None, 1e-6, 0.0, LLAMA)[:2]


def only_site(function, *shapes):
    """The node of the one op in the graph of a function of bfloat16 tensors."""
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
        graph = make_fx(function)(*inputs).graph
    (node,) = [node for node in graph.nodes if is_op(node)]
    return node


class TestNeighbours:
    def test_matrix_products_on_both_sides_are_none(self):
        def forward(x, w, weight):
            return norm(x @ w, weight) @ w

        assert neighbours_of(only_site(forward, (4, 8), (8, 8), (8,))) == ()

    def test_pointwise_ones_have_names_and_views_have_none(self):
        def forward(x, w, weight):
            x = torch.sigmoid(x @ w).view(2, 2, 8) * 2
            return torch.relu(norm(x, weight).view(4, 8)) @ w

        found = neighbours_of(only_site(forward, (4, 8), (8, 8), (8,)))
        assert found == ("after relu", "before mul", "before sigmoid")

    def test_a_consumer_that_waits_for_the_site_is_none(self):
        """The sum at the end of a Llama layer reads the total, but after two products."""

        def forward(x, residual, w, weight):
            y, total = add_norm(x, residual, weight)
            return total + y @ w

        assert neighbours_of(only_site(forward, (4, 8), (4, 8), (8, 8), (8,))) == ()

    def test_a_consumer_of_something_else_as_well_is_one(self):
        def forward(x, w, weight):
            y = norm(x, weight)
            return y * torch.sigmoid(x @ w)

        assert neighbours_of(only_site(forward, (4, 8), (8, 8), (8,))) == ("after mul",)

    def test_a_small_producer_is_none(self):
        """Its result is made once for all layers."""

        def forward(x, scale, weight):
            return norm(x, weight + scale)

        assert neighbours_of(only_site(forward, (4, 8), (8,), (8,))) == ()

    def test_a_reduction_and_a_softmax_are_none(self):
        def forward(x, weight):
            return norm(torch.cumsum(x, 0), weight).sum(-1)

        assert neighbours_of(only_site(forward, (4, 8), (8,))) == ()


class TestCutOut(TestCase):
    maxDiff = None

    def test_the_region_returns_what_leaves_it(self):
        def forward(x, w, residual, weight):
            x = torch.relu(x @ w)
            y, total = add_norm(x, residual, weight)
            return torch.sigmoid(y) @ w, total, x

        region = cut_out(only_site(forward, (4, 8), (8, 8), (4, 8), (8,)), "A GPU")
        assert region.neighbours == ("after sigmoid", "before relu")
        assert [spec.shape for spec in region.inputs] == [(4, 8), (4, 8), (8,)]
        self.assertExpectedInline(
            render(region.module.graph).replace(", None", ""),
            """\
    relu_default = aten.relu.default(input_0)
    add_rms_norm_default = normfuse.add_rms_norm.default(relu_default, input_1, input_2, 1e-06, 0.0, 'f32 unit=f32>bf16 weight=bf16 out=bf16')
    getitem = getitem(add_rms_norm_default, 0)
    getitem_1 = getitem(add_rms_norm_default, 1)
    sigmoid_default = aten.sigmoid.default(getitem)
    return (relu_default, getitem_1, sigmoid_default)""",
        )


def test_the_key_holds_what_decides_the_speed():
    heads, tables = [(2, 4, 5, 128), (2, 2, 5, 128)], [(2, 1, 5, 128)] * 2

    def turned(q, k, weight_q, weight_k, cos, sin):
        turns = ["half 128 in=bf16 out=bf16"] * 2
        numbers = ([1e-6] * 2, [0.0] * 2, [LLAMA, GEMMA], turns)
        return QK_RMS_NORM_ROPE([q, k], [weight_q, weight_k], cos, sin, *numbers)[:2]

    node = only_site(turned, *heads, (128,), (128,), *tables)
    assert key_of(node, "A GPU") == (
        "A GPU",
        ".".join(torch.__version__.split(".")[:2]),
        "qk_rms_norm_rope",
        (LLAMA, GEMMA, *["half 128 in=bf16 out=bf16"] * 2),
        (128, 128),
        "bf16",
    )
    assert rows_of(node) == Rows.exactly(2 * (4 + 2) * 5)


def test_symbolic_rows_become_a_range_and_no_guard():
    torch._dynamo.reset()
    seen = []

    def backend(graph_module, example_inputs):
        from normfuse.passes import inductor

        def collect(graph):
            for node in filter(is_op, graph.nodes):
                region = cut_out(node, "A GPU")
                seen.append((rows_of(node), neighbours_of(node), region))

        from normfuse.backend import patches

        options = patches(None, {"normfuse.lowering": "op"})
        options["post_grad_custom_post_pass"] = inductor.Hook(collect, "collect")
        return inductor.interpret_graph(graph_module, example_inputs, options)

    module = torch.nn.RMSNorm(8, eps=1e-6)
    compiled = torch.compile(lambda x: torch.relu(module(x)), backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (12, 7, 300):
            compiled(torch.randn(rows, 8))
    ((rows, neighbours, region),) = seen
    assert rows == Rows(2, 12, 2**62)
    assert neighbours == ("after relu",)
    assert region.inputs[0].shape == (12, 8)
    assert region.rows == 12


@pytest.mark.parametrize("form", ["inline", "op"])
def test_a_compiled_region_computes_what_the_graph_did(form):
    """Compiled as it is measured, in a thread that knows nothing of a compilation around it."""

    def forward(x, w, residual, weight):
        x = torch.relu(x @ w).view(2, 2, 8)
        y, total = add_norm(x, residual, weight)
        return torch.sigmoid(y) * 2, total

    region = cut_out(only_site(forward, (4, 8), (8, 8), (2, 2, 8), (8,)), "A GPU")
    (inputs,) = measure.input_sets(region.inputs, 1)
    with torch.no_grad():
        eager = region.module(*inputs)
        with FakeTensorMode():  # as inside a compilation
            ours = measure._apart(lambda: measure.compiled(region, form)(inputs))
        x, residual, weight = inputs
        total = torch.relu(x.double()).view(2, 2, 8) + residual.double()
        exact = total, torch.sigmoid(float64.rms_norm(total, weight, 1e-6, 0.0)) * 2
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_close_as_eager(mine, theirs, truth)


@pytest.mark.parametrize(
    ("shape", "stride"),
    [((2, 3), (3, 1)), ((2, 3), (8, 1)), ((4, 1, 3), (3, 0, 1)), ((0, 3), (3, 1))],
)
def test_inputs_have_the_strides_of_the_graph(shape, stride):
    spec = Spec(shape, stride, torch.bfloat16, torch.device("cpu"))
    ((one,), (other,)) = measure.input_sets([spec], 2)
    assert (tuple(one.shape), one.stride(), one.dtype) == (shape, stride, torch.bfloat16)
    assert one.data_ptr() != other.data_ptr() or 0 in shape


def test_an_embedding_without_a_norm_is_measured_with_what_makes_its_tables():
    def turned(q, angles):
        cos, sin = angles.cos().mul(2), angles.sin().mul(2)
        return ROPE([q], cos, sin, ["half 128 in=bf16 out=bf16"])[0].relu(), cos

    def by_tables(q, cos, sin):
        return ROPE([q], cos, sin, ["half 128 in=bf16 out=bf16"])[0]

    q, angles = (2, 4, 5, 128), (2, 1, 5, 128)
    made, given = only_site(turned, q, angles), only_site(by_tables, q, *[(2, 1, 5, 128)] * 2)

    assert "makes its tables" in key_of(made, "A GPU").parameters
    assert "makes its tables" not in key_of(given, "A GPU").parameters
    region = cut_out(made, "A GPU")
    assert {"before cos", "before sin", "after relu"} <= set(region.neighbours)
    assert [spec.shape for spec in region.inputs] == [angles, q]
    (output,) = region.module.graph.find_nodes(op="output")
    assert len(output.args[0]) == 1  # the tables of other layers are theirs
    assert region.by_tables.key == region.key
    assert region.by_tables.neighbours == ("after relu",)
    assert [spec.shape for spec in region.by_tables.inputs] == [q, angles, angles]
    assert cut_out(given, "A GPU").by_tables is None


def test_sites_that_read_the_same_tables_are_counted():
    def layers(q, angles):
        cos, sin = angles.cos(), angles.sin()
        for _ in range(3):
            tables = cos.unsqueeze(1), sin.unsqueeze(1)
            q = ROPE([q], *tables, ["half 128 in=bf16 out=bf16"])[0]
        return q * cos.unsqueeze(1)

    with FakeTensorMode():
        inputs = [
            torch.empty(shape, dtype=torch.bfloat16) for shape in ((2, 4, 5, 128), (2, 5, 128))
        ]
        graph = make_fx(layers)(*inputs).graph
    sites = graph.find_nodes(op="call_function", target=ROPE)
    assert [sites_by_tables(site) for site in sites] == [3, 3, 3]
