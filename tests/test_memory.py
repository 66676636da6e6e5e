"""Which memory launches share, and which gradients they write over others."""

from itertools import product

import pytest
import torch
from torch import nn

from normfuse.ops.add_rms_norm_backward import ADD_RMS_NORM_BACKWARD
from normfuse.ops.qk_rms_norm_rope import QK_RMS_NORM_ROPE
from normfuse.ops.rms_norm_backward import RMS_NORM_BACKWARD
from tests import rotary
from tests.blocks import BranchBetweenNorms, GemmaRMSNorm
from tests.graphs import graphs_for_code
from tests.rotary import BATCH, DIM, TOKENS, WIDTH
from tests.test_backward_lowering import BF16, add_norm_backward, launches
from tests.test_lowering import LLAMA, lowered

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_on_cpu")
SHAPES = [(64, 96)] * 3 + [(96,), (64, 1)]


def backward_graph(model, *inputs):
    """The graph of the gradients as Inductor generates code for it."""
    return graphs_for_code(model, lambda compiled: compiled(*inputs).sum().backward())[-1]


RESULTS = ("grad_x_ptr", "grad_residual_ptr")
GRADIENTS = ("grad_y_ptr", "grad_total_ptr")


def written_over(launch):
    """The results of a launch that are in the place of a gradient, and which."""
    operands = launch.kwargs["kwargs"]
    pairs = product(RESULTS, GRADIENTS)
    return {result: grad for result, grad in pairs if operands.get(result, 0) is operands.get(grad)}


def test_the_gradient_of_a_residual_stream_stays_in_one_place():
    model = nn.Sequential(
        nn.Linear(96, 96), *(BranchBetweenNorms(96) for _ in range(3)), GemmaRMSNorm(96)
    )
    model = nn.Sequential(*model, nn.Linear(96, 8)).bfloat16()

    graph = backward_graph(model, torch.randn(64, 96).bfloat16())

    rows = [node for node in launches(graph) if "x_ptr" in node.kwargs["kwargs"]]
    assert len(rows) == 4
    assert all("grad_x_ptr" in written_over(launch) for launch in rows)
    stream = {node.kwargs["kwargs"].get("grad_residual_ptr") for node in rows} - {None}
    assert len(stream) == 1
    assert not graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default)


def places(function, *shapes):
    """What the first launch of a lowered function writes over what."""
    launch, *_ = launches(lowered(function, *shapes))
    return written_over(launch)


def made(grad):
    return grad @ grad.new_ones(grad.shape[1], grad.shape[1])


def test_a_gradient_that_dies_is_written_over():
    found = places(lambda grad, *rest: add_norm_backward(made(grad), *rest), *SHAPES)

    assert found == {"grad_x_ptr": "grad_y_ptr"}


def test_also_through_a_view():
    def backward(grad, *rest):
        return add_norm_backward(made(grad).view(64, 96), *rest)

    assert places(backward, (96, 64), *SHAPES[1:]) == {"grad_x_ptr": "grad_y_ptr"}


def product_first(grad, *rest):
    value = made(grad)
    return value.view(96, 64) @ value, add_norm_backward(value, *rest)


def product_last(grad, *rest):
    value = made(grad)
    results = add_norm_backward(value, *rest)
    return value.view(96, 64) @ value, results


def pointwise_result(grad, *rest):
    value = grad + 1
    return value, add_norm_backward(value, *rest)


def test_a_product_may_have_read_it_before():
    assert places(product_first, *SHAPES) == {"grad_x_ptr": "grad_y_ptr"}
    assert places(product_last, *SHAPES) == {}


def test_a_pointwise_gradient_is_computed_where_it_is_read_and_written_over():
    graph = lowered(lambda grad, *rest: add_norm_backward(grad + 1, *rest), *SHAPES)

    launch, _ = launches(graph)
    assert written_over(launch) == {"grad_x_ptr": "grad_y_ptr"}
    place = launch.kwargs["kwargs"]["grad_y_ptr"]
    assert place.target is torch.ops.prims.inductor_force_stride_order.default
    assert place.args[0].target is torch.ops.aten.add.Tensor


def test_launches_that_read_the_same_tables_share_their_memory():
    def layers(x, weight, angles):
        tables = angles.cos(), angles.sin()
        for _ in range(2):
            norms = ([weight] * 1, *tables, [1e-6], [0.0], [LLAMA], ["half 96 in=bf16 out=bf16"])
            x = QK_RMS_NORM_ROPE([x], *norms)[0]
        return x

    first, second = launches(lowered(layers, (2, 4, 5, 96), (96,), (2, 1, 5, 96)))

    for name in ("cos_ptr", "sin_ptr"):
        table = first.kwargs["kwargs"][name]
        assert table is second.kwargs["kwargs"][name]
        assert table.target is torch.ops.prims.inductor_force_stride_order.default


@pytest.mark.parametrize("shown", [lambda t: t.unsqueeze(1), lambda t: t.unsqueeze(1).bfloat16()])
def test_also_where_each_layer_shows_them_anew(shown):
    """As `apply_rotary_pos_emb` does in Hugging Face models."""

    def layers(x, weight, angles):
        tables = angles.cos(), angles.sin()
        for _ in range(3):
            cos, sin = (shown(table) for table in tables)
            norms = ([weight], cos, sin, [1e-6], [0.0], [LLAMA], ["half 96 in=bf16 out=bf16"])
            x = QK_RMS_NORM_ROPE([x], *norms)[0]
        return x

    graph = lowered(layers, (2, 4, 5, 96), (96,), (2, 5, 96))

    found = launches(graph)
    assert len(found) == 3
    for name in ("cos_ptr", "sin_ptr"):
        (table,) = {launch.kwargs["kwargs"][name] for launch in found}
        assert table.target is torch.ops.prims.inductor_force_stride_order.default
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten.unsqueeze.default)) == 2


