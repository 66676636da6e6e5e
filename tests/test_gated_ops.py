"""The op `gated_rms_norm`: what it computes, its gradients, and what its eager function refuses."""

from itertools import product

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

import normfuse
from normfuse import Gating, RoundingPlan
from normfuse.ops import GATED_RMS_NORM
from normfuse.ops.gating import ACTIVATIONS
from tests import float64
from tests import gated_blocks as blocks

EPS = 1e-5
ORDERS = pytest.mark.parametrize("gate_first", [False, True], ids=["gate last", "gate first"])
ACTS = pytest.mark.parametrize("activation", ACTIVATIONS)


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("block", "arguments"),
    [
        (blocks.KimiLinearRMSNormGated(96, EPS), (1, False, "sigmoid")),
        (blocks.FalconH1RMSNormGated(96, EPS), (2, False, "silu")),
        (blocks.FalconH1RMSNormGated(96, EPS, norm_before_gate=False), (2, True, "silu")),
    ],
)
def test_has_the_bits_of_models_that_round_once(block, arguments, dtype):
    block, x, gate = block.to(dtype), rand(2, 3, 96, dtype=dtype), rand(2, 3, 96, dtype=dtype)
    groups, gate_first, activation = arguments

    y = normfuse.gated_rms_norm(
        x, gate, block.weight, EPS, groups=groups, gate_first=gate_first, activation=activation
    )

    exact = float64.gated_rms_norm(x, gate, block.weight, EPS, 0.0, *arguments)
    float64.assert_as_close_as_eager(y, block(x, gate), exact)
    if dtype == torch.float32 or activation == "silu":
        assert torch.equal(y, block(x, gate))


@ORDERS
@ACTS
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients(groups, activation, gate_first):
    wide = torch.float64
    x, gate = (rand(3, 8, dtype=wide).requires_grad_() for _ in range(2))
    weight = rand(8, dtype=wide).requires_grad_()
    types = str(RoundingPlan.once(wide, wide)), str(Gating.once(wide))
    norm = (EPS, 1.0, groups, gate_first, activation)

    assert gradcheck(lambda *tensors: GATED_RMS_NORM(*tensors, *norm, *types), (x, gate, weight))


@pytest.mark.parametrize("shape", [(8,), (2, 3, 8), (0, 8)], ids=str)
@pytest.mark.parametrize("spans", ["a group", "nothing"])
def test_gradients_of_other_weights_and_shapes(spans, shape):
    x, gate = (rand(*shape, dtype=torch.float64).requires_grad_() for _ in range(2))
    weight = rand(4, dtype=torch.float64).requires_grad_() if spans == "a group" else None
    tensors = [tensor for tensor in (x, gate, weight) if tensor is not None]

    assert gradcheck(lambda *t: normfuse.gated_rms_norm(*t, groups=2), tensors)


def test_gradients_are_as_accurate_as_eager():
    block = blocks.Qwen3NextRMSNormGated(96).bfloat16()
    x, gate, upstream = (rand(33, 96, dtype=torch.bfloat16) for _ in range(3))
    inputs = [x.requires_grad_(), gate.requires_grad_(), block.weight]

    y = normfuse.gated_rms_norm(*inputs, 1e-6, plan=RoundingPlan.before_weight(x.dtype, x.dtype))

    ours = torch.autograd.grad(y, inputs, upstream)
    eager = torch.autograd.grad(block(x, gate), inputs, upstream)
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    formula = float64.gated_rms_norm(*wide, 1e-6, 0.0, 1, False, "silu")
    exact = torch.autograd.grad(formula, wide, upstream.double())
    for one, expected, truth in zip(ours, eager, exact, strict=True):
        float64.assert_as_close_as_eager(one, expected, truth)


def layouts():
    yield "contiguous", rand(2, 3, 8), rand(2, 3, 8)
    yield "vector", rand(8), rand(8)
    yield "transposed", rand(2, 4, 3, 8).transpose(1, 2), rand(2, 3, 4, 8)
    yield "sliced", rand(4, 24)[:, 8:16], rand(4, 16)[:, ::2]
    yield "columns first", rand(8, 4).t(), rand(4, 8)
    yield "zero rows", rand(0, 8), rand(0, 8)
    yield "mixed types", rand(4, 8, dtype=torch.bfloat16), rand(4, 8, dtype=torch.float16)


@ORDERS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("x", "gate"), [pytest.param(*case, id=name) for name, *case in layouts()])
def test_opcheck(x, gate, groups, gate_first):
    x, gate, weight = (t.detach().requires_grad_() for t in (x, gate, rand(8)))
    plan = str(RoundingPlan.once(torch.float32, torch.float32))
    types = str(Gating.once(torch.float32))
    opcheck(GATED_RMS_NORM, (x, gate, weight, EPS, 1.0, groups, gate_first, "silu", plan, types))


def test_the_text_of_a_gating_reads_back():
    for types in product((torch.bfloat16, torch.float32, torch.float64), repeat=4):
        assert Gating.parse(str(Gating(*types))) == Gating(*types)


def test_refuses_another_text_of_a_gating():
    with pytest.raises(ValueError, match="the types of a Gating read like") as raised:
        Gating.parse("gate=f32")
    assert str(raised.value) == (
        "the types of a Gating read like 'gate=f32 factor=f32 product=f32 out=f32', "
        "got 'gate=f32': write them with str(Gating(...))"
    )


def test_refuses_types_that_are_not_floating():
    with pytest.raises(TypeError, match=r"product must be one of .* got torch\.int32"):
        Gating(torch.float32, torch.float32, torch.int32, torch.float32)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gate": rand(2, 1)}, "gate must have the shape of x, (2, 8), got (2, 1): expand it"),
        ({"groups": 3}, "groups must divide the last dimension of x, 8, got 3: pass the number"),
        ({"weight": rand(4)}, "weight must have shape (8,), got (4,): pass the weight"),
        ({"weight": rand(2), "groups": 2}, "weight must have shape (4,), got (2,): pass the"),
        ({"activation": "gelu"}, "activation must be one of ('silu', 'sigmoid', 'x_sigmoid'), got"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"plan": RoundingPlan.once(torch.float32, torch.float32)}, "plan must have no weight"),
    ],
)
def test_refusals(changes, sentence):
    arguments = {"x": rand(2, 8), "gate": rand(2, 8), **changes}
    with pytest.raises(ValueError, match="must") as raised:
        normfuse.gated_rms_norm(**arguments)
    assert str(raised.value).startswith(sentence)
