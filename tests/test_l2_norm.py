"""The L2 norm of linear attention: its rule, its op and its gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.library import opcheck

import normfuse
from normfuse.explain import explain_with
from normfuse.ops import L2_NORM, RoundingPlan
from normfuse.passes import inductor
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


def bounded(x):
    """Cosine attention, as Swin 2 has it, and the embeddings of CLIP."""
    return F.normalize(x, dim=-1)


def bounded_by_a_tensor(x):
    return x / torch.maximum(x.norm(dim=-1, keepdim=True), torch.tensor(3.0, dtype=x.dtype))


def bounded_in_float32(x):
    return F.normalize(x.float(), dim=-1, eps=5.0).type_as(x)


def bounded_step_by_step(x):
    return x / x.square().sum(-1, keepdim=True).sqrt().clamp_min(2.0)


def rounded(x):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-6)).type_as(x)


def of_exact_sums(dtype):
    """Rows of zeros, below, around and above the bounds, whose squares sum up without rounding."""
    lengths = torch.tensor([0.0, 2.0**-47, 0.25, 1.0, 4.0])[:, None, None]
    return (lengths * torch.randint(-3, 4, (2, 5, 3, WIDTH))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", [qwen3_next, kimi_linear, rounded, bounded_step_by_step])
def test_every_spelling_becomes_one_op_with_the_bits_of_eager(norm, dtype):
    x = torch.randn(2, 5, 3, WIDTH).to(dtype)
    if norm is bounded_step_by_step:
        x = of_exact_sums(dtype)
    with torch.no_grad():
        report = explain_with(norm, (x,), options={"normfuse.lowering": "op"})
        assert torch.equal(capture(norm, lowering="op")(x), norm(x))
    assert [(site.op, site.reason) for site in report.sites] == [("l2_norm", None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("norm", [bounded, bounded_by_a_tensor, bounded_in_float32])
def test_a_bounded_root_has_the_bits_of_the_graph_without_us(norm, dtype):
    """In float32, eager's own call on a CPU takes another root than its parts do."""
    x = of_exact_sums(dtype)

    def as_captured(graph_module, example_inputs):
        return inductor.interpret_graph(graph_module, example_inputs, {})

    with torch.no_grad():
        report = explain_with(norm, (x,), options={"normfuse.lowering": "op"})
        ours = capture(norm, lowering="op")(x)
        torch._dynamo.reset()
        assert torch.equal(ours, torch.compile(norm, backend=as_captured)(x))
        torch.testing.assert_close(ours, norm(x))
    assert [(site.op, site.reason) for site in report.sites] == [("l2_norm", None)]


@pytest.mark.parametrize(
    ("normalize", "reason"),
    [
        (
            lambda x: x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp(min=1e-6),
            "the root of a mean is clamped, where an eps would be added under it",
        ),
        (
            lambda x: x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt().clamp(min=1e-6),
            "an eps is added under the root, and another number bounds it",
        ),
        (
            lambda x: x / x.norm(dim=-1, keepdim=True).clamp(1e-6, 1.0),
            "the root is clamped, and does not divide the squared value itself",
        ),
        (
            lambda x: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6).clamp(min=1.0),
            "the root is clamped by more than one number from below",
        ),
        (
            lambda x: x * x.norm(dim=-1, keepdim=True).clamp(min=1e-6).reciprocal(),
            "the root is clamped, and does not divide the squared value itself",
        ),
        (
            lambda x: x / (x.norm(dim=-1, keepdim=True) * WIDTH**-0.5).clamp(min=1e-6),
            "the root is scaled before it divides: no plan has the rounding of that product",
        ),
    ],
)
def test_other_clamps_of_a_root_are_declined(normalize, reason):
    with torch.no_grad():
        report = explain_with(normalize, (torch.randn(2, WIDTH).bfloat16(),))
    assert [(site.op, site.reason) for site in report.sites] == [(None, reason)]


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


def test_gradients_of_a_bounded_root():
    """Rows that are shorter than the bound, longer, and of zeros."""
    x = torch.randn(4, 5, dtype=torch.float64) * torch.tensor([[1.0], [0.1], [0.0], [3.0]])
    plan = "f64 sum divide_by_sqrt bounded unit=f64 out=f64"

    def both(x):
        return L2_NORM(x, None, 0.7, plan)

    x.requires_grad_()
    assert gradcheck(both, x)
    (ours,) = torch.autograd.grad(both(x)[0].square().sum() + both(x)[0][:, 0].sum(), x)
    eager = F.normalize(x, dim=-1, eps=0.7)
    (theirs,) = torch.autograd.grad(eager.square().sum() + eager[:, 0].sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_a_bounded_root_in_training():
    """Spelled out before autograd, it is fused there, too; F.normalize is one call until after."""
    x = torch.randn(3, 4, WIDTH, requires_grad=True)
    report = explain_with(bounded_step_by_step, (x,), options={"normfuse.lowering": "op"})
    assert [site.op for site in report.sites] == ["l2_norm"]
    (ours,) = torch.autograd.grad(capture(bounded_step_by_step, lowering="op")(x)[..., 0].sum(), x)
    (eager,) = torch.autograd.grad(bounded_step_by_step(x)[..., 0].sum(), x)
    torch.testing.assert_close(ours, eager)


def test_in_eager_against_float64():
    x = torch.randn(7, WIDTH).bfloat16()
    truth = x.double() / (x.double().pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
    float64.assert_as_close_as_eager(normfuse.l2_norm(x), rounded(x), truth)


def test_plan_of_an_rms_norm():
    plan = RoundingPlan.once(torch.float32, None)
    with pytest.raises(ValueError, match="plan must be weightless with the mean 'sum'"):
        normfuse.l2_norm(torch.randn(2, 4), plan=plan)
