"""Norms of queries and keys, with and without RoPE: one op in every spelling, bits of eager."""

import pytest
import torch

from normfuse.explain import explain_with
from normfuse.testing import capture
from tests import rotary
from tests.blocks import Gemma4WeightlessNorm, GemmaRMSNorm
from tests.graphs import after_each_pass

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


def ops(block, *inputs, **options):
    """The ops of the sites, and the calls of ours in the final graph; the bits are eager's."""
    options = {"lowering": "op", **options}
    with torch.no_grad():
        ours = {f"normfuse.{name}": value for name, value in options.items()}
        report = explain_with(block, inputs, options=ours)
        rewritten, eager = capture(block, **options)(*inputs), block(*inputs)
    if not torch.equal(rewritten, eager):
        with torch.no_grad():
            assert torch.equal(rewritten, capture(block, rules=[])(*inputs))
    calls = [
        line.split("normfuse.")[1].split(".")[0]
        for line in report.after.splitlines()
        if "torch.ops.normfuse." in line
    ]
    assert [site.reason for site in report.sites if not site.fused] == []
    return [site.op for site in report.sites], calls


@DTYPES
@pytest.mark.parametrize("spelling", rotary.SPELLINGS)
def test_every_rotary_embedding_is_read(spelling, dtype):
    block = rotary.Attention(rotary.SPELLINGS[spelling]).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


@DTYPES
@pytest.mark.parametrize("spelling", ["llama", "cohere", "partial", "llama4"])
@pytest.mark.parametrize("kind", [rotary.NormAfterTranspose, rotary.Packed])
def test_transposed_and_packed_heads_are_read_in_place(kind, spelling, dtype):
    block = kind(rotary=rotary.SPELLINGS[spelling], norm=GemmaRMSNorm).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


@DTYPES
@pytest.mark.parametrize("spelling", ["llama", "gpt_oss", "neighbours"])
def test_a_module_of_torch_on_transposed_heads(spelling, dtype):
    """Its result lies row by row, so that the op's is copied; RoPE behind it makes that needless"""
    block = rotary.NormAfterTranspose(rotary.SPELLINGS[spelling], torch.nn.RMSNorm).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


@DTYPES
def test_tables_that_each_call_computes(dtype):
    def of_angles(x, cos, sin):
        return rotary.llama(x, torch.cos(cos), torch.sin(cos))

    found = ops(
        rotary.Attention(of_angles).to(dtype), rotary.hidden_states(dtype), *rotary.tables(dtype)
    )
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


@DTYPES
@pytest.mark.parametrize("spelling", ["llama", "partial"])
def test_a_weightless_value_norm_joins(spelling, dtype):
    block = rotary.OneByOne(Gemma4WeightlessNorm(), rotary=rotary.SPELLINGS[spelling]).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm_rope"] * 3, ["qk_rms_norm_rope"])


@DTYPES
def test_key_and_value_may_be_one_tensor(dtype):
    block = rotary.OneByOne(Gemma4WeightlessNorm()).to(dtype)
    block.v_proj = block.k_proj
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm_rope"] * 3, ["qk_rms_norm_rope"])


@DTYPES
@pytest.mark.parametrize("kind", [rotary.WholeProjections, rotary.NormAfterRotary])
def test_norms_without_rope_behind_them_share_an_op(kind, dtype):
    options = {"skip": ["rope"]}
    found = ops(kind().to(dtype), rotary.hidden_states(dtype), *rotary.tables(dtype), **options)
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


def test_queries_may_turn_before_keys_are_normalised():
    """Gemma 4's vision: halves of a head turn by themselves, which no op does."""

    class Axial(rotary.Attention):
        def forward(self, x, cos, sin):
            shape = (*x.shape[:-1], -1, rotary.DIM)

            def turned(heads):
                halves = zip(*(t.chunk(2, -1) for t in (heads, cos, sin)), strict=True)
                return torch.cat([a * c + rotary.rotate_half(a) * s for a, c, s in halves], -1)

            q = turned(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2))
            k = turned(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2))
            v = self.v_proj(x).view(shape).transpose(1, 2)
            return rotary.attend(q, k, v)

    found = ops(Axial().bfloat16(), rotary.hidden_states(), *rotary.tables(), skip=["rope"])
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


