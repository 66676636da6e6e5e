"""RoPE that no norm precedes: one op for q and k, in inference only; eager's bits and gradients."""

import pytest
import torch
from torch.autograd import gradcheck

import normfuse
from normfuse.explain import explain_with
from normfuse.ops.rope import ROPE
from normfuse.ops.rotation import Rotation
from normfuse.testing import capture
from tests import rotary
from tests.graphs import after_each_pass
from tests.test_qk_rms_norm import LOOKALIKES

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


class Plain(rotary.Attention):
    """`LlamaAttention`."""

    def __init__(self, rotary=rotary.llama):
        super().__init__(rotary, lambda _: torch.nn.Identity())


def found(block, dtype=torch.bfloat16, **options):
    """The calls of our ops in the final graph, and the report; the bits are eager's."""
    options = {"lowering": "op", **options}
    inputs = (rotary.hidden_states(dtype), *rotary.tables(dtype))
    with torch.no_grad():
        ours = {f"normfuse.{name}": value for name, value in options.items()}
        report = explain_with(block.to(dtype), inputs, options=ours)
        assert torch.equal(capture(block, **options)(*inputs), block(*inputs))
    calls = [line for line in report.after.splitlines() if "torch.ops.normfuse." in line]
    return [line.split("normfuse.")[1].split(".")[0] for line in calls], report


@pytest.mark.guarantee
@DTYPES
@pytest.mark.parametrize("spelling", rotary.SPELLINGS)
def test_every_spelling_of_q_and_k_is_one_op(spelling, dtype):
    calls, report = found(Plain(rotary.SPELLINGS[spelling]), dtype)
    assert calls == ["rope"]
    assert report.sites == []
    assert report.notes == [
        "Beside the norms, 2 rotary embeddings that no norm precedes became part of a `rope`.",
        "1 `rope` lowered to op",
    ]


@pytest.mark.parametrize("kind", [rotary.WholeProjections, rotary.NormAfterRotary])
def test_norms_of_whole_projections_and_after_it(kind):
    assert sorted(found(kind())[0]) == ["qk_rms_norm", "rope"]


@pytest.mark.parametrize("lookalike", LOOKALIKES)
def test_what_only_looks_like_it_stays(lookalike):
    assert found(Plain(lookalike))[0] == []


def test_tables_are_told_apart():
    class TwoTables(Plain):
        def forward(self, x, cos, sin):
            shape = (*x.shape[:-1], -1, rotary.DIM)
            q = self.q_proj(x).view(shape).transpose(1, 2)
            k = self.k_proj(x).view(shape).transpose(1, 2)
            v = self.v_proj(x).view(shape).transpose(1, 2)
            return rotary.attend(rotary.llama(q, cos, sin), rotary.llama(k, sin, cos), v)

    assert found(TwoTables())[0] == ["rope"] * 2


def test_keys_that_wait_for_the_turned_queries_have_their_own_op():
    class Dependent(Plain):
        def forward(self, x, cos, sin):
            shape = (*x.shape[:-1], -1, rotary.DIM)
            q = rotary.llama(self.q_proj(x).view(shape).transpose(1, 2), cos, sin)
            x = x + q.transpose(1, 2).reshape(x.shape)
            k = self.k_proj(x).view(shape).transpose(1, 2)
            v = self.v_proj(x).view(shape).transpose(1, 2)
            return rotary.attend(q, rotary.llama(k, cos, sin), v)

    assert found(Dependent())[0] == ["rope"] * 2


def test_a_value_that_is_read_elsewhere_stays():
    class ReadTwice(Plain):
        def forward(self, x, cos, sin):
            q = self.q_proj(x).view(*x.shape[:-1], -1, rotary.DIM).transpose(1, 2)
            return rotary.llama(q, cos, sin), q.relu()

    inputs = (rotary.hidden_states(), *rotary.tables())
    with torch.no_grad():
        report = explain_with(ReadTwice().bfloat16(), inputs, options={"normfuse.lowering": "op"})
    assert "normfuse.rope" not in report.after


@pytest.mark.parametrize("options", [{"skip": ["rope"]}, {"rules": ["rms_norm"]}])
def test_the_rule_can_be_left_out(options):
    calls, report = found(Plain(), **options)
    assert (calls, report.num_sites) == ([], 0)


@pytest.mark.guarantee
def test_a_training_graph_keeps_its_own():
    block, inputs = Plain().bfloat16(), (rotary.hidden_states(), *rotary.tables())
    report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
    assert "normfuse.rope" not in report.after


@pytest.mark.guarantee
def test_without_a_measurement_auto_leaves_the_models_own_operations():
    block, inputs = Plain().bfloat16(), (rotary.hidden_states(), *rotary.tables())
    with torch.no_grad():
        graphs = after_each_pass(block, *inputs, lowering="auto")
        plain = after_each_pass(block, *inputs, rules=[])
    assert graphs == plain


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [8, 6])
@pytest.mark.parametrize("tables_learn", [True, False])
def test_gradients_are_those_of_the_formula(layout, dim, tables_learn):
    q, k = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 1, 4, 8).double()
    cos, sin = (torch.randn(4, dim).double() for _ in range(2))
    turns = [str(Rotation(layout, dim, torch.float64, torch.float64))] * 2
    tables = [table.requires_grad_(tables_learn) for table in (cos, sin)]
    values = [q.requires_grad_(), k.requires_grad_(), *tables]
    assert gradcheck(lambda q, k, cos, sin: ROPE([q, k], cos, sin, turns), values)


@DTYPES
def test_the_function_and_what_it_refuses(dtype):
    q, k = torch.randn(2, 4, 5, 16).to(dtype), torch.randn(2, 2, 5, 16).to(dtype)
    cos, sin = torch.randn(2, 1, 5, 16).to(dtype), torch.randn(2, 1, 5, 16).to(dtype)
    turned = normfuse.rope(q, k, cos, sin)
    assert torch.equal(turned.q, rotary_of(q, cos, sin))
    assert torch.equal(turned.k, rotary_of(k, cos, sin))
    with pytest.raises(ValueError, match="layout must be one of"):
        normfuse.rope(q, k, cos, sin, layout="thirds")
    with pytest.raises(ValueError, match="rotary_dim must be even"):
        normfuse.rope(q, k, cos, sin, rotary_dim=5)
    with pytest.raises(ValueError, match="sin must have the shape and type of cos"):
        normfuse.rope(q, k, cos, sin[:1])
    with pytest.raises(TypeError, match="q must have one of the types"):
        normfuse.rope(q.int(), k, cos, sin)
    with pytest.raises(ValueError, match="every rotation must turn"):
        ROPE([q], cos, sin, ["none"])


def rotary_of(x, cos, sin):
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin
