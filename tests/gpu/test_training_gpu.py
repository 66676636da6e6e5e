"""Training on a GPU as people do it: autocast, with a scaled loss in float16, and checkpoints."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import normfuse
from normfuse.explain import explain_with
from tests.blocks import GemmaBlock, GemmaRMSNorm, LlamaBlock, activation
from tests.test_training_contexts import assert_as_close_as_eager, step

pytestmark = pytest.mark.gpu
HALVES = [torch.bfloat16, torch.float16]


class CastlessNorm(GemmaRMSNorm):
    """Nobody casts but autocast, which wants the power, the sum and the root in float32."""

    def forward(self, x):
        return self._norm(x) * (1.0 + self.weight)


class CastlessBlock(GemmaBlock):
    """Norms behind a projection, whose result is half precision under autocast."""

    def __init__(self):
        super().__init__()
        self.post_feedforward_layernorm = CastlessNorm()


class FunctionalBlock(LlamaBlock):
    """`torch.nn.RMSNorm` in the place of the norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-6)


BLOCKS = [LlamaBlock, GemmaBlock, CastlessBlock, FunctionalBlock]


def inputs_on(device):
    return [activation(64).float().to(device).requires_grad_() for _ in range(2)]


def under(dtype, block):
    def half(x, residual):
        with torch.autocast("cuda", dtype):
            return block(x, residual).float()

    return half


@pytest.mark.guarantee
@pytest.mark.parametrize("lowering", ["inline", "triton"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block_class", BLOCKS)
def test_autocast(block_class, dtype, lowering, device):
    block, inputs = block_class().to(device), inputs_on(device)
    half = under(dtype, block)
    compiled = torch.compile(half, options=normfuse.options(lowering=lowering))

    ours, eager = (step(f, block.parameters(), *inputs) for f in (compiled, half))

    assert_as_close_as_eager(ours, eager, step(block, block.parameters(), *inputs), dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("block_class", BLOCKS)
def test_the_report_under_autocast_leaves_no_norm_without_a_word(block_class, dtype, device):
    report = explain_with(under(dtype, block_class().to(device)), inputs_on(device))

    assert report.num_sites == (1 if issubclass(block_class, LlamaBlock) else 3)
    assert all(site.fused or site.reason for site in report.sites)


@pytest.mark.guarantee
def test_a_scaled_loss(device):
    """float16, and the gradients that a scaler gives back to the optimizer."""
    block, inputs = GemmaBlock().to(device), inputs_on(device)
    half = under(torch.float16, block)

    def unscaled(function):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**12)
        optimizer = torch.optim.AdamW(block.parameters(), lr=0.0, fused=True)
        optimizer.zero_grad()
        scaler.scale(function(*inputs).square().mean()).backward()
        scaler.unscale_(optimizer)
        gradients = [p.grad.clone() for p in block.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**12  # nothing was infinite
        return gradients

    compiled = torch.compile(half, options=normfuse.options(lowering="triton"))
    assert_as_close_as_eager(*map(unscaled, (compiled, half, block)), torch.float16)


@pytest.mark.guarantee
def test_a_checkpoint(device):
    block, inputs = GemmaBlock().to(device), inputs_on(device)

    def checkpointed(x, residual):
        return checkpoint(under(torch.bfloat16, block), x, residual, use_reentrant=False)

    compiled = torch.compile(checkpointed, options=normfuse.options(lowering="triton"))
    functions = (compiled, checkpointed, block)
    results = [step(function, block.parameters(), *inputs) for function in functions]

    assert_as_close_as_eager(*results, torch.bfloat16)