def test_tables_are_told_apart():
    """Two attentions whose tables differ do not share a launch, though nothing else does."""

    class TwoTables(rotary.Attention):
        def forward(self, x, cos, sin):
            shape = (*x.shape[:-1], -1, rotary.DIM)
            q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
            k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
            v = self.v_proj(x).view(shape).transpose(1, 2)
            return rotary.attend(rotary.llama(q, cos, sin), rotary.llama(k, sin, cos), v)

    found = ops(TwoTables().bfloat16(), rotary.hidden_states(), *rotary.tables())
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"] * 2)


def test_dependent_norms_are_not_joined():
    """The keys are projected from the turned queries: one launch cannot do both."""

    class Dependent(rotary.Attention):
        def forward(self, x, cos, sin):
            shape = (*x.shape[:-1], -1, rotary.DIM)
            q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
            q = rotary.llama(q, cos, sin)
            x = x + q.transpose(1, 2).reshape(x.shape)
            k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
            v = self.v_proj(x).view(shape).transpose(1, 2)
            return rotary.attend(q, rotary.llama(k, cos, sin), v)

    found = ops(Dependent().bfloat16(), rotary.hidden_states(), *rotary.tables())
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"] * 2)


class InPlaceNorm(GemmaRMSNorm):
    """Only after autograd is it a norm: before, a write stands between its two halves."""

    def _norm(self, x):
        return x.mul_(torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


def test_rope_is_read_after_autograd():
    block = rotary.Attention(norm=InPlaceNorm).bfloat16()
    found = ops(block, rotary.hidden_states(), *rotary.tables())
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


def negated_by_keyword(x, cos, sin):
    """Only after autograd is it RoPE, where both norms are one op."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((torch.neg(input=second), first), dim=-1) * sin


def test_rope_that_is_read_later_than_the_norm():
    block = rotary.Attention(negated_by_keyword).bfloat16()
    found = ops(block, rotary.hidden_states(), *rotary.tables())
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


def same_sign(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((second, first), dim=-1) * sin


def other_columns(x, cos, sin):
    return (x * cos) + (torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * sin)


def other_value(x, cos, sin):
    return (x * cos) + (rotary.rotate_half(x * 2) * sin)


def with_sum(x, cos, sin):
    return rotary.llama(x, cos, sin) + x


def rolled_tokens(x, cos, sin):
    return (x * cos) + (rotary.rotate_half(x.roll(1, dims=2)) * sin)


def twice_rounded(x, cos, sin):
    return rotary.llama(x, cos, sin).half().to(x.dtype)


def scaled_as_complex(x, cos, sin):
    """Complex numbers times real ones: they grow, and do not turn."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * cos[..., : rotary.DIM // 2].float()).flatten(-2).type_as(x)


def halves_as_complex(x, cos, sin):
    """Gemma's of its authors: column j and j + D / 2 are one complex number."""
    turns = torch.complex(cos.float(), sin.float())[..., : rotary.DIM // 2]
    halves = torch.view_as_complex(torch.stack(x.float().chunk(2, dim=-1), dim=-1))
    return torch.cat(torch.view_as_real(halves * turns).unbind(-1), dim=-1).to(x.dtype)


def tables_of_two_types(x, cos, sin):
    return (x * cos.float() + rotary.rotate_half(x) * sin).type_as(x)


def whole_numbers(x, cos, sin):
    return rotary.llama(x, cos.int(), sin.int())


LOOKALIKES = (
    halves_as_complex,
    scaled_as_complex,
    tables_of_two_types,
    whole_numbers,
    same_sign,
    other_columns,
    other_value,
    with_sum,
    rolled_tokens,
)


@pytest.mark.parametrize("lookalike", LOOKALIKES)
def test_what_only_looks_like_rope_stays(lookalike):
    block = rotary.Attention(lookalike).bfloat16()
    found = ops(block, rotary.hidden_states(), *rotary.tables())
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


def test_a_second_rounding_behind_rope_stays():
    block = rotary.Attention(twice_rounded).bfloat16()
    found = ops(block, rotary.hidden_states(), *rotary.tables())
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


def test_a_value_changed_in_place_before_it_turns_is_left_alone():
    class InPlace(rotary.Attention):
        def forward(self, x, cos, sin):
            shape = (*x.shape[:-1], -1, rotary.DIM)
            projected = self.q_proj(x)
            q = self.q_norm(projected.view(shape)).transpose(1, 2)
            projected.mul_(0)
            return rotary.llama(q, cos, sin) + projected.view(shape).transpose(1, 2)

    with torch.no_grad():
        block, inputs = InPlace().bfloat16(), (rotary.hidden_states(), *rotary.tables())
        assert torch.equal(capture(block, lowering="op")(*inputs), block(*inputs))


@pytest.mark.parametrize("dynamic", [None, True])
def test_changing_shapes(dynamic):
    block = rotary.Attention().bfloat16()
    compiled = capture(block, lowering="op")
    with torch.no_grad():
        for tokens in (5, 7, 9):
            x = torch.randn(2, tokens, rotary.WIDTH, dtype=torch.bfloat16)
            cos, sin = (torch.randn(2, 1, tokens, rotary.DIM).bfloat16() for _ in range(2))
            assert torch.equal(compiled(x, cos, sin), block(x, cos, sin))
            text = after_each_pass(block, x, cos, sin, lowering="op", dynamic=bool(dynamic))
            assert "qk_rms_norm" in text


def test_gradients_are_those_of_eager():
    block = rotary.Attention(norm=torch.nn.RMSNorm).double()
    inputs = [rotary.hidden_states(torch.float64), *rotary.tables(torch.float64)]

    def gradients(function):
        leaves = [value.clone().requires_grad_() for value in inputs]
        block.zero_grad()
        function(*leaves).sin().sum().backward()
        return [leaf.grad for leaf in leaves] + [p.grad.clone() for p in block.parameters()]

    compiled = capture(block, lowering="op")
    for ours, theirs in zip(gradients(compiled), gradients(block), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_left_out_by_an_option():
    block, inputs = rotary.Attention().bfloat16(), (rotary.hidden_states(), *rotary.tables())
    assert ops(block, *inputs, rules=["rms_norm"]) == (["rms_norm"] * 2, ["rms_norm"] * 2)


class ComplexTables(rotary.Attention):
    """Queries and keys times complex numbers, as Llama 4 turns them."""

    def __init__(self, turns):
        super().__init__()
        self.turns = turns

    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, rotary.DIM)
        turns = self.turns(torch.complex(cos, sin)[..., : rotary.DIM // 2])
        q = self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2)
        v = self.v_proj(x).view(shape).transpose(1, 2)
        return rotary.attend(self.turned(q, turns), self.turned(k, turns), v)

    def turned(self, x, turns):
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


COMPLEX_TABLES = {
    "conjugate": torch.conj,
    "written out": lambda turns: turns.conj().resolve_conj(),
    "twice": lambda turns: turns.conj().conj(),
    "in float64": lambda turns: turns.to(torch.complex128),
    "conjugate in float64": lambda turns: turns.to(torch.complex128).conj(),
}


@DTYPES
@pytest.mark.parametrize("turns", COMPLEX_TABLES)
def test_complex_tables_and_their_conjugates_are_read(turns, dtype):
    block = ComplexTables(COMPLEX_TABLES[turns]).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(torch.float32))
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


def test_a_conjugate_is_read_behind_a_write_to_what_it_views():
    def doubled_later(turns):
        turns = turns.clone()
        conjugate = turns.conj()
        turns.mul_(2)
        return conjugate

    inputs = rotary.hidden_states(torch.float32), *rotary.tables(torch.float32)
    found = ops(ComplexTables(doubled_later), *inputs)  # after autograd, where nothing is written
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


def test_a_conjugate_for_each_of_queries_and_keys_is_one_table():
    class OneByOne(ComplexTables):
        def turned(self, x, turns):
            return super().turned(x, turns.conj())

    inputs = rotary.hidden_states(torch.float32), *rotary.tables(torch.float32)
    found = ops(OneByOne(lambda turns: turns), *inputs)
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


# Of two halves: torch itself says that it is experimental.
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_complex_table_that_no_rotation_has_leaves_the_norms_to_another_op():
    class Halves(ComplexTables):
        def turned(self, x, turns):
            pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns.to(torch.complex32)).flatten(-2)

    inputs = rotary.hidden_states(torch.float32), *rotary.tables(torch.float32)
    assert ops(Halves(lambda turns: turns), *inputs) == (["qk_rms_norm"] * 2, ["qk_rms_norm"])


def test_a_table_that_changes_behind_its_negative_is_not_read_for_it():
    def negative_of_what_changes(x, cos, sin):
        sin = sin.clone()
        negative = -sin
        sin.zero_()
        return x * cos + rotary.rotate_half(x) * negative

    block = rotary.Attention(negative_of_what_changes)
    inputs = rotary.hidden_states(torch.float32), *rotary.tables(torch.float32)
    with torch.no_grad():
        assert torch.equal(capture(block, lowering="op")(*inputs), block(*inputs))
