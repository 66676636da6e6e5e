"""What the gradient ops become in a compiled training step, and what its forward keeps for them."""

import pytest
import torch
from expecttest import TestCase
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from normfuse.backend import patches
from normfuse.ops.add_rms_norm_backward import ADD_RMS_NORM_BACKWARD
from normfuse.ops.dual_rms_norm_add_backward import DUAL_RMS_NORM_ADD_BACKWARD
from normfuse.ops.dual_rms_norm_add_rms_norm_backward import DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD
from normfuse.ops.qk_rms_norm_rope_backward import QK_RMS_NORM_ROPE_BACKWARD
from normfuse.ops.rms_norm_add_rms_norm_backward import RMS_NORM_ADD_RMS_NORM_BACKWARD
from normfuse.ops.rms_norms_backward import RMS_NORMS_BACKWARD
from normfuse.passes import inductor, lower
from normfuse.settings import Settings
from tests.blocks import GemmaBlock, LlamaBlock, activation
from tests.graphs import render
from tests.test_lowering import LLAMA, lowered

pytest.importorskip("triton")

BF16 = torch.bfloat16


def add_norm_backward(grad_y, grad_total, total, weight, rstd):
    grad, _, grad_weight = ADD_RMS_NORM_BACKWARD(
        grad_y, grad_total, total, weight, rstd, None, None, None, None, 0.0, LLAMA, BF16, BF16,
        [True, False, True],
    )  # fmt: skip
    return grad, grad_weight


class TestInline(TestCase):
    def test_reduces_rows_and_columns_of_one_product_as_inductors_own_decomposition(self):
        graph = lowered(add_norm_backward, (4, 8), (4, 8), (4, 8), (8,), (4, 1), lowering="inline")
        self.assertExpectedInline(
            render(graph),
            """\
    convert_element_type = prims.convert_element_type.default(rstd_1, torch.float32)
    convert_element_type_1 = prims.convert_element_type.default(total_1, torch.float32)
    mul = aten.mul.Tensor(convert_element_type_1, convert_element_type)
    convert_element_type_2 = prims.convert_element_type.default(grad_y_1, torch.float32)
    mul_1 = aten.mul.Tensor(convert_element_type_2, mul)
    sum_1 = aten.sum.dim_IntList(mul_1, (0))
    convert_element_type_3 = prims.convert_element_type.default(sum_1, torch.bfloat16)
    convert_element_type_4 = prims.convert_element_type.default(weight_1, torch.float32)
    mul_2 = aten.mul.Tensor(convert_element_type_2, convert_element_type_4)
    div = aten.div.Tensor(mul, 8)
    mul_3 = aten.mul.Tensor(mul, mul_2)
    sum_2 = aten.sum.dim_IntList(mul_3, (-1), True)
    mul_4 = aten.mul.Tensor(div, sum_2)
    sub = aten.sub.Tensor(mul_2, mul_4)
    mul_5 = aten.mul.Tensor(sub, convert_element_type)
    add = aten.add.Tensor(mul_5, grad_total_1)
    convert_element_type_5 = prims.convert_element_type.default(add, torch.bfloat16)
    return (convert_element_type_5, convert_element_type_3)""",
        )


def launches(graph):
    return [node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)]


def test_a_pass_over_the_rows_and_a_sum_of_partial_sums(kernels_on_cpu):
    graph = lowered(add_norm_backward, (64, 1024), (64, 1024), (64, 1024), (1024,), (64, 1))

    rows, partials = launches(graph)
    sums = rows.kwargs["kwargs"]["partial_ptr"].meta["val"]
    assert (sums.shape, sums.dtype) == ((32, 1024), torch.float32), "a program takes two rows"
    assert rows.kwargs["tensors_to_clone"] == ["grad_x_ptr", "partial_ptr"]
    assert partials.kwargs["tensors_to_clone"] == ["grad_weight_1_ptr"]


def test_the_number_of_programs_grows_with_the_rows_but_not_with_the_gpu(kernels_on_cpu):
    graph = lowered(add_norm_backward, *[(8192, 1024)] * 3, (1024,), (8192, 1))

    rows, _ = launches(graph)
    assert rows.kwargs["grid"] == [(264, 1, 1)]


def test_a_changing_number_of_rows(kernels_on_cpu):
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(*shape):
        sizes = [DimDynamic.DUCK, DimDynamic.STATIC][-len(shape) :]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(torch.empty(shape, dtype=BF16), symbolic_context=context)

    inputs = [*(fake(64, 1024) for _ in range(3)), fake(1024), fake(64, 1)]
    graph = make_fx(add_norm_backward)(*inputs).graph
    lower.Lower(Settings("triton"))(graph)

    rows, partials = launches(graph)
    assert rows.kwargs["grid"] == [(132, 1, 1)]
    assert partials.kwargs["kwargs"]["partial_1_ptr"].meta["val"].shape == (132, 1024)
    assert not mode.shape_env.guards


