"""The ops: what they compute, how they round, their gradients, how the dispatcher sees them."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import normfuse
from normfuse import RoundingPlan
from normfuse.ops import ADD_RMS_NORM, RMS_NORM, RMS_NORM_ADD, RMS_NORM_ADD_RMS_NORM
from normfuse.ops.rounding import MEANS, ROOTS
from tests import float64
from tests.blocks import LlamaRMSNorm
from tests.float64 import assert_as_close_as_eager

EPS = 1e-5
F64 = str(RoundingPlan.once(torch.float64, torch.float64))


def formula(x, weight=None, offset=0.0, eps=EPS):
    return float64.rms_norm(x, weight, eps, offset)


def eager(x, weight=None, offset=0.0, eps=EPS):
    factor = None if weight is None else weight + offset
    return F.rms_norm(x, x.shape[-1:], factor, eps)


def rand(*shape, dtype=torch.float32, device="cpu"):
    return (3 * torch.randn(shape)).to(device, dtype)


def doubles(*tensors):
    return [tensor.detach().double() for tensor in tensors]


def leaves(*tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
WEIGHTED = pytest.mark.parametrize("weighted", [True, False], ids=["weight", "weightless"])


@DTYPES
@WEIGHTED
def test_rms_norm_is_as_accurate_as_eager(dtype, weighted, device):
    x = rand(5, 3, 96, dtype=dtype, device=device)
    weight = rand(96, dtype=dtype, device=device) if weighted else None

    y = normfuse.rms_norm(x, weight, EPS, offset=1.0)

    assert_as_close_as_eager(y, eager(x, weight, 1.0), formula(x, weight, 1.0))


@DTYPES
def test_add_rms_norm_is_as_accurate_as_eager(dtype, device):
    x, residual = (rand(7, 96, dtype=dtype, device=device) for _ in range(2))
    weight = rand(96, dtype=dtype, device=device)

    def block(x, residual, weight, norm):
        total = (residual + x * 0.22) * 0.7
        return norm(total, weight), total

    result = normfuse.add_rms_norm(
        x, residual, weight, EPS, branch_scale=0.22, total_scale=torch.tensor(0.7, device=device)
    )

    expected = block(x, residual, weight, eager)
    exact = block(*doubles(x, residual, weight), formula)
    assert_as_close_as_eager(result.y, expected[0], exact[0])
    assert_as_close_as_eager(result.total, expected[1], exact[1])


@DTYPES
def test_rms_norm_add_is_as_accurate_as_eager(dtype, device):
    x, residual = (rand(7, 96, dtype=dtype, device=device) for _ in range(2))
    weight = rand(96, dtype=dtype, device=device)

    def block(x, residual, weight, norm):
        return (residual + norm(x, weight, 1.0) * 0.22) * 0.7

    total = normfuse.rms_norm_add(
        x, residual, weight, EPS, offset=1.0, branch_scale=0.22, total_scale=0.7
    )

    exact = block(*doubles(x, residual, weight), formula)
    assert_as_close_as_eager(total, block(x, residual, weight, eager), exact)


@DTYPES
def test_rms_norm_add_rms_norm_is_as_accurate_as_eager(dtype, device):
    x, residual = (rand(7, 96, dtype=dtype, device=device) for _ in range(2))
    weight_1, weight_2 = (rand(96, dtype=dtype, device=device) for _ in range(2))

    def block(x, residual, weight_1, weight_2, norm):
        total = (residual + norm(x, weight_1, 1.0, EPS) * 0.22) * 0.7
        return norm(total, weight_2, 0.5, 0.1), total

    scales = {"branch_scale": 0.22, "total_scale": 0.7}
    result = normfuse.rms_norm_add_rms_norm(
        x, residual, weight_1, weight_2, EPS, 0.1, offset_1=1.0, offset_2=0.5, **scales
    )

    expected = block(x, residual, weight_1, weight_2, eager)
    exact = block(*doubles(x, residual, weight_1, weight_2), formula)
    assert_as_close_as_eager(result.y, expected[0], exact[0])
    assert_as_close_as_eager(result.total, expected[1], exact[1])


def test_the_second_norm_takes_eps_and_offset_of_the_first():
    x, residual, weight = rand(3, 8), rand(3, 8), rand(8)

    short = normfuse.rms_norm_add_rms_norm(x, residual, weight, weight, 0.1, offset_1=1.0)
    full = normfuse.rms_norm_add_rms_norm(
        x, residual, weight, weight, 0.1, 0.1, offset_1=1.0, offset_2=1.0
    )

    assert torch.equal(short.y, full.y)


@DTYPES
@WEIGHTED
@pytest.mark.parametrize("shape", [(4, 64), (64,), (2, 3, 129), (1, 5377), (0, 8), (7, 1)], ids=str)
def test_the_default_plan_has_the_bits_of_torch(dtype, weighted, shape):
    x = rand(*shape, dtype=dtype)
    weight = rand(shape[-1], dtype=dtype) if weighted else None

    y = normfuse.rms_norm(x, weight, EPS)

    assert torch.equal(y, F.rms_norm(x, shape[-1:], weight, EPS))
    assert y.dtype == dtype


@DTYPES
def test_the_plan_before_weight_has_the_bits_of_llama(dtype):
    x, norm = rand(16, 64, dtype=dtype), LlamaRMSNorm(64, EPS).to(dtype)

    y = normfuse.rms_norm(x, norm.weight, EPS, plan=RoundingPlan.before_weight(dtype, dtype))

    assert torch.equal(y, norm(x))


def test_the_two_plans_differ_in_bfloat16():
    x, norm = rand(16, 64, dtype=torch.bfloat16), LlamaRMSNorm(64, EPS).bfloat16()

    y = normfuse.rms_norm(x, norm.weight, EPS)

    assert not torch.equal(y, norm(x))


def test_a_wider_weight_widens_the_result_of_llama():
    x, norm = rand(16, 64, dtype=torch.bfloat16), LlamaRMSNorm(64, EPS)

    y = normfuse.rms_norm(
        x, norm.weight, EPS, plan=RoundingPlan.before_weight(x.dtype, torch.float32)
    )

    assert torch.equal(y, norm(x))
    assert y.dtype == torch.float32


def test_a_wider_residual_widens_the_sum():
    x, residual, weight = rand(4, 64, dtype=torch.bfloat16), rand(4, 64), rand(64)

    y, total = normfuse.add_rms_norm(x, residual, weight, EPS)

    assert torch.equal(total, residual + x)
    assert torch.equal(y, F.rms_norm(residual + x, (64,), weight, EPS))


def layouts():
    """x, residual and weight as models pass them."""
    yield "contiguous", rand(2, 3, 8), rand(2, 3, 8), rand(8)
    yield "vector", rand(8), rand(8), rand(8)
    yield "transposed", rand(2, 4, 3, 8).transpose(1, 2), rand(2, 3, 4, 8), rand(8)
    yield "strided", rand(4, 16)[:, ::2], rand(4, 24)[:, 8:16], rand(16)[::2]
    yield "zero rows", rand(0, 8), rand(0, 8), rand(8)
    yield "mixed types", rand(4, 8, dtype=torch.bfloat16), rand(4, 8), rand(8, dtype=torch.float16)


LAYOUTS = pytest.mark.parametrize(
    ("x", "residual", "weight"), [pytest.param(*case, id=name) for name, *case in layouts()]
)


def once(x, weight):
    return str(RoundingPlan.once(x.dtype, weight.dtype))


@LAYOUTS
def test_opcheck_rms_norm(x, residual, weight):
    x, weight = leaves(x, weight)
    opcheck(RMS_NORM, (x, weight, None, EPS, 1.0, once(x, weight)))


@LAYOUTS
def test_opcheck_add_rms_norm(x, residual, weight):
    x, residual, weight, scale = leaves(x, residual, weight, rand(1))
    plan = once(x + residual, weight)
    opcheck(ADD_RMS_NORM, (x, residual, weight, None, scale, 0.22, None, EPS, 0.0, plan))


@LAYOUTS
def test_opcheck_rms_norm_add(x, residual, weight):
    x, residual, weight, scale = leaves(x, residual, weight, rand())
    plan = once(x, weight)
    opcheck(RMS_NORM_ADD, (x, residual, weight, scale, None, None, 0.7, EPS, 0.0, plan))


@LAYOUTS
def test_opcheck_rms_norm_add_rms_norm(x, residual, weight):
    x, residual, weight = leaves(x, residual, weight)
    norms = (EPS, 1.0, once(x, weight), EPS, 0.0, once(x + residual, weight))
    opcheck(
        RMS_NORM_ADD_RMS_NORM,
        (x, residual, weight, weight, None, None, None, None, *norms),
    )


def test_opcheck_with_eps_in_a_buffer_and_no_weight():
    (x,) = leaves(rand(4, 8, dtype=torch.bfloat16))
    plan = str(RoundingPlan.once(torch.bfloat16, None))
    opcheck(RMS_NORM, (x, None, torch.tensor(EPS), 0.0, 0.0, plan))


def plans_with_every_mean_and_root():
    wide = torch.float64
    return [
        str(RoundingPlan(wide, wide, (wide,), (wide, wide), wide, mean, root))
        for mean, root in itertools.product(MEANS, ROOTS)
    ]


@pytest.mark.parametrize("plan", plans_with_every_mean_and_root())
def test_gradcheck_rms_norm(plan):
    x, weight = leaves(*doubles(rand(2, 3, 5), rand(5)))

    assert torch.autograd.gradcheck(lambda *t: RMS_NORM(*t, None, EPS, 1.0, plan), (x, weight))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 1)], ids=str)
def test_gradcheck_rms_norm_of_other_shapes(shape):
    x, weight = leaves(*doubles(rand(*shape), rand(shape[-1])))

    assert torch.autograd.gradcheck(lambda *t: RMS_NORM(*t, None, EPS, 0.0, F64), (x, weight))


@pytest.mark.parametrize("op", [ADD_RMS_NORM, RMS_NORM_ADD], ids=["add_rms_norm", "rms_norm_add"])
def test_gradcheck_with_scale_tensors(op):
    inputs = leaves(*doubles(rand(3, 5), rand(3, 5), rand(5), rand(), rand(1)))

    assert torch.autograd.gradcheck(lambda *t: op(*t, 0.22, 0.7, EPS, 1.0, F64), inputs)


def test_gradcheck_rms_norm_add_rms_norm():
    inputs = leaves(*doubles(rand(3, 5), rand(3, 5), rand(5), rand(5), rand(1), rand()))
    norms = (EPS, 1.0, F64, 0.1, 0.5, F64)

    assert torch.autograd.gradcheck(lambda *t: RMS_NORM_ADD_RMS_NORM(*t, 0.22, 0.7, *norms), inputs)


def test_gradcheck_without_weights():
    inputs = leaves(*doubles(rand(3, 5), rand(3, 5)))

    assert torch.autograd.gradcheck(normfuse.add_rms_norm, inputs)
    assert torch.autograd.gradcheck(normfuse.rms_norm_add, inputs)
    assert torch.autograd.gradcheck(normfuse.rms_norm_add_rms_norm, inputs)


def sandwich(x, residual, weight_1, weight_2, norm=eager):
    total = residual + norm(x, weight_1, 1.0)
    return norm(total, weight_2, 1.0), total


@DTYPES
def test_gradients_are_as_accurate_as_eager(dtype, device):
    tensors = [rand(*s, dtype=dtype, device=device) for s in ((33, 96), (33, 96), (96,), (96,))]
    inputs = leaves(*tensors)
    upstream = [rand(33, 96, dtype=dtype, device=device) for _ in range(2)]

    results = normfuse.rms_norm_add_rms_norm(*inputs, EPS, offset_1=1.0)

    ours = torch.autograd.grad(results, inputs, upstream)
    plain = torch.autograd.grad(sandwich(*inputs), inputs, upstream)
    wide = leaves(*doubles(*inputs))
    exact = torch.autograd.grad(sandwich(*wide, norm=formula), wide, doubles(*upstream))
    for one, expected, reference in zip(ours, plain, exact, strict=True):
        assert_as_close_as_eager(one, expected, reference)
