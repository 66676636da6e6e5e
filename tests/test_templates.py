"""A tensor that only lends its type to a cast does not stand in the way of a match."""

import pytest
import torch
from torch import nn

from normfuse.explain import explain_with
from normfuse.testing import capture
from tests import rotary


class RMSNorm(nn.Module):
    """`RMSNorm` of OLMo-core: the weight is cast to the type of the value that it multiplies."""

    def __init__(self, width, cast):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)
        self.cast = cast

    def forward(self, x):
        dtype = x.dtype
        x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (self.cast(self.weight, x) * x).to(dtype)


def by_type_as(weight, x):
    return weight.type_as(x)


def by_to(weight, x):
    return weight.to(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("cast", [by_type_as, by_to])
def test_a_weight_cast_like_what_it_multiplies(cast, dtype):
    norm = RMSNorm(48, cast).to(dtype)
    inputs = [torch.randn(5, 48).to(dtype) for _ in range(2)]

    def block(x, residual):
        return residual + norm(x)

    with torch.no_grad():
        report = explain_with(block, inputs, options={"normfuse.lowering": "op"})

        assert torch.equal(capture(block, lowering="op")(*inputs), block(*inputs))
    assert [site.op for site in report.sites] == ["rms_norm_add"]


def test_rope_that_is_cast_like_the_queries():
    def cast_like_x(x, cos, sin):
        return rotary.cohere(x.float(), cos, sin).type_as(x)

    block = rotary.Attention(cast_like_x).bfloat16()
    inputs = (rotary.hidden_states(), *rotary.tables())

    with torch.no_grad():
        report = explain_with(block, inputs, options={"normfuse.lowering": "op"})

        assert torch.equal(capture(block, lowering="op")(*inputs), block(*inputs))
    assert [site.op for site in report.sites] == ["qk_rms_norm_rope"] * 2