def test_no_second_launch_for_a_frozen_weight(kernels_on_cpu):
    def backward(*tensors):
        return add_norm_backward(*tensors)[0]

    (rows,) = launches(lowered(backward, (64, 96), (64, 96), (64, 96), (96,), (64, 1)))

    assert "partial_ptr" not in rows.kwargs["kwargs"]


def test_the_sandwich_is_one_pass(kernels_on_cpu):
    def backward(grad_y, grad_total, x, total, weight, rstd):
        norms = (weight, weight, rstd, rstd, None, None, None, None, 1.0, LLAMA, 1.0, LLAMA)
        return RMS_NORM_ADD_RMS_NORM_BACKWARD(
            grad_y, grad_total, x, total, *norms, BF16, [True] * 4
        )

    graph = lowered(backward, *[(64, 96)] * 4, (96,), (64, 1))

    assert len(launches(graph)) == 2


def test_norms_of_one_value_are_one_pass(kernels_on_cpu):
    def backward(x, grad_1, grad_2, weight, rstd):
        numbers = ([1.0, 0.0], [1.0, 0.5], [LLAMA] * 2, [True] * 3)
        return RMS_NORMS_BACKWARD(x, [grad_1, grad_2], [weight] * 2, rstd, *numbers)

    rows, partials = launches(lowered(backward, *[(64, 96)] * 3, (96,), (64, 1)))

    clones = ["grad_x_ptr", "partial_1_ptr", "partial_2_ptr"]
    assert rows.kwargs["tensors_to_clone"] == clones
    assert partials.kwargs["tensors_to_clone"] == ["grad_weight_1_ptr", "grad_weight_2_ptr"]


def test_two_branches_are_one_pass(kernels_on_cpu):
    def backward(grad_total, x_1, x_2, weight, rstd):
        norms = ([weight] * 3, [rstd] * 3, None, None, None, 0.5, [1.0] * 3, [LLAMA] * 3)
        return DUAL_RMS_NORM_ADD_BACKWARD(grad_total, x_1, x_2, *norms, BF16, [True] * 6)

    graph = lowered(backward, *[(64, 96)] * 3, (96,), (64, 1))

    assert len(launches(graph)) == 2


def test_two_branches_and_the_norm_of_the_sum_are_one_pass(kernels_on_cpu):
    def backward(grad_y, grad_total, x_1, x_2, total, weight, rstd):
        norms = ([weight] * 4, [rstd] * 4, None, None, None, None, [1.0] * 4, [LLAMA] * 4)
        return DUAL_RMS_NORM_ADD_RMS_NORM_BACKWARD(
            grad_y, grad_total, x_1, x_2, total, *norms, BF16, [True] * 7
        )

    rows, partials = launches(lowered(backward, *[(64, 96)] * 5, (96,), (64, 1)))

    assert "partial_4_ptr" in rows.kwargs["tensors_to_clone"]
    assert "grad_weight_4_ptr" in partials.kwargs["tensors_to_clone"]


def test_queries_and_keys_are_one_pass(kernels_on_cpu):
    def backward(q, k, weight, rstd_q, rstd_k, cos, sin):
        rotation = "half 64 in=bf16 out=bf16"
        return QK_RMS_NORM_ROPE_BACKWARD(
            [q, k], [q, k], [weight, weight], [rstd_q, rstd_k], cos, sin,
            [1e-6] * 2, [0.0] * 2, [LLAMA] * 2, [rotation] * 2, [True] * 4,
        )  # fmt: skip

    graph = lowered(
        backward, (1, 4, 8, 64), (1, 2, 8, 64), (64,), (1, 4, 8, 1), (1, 2, 8, 1), (1, 1, 8, 64),
        (1, 1, 8, 64),
    )  # fmt: skip

    assert len(launches(graph)) == 2


def kept_for_backward(block, settings):
    """(shape, type) of all that a compiled forward hands to its backward, weights left out."""
    forwards = []

    def note(graph):
        forwards.append(next(node for node in graph.nodes if node.op == "output").args[0])

    hook = "post_grad_custom_post_pass"
    seen = inductor.Hook(note, "note")
    settings = {**settings, hook: inductor.chained(hook, seen, settings)}

    def backend(graph_module, example_inputs):
        return inductor.interpret_graph(graph_module, example_inputs, settings)

    torch._dynamo.reset()
    x, residual = (activation(32).requires_grad_() for _ in range(2))
    torch.compile(block, backend=backend)(x, residual)
    values = [node.meta["val"] for node in forwards[0][1:]]
    return sorted((tuple(v.shape), str(v.dtype)) for v in values if v.shape[0] == 32)


@pytest.mark.parametrize("block_class", [LlamaBlock, GemmaBlock])
@pytest.mark.parametrize("lowering", ["op", "inline"])
def test_keeps_no_more_than_plain_inductor_and_nothing_wide_but_rstd(block_class, lowering):
    block = block_class().bfloat16()
    ours = kept_for_backward(block, patches(None, {"normfuse.lowering": lowering}))
    plain = kept_for_backward(block, {})

    assert all(shape[-1] == 1 for shape, dtype in ours if dtype == "torch.float32")
    assert len(ours) <= len(plain)
