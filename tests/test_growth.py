"""What our passes cost grows as the number of layers does. Work is counted, not timed."""

import sys
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from normfuse.backend import patches
from normfuse.passes import inductor
from tests.blocks import GemmaRMSNorm
from tests.rotary import BATCH, DIM, TOKENS, WIDTH, NormAfterTranspose


@contextmanager
def counting_calls(counts, name):
    """Adds the number of Python functions that are called to `counts[name]`."""

    def count(frame, event, argument):
        counts[name] = counts.get(name, 0) + (event == "call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)


def counted(hook, function, counts):
    def run(graph):
        with counting_calls(counts, hook):
            function(graph)

    return inductor.Hook(run, f"counted {hook}")


class Layer(nn.Module):
    """Attention with norms of the heads and RoPE, between the norms of a Gemma sandwich."""

    def __init__(self):
        super().__init__()
        self.attention = NormAfterTranspose()
        self.before, self.behind = GemmaRMSNorm(WIDTH), GemmaRMSNorm(WIDTH)

    def forward(self, x, cos, sin):
        branch = self.attention(self.before(x), cos, sin).reshape(x.shape)
        return x + self.behind(branch)


class PlainLayer(nn.Module):
    """Norms and RoPE apart, as in Llama: nothing but the norms stands in the residual stream."""

    def __init__(self):
        super().__init__()
        self.attention = NormAfterTranspose()
        self.attention.q_norm = self.attention.k_norm = nn.Identity()
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.before, self.behind = GemmaRMSNorm(WIDTH), GemmaRMSNorm(WIDTH)

    def forward(self, x, cos, sin):
        x = x + self.attention(self.before(x), cos, sin).reshape(x.shape)
        return x + self.mlp(self.behind(x))


class Model(nn.Module):
    def __init__(self, layer, num_layers):
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(num_layers))

    def forward(self, x, cos, sin):
        for layer in self.layers:
            x = layer(x, cos, sin)
        return x


def work(layer, num_layers):
    """Calls inside each pass of ours for a model of so many layers."""
    ours = patches(None, {"normfuse.lowering": "inline"})
    counts = {}
    hooks = {hook: counted(hook, ours[hook], counts) for hook in inductor.HOOKS}

    def backend(graph_module, example_inputs):
        return inductor.interpret_graph(graph_module, example_inputs, {**ours, **hooks})

    torch._dynamo.reset()
    x, table = torch.randn(BATCH, TOKENS, WIDTH), torch.randn(BATCH, 1, TOKENS, DIM)
    with torch.no_grad():
        compiled = torch.compile(Model(layer, num_layers), backend=backend, dynamic=False)
        compiled(x, table, table)
    return counts


@pytest.mark.parametrize("layer", [Layer, PlainLayer])
def test_twice_as_many_layers_are_twice_the_work(layer):
    work(layer, 1)  # fills torch's own caches, so that all models find them as full
    few, some, many = (work(layer, number) for number in (2, 4, 8))
    assert many["joint_custom_post_pass"] == few["joint_custom_post_pass"]  # training's alone
    for hook in set(inductor.HOOKS) - {"joint_custom_post_pass"}:
        two_layers, four_layers = some[hook] - few[hook], many[hook] - some[hook]
        assert 0 < four_layers < 2.1 * two_layers, hook
