"""Training steps as Inductor would generate code for them, their launches interpreted."""

import copy

import pytest
import torch
from torch import nn

from normfuse.passes import memory
from tests.blocks import BranchBetweenNorms, GemmaRMSNorm
from tests.kernels import compiled
from tests.rotary import BATCH, TOKENS, WIDTH
from tests.test_memory import Turning

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_on_cpu")


class Attentions(nn.Module):
    """Two layers that turn by the same angles, each computed by the layer itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Turning(), Turning()])

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).transpose(1, 2).reshape(x.shape)
        return x


MODELS = {
    "a residual stream": lambda: nn.Sequential(
        nn.Linear(WIDTH, WIDTH),
        *(BranchBetweenNorms(WIDTH) for _ in range(3)),
        GemmaRMSNorm(WIDTH),
        nn.Linear(WIDTH, 8),
    ),
    "attention": Attentions,
}


def gradients(model, x, interpreter):
    """Of all parameters after one step, and the kernels that were launched."""
    launched = []
    torch._dynamo.reset()
    backend = compiled.backend(interpreter, launched)
    step(torch.compile(model, backend=backend, dynamic=False), x)
    return [parameter.grad for parameter in model.parameters()], launched


def step(function, x):
    function(x).float().square().sum().backward()


@pytest.mark.guarantee
@pytest.mark.parametrize("name", MODELS)
def test_memory_that_is_shared_and_written_over_changes_no_bit(name, interpreter, monkeypatch):
    torch.manual_seed(0)
    model = MODELS[name]().bfloat16()
    x = torch.randn(BATCH, TOKENS, WIDTH).bfloat16()

    ours, launched = gradients(copy.deepcopy(model), x, interpreter)
    monkeypatch.setattr(memory, "PLACES", {})
    apart, _ = gradients(copy.deepcopy(model), x, interpreter)
    exact = copy.deepcopy(model).double()
    step(exact, x.double())

    assert sum("backward" in kernel for kernel in launched) >= 2
    for one, other, parameter in zip(ours, apart, exact.parameters(), strict=True):
        assert torch.equal(one, other)
        error = (one.double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < 8 * torch.finfo(torch.bfloat16).eps
