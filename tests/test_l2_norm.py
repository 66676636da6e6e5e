"""The L2 norm of linear attention: its rule, its op and its gradients."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

import normfuse
from normfuse.explain import explain_with
from normfuse.ops import L2_NORM, RoundingPlan
from normfuse.testing import capture
from tests import float64

WIDTH = 48
PLAN = "f32 sum unit=f32>bf16 out=bf16"


def qwen3_next(x):
    """`l2norm` of Qwen3-Next: multiplied by the inverse root."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def kimi_linear(x):
    """`l2norm` of Kimi Linear: divided by the root."""
    return x / torch.sqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def rounded(x):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-6)).type_as(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", [qwen3_next, kimi_linear, rounded])
def test_every_spelling_becomes_one_op_with_the_bits_of_eager(norm, dtype):
    x = torch.randn(2, 5, 3, WIDTH).to(dtype)
    with torch.no_grad():
        report = explain_with(norm, (x,), options={"normfuse.lowering": "op"})
        assert torch.equal(capture(norm, lowering="op")(x), norm(x))
    assert [(site.op, site.reason) for site in report.sites] == [("l2_norm", None)]


def test_a_factor_behind_it_is_no_weight():
    def scaled(x, weight):
        return rounded(x) * weight

    x, weight = torch.randn(5, WIDTH).bfloat16(), torch.randn(WIDTH).bfloat16()
    with torch.no_grad():
        report = explain_with(scaled, (x, weight), options={"normfuse.lowering": "op"})
        assert torch.equal(capture(scaled, lowering="op")(x, weight), scaled(x, weight))
    assert [site.op for site in report.sites] == ["l2_norm"]


def test_left_out_by_an_option():
    with torch.no_grad():
        report = explain_with(
            rounded, (torch.randn(5, WIDTH).bfloat16(),), options={"normfuse.skip": ["l2_norm"]}
        )
    assert [site.reason for site in report.sites] == ["the options leave out the rule l2_norm"]


def test_opcheck():
    x = torch.randn(3, WIDTH).bfloat16().requires_grad_()
    assert set(opcheck(L2_NORM, (x, None, 1e-6, PLAN)).values()) == {"SUCCESS"}


@pytest.mark.parametrize("root", ["rsqrt", "divide_by_sqrt"])
def test_gradients(root):
    plan = f"f64 sum {root} unit=f64 out=f64".replace(" rsqrt", "")
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: L2_NORM(x, None, 1e-6, plan), x)


def test_in_eager_against_float64():
    x = torch.randn(7, WIDTH).bfloat16()
    truth = x.double() / (x.double().pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    float64.assert_as_close_as_eager(normfuse.l2_norm(x), rounded(x), truth)


def test_plan_of_an_rms_norm():
    plan = RoundingPlan.once(torch.float32, None)
    with pytest.raises(ValueError, match="plan must be weightless with the mean 'sum'"):
        normfuse.l2_norm(torch.randn(2, 4), plan=plan)
