"""The values of a form's copies: what running them on fakes gives, and no alias of another copy."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves

from normfuse.ops import QK_RMS_NORM_ROPE, RMS_NORM
from normfuse.passes.lower import Lower
from normfuse.settings import Settings

LLAMA = "f32 unit=f32>bf16 weight=bf16 out=bf16"


def turned(qkv, weight, cos, sin):
    """Heads of q and k, turned by tables: slices of one projection, k at an offset."""
    q, k = qkv[:, :, :4].transpose(1, 2), qkv[:, :, 4:].transpose(1, 2)
    turns = ["half 16 in=bf16 out=bf16"] * 2
    numbers = ([1e-6] * 2, [0.0] * 2)
    return QK_RMS_NORM_ROPE([q, k], [weight] * 2, cos, sin, *numbers, [LLAMA] * 2, turns)[:2]


def two_layers(first, second, weight, cos, sin):
    """The same form twice; the inputs of the second site begin elsewhere in their memory."""
    return *turned(first[:, :5], weight, cos, sin), *turned(second[:, 1:], weight, cos, sin)


SHAPES = [(2, 6, 6, 16), (2, 6, 6, 16), (16,), (2, 1, 5, 16), (2, 1, 5, 16)]


def traced(function, shapes, mode="fake"):
    inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    return make_fx(function, tracing_mode=mode)(*inputs).graph


def tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def layout(value):
    return [
        (str(one.shape), str(one.stride()), str(one.storage_offset()), one.dtype, one.device)
        for one in tensors(value)
    ]


def run_on_fakes(graph):
    """What each node's operation gives for the values that the graph's inputs hold."""
    values = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = node.meta["val"]
        elif node.op == "call_function":
            arguments, keywords = map_arg((node.args, node.kwargs), values.__getitem__)
            (mode,) = {one.fake_mode for one in tensors(list(values.values()))}
            with mode:
                values[node] = node.target(*arguments, **keywords)
    return values


def groups_by_memory(values):
    """The names of the nodes that share memory, as a set of groups."""
    groups = {}
    for node, value in values.items():
        for index, one in enumerate(tensors(value)):
            groups.setdefault(one.untyped_storage()._cdata, set()).add((node.name, index))
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.usefixtures("kernels_on_cpu")
@pytest.mark.parametrize("lowering", ["inline", "triton"])
def test_the_values_of_copies_are_those_that_running_them_gives(lowering, mode):
    graph = traced(two_layers, SHAPES, mode)
    Lower(Settings(lowering))(graph)
    graph.lint()
    assert "normfuse" not in str(graph)
    recorded = {node: node.meta["val"] for node in graph.nodes if node.op != "output"}
    expected = run_on_fakes(graph)
    for node, value in recorded.items():
        assert layout(value) == layout(expected[node]), node.format_node()
    assert groups_by_memory(recorded) == groups_by_memory(expected)


def test_a_form_is_run_once_however_many_sites_share_it(monkeypatch):
    operations_of_lowering(1, monkeypatch)  # fills torch's own cache of operations on fakes
    runs = [operations_of_lowering(num, monkeypatch) for num in (1, 2, 4)]
    assert runs[0] > 0
    assert runs == [runs[0]] * 3


def operations_of_lowering(num_layers, monkeypatch):
    """How many operations on fake tensors the last pass runs."""

    def layers(x, weight):
        for _ in range(num_layers):
            x = RMS_NORM(x, weight, None, 1e-6, 0.0, LLAMA)[0]
        return x

    graph = traced(layers, [(4, 8), (8,)])
    dispatched = []
    dispatch = FakeTensorMode.dispatch
    with monkeypatch.context() as patch:
        patch.setattr(
            FakeTensorMode,
            "dispatch",
            lambda mode, func, *rest: dispatched.append(func) or dispatch(mode, func, *rest),
        )
        Lower(Settings("inline"))(graph)
    return len(dispatched)
