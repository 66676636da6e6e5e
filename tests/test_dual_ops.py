"""The ops of two branches: how the dispatcher sees them, gradients, eager, refusals."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

import normfuse
from normfuse import RoundingPlan
from normfuse.ops import DUAL_RMS_NORM_ADD, DUAL_RMS_NORM_ADD_RMS_NORM
from tests import float64

LAYOUTS = {
    "contiguous": lambda: [torch.randn(2, 3, 8) for _ in range(3)],
    "a vector": lambda: [torch.randn(8) for _ in range(3)],
    "no rows": lambda: [torch.randn(0, 8) for _ in range(3)],
    "transposed": lambda: [
        torch.randn(2, 4, 3, 8).transpose(1, 2),
        torch.randn(2, 3, 4, 8),
        torch.randn(2, 3, 4, 16)[..., 8:],
    ],
    "mixed types": lambda: [torch.randn(4, 8).bfloat16(), torch.randn(4, 8), torch.randn(4, 8)],
}
PLAN = "f32 unit=f32 weight=f32 out=f32"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("op", "count"), [(DUAL_RMS_NORM_ADD, 3), (DUAL_RMS_NORM_ADD_RMS_NORM, 4)], ids=str
)
def test_opcheck(op, count, layout):
    tensors = [tensor.requires_grad_() for tensor in LAYOUTS[layout]()]
    weights = [torch.randn(8, requires_grad=True) for _ in range(count)]
    scales = (None, torch.randn(1, requires_grad=True), 0.22, None)
    checks = opcheck(op, (*tensors, *weights, *scales, *(1e-6, 1.0, PLAN) * count))
    assert set(checks.values()) == {"SUCCESS"}


def doubles(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize(
    ("op", "count"), [(DUAL_RMS_NORM_ADD, 3), (DUAL_RMS_NORM_ADD_RMS_NORM, 4)], ids=str
)
@pytest.mark.parametrize("scales_learn", [True, False])
def test_gradients(op, count, scales_learn):
    plan = "f64 unit=f64 weight=f64 out=f64"
    norms = [(1e-5, 1.0, plan), (0.1, 0.0, plan), (0.2, 0.5, plan), (0.3, 0.25, plan)][:count]
    inputs = doubles(*[(3, 5)] * 3, *[5] * count, 1, ())
    for scale in inputs[-2:]:
        scale.requires_grad_(scales_learn)

    def every_result(*tensors):
        return op(*tensors, 0.22, 0.7, *(value for norm in norms for value in norm))

    assert gradcheck(every_result, inputs)
    assert gradcheck(lambda *tensors: every_result(*tensors)[-1], inputs)
    assert gradcheck(lambda *tensors: sum(every_result(*tensors)[: count - 2]), inputs)


@pytest.mark.parametrize(
    ("op", "count"), [(DUAL_RMS_NORM_ADD, 3), (DUAL_RMS_NORM_ADD_RMS_NORM, 4)], ids=str
)
def test_gradients_of_gradients(op, count):
    plan = "f64 unit=f64 weight=f64 out=f64"
    norms = (0.1, 1.0, plan) * count
    inputs = doubles(*[(2, 3)] * 3, *[3] * count)

    assert gradgradcheck(lambda *t: op(*t, None, None, 0.7, 0.3, *norms)[0], inputs)


def test_the_same_gradients_whether_a_scale_learns():
    tensors = [t.requires_grad_() for t in LAYOUTS["transposed"]()]
    weights = [torch.randn(8, requires_grad=True) for _ in range(4)]
    inputs, upstream = (*tensors, *weights), torch.randn(2, 3, 4, 8)

    def gradients(scale):
        y, total = normfuse.dual_rms_norm_add_rms_norm(*tensors, weights, total_scale=scale)
        return torch.autograd.grad((y * total).sum() + (total * upstream).sum(), inputs)

    by_the_op, plain = (gradients(torch.tensor(0.7, requires_grad=b)) for b in (False, True))

    for one, other in zip(by_the_op, plain, strict=True):
        # Sums of 24 rows in float32, in two orders, behind sums of 8 columns.
        rounding = (24 + 3 * 8) * torch.finfo(torch.float32).eps
        assert (one - other).abs().max() <= rounding * other.abs().max()


def test_gradients_without_weights():
    inputs = doubles(*[(3, 5)] * 3)

    assert gradcheck(normfuse.dual_rms_norm_add, inputs)
    assert gradcheck(normfuse.dual_rms_norm_add_rms_norm, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_in_eager_against_float64(dtype):
    x_1, x_2, residual = (torch.randn(7, 96).to(dtype) for _ in range(3))
    weights = [torch.randn(96).to(dtype) for _ in range(4)]

    def chain(x_1, x_2, residual, norm):
        branch = norm(x_1, weights[0]) + norm(x_2, weights[1])
        total = (residual + norm(branch, weights[2]) * 0.22) * 0.7
        return norm(total, weights[3]), total

    settings = {"offset": 1.0, "branch_scale": 0.22, "total_scale": torch.tensor(0.7).to(dtype)}
    y, total = normfuse.dual_rms_norm_add_rms_norm(x_1, x_2, residual, weights, **settings)
    alone = normfuse.dual_rms_norm_add(x_1, x_2, residual, weights[:3], **settings)

    assert torch.equal(alone, total)
    settings["total_scale"] = 0.7
    eager = chain(x_1, x_2, residual, lambda x, w: normfuse.rms_norm(x, w, offset=1.0))
    wide = (x_1.double(), x_2.double(), residual.double())
    exact = chain(*wide, lambda x, w: float64.rms_norm(x, w, 1e-6, 1.0))
    float64.assert_as_close_as_eager(y, eager[0], exact[0])
    float64.assert_as_close_as_eager(total, eager[1], exact[1])


X = torch.ones(2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        pytest.param(
            lambda: normfuse.dual_rms_norm_add(X, X[:1], X),
            "x_2 must have the shape of x_1, (2, 8), got (1, 8): expand it before the call",
            id="the other branch",
        ),
        pytest.param(
            lambda: normfuse.dual_rms_norm_add_rms_norm(X, X, X, [None] * 3),
            "weights must have one entry for each of the 4 norms, got 3: "
            "leave it out where the default serves, or pass them all",
            id="too few weights",
        ),
        pytest.param(
            lambda: normfuse.dual_rms_norm_add(X, X, X, plans=[]),
            "plans must have one entry for each of the 3 norms, got 0: "
            "leave it out where the default serves, or pass them all",
            id="no plans",
        ),
        pytest.param(
            lambda: normfuse.dual_rms_norm_add(X, X, X, [None, X, None]),
            "weights[1] must have shape (8,), got (2, 8): pass the weight of the normalised axis",
            id="a weight of two dimensions",
        ),
        pytest.param(
            lambda: normfuse.dual_rms_norm_add(
                X, X, X, plans=[RoundingPlan.once(X.dtype, X.dtype)] * 3
            ),
            "plans[0] must have no weight types for this call, got "
            "'f32 unit=f32 weight=f32 out=f32': build it for the weight that is passed",
            id="a plan with a weight that is missing",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011  (the whole message is compared)
        call()
    assert str(raised.value) == message
