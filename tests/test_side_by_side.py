"""Norms side by side: projections of one value share one op, whatever stands in between."""

import operator

import pytest
import torch

from normfuse.patterns.columns import chain_of, value_key
from tests import rotary
from tests.test_qk_rms_norm import DTYPES, ops


@DTYPES
@pytest.mark.parametrize("spelling", ["gpt_oss", "neighbours", "back_by_negative_tables"])
def test_norms_behind_rope_that_is_put_together_again(spelling, dtype):
    block = rotary.NormAfterRotary(rotary.SPELLINGS[spelling]).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm"] * 2, ["rope", "qk_rms_norm"])


@DTYPES
@pytest.mark.parametrize("put_together", [torch.cat, torch.stack])
def test_norms_behind_chunks_that_are_put_together(put_together, dtype):
    def chunks(x, cos, sin):
        return put_together(x.chunk(2, dim=-1), dim=-1).reshape(x.shape)

    block = rotary.NormAfterRotary(chunks).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


@DTYPES
def test_projections_of_low_rank_share_an_op(dtype):
    found = ops(rotary.LowRank().to(dtype), rotary.hidden_states(dtype))
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


def test_nothing_moves_out_of_autocast():
    """After autograd casts are operations of their own, and what is between may move."""

    class Cast(rotary.LowRank):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16):
                q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
            compressed, _ = self.kv_a_proj(x).split([self.RANKS[1], rotary.DIM], dim=-1)
            return q.float() + self.kv_b_proj(self.kv_a_layernorm(compressed))[..., : rotary.WIDTH]

    found = ops(Cast(), rotary.hidden_states(torch.float32))
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


@DTYPES
def test_a_module_of_torch_without_rope_joins(dtype):
    def unturned(x, cos, sin):
        return x

    block = rotary.NormAfterTranspose(unturned, torch.nn.RMSNorm).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


class Sum(torch.nn.Module):
    """A projection, and something that is added to it."""

    def __init__(self, projection, kind):
        super().__init__()
        rows, columns = projection.weight.shape
        self.projection, self.kind = projection, kind
        self.bias = torch.nn.Parameter(torch.randn(rows))
        self.down = torch.nn.Linear(columns, 4, bias=False)
        self.up = torch.nn.Linear(4, rows, bias=False)

    def forward(self, x):
        if self.kind == "bias":
            return self.projection(x) + self.bias
        adapter = self.up(self.down(x))
        return self.projection(x) + (adapter * 2 if self.kind == "scaled adapter" else adapter)


@DTYPES
@pytest.mark.parametrize("kind", ["bias", "adapter", "scaled adapter"])
def test_a_projection_may_be_a_sum(kind, dtype):
    def unturned(x, cos, sin):
        return x

    block = rotary.NormAfterTranspose(unturned)
    block.q_proj, block.k_proj = Sum(block.q_proj, kind), Sum(block.k_proj, kind)
    found = ops(block.to(dtype), rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


def test_tables_are_compared_in_one_walk():
    """A value that is used twice at every step has 2^200 paths to it."""
    graph = torch.fx.Graph()
    ends = []
    start = graph.placeholder("angles")
    start.meta["example_value"] = torch.empty(2)
    for _ in range(2):
        node = start
        for _ in range(200):
            node = graph.call_function(operator.add, (node, node))
            node.meta["example_value"] = torch.empty(2)
        ends.append(node)

    assert value_key(ends[0]) == value_key(ends[1]) != value_key(ends[1].args[0])
    assert len(chain_of(ends[0])) == 201
