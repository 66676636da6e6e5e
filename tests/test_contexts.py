"""Norms inside autocast, activation checkpointing and control flow."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from normfuse.explain import explain_with
from normfuse.testing import capture
from tests import blocks

BLOCKS = [
    (blocks.LlamaBlock, ["add_rms_norm"]),
    (blocks.GemmaBlock, ["rms_norm_add_rms_norm", "rms_norm_add_rms_norm", "rms_norm_add"]),
    (blocks.OlmoBlock, ["rms_norm_add"]),
    (blocks.GraniteBlock, ["add_rms_norm"]),
]


def inputs(dtype=torch.float32):
    return tuple(torch.randn(4, blocks.WIDTH, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("block", "ops"), BLOCKS)
def test_autocast_keeps_eagers_bits(block, ops, grad):
    module, (x, residual) = block(), inputs()

    def forward(x, residual):
        with torch.autocast("cpu", torch.bfloat16):
            return module(x, residual)

    with torch.set_grad_enabled(grad):
        eager = forward(x, residual)
        rewritten = capture(forward, lowering="op")(x, residual)
        report = explain_with(forward, (x, residual), options={"normfuse.lowering": "op"})

    assert [site.op for site in report.sites] == ops
    pairs = zip(flat(rewritten), flat(eager), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def flat(value):
    return value if isinstance(value, tuple) else (value,)


def test_a_checkpointed_block_is_rewritten_and_has_eagers_gradients():
    module = blocks.GemmaBlock()
    x, residual = inputs()

    def forward(module, x, residual):
        return checkpoint(module, x, residual, use_reentrant=False)

    def gradients(function, module, x, residual):
        x = x.clone().requires_grad_()
        loss = function(module, x, residual).square().sum()
        return torch.autograd.grad(loss, [x, *module.parameters()])

    compiled = torch.compile(forward, backend="normfuse", options={"normfuse.lowering": "op"})
    ours = gradients(compiled, module, x, residual)
    eager = gradients(forward, module, x, residual)
    exact = gradients(forward, copy.deepcopy(module).double(), x.double(), residual.double())

    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        limit = 2 * (theirs - truth).abs().max() + 2**-23 * truth.abs().max()
        assert (mine - truth).abs().max() <= limit
    report = explain_with(forward, (module, x, residual), options={"normfuse.lowering": "op"})
    assert [site.fused for site in report.sites] == [True, True, True]


def test_inductor_may_rewrite_the_backward_of_a_captured_graph():
    norm = blocks.LlamaRMSNorm()
    x, weight = inputs()[0], torch.randn(2, blocks.WIDTH, blocks.WIDTH, requires_grad=True)

    def forward(x):  # the gradient of `unit` is a sum of two products, which becomes one addmm
        unit = norm(x)
        return unit @ weight[0] + unit @ weight[1]

    def gradient(function):
        return torch.autograd.grad(function(x).sum(), weight)[0]

    assert torch.equal(gradient(capture(forward, lowering="op")), gradient(forward))


def test_a_branch_of_torch_cond():
    norm = blocks.LlamaRMSNorm()
    x, _ = inputs()

    def forward(x):
        return torch.cond(x.sum() > 0, norm, lambda x: x * 2, (x,))

    with torch.no_grad():
        rewritten = capture(forward, lowering="op")
        for value in (x.abs(), -x.abs()):
            assert torch.equal(rewritten(value), forward(value))
