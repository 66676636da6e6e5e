"""Every spelling of an RMSNorm becomes one op, and gives the bits of eager."""

import pytest
import torch
import torch.nn.functional as F

from normfuse.explain import explain_with
from normfuse.testing import capture

WIDTH = 48  # no power of two: a mean that is taken as a product with 1 / N rounds differently
EPS = 1e-6

# torch says that it is slower with operands of two types.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype")

WEIGHTED = {}
WEIGHTLESS = {}


def weighted(function):
    WEIGHTED[function.__name__] = function
    return function


def weightless(function):
    WEIGHTLESS[function.__name__] = function
    return function


# What multiplies, as the classes of transformers have it.


@weighted
def llama(x, w):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


@weighted
def llama4(x, w):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x) * w


@weighted
def t5(x, w):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + EPS)
    if w.dtype in (torch.float16, torch.bfloat16):
        x = x.to(w.dtype)
    return w * x


@weighted
def gemma(x, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1.0 + w.float())).type_as(x)


@weighted
def gemma_offset_in_the_weight_type(x, w):
    h = x.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x)
    return h * (w + 1)


@weighted
def gemma_offset_cast_after_the_sum(x, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * (1 + w).float()).type_as(x)


@weighted
def gemma4(x, w):
    h = x.float()
    h = h * torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.5)
    return (h * w.float()).type_as(x)


@weighted
def olmo2(x, w):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (w * h).to(x.dtype)


@weighted
def functional(x, w):
    return F.rms_norm(x, (WIDTH,), w, EPS)


@weighted
def functional_default_eps(x, w):
    return F.rms_norm(x, (WIDTH,), w)


@weightless
def functional_weightless(x):
    return F.rms_norm(x, (WIDTH,), eps=EPS)


@weighted
def functional_of_a_cast(x, w):
    """`RMSNorm` of torchtune."""
    return F.rms_norm(x.float(), (WIDTH,), w, EPS).to(x.dtype)


@weighted
def functional_of_a_cast_with_an_offset(x, w):
    """`RMSNorm` of Krea 2."""
    return F.rms_norm(x.float(), (WIDTH,), w.float() + 1.0, EPS).to(x.dtype)


@weighted
def functional_of_a_cast_that_stays_wide(x, w):
    return F.rms_norm(x.float(), (WIDTH,), w.float(), EPS)


@weighted
def functional_rounded_twice(x, w):
    """The call rounds, so that a cast behind it is another step."""
    return F.rms_norm(x, (WIDTH,), w, EPS).float(), x


@weightless
def functional_weightless_of_a_cast(x):
    return F.rms_norm(x.float(), (WIDTH,), eps=EPS).type_as(x)


@weightless
def weightless_rounded(x):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).type_as(x)


@weightless
def weightless_float32(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


@weightless
def deepseek_v4(x):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype)


# How the statistic is written.


@weightless
def product_with_itself(x):
    h = x.float()
    return h * torch.rsqrt((h * h).mean(-1, keepdim=True) + EPS)


@weightless
def positive_dimension(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(dim=x.dim() - 1, keepdim=True) + EPS)


@weightless
def eps_first(x):
    h = x.float()
    return h * torch.rsqrt(EPS + h.pow(2).mean(-1, keepdim=True))


@weightless
def without_eps(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))


@weightless
def divided_by_the_root(x):
    h = x.float()
    return h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


@weightless
def reciprocal_of_the_root(x):
    h = x.float()
    return h * (1 / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + EPS))


@weightless
def power_of_a_half(x):
    h = x.float()
    return h / (h.pow(2).mean(-1, keepdim=True) + EPS) ** 0.5


@weightless
def sum_divided(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / WIDTH + EPS)


@weightless
def sum_scaled(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) * (1 / WIDTH) + EPS)


@weightless
def sum_unsqueezed_then_divided(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).sum(-1).unsqueeze(-1) / WIDTH + EPS)


@weightless
def unsqueezed(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1).unsqueeze(-1) + EPS)


@weightless
def indexed_with_none(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1) + EPS)[..., None]


@weightless
def expanded(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS).expand_as(h)


@weightless
def repeated_casts(x):
    return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)


