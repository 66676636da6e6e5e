"""torch.export, then AOTInductor with our options."""

import copy

import pytest
import torch

from normfuse.explain import explain_with
from normfuse.testing import capture
from tests.blocks import Gemma4ExpertsBlock, GemmaBlock, LlamaBlock, activation
from tests.export import package_block, run_elsewhere
from tests.float64 import assert_as_close_as_eager


@pytest.mark.guarantee
@torch.no_grad()
@pytest.mark.parametrize("block", [LlamaBlock, GemmaBlock, Gemma4ExpertsBlock])
def test_an_exported_graph_is_rewritten_as_the_model_is(block):
    """Export takes functions apart, and asserts the type of each value before it casts it."""
    model = block().bfloat16()
    inputs = [activation(2, 4) for _ in range(3 if block is Gemma4ExpertsBlock else 2)]
    exported = torch.export.export(model, tuple(inputs)).module()

    ops = [
        [site.op for site in explain_with(m, inputs, options={"normfuse.lowering": "op"}).sites]
        for m in (model, exported)
    ]

    assert ops[0] == ops[1]
    ours, eager = capture(exported, lowering="op")(*inputs), model(*inputs)
    assert all(map(torch.equal, *(as_tuple(value) for value in (ours, eager))))


def as_tuple(value):
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.guarantee
def test_a_package_runs_where_normfuse_is_not_imported(tmp_path):
    block, package, ops = package_block(tmp_path, "cpu", lowering="inline")
    pairs = [(activation(rows), activation(rows)) for rows in (4, 7)]

    results = run_elsewhere(package, pairs, tmp_path)

    assert ops == ["rms_norm_add_rms_norm", "rms_norm_add"]
    wide = copy.deepcopy(block).double()
    for y, (x, residual) in zip(results, pairs, strict=True):
        exact = wide(x.double(), residual.double())
        assert_as_close_as_eager(y, block(x, residual), exact)
