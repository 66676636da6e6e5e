"""Attention as Inductor would generate code for it, its launches interpreted: caches and copies."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from normfuse.passes import lower
from tests.cached_attention import Cached, CachedAt, ReturnsBoth, Uncached, inputs
from tests.kernels import compiled

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

STEPS = 3


def steps(model, arguments, interpreter):
    """The results of some steps, what the buffers hold then, and the kernels."""
    launched = []
    torch._dynamo.reset()
    function = torch.compile(model, backend=compiled.backend(interpreter, launched), dynamic=False)
    with torch.no_grad():
        results = [tree_leaves(function(*one)) for one in arguments]
    return tree_leaves(results), dict(model.named_buffers()), launched


@pytest.mark.guarantee
@pytest.mark.parametrize("normed", [True, False, "jointly"])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", [Cached, CachedAt, Uncached, ReturnsBoth])
def test_what_a_launch_writes_elsewhere_changes_no_bit(
    kind, tokens, normed, interpreter, monkeypatch
):
    torch.manual_seed(0)
    model = kind(normed=normed)
    arguments = [inputs(tokens) for _ in range(STEPS)]
    if kind is CachedAt:
        rows = torch.tensor([4, 0, -1])[:tokens]
        arguments = [(*one, rows + step) for step, one in enumerate(arguments)]

    found = steps(copy.deepcopy(model), arguments, interpreter)
    monkeypatch.setattr(lower, "copies_behind", lambda op: None)
    expected = steps(copy.deepcopy(model), arguments, interpreter)

    assert found[2] == expected[2] == ["qk_rms_norm_rope_kernel"] * STEPS
    for one, other in zip(found[0], expected[0], strict=True):
        assert torch.equal(one, other)
    for name, buffer in expected[1].items():
        assert torch.equal(found[1][name], buffer), name
    changed = [
        name
        for name, buffer in expected[1].items()
        if not torch.equal(buffer, dict(model.named_buffers())[name])
    ]
    written = {Cached: ["keys", "values", "length"], CachedAt: ["keys", "values"]}
    assert changed == written.get(kind, [])


class Layers(torch.nn.Module):
    """Layers that show the tables of a model in views of their own, as those of transformers do."""

    def __init__(self, normed):
        super().__init__()
        self.layers = torch.nn.ModuleList(Uncached(normed=normed) for _ in range(3))

    def forward(self, x, angles):
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        for layer in self.layers:
            heads = layer(x, cos.unsqueeze(1), sin.unsqueeze(1))
            x = x + heads.transpose(1, 2).flatten(2)[..., : x.shape[-1]]
        return x


@pytest.mark.guarantee
@pytest.mark.parametrize("normed", [True, False, "jointly"])
def test_tables_that_layers_share_change_no_bit(normed, interpreter, monkeypatch):
    torch.manual_seed(0)
    model, (x, *_) = Layers(normed), inputs(3)
    arguments = [(x, torch.randn(x.shape[0], 3, 16))]

    found = steps(copy.deepcopy(model), arguments, interpreter)
    monkeypatch.setattr(lower, "share_operands", lambda graph: None)
    expected = steps(copy.deepcopy(model), arguments, interpreter)

    assert found[2] == expected[2] == ["qk_rms_norm_rope_kernel"] * 3
    assert torch.equal(*found[0], *expected[0])
