"""Random programs keep the values, types, shapes, strides and writes of eager.

`NORMFUSE_FUZZ=5000 pytest tests/fuzz` draws that many programs, others at every run; without it,
the same few are drawn each time.
"""

import os
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch._dynamo.exc import BackendCompilerFailed

from normfuse.passes import inductor
from normfuse.passes.recognise import is_op
from normfuse.patterns.micro_ops import same_layout
from normfuse.testing import capture
from tests.fuzz.programs import NEAR_MISSES, heads, near_misses, programs

IS_LONG = "NORMFUSE_FUZZ" in os.environ
NUM_PROGRAMS = int(os.environ.get("NORMFUSE_FUZZ", 220))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight"),
    pytest.mark.timeout(0 if IS_LONG else 1800),  # a failure takes minutes to shrink
]


def fuzz(share):
    """Draw this share of all programs."""
    return settings(
        max_examples=max(1, round(share * NUM_PROGRAMS)),
        derandomize=not IS_LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@fuzz(0.6)
@given(st.one_of(programs(), heads()))
def test_programs_stay_as_eager(program):
    check(program)


@fuzz(0.2)
@given(st.one_of(programs(plain=True), heads(plain=True)))
def test_plain_programs_are_fused(program):
    graph = check(program)
    assert any(is_op(node) for node in graph.nodes)
    assert [str(node) for node in graph.nodes if is_statistic(node)] == []


@pytest.mark.parametrize("name", NEAR_MISSES)
@fuzz(0.2 / len(NEAR_MISSES))
@given(st.data())
def test_near_misses_are_left_alone(name, data):
    graph = check(data.draw(near_misses(name)))
    assert not any(is_op(node) for node in graph.nodes)


def check(program):
    """Compare a program with eager; returns its rewritten graph."""
    graphs = []

    def rewritten(function):
        return capture(function, lowering="op", post_grad_custom_post_pass=graphs.append)

    eager = run(program)
    try:
        ours = run(program, rewritten)
    except BackendCompilerFailed:
        run_without_us(program)
        raise
    if wrong := differences(ours, eager):
        known = differences(ours, run_without_us(program))
        assert not wrong.keys() & known.keys(), wrong
    return graphs[0]  # symbolic sizes make AOTAutograd compile the backward at once, too


def run(program, compiled=lambda function: function):
    """What a program returns, and its inputs afterwards."""
    torch._dynamo.reset()
    inputs = program.make_inputs()
    with (
        torch.set_grad_enabled(bool(program.learned)),
        torch._dynamo.config.patch(assume_static_by_default=not program.dynamic),
    ):
        results = compiled(program.function())(*inputs)
    return [*results, *(value for value in inputs if isinstance(value, torch.Tensor))]


def run_without_us(program):
    """The results of the graph as plain Inductor has it; a program that it refuses says nothing."""

    def backend(graph_module, example_inputs):
        return inductor.interpret_graph(graph_module, example_inputs, {})

    try:
        return run(program, partial(torch.compile, backend=backend))
    except BackendCompilerFailed:
        reject()


def differences(ours, theirs):
    """A sentence for each result that is not the same, by its position."""
    return {
        index: difference
        for index, pair in enumerate(zip(ours, theirs, strict=True))
        if (difference := _difference(*pair))
    }


def _difference(one, other):
    for name in ("dtype", "shape"):
        if getattr(one, name) != getattr(other, name):
            return f"{name} {getattr(one, name)} instead of {getattr(other, name)}"
    if other.requires_grad and not one.requires_grad:  # an op has one answer for all its results
        return "no gradient"
    if not same_layout(one, other):
        return f"strides {one.stride()} instead of {other.stride()}"
    unequal = (one != other) & ~(one.isnan() & other.isnan())
    return f"{int(unequal.sum())} of {one.numel()} elements differ" if unequal.any() else None


def is_statistic(node):
    """A part of an RMS statistic that no op has taken."""
    name = getattr(node.target, "_schema", None) and node.target._schema.name
    return name in ("aten::mean", "aten::rsqrt", "aten::sqrt", "aten::pow", "aten::var")
