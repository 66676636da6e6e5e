"""Models that are compiled in parts, in regions, in threads, and beside others."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import normfuse
from normfuse.explain import explain_with
from normfuse.testing import capture
from tests.blocks import GemmaBlock, LlamaBlock, LlamaRMSNorm, OlmoBlock, activation

# No code is generated, so that the results have eager's bits.
WITHOUT_CODE = {"disable_cpp_codegen": True}
OP = {"normfuse.lowering": "op", **WITHOUT_CODE}
GEMMA = ["rms_norm_add_rms_norm", "rms_norm_add_rms_norm", "rms_norm_add"]  # norms of one block


def inputs(rows=4):
    return activation(rows), activation(rows)


class Stack(nn.Module):
    """Two blocks, called by `call`."""

    def __init__(self, call=lambda block, x, residual: block(x, residual)):
        super().__init__()
        self.layers = nn.ModuleList([GemmaBlock(), GemmaBlock()])
        self.call = call

    def forward(self, x, residual):
        for layer in self.layers:
            x = self.call(layer, x, residual)
        return x


@torch.compiler.nested_compile_region
def call_as_a_region(block, x, residual):
    return block(x, residual)


class Broken(Stack):
    """What comes between the blocks cannot be captured."""

    def forward(self, x, residual):
        x = self.layers[0](x, residual)
        torch._dynamo.graph_break()
        return self.layers[1](x, residual)


def call_checkpointed(block, x, residual):
    return torch.utils.checkpoint.checkpoint(block, x, residual, use_reentrant=False)


@pytest.mark.guarantee
@torch.no_grad()
def test_a_graph_break_ends_a_chain_and_nothing_else():
    model, (x, residual) = Broken().bfloat16(), inputs()

    report = explain_with(model, (x, residual), options=OP)

    assert [site.op for site in report.sites] == [*GEMMA, *GEMMA]
    assert [site.graph for site in report.sites] == [0, 0, 0, 1, 1, 1]
    assert torch.equal(capture(model, lowering="op")(x, residual), model(x, residual))


@pytest.mark.guarantee
@pytest.mark.parametrize(
    ("lowering", "grad"),
    [("op", False), ("op", True), ("inline", False)],
    ids=["op", "op in training", "inline"],
)
def test_a_nested_region_is_rewritten_and_compiled_once(lowering, grad):
    model, (x, residual) = Stack(call_as_a_region).bfloat16(), inputs()
    x.requires_grad_(grad)
    options = {"normfuse.lowering": lowering, **WITHOUT_CODE}

    with torch.set_grad_enabled(grad):
        compiled = torch.compile(model, backend="normfuse", options=options, fullgraph=True)
        report = explain_with(model, (x, residual), options=options)
        assert torch.equal(compiled(x, residual), model(x, residual))

    assert [site.op for site in report.sites] == GEMMA
    assert {site.lowering for site in report.sites} == {lowering}


def test_the_report_knows_the_lowering_inside_a_checkpoint():
    model, (x, residual) = Stack(call_checkpointed).bfloat16(), inputs()

    report = explain_with(model, (x.requires_grad_(), residual), options=OP)

    assert [site.op for site in report.sites] == [*GEMMA, *GEMMA]
    assert {site.lowering for site in report.sites} == {"op"}


@pytest.mark.guarantee
@torch.no_grad()
def test_one_layer_may_be_compiled_for_all():
    model, (x, residual) = Stack().bfloat16(), inputs()
    expected, names = model(x, residual), list(model.state_dict())

    for layer in model.layers:
        layer.compile(backend="normfuse", options=OP, fullgraph=True)

    y = model(x, residual)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(model(x, residual), y)
    assert torch.equal(y, expected)
    assert list(model.state_dict()) == names


@pytest.mark.guarantee
@torch.no_grad()
def test_a_submodule_may_be_compiled_alone():
    model, (x, residual) = Stack().bfloat16(), inputs()
    expected = model(x, residual)

    model.layers[1] = torch.compile(model.layers[1], backend="normfuse", options=OP)

    assert torch.equal(model(x, residual), expected)


@pytest.mark.guarantee
def test_threads_may_compile_at_once():
    """Forward and backward, one set of options for several threads."""
    shared = [normfuse.options(lowering=lowering, **WITHOUT_CODE) for lowering in ("op", "inline")]
    jobs = [
        (block().bfloat16(), inputs(rows), shared[rows % 2])
        for rows, block in enumerate((GemmaBlock, LlamaBlock, OlmoBlock, GemmaBlock), start=2)
    ]

    def compile_and_compare(job):
        block, (x, residual), options = job
        y = torch.compile(block, options=options)(x, residual)
        y.float().sum().backward()
        return torch.equal(y, block(x, residual)) and all(
            weight.grad is not None for weight in block.parameters()
        )

    with ThreadPoolExecutor(len(jobs)) as pool:
        assert list(pool.map(compile_and_compare, jobs)) == [True] * len(jobs)


@pytest.mark.guarantee
@torch.no_grad()
def test_every_model_of_a_process_has_its_own_options():
    """The same norm and shapes, so that whatever was kept by graph alone would show."""
    norm, x = LlamaRMSNorm().bfloat16(), activation(64)
    fast, exact, none = (
        torch.compile(norm, backend="normfuse", options={**OP, **options})
        for options in ({"normfuse.numerics": "fast"}, {}, {"normfuse.rules": []})
    )
    other = torch.compile(LlamaRMSNorm().bfloat16(), backend="normfuse", options=OP)
    other(x)

    rounded_once = fast(x)

    for _ in range(2):
        assert torch.equal(exact(x), norm(x))
        assert torch.equal(none(x), norm(x))
        assert torch.equal(fast(x), rounded_once)
    assert not torch.equal(rounded_once, norm(x))