@weightless
def in_place(x):
    h = x.float() * 2
    variance = h.pow(2).mean(-1, keepdim=True).add_(EPS)
    return h.mul_(variance.rsqrt_())


@weightless
def eps_in_a_tensor(x):
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + torch.tensor(EPS))


@weighted
def view_before_the_weight(x, w):
    h = x.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return h.view(-1, WIDTH) * w


@weighted
def weight_as_a_row(x, w):
    h = x.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)
    return h * w.view(1, -1)


@weighted
def inverse_root_used_again(x, w):
    h = x.float()
    rstd = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
    return (h * rstd).to(x.dtype) * w, rstd


@weightless
def rounded_inverse_root_used_again(x):
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS).to(x.dtype)
    return x * rstd, rstd


def check(function, *inputs, grad=False):
    with torch.set_grad_enabled(grad):
        eager = as_tuple(function(*inputs))
        report = explain_with(function, inputs, options={"normfuse.lowering": "op"})
        rewritten = as_tuple(capture(function, lowering="op")(*inputs))
    assert [(site.op, site.reason) for site in report.sites] == [("rms_norm", None)]
    assert "rsqrt" not in report.after
    for ours, theirs in zip(rewritten, eager, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spelling", WEIGHTED)
def test_with_a_weight(spelling, dtype):
    check(WEIGHTED[spelling], torch.randn(5, 7, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spelling", WEIGHTLESS)
def test_without_a_weight(spelling, dtype):
    check(WEIGHTLESS[spelling], torch.randn(5, 7, WIDTH).to(dtype))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.float32, torch.bfloat16),  # Mamba's residual stream
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float16),
        (torch.float64, torch.float64),
    ],
)
@pytest.mark.parametrize("spelling", ["llama", "gemma", "olmo2"])
def test_with_mixed_types(spelling, x, weight):
    check(WEIGHTED[spelling], torch.randn(5, 7, WIDTH).to(x), torch.randn(WIDTH).to(weight))


@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 3), (2, 3, 4, 5)], ids=str)
def test_with_any_rank(shape):
    check(llama, torch.randn(*shape, WIDTH).bfloat16(), torch.randn(WIDTH).bfloat16())


@pytest.mark.parametrize(
    "spelling", ["functional_of_a_cast", "functional_of_a_cast_with_an_offset"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_call_on_a_cast_with_gradients(spelling, dtype):
    def gradients(function):
        generator = torch.Generator().manual_seed(0)
        x, w = (torch.randn(*size, WIDTH, generator=generator) for size in ((5, 7), ()))
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, w)]
        y = function(*leaves)
        return y, *torch.autograd.grad(y.float().square().sum(), leaves)

    ours = gradients(capture(WEIGHTED[spelling], lowering="op"))

    check(WEIGHTED[spelling], torch.randn(5, 7, WIDTH).to(dtype), torch.randn(WIDTH).to(dtype))
    for one, other in zip(ours, gradients(WEIGHTED[spelling]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_call_on_a_cast_joins_the_sum_before_it():
    def block(x, residual, w):
        total = x + residual
        return functional_of_a_cast(total, w), total

    inputs = [torch.randn(5, WIDTH).bfloat16() for _ in range(2)] + [torch.randn(WIDTH).bfloat16()]
    with torch.no_grad():
        report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
        rewritten = capture(block, lowering="op")(*inputs)

        assert [site.op for site in report.sites] == ["add_rms_norm"]
        for ours, theirs in zip(rewritten, block(*inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_eps_before_the_mean_of_a_single_row():
    check(eps_first, torch.randn(WIDTH, requires_grad=True), grad=True)


def test_with_transposed_heads():
    heads = torch.randn(2, 5, 4, WIDTH).bfloat16().transpose(1, 2)
    check(gemma, heads, torch.randn(WIDTH).bfloat16())


def sum_as_weight(x, residual):
    total = x + residual
    return llama(total, total)


def sandwich_sum_as_weight(x, residual):
    total = residual + llama(x, residual)
    return llama(total, total)


@pytest.mark.parametrize("block", [sum_as_weight, sandwich_sum_as_weight])
def test_sum_that_is_its_own_weight(block):
    x, residual = torch.randn(WIDTH), torch.randn(WIDTH)
    with torch.no_grad():
        assert torch.equal(capture(block, lowering="op")(x, residual), block(x, residual))
