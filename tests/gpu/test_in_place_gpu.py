"""Gradients written over those that they are made from, on a GPU: their bits, and the memory."""

import copy

import pytest
import torch
from torch import nn

import normfuse
from normfuse.ops import lowering
from normfuse.passes import memory
from tests import op_arguments
from tests.blocks import BranchBetweenNorms
from tests.kernels.inputs import BF16, F32, assert_same_bits
from tests.kernels.over_gradients import Over
from tests.kernels.test_in_place import BACKWARDS

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("width", [96, 2560])
@pytest.mark.parametrize("name", BACKWARDS)
def test_results_are_the_same_in_the_place_of_gradients(name, width, dtype, device, monkeypatch):
    """More rows than programs, so that some are read ahead while others are written."""
    monkeypatch.setattr(op_arguments, "ROWS", (4, 1024))
    monkeypatch.setattr(op_arguments, "WIDTH", min(width, 256) if name.startswith("qk") else width)
    op = getattr(torch.ops.normfuse, name).default
    with torch.device(device):
        arguments = op_arguments.of(op, dtype)
    used = (True,) * len(lowering.inline_form(op)(*arguments))
    expected = lowering.kernel_form(op, used, lambda kernel: kernel)(*copy.deepcopy(arguments))

    results = lowering.kernel_form(op, used, Over)(*arguments)

    assert_same_bits(list(results), list(expected))


def test_a_training_step_has_the_same_bits_and_needs_less_memory(device, monkeypatch):
    torch.manual_seed(0)
    layers = [
        nn.Linear(2560, 2560),
        *(BranchBetweenNorms(2560) for _ in range(3)),
        nn.RMSNorm(2560),
    ]
    model = nn.Sequential(*layers, nn.Linear(2560, 512)).to(device, BF16)
    x = torch.randn(4096, 2560, device=device, dtype=BF16)

    def step():
        torch._dynamo.reset()
        one = copy.deepcopy(model)
        compiled = torch.compile(one, options=normfuse.options(lowering="triton"))
        with torch._inductor.config.patch(force_disable_caches=True):
            compiled(x).sum().backward()  # compiles
        one.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        compiled(x).sum().backward()
        return [parameter.grad for parameter in one.parameters()], torch.cuda.max_memory_allocated()

    gradients, peak = step()
    monkeypatch.setattr(memory, "PLACES", {})
    others, other_peak = step()

    assert_same_bits(gradients, others)
    assert peak <= other_peak
