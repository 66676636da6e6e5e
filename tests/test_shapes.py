"""Shapes that change between calls: rows come and go, zero and one included."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from normfuse.passes.recognise import Recognise
from tests.blocks import WIDTH, GemmaBlock, LlamaBlock, activation
from tests.float64 import assert_as_close_as_eager

# No code is generated, so that the results have eager's bits.
OP = {"normfuse.lowering": "op", "disable_cpp_codegen": True}
INLINE = {"normfuse.lowering": "inline", "disable_cpp_codegen": True}
ROWS = (5, 3, 17, 1, 0, 2)


def block_and_calls(grad=False, **options):
    """A block, and a function that says whether its compiled form equals it for so many rows."""
    block = GemmaBlock().bfloat16()
    compiled = torch.compile(block, backend="normfuse", **options)

    def equal(rows, mark=None):
        inputs = [activation(rows), activation(rows)]
        for value in inputs if mark is not None else ():
            mark(value, 0)
        if grad:
            return same_gradients(compiled, block, [x.requires_grad_() for x in inputs])
        with torch.no_grad():
            return torch.equal(compiled(*inputs), block(*inputs))

    return equal


def same_gradients(compiled, block, inputs):
    """Eager's bits forward, and gradients of the inputs as near to float64's as eager's are."""
    assert torch.equal(compiled(*inputs), block(*inputs))
    wide = [x.detach().double().requires_grad_() for x in inputs]
    gradients = (
        torch.autograd.grad(function(*values).sum(), values)
        for function, values in (
            (compiled, inputs),
            (block, inputs),
            (copy.deepcopy(block).double(), wide),
        )
    )
    for ours, theirs, exact in zip(*gradients, strict=True):
        assert_as_close_as_eager(ours, theirs, exact)
    return True


@pytest.mark.guarantee
@pytest.mark.parametrize("options", [OP, INLINE], ids=["op", "inline"])
def test_rows_that_turn_out_to_change(options):
    equal = block_and_calls(options=options)

    assert all(map(equal, ROWS))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert all(map(equal, (*ROWS, 31)))


@pytest.mark.guarantee
def test_rows_that_are_known_to_change_compile_once():
    counters.clear()
    equal = block_and_calls(options=OP, dynamic=True)

    assert all(map(equal, (5, 3, 17, 2)))
    assert counters["stats"]["unique_graphs"] == 1
    assert equal(1)
    assert equal(0)


@pytest.mark.guarantee
@pytest.mark.parametrize("mark", [torch._dynamo.mark_dynamic, torch._dynamo.maybe_mark_dynamic])
def test_marked_rows_compile_once(mark):
    equal = block_and_calls(options=OP)

    assert equal(5, mark)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert equal(3, mark)
        assert equal(17, mark)


@pytest.mark.guarantee
def test_one_graph_for_every_number_of_rows_if_they_are_unbacked():
    equal = block_and_calls(options=OP, fullgraph=True)

    assert equal(7, torch._dynamo.decorators.mark_unbacked)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert all(map(equal, ROWS))


@pytest.mark.guarantee
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_rows_that_change_in_training(dynamic):
    equal = block_and_calls(grad=True, options=OP, dynamic=dynamic)

    assert all(map(equal, (5, 3, 0)))


@pytest.mark.guarantee
def test_an_axis_that_changes_before_the_rows():
    block = GemmaBlock().bfloat16()
    compiled = torch.compile(block, backend="normfuse", options=OP, dynamic=True)

    with torch.no_grad():
        for shape in ((2, 3), (4, 5), (3, 0)):
            x, residual = torch.randn(2, *shape, WIDTH).bfloat16()
            assert torch.equal(compiled(x, residual), block(x, residual)), shape


@pytest.mark.parametrize("block", [LlamaBlock, GemmaBlock])
def test_a_variable_eps_is_computed_before_it_is_read(block, monkeypatch):
    """`dynamic=True` makes a number of each eps, which stands behind the sum that the op begins."""
    original = Recognise.__call__
    checked = []

    def checking(self, graph, *arguments):
        sites = original(self, graph, *arguments)
        graph.lint()
        checked.append(graph)
        return sites

    monkeypatch.setattr(Recognise, "__call__", checking)
    compiled = torch.compile(block(), backend="normfuse", options=OP, dynamic=True)
    with torch.no_grad():
        compiled(activation(4).float(), activation(4).float())
    assert checked
