"""Weights may change after compilation, in every way that training and serving know.

Nothing of a weight is folded into the compiled code, so the next call sees the new values, and
changed values alone compile nothing again.
"""

import pytest
import torch
from torch import nn

from normfuse.testing import capture
from tests import float64
from tests.blocks import GemmaRMSNorm, LlamaRMSNorm
from tests.float64 import assert_as_close_as_eager

WIDTH = 64


class Norms(nn.Module):
    """A Llama norm and, behind a sum, a Gemma norm."""

    def __init__(self):
        super().__init__()
        self.llama = LlamaRMSNorm(WIDTH)
        self.gemma = GemmaRMSNorm(WIDTH)

    def forward(self, x):
        return x + self.gemma(x + self.llama(x))

    def exact(self, x):
        total = x + float64.rms_norm(x, self.llama.weight, self.llama.variance_epsilon, 0.0)
        return x + float64.rms_norm(total, self.gemma.weight, self.gemma.eps, 1.0)


def data_copy(model):
    """How the weight loaders of serving engines write; it leaves `_version` as it was."""
    for weight in model.parameters():
        weight.data.copy_(torch.randn_like(weight))


def copy_under_no_grad(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))


def copy_under_inference_mode(model):
    with torch.inference_mode():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight))


def add_in_place(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)


def load_state_dict(model):
    model.load_state_dict(other_weights(model))


def load_state_dict_assign(model):
    model.load_state_dict(other_weights(model), assign=True)


def other_weights(model):
    return {name: torch.randn_like(weight) for name, weight in model.state_dict().items()}


def replace_the_parameters(model):
    for norm in (model.llama, model.gemma):
        norm.weight = nn.Parameter(torch.randn_like(norm.weight))


def replace_the_data(model):
    for weight in model.parameters():
        weight.data = torch.randn_like(weight)


def fused_adamw(model):
    adamw_step(model, fused=True)


def foreach_adamw(model):
    adamw_step(model, foreach=True)


def adamw_step(model, **implementation):
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    torch.optim.AdamW(model.parameters(), lr=0.5, **implementation).step()


UPDATES = (
    data_copy,
    copy_under_no_grad,
    copy_under_inference_mode,
    add_in_place,
    load_state_dict,
    load_state_dict_assign,
    replace_the_parameters,
    replace_the_data,
    fused_adamw,
    foreach_adamw,
)


@pytest.fixture(params=UPDATES, ids=lambda update: update.__name__)
def update(request):
    return request.param


@pytest.mark.parametrize("lowering", ["op", "inline"])
def test_the_rewritten_graph_sees_the_bits_of_new_weights(update, lowering):
    model, x = Norms().bfloat16(), torch.randn(16, WIDTH).bfloat16()
    compiled = capture(model, x, lowering=lowering)
    before = compiled(x)

    update(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x)

    assert torch.equal(after, model(x))
    assert not torch.equal(after, before)


@torch.no_grad()
@pytest.mark.parametrize("options", [None, {"normfuse.lowering": "op"}], ids=["default", "op"])
def test_the_compiled_model_sees_new_weights(update, options, device):
    model, x = Norms().bfloat16().to(device), torch.randn(16, WIDTH).bfloat16().to(device)
    compiled = torch.compile(model, backend="normfuse", options=options)
    before = compiled(x)

    with torch.enable_grad():
        update(model)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x)

    assert_as_close_as_eager(after, model(x), model.exact(x))
    assert not torch.equal(after, before)


def test_a_training_step_between_two_calls():
    model, x = Norms().bfloat16(), torch.randn(16, WIDTH).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)
    compiled = capture(model, x, lowering="op")

    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).float().square().sum().backward()
        optimizer.step()
        assert torch.equal(compiled(x), model(x))
