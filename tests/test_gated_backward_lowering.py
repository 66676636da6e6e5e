"""What the gradient ops of gates and modulations become in a compiled training step."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.library import opcheck

import normfuse
from normfuse.ops.gated_rms_norm_backward import GATED_RMS_NORM_BACKWARD
from normfuse.ops.modulated_rms_norm_backward import MODULATED_RMS_NORM_BACKWARD
from normfuse.passes import lower
from normfuse.settings import Settings
from tests.test_backward_lowering import launches
from tests.test_lowering import LLAMA, lowered

pytest.importorskip("triton")

BF16 = torch.bfloat16


def gated_backward(grad_y, x, gate, weight, rstd):
    norm = (weight, rstd, 0.0, 2, True, "silu", LLAMA)
    return GATED_RMS_NORM_BACKWARD(grad_y, x, gate, *norm, [True] * 3)


def modulated_backward(grad_y, x, scale, shift, weight, rstd):
    norm = (weight, rstd, 0.0, 1.0, LLAMA)
    return MODULATED_RMS_NORM_BACKWARD(grad_y, x, scale, shift, *norm, [True] * 4)


GATED = [*[(4, 16, 128)] * 3, (128,), (4, 16, 2, 1)]
MODULATED = [*[(4, 16, 128)] * 2, *[(4, 1, 128)] * 2, (128,), (4, 16, 1)]
BOTH = pytest.mark.parametrize(
    ("function", "shapes"),
    [(gated_backward, GATED), (modulated_backward, MODULATED)],
    ids=["gated", "modulated"],
)


@BOTH
def test_a_pass_over_the_rows_and_a_sum_of_partial_sums(function, shapes, kernels_on_cpu):
    rows, partials = launches(lowered(function, *shapes))

    assert "grad_x_ptr" in rows.kwargs["tensors_to_clone"]
    assert all("grad" in name for name in partials.kwargs["tensors_to_clone"])


@BOTH
def test_inline_has_no_op_left(function, shapes):
    graph = lowered(function, *shapes, lowering="inline")

    assert not [node for node in graph.nodes if "normfuse" in str(node.target)]
    assert not launches(graph)


def test_each_sequence_has_programs_of_its_own(kernels_on_cpu):
    rows, partials = launches(lowered(modulated_backward, *MODULATED))

    # One program takes 16 rows of 128.
    assert rows.kwargs["grid"] == [(4, 1, 1)]
    sums = [partials.kwargs["kwargs"][f"partial_{i}_ptr"].meta["val"] for i in (1, 2, 3)]
    assert [tuple(one.shape) for one in sums] == [(4, 128)] * 3


def test_groups_with_weights_of_their_own_have_programs_of_their_own(kernels_on_cpu):
    rows, _ = launches(lowered(gated_backward, *GATED))

    sums = rows.kwargs["kwargs"]["partial_ptr"].meta["val"]
    assert rows.kwargs["grid"] == [(2 * sums.shape[0], 1, 1)]
    assert sums.shape[1] == 128


@BOTH
def test_changing_numbers_of_sequences_and_rows(function, shapes, kernels_on_cpu):
    mode = FakeTensorMode(shape_env=ShapeEnv())

    def fake(shape):
        sizes = [DimDynamic.DUCK if size in (4, 16) else DimDynamic.STATIC for size in shape]
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(torch.empty(shape, dtype=BF16), symbolic_context=context)

    graph = make_fx(function)(*map(fake, shapes)).graph
    lower.Lower(Settings("triton"))(graph)

    assert len(launches(graph)) == 2
    assert not mode.shape_env.guards


@BOTH
def test_no_second_launch_where_only_x_learns(function, shapes, kernels_on_cpu):
    assert len(launches(lowered(lambda *tensors: function(*tensors)[0], *shapes))) == 1


@BOTH
def test_opcheck(function, shapes):
    tensors = [torch.randn(shape) for shape in shapes]
    tests = ("test_schema", "test_faketensor")
    if function is gated_backward:
        norm = (0.0, 2, False, "sigmoid", LLAMA, [True, True, False])
        opcheck(GATED_RMS_NORM_BACKWARD, (*tensors, *norm), test_utils=tests)
    else:
        norm = (0.0, 1.0, LLAMA, [True, True, True, False])
        opcheck(MODULATED_RMS_NORM_BACKWARD, (*tensors, *norm), test_utils=tests)


@pytest.mark.parametrize("name", ["gated", "modulated"])
def test_gradients_of_gradients(name):
    x, other = (torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight = torch.randn(4, dtype=torch.float64).requires_grad_()
    function = getattr(normfuse, f"{name}_rms_norm")

    def norm(x, other, weight):
        return function(x, other, weight=weight)

    assert torch.autograd.gradgradcheck(norm, (x, other, weight))


def test_an_unsummed_shift_is_no_alias_of_its_gradient():
    grad_y, x, scale, shift = (torch.randn(3, 8) for _ in range(4))
    rstd, plan = torch.rand(3, 1), "f32 unit=f32 out=f32"
    norm = (None, rstd, 0.0, 1.0, plan, [True, True, True, False])

    grads = MODULATED_RMS_NORM_BACKWARD(grad_y, x, scale, shift, *norm)

    assert torch.equal(grads[2], grad_y)
    assert grads[2].data_ptr() != grad_y.data_ptr()


def test_a_shift_is_not_kept_for_the_backward():
    x, scale, shift = (torch.randn(3, 8).requires_grad_() for _ in range(3))
    kept = []

    def note(tensor):
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = normfuse.modulated_rms_norm(x, scale, shift)

    assert {x.data_ptr(), scale.data_ptr()} <= set(kept)
    assert shift.data_ptr() not in kept
    (grad,) = torch.autograd.grad(y.sum(), shift)
    assert torch.equal(grad, torch.ones(3, 8))
