"""What launches write for attention: into caches, and repeated for the queries that share it."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from normfuse.passes import destinations
from tests import cached_attention
from tests.cached_attention import (
    HEADS,
    KEY_HEADS,
    Cached,
    CachedAt,
    ReturnsBoth,
    Uncached,
    inputs,
)
from tests.graphs import graphs_for_code

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_on_cpu")

aten = torch.ops.aten
TOKENS = 5


def inference_graph(model, *arguments, **options):
    """The graph that Inductor generates code for."""

    def call(compiled):
        with torch.no_grad():
            compiled(*arguments)

    return graphs_for_code(model, call, **options)[-1]


def launch_of(graph):
    """The operands of the only launch of a graph."""
    target = torch.ops.higher_order.triton_kernel_wrapper_mutation
    (launch,) = graph.find_nodes(op="call_function", target=target)
    return launch.kwargs["kwargs"]


def count(graph, *targets):
    return sum(node.target in targets for node in graph.nodes)


def puts(graph):
    return count(graph, aten.index_put.default, aten.index_put_.default)


def copied(operands):
    """Where each of the three tensors of a launch goes."""
    return [
        operands[f"PLACE_{number}"] or operands[f"COPIES_{number}"]
        if f"x_{number}_ptr" in operands
        else None
        for number in (1, 2, 3)
    ]


@pytest.mark.parametrize("normed", [True, False, "jointly"])
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_a_key_and_its_value_are_written_into_their_caches(tokens, normed):
    graph = inference_graph(Cached(normed=normed), *inputs(tokens))
    operands = launch_of(graph)
    place = f"axis={'none' if tokens == 1 else 'middle'} from=first"
    assert copied(operands) == [0, place, place]
    assert puts(graph) == 0
    # The caches themselves and not copies of them; how full they are is read where it is kept.
    for name in ("there_2_ptr", "there_3_ptr", "position_2_ptr", "position_3_ptr"):
        assert operands[name].op == "placeholder", name
    assert count(graph, aten.clone.default) == 2  # whole caches, repeated for attention
    assert count(graph, aten.copy_.default) == 1  # how full they are


def test_positions_may_be_given():
    rows = torch.tensor([7, 2, 9, 0, 4])
    graph = inference_graph(CachedAt(), *inputs(TOKENS), rows)
    operands = launch_of(graph)
    assert copied(operands) == [0, *["axis=middle from=each"] * 2]
    assert puts(graph) == 0
    assert operands["position_2_ptr"].op == "placeholder"


@pytest.mark.parametrize("normed", [True, False, "jointly"])
def test_without_a_cache_both_are_repeated(normed):
    graph = inference_graph(Uncached(normed=normed), *inputs(TOKENS))
    assert copied(launch_of(graph)) == [0, 2, 2]
    assert count(graph, aten.clone.default) == 0


class KeepsKey(Cached):
    """Somebody else reads the key that goes into a cache."""

    def forward(self, x, cos, sin):
        q, k, v = self.heads(x, cos, sin)
        self.keys.index_copy_(2, self.positions(x.shape[1]), k)
        return self.attend(q, self.keys, v), k


@pytest.mark.parametrize(
    ("model", "where"),
    [(ReturnsBoth, [0, 2, 2]), (KeepsKey, [0, "axis=middle from=first", None])],
)
@pytest.mark.guarantee
def test_a_result_that_somebody_else_reads_is_kept_and_copied(model, where):
    graph = inference_graph(model(), *inputs(TOKENS))
    operands = launch_of(graph)
    assert copied(operands) == where
    assert {"y_2_ptr", "there_2_ptr"} <= set(operands)
    assert ("y_3_ptr" in operands) is False  # the value itself is where it was
    assert puts(graph) == 0


class Interleaved(Uncached):
    """Heads repeated while tokens lie outside, as in models that transpose afterwards."""

    def attend(self, q, k, v):
        copies = HEADS // self.key_heads
        k, v = (x.transpose(1, 2).repeat_interleave(copies, dim=2).transpose(1, 2) for x in (k, v))
        return scaled_dot_product_attention(q, k, v)


class ByProducts(Uncached):
    """Attention spelled out: key and value have readers of their own."""

    def attend(self, q, k, v):
        copies = HEADS // self.key_heads
        k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        return torch.softmax(q @ k.transpose(2, 3) / 4, dim=-1) @ v


@pytest.mark.parametrize("model", [Interleaved, ByProducts])
def test_heads_are_repeated_in_every_spelling(model):
    graph = inference_graph(model(), *inputs(TOKENS))
    assert copied(launch_of(graph)) == [0, 2, 2]


def test_a_cache_of_dynamic_tokens_is_written():
    model = Cached()
    graph = inference_graph(model, *inputs(TOKENS), dynamic=True)
    assert puts(graph) == 0
    assert copied(launch_of(graph)) == [0, *["axis=middle from=first"] * 2]


class ReadsBefore(Cached):
    """Somebody reads the cache as it was."""

    def forward(self, x, cos, sin):
        before = self.keys.sum()
        return super().forward(x, cos, sin), before


class Adds(Cached):
    """The key is added to what the cache holds."""

    def forward(self, x, cos, sin):
        q, k, _ = self.heads(x, cos, sin)
        aten.index_put_(self.keys, [None, None, self.positions(x.shape[1])], k, True)
        return self.attend(q, self.keys, self.values)


class FreshCache(Cached):
    """A cache that is no input: nobody gets it back."""

    def forward(self, x, cos, sin):
        q, k, _ = self.heads(x, cos, sin)
        keys = torch.zeros_like(self.keys).index_copy(2, self.positions(x.shape[1]), k)
        return self.attend(q, keys, self.values)


class Scattered(Cached):
    """Each sequence has positions of its own."""

    def forward(self, x, cos, sin):
        q, k, _ = self.heads(x, cos, sin)
        batch = torch.arange(x.shape[0])[:, None]
        self.keys[batch, :, self.positions(x.shape[1])] = k.transpose(1, 2)
        return self.attend(q, self.keys, self.values)


class Computed(CachedAt):
    """Positions that a kernel would have to compute first."""

    def forward(self, x, cos, sin, rows):
        return super().forward(x, cos, sin, rows * 2)


@pytest.mark.parametrize("model", [ReadsBefore, Adds, FreshCache, Scattered, Computed])
@pytest.mark.guarantee
def test_what_a_launch_cannot_write_stays_as_it_was(model):
    values = inputs(TOKENS)
    if model is Computed:
        values = *values, torch.tensor([3, 2, 4, 0, 1])
    graph = inference_graph(model(), *values)
    assert copied(launch_of(graph)) == [0, 0, None]
    assert puts(graph) == (2 if model in (ReadsBefore, Computed) else 1)


class Biased(Cached):
    """A value that a pointwise kernel computes."""

    def heads(self, x, cos, sin):
        q, k, v = super().heads(x, cos, sin)
        return q, k, v.sigmoid()


def test_a_value_that_is_not_in_memory_does_not_join():
    graph = inference_graph(Biased(), *inputs(TOKENS))
    assert copied(launch_of(graph)) == [0, "axis=middle from=first", None]
    assert puts(graph) == 1


class OfTheQuery(Cached):
    """A value that depends on the turned query."""

    def __init__(self):
        super().__init__()
        self.mixing = nn.Parameter(cached_attention.random(HEADS * 16, KEY_HEADS * 16))

    def heads(self, x, cos, sin):
        q, k, v = super().heads(x, cos, sin)
        v = (q.transpose(1, 2).flatten(2) @ self.mixing).view(*x.shape[:-1], -1, 16)
        return q, k, v.transpose(1, 2)


def test_a_value_that_waits_for_the_launch_does_not_join():
    graph = inference_graph(OfTheQuery(), *inputs(TOKENS))
    assert copied(launch_of(graph)) == [0, "axis=middle from=first", None]
    assert puts(graph) == 1


def test_what_is_repeated_more_often_than_was_measured_is_copied_by_others(monkeypatch):
    monkeypatch.setattr(destinations, "MAX_COPIES", 1)
    graph = inference_graph(Uncached(), *inputs(TOKENS))
    assert copied(launch_of(graph)) == [0, 0, None]


class AfterAnother(Uncached):
    """Two attentions: only the value of the first could join, and only the key of the second."""

    def forward(self, x, cos, sin):
        q, k, v = self.heads(x, cos, sin)
        first = self.attend(q.sigmoid(), k.sigmoid(), v).transpose(1, 2).flatten(2)
        q, k, v = self.heads(x + first[..., :32], cos, sin)
        return self.attend(q, k, v.sigmoid())


def test_what_was_read_before_does_not_join():
    graph = inference_graph(AfterAnother(), *inputs(TOKENS))
    graph.lint()
    target = torch.ops.higher_order.triton_kernel_wrapper_mutation
    launches = graph.find_nodes(op="call_function", target=target)
    assert [copied(node.kwargs["kwargs"]) for node in launches] == [[0, 0, None], [0, 2, None]]


class TwoLayers(nn.Module):
    """Layers that share their positions."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([CachedAt() for _ in range(2)])

    def forward(self, x, cos, sin, rows):
        for layer in self.layers:
            y = layer(x, cos, sin, rows)
            x = y.transpose(1, 2).reshape(*x.shape[:2], -1)[..., :32]
        return x


def test_layers_that_share_positions_write_their_own_caches():
    graph = inference_graph(TwoLayers(), *inputs(TOKENS), torch.arange(TOKENS))
    target = torch.ops.higher_order.triton_kernel_wrapper_mutation
    launches = graph.find_nodes(op="call_function", target=target)
    written = [
        node.kwargs["kwargs"][f"there_{number}_ptr"] for node in launches for number in (2, 3)
    ]
    assert puts(graph) == 0
    assert len(set(written)) == 4
    assert {node.op for node in written} == {"placeholder"}