def test_tables_of_two_kinds_are_two():
    """Gemma 3's local and global layers turn by different angles."""

    def layers(x, weight, angles):
        for scale in (1.0, 2.0):
            tables = ((angles * scale).cos().unsqueeze(1), (angles * scale).sin().unsqueeze(1))
            norms = ([weight], *tables, [1e-6], [0.0], [LLAMA], ["half 96 in=bf16 out=bf16"])
            x = QK_RMS_NORM_ROPE([x], *norms)[0]
        return x

    first, second = launches(lowered(layers, (2, 4, 5, 96), (96,), (2, 5, 96)))

    for name in ("cos_ptr", "sin_ptr"):
        assert first.kwargs["kwargs"][name] is not second.kwargs["kwargs"][name]


def test_each_result_has_a_place_of_its_own():
    def backward(grad, grad_total, *rest):
        operands = (made(grad), made(grad_total), *rest, None, None, None, None)
        return ADD_RMS_NORM_BACKWARD(*operands, 0.0, LLAMA, BF16, BF16, [True] * 3)

    assert places(backward, *SHAPES) == {
        "grad_x_ptr": "grad_y_ptr",
        "grad_residual_ptr": "grad_total_ptr",
    }


def test_two_results_never_share_the_place_of_one_gradient():
    def backward(grad, *rest):
        operands = (made(grad),) * 2 + (*rest, None, None, None, None)
        return ADD_RMS_NORM_BACKWARD(*operands, 0.0, LLAMA, BF16, BF16, [True] * 3)

    assert len(set(places(backward, *SHAPES[1:]))) == 1


def test_what_is_also_read_as_something_else_is_left():
    """The kernel may read an activation, or another view, after it has written a result."""

    def read_as_total(grad, grad_total, weight, rstd):
        value = made(grad)
        return add_norm_backward(value, grad_total, value, weight, rstd)

    def read_as_two_views(grad, *rest):
        value = made(grad)
        return add_norm_backward(value.view(64, 96), value.view(64 * 96).view(64, 96), *rest)

    assert places(read_as_total, *SHAPES[:2], *SHAPES[3:]) == {}
    assert places(read_as_two_views, *SHAPES[1:]) == {}


@pytest.mark.parametrize(
    "backward",
    [
        add_norm_backward,  # inputs
        lambda grad, *rest: (value := made(grad), add_norm_backward(value, *rest)),
        lambda grad, *rest: (
            (value := made(grad)).view(96, 64).cos(),
            add_norm_backward(value, *rest),
        ),
        lambda grad, *rest: add_norm_backward(made(grad.float()), *rest),
        pointwise_result,
        lambda grad, *rest: add_norm_backward(grad.unsafe_split(64)[0], *rest),
        lambda grad, *rest: add_norm_backward(made(grad).chunk(2)[0], *rest),
    ],
    ids=[
        "input",
        "result",
        "read as a view",
        "other type",
        "pointwise result",
        "part of a pair",
        "part",
    ],
)
def test_a_gradient_that_does_not_fit_or_die_is_left(backward, request):
    first = (128, 96) if "part" in request.node.callspec.id else (64, 96)

    assert places(backward, first, *SHAPES[1:]) == {}


def test_rows_that_are_read_again_keep_their_gradients():
    def backward(grad, x, weight, rstd):
        return RMS_NORM_BACKWARD(made(grad), x, weight, rstd, 1.0, LLAMA, [True, True])

    width = 65536
    launch, _ = launches(lowered(backward, (8, width), (8, width), (width,), (8, 1)))

    assert launch.kwargs["kwargs"]["HELD"] is False
    assert written_over(launch) == {}


class Turning(rotary.Attention):
    """Computes its tables, as a model does for all of its layers."""

    def angles(self, x):
        positions = torch.arange(TOKENS, dtype=torch.float32)
        return torch.outer(positions, 10000.0 ** -torch.arange(0, 1, 2 / DIM))

    def forward(self, x):
        angles = self.angles(x)
        cos, sin = (f(torch.cat((angles, angles), -1)).to(x.dtype) for f in (torch.cos, torch.sin))
        return super().forward(x, cos[None], sin[None])


class TurningByProduct(Turning):
    """Angles that the backward does not compute again, as torch 2.11 makes those of all models."""

    def __init__(self, dtype):
        super().__init__()
        self.types = dtype

    def angles(self, x):
        return x.detach()[0].to(self.types) @ torch.ones(WIDTH, DIM // 2, dtype=self.types)


def saved_tables(model):
    """Types of the tables, and of halves of them, that a backward gets; and its nodes."""
    graph = backward_graph(model.bfloat16(), torch.randn(BATCH, TOKENS, WIDTH).bfloat16())
    saved = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    tables = [one.dtype for one in saved if one.shape in ((1, TOKENS, DIM), (1, 1, TOKENS, DIM))]
    halves = [one.dtype for one in saved if one.shape == (TOKENS, DIM // 2)]
    return tables, halves, [node.target for node in graph.nodes]


def test_tables_are_computed_anew_in_the_backward():
    tables, _, targets = saved_tables(Turning())

    assert not tables
    assert torch.ops.aten.cos.default in targets


def test_what_tables_are_made_from_is_kept_where_it_is_smaller():
    tables, halves, targets = saved_tables(TurningByProduct(torch.float32))

    assert (tables, halves) == ([], [torch.float32])
    assert torch.ops.aten.cos.default in targets


def test_tables_are_kept_where_what_they_are_made_from_is_larger():
    tables, halves, _ = saved_tables(TurningByProduct(torch.float64))

    assert (tables, halves) == ([torch.bfloat16] * 2, [])
