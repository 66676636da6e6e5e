"""Training through `backend="normfuse"`: the gradients of eager, for everything that learns."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import float64
from tests.blocks import WIDTH, GemmaBlock, LlamaBlock, activation
from tests.float64 import assert_as_close_as_eager


def exact_llama(block, x, residual):
    total = x + residual
    unit = float64.rms_norm(total, block.norm.weight, block.norm.variance_epsilon, 0.0)
    return total + F.linear(unit, block.branch.weight)


def exact_gemma(block, x, residual):
    def norm(x, layer):
        return float64.rms_norm(x, layer.weight, layer.eps, 1.0)

    total = residual + norm(x, block.post_attention_layernorm)
    branch = F.linear(norm(total, block.pre_feedforward_layernorm), block.mlp.weight)
    return total + norm(branch, block.post_feedforward_layernorm)


class LearnedEps(nn.Module):
    """Nothing in the formula keeps eps from being a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.eps = nn.Parameter(torch.tensor(0.1))

    def forward(self, x, residual):
        x = x + residual
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


@pytest.mark.guarantee
@pytest.mark.parametrize("lowering", ["inline", "op"])
@pytest.mark.parametrize(
    ("block_class", "formula"),
    [(LlamaBlock, exact_llama), (GemmaBlock, exact_gemma), (LearnedEps, LearnedEps.forward)],
    ids=["llama", "gemma", "learned eps"],
)
def test_training_has_the_gradients_of_eager(block_class, formula, lowering, device):
    block = block_class().bfloat16().to(device)
    inputs = [activation(32).to(device).requires_grad_() for _ in range(2)]
    upstream = activation(32).to(device)

    model = torch.compile(block, backend="normfuse", options={"normfuse.lowering": lowering})
    ours = gradients(model, block, inputs, upstream)

    eager = gradients(block, block, inputs, upstream)
    wide = copy.deepcopy(block).double()
    wide_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    exact = gradients(lambda *t: formula(wide, *t), wide, wide_inputs, upstream.double())
    for one, expected, reference in zip(ours, eager, exact, strict=True):
        assert_as_close_as_eager(one, expected, reference)


def gradients(function, block, inputs, upstream):
    """The result, and the gradients of the inputs and weights."""
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, [*inputs, *block.parameters()], upstream)]
