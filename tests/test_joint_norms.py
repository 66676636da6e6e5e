"""Norms of whole projections whose heads turn: OLMo 2, OLMoE, MiniMax M2. One op in inference."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

import normfuse
from normfuse.backend import patches
from normfuse.explain import explain_with
from normfuse.ops import QK_RMS_NORM_ROPE
from normfuse.ops.lowering import obstacle_to_kernel
from normfuse.passes import inductor
from normfuse.passes.region import key_of
from normfuse.testing import capture
from tests import rotary
from tests.blocks import GemmaRMSNorm, LlamaRMSNorm
from tests.rotary import DIM, HEADS, KEY_HEADS, WIDTH, WholeProjections
from tests.test_qk_rms_norm import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


class Spelled(WholeProjections):
    """With another rotary embedding, before or after the heads come first."""

    def __init__(self, turned=rotary.llama, norm=LlamaRMSNorm, *, heads_first=True):
        super().__init__(norm)
        self.turned, self.heads_first = turned, heads_first

    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, DIM)
        q, k = (self.q_norm(self.q_proj(x)).view(shape), self.k_norm(self.k_proj(x)).view(shape))
        if self.heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        else:
            cos, sin = cos.transpose(1, 2), sin.transpose(1, 2)
        q, k = self.turned(q, cos, sin), self.turned(k, cos, sin)
        if not self.heads_first:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        return rotary.attend(q, k, k)


class Packed(WholeProjections):
    """Slices of one projection."""

    def __init__(self):
        super().__init__()
        self.qk_proj = nn.Linear(WIDTH, WIDTH + KEY_HEADS * DIM, bias=False)

    def forward(self, x, cos, sin):
        q, k = self.qk_proj(x).split([WIDTH, KEY_HEADS * DIM], -1)
        shape = (*x.shape[:-1], -1, DIM)
        q, k = (self.q_norm(q).view(shape).transpose(1, 2), self.k_norm(k).view(shape))
        k = k.transpose(1, 2)
        k = rotary.llama(k, cos, sin)
        return rotary.attend(rotary.llama(q, cos, sin), k, k)


@pytest.mark.guarantee
@DTYPES
@pytest.mark.parametrize("heads_first", [True, False])
@pytest.mark.parametrize("spelling", ["llama", "gpt_oss", "cohere", "neighbours", "partial"])
def test_every_rotary_embedding_joins_the_norms(spelling, heads_first, dtype):
    block = Spelled(rotary.SPELLINGS[spelling], heads_first=heads_first).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


@DTYPES
@pytest.mark.parametrize("norm", [GemmaRMSNorm, nn.RMSNorm])
def test_other_norms(norm, dtype):
    block = Spelled(norm=norm).to(dtype)
    found = ops(block, rotary.hidden_states(dtype), *rotary.tables(dtype))
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


def test_slices_of_one_projection():
    block = Packed().bfloat16()
    found = ops(block, rotary.hidden_states(), *rotary.tables())
    assert found == (["qk_rms_norm_rope"] * 2, ["qk_rms_norm_rope"])


class Weightless(Spelled):
    """A weight says what a norm runs over."""

    def __init__(self):
        super().__init__(norm=lambda width: nn.RMSNorm(width, elementwise_affine=False))


@pytest.mark.parametrize("block", [Weightless, WholeProjections])  # whose keys are values, too
def test_other_norms_stay_apart_from_the_embedding(block):
    found = ops(block().bfloat16(), rotary.hidden_states(), *rotary.tables())
    assert found == (["qk_rms_norm"] * 2, ["qk_rms_norm", "rope"])


class OwnTables(WholeProjections):
    """Each head turns by an angle of its own."""

    def forward(self, x, cos, sin):
        q = self.q_norm(self.q_proj(x)).view(*x.shape[:-1], -1, DIM).transpose(1, 2)
        return rotary.llama(q, *(table.repeat(1, HEADS, 1, 1) for table in (cos, sin)))


def test_heads_that_turn_by_tables_of_their_own():
    found = ops(OwnTables().bfloat16(), rotary.hidden_states(), *rotary.tables())
    assert found == (["rms_norm"], ["rms_norm", "rope"])


class CallsTheOp(WholeProjections):
    """The user's own call, whose weights say on which axis the heads are, before they move."""

    def forward(self, x, cos, sin):
        shape = (*x.shape[:-1], -1, DIM)
        q, k = self.q_proj(x).view(shape), self.k_proj(x).view(shape)
        weights = [norm.weight.view(-1, DIM) for norm in (self.q_norm, self.k_norm)]
        q, k, _ = normfuse.qk_rms_norm(q, k, *weights)
        k = rotary.llama(k.transpose(1, 2), cos, sin)
        return rotary.attend(rotary.llama(q.transpose(1, 2), cos, sin), k, k)


def test_a_joint_norm_that_the_user_calls_keeps_its_heads():
    block, inputs = CallsTheOp().bfloat16(), (rotary.hidden_states(), *rotary.tables())
    with torch.no_grad():
        report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
        assert torch.equal(capture(block)(*inputs), block(*inputs))
    assert "normfuse.qk_rms_norm.default" in report.after
    assert "normfuse.rope.default" in report.after


def test_training_keeps_the_norms_whose_gradient_has_a_kernel():
    block = WholeProjections()
    inputs = [rotary.hidden_states(torch.float32), *rotary.tables(torch.float32)]
    report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
    assert [site.op for site in report.sites] == ["qk_rms_norm"] * 2


def test_gradients_of_the_public_function_are_those_of_eager():
    block = WholeProjections(norm=partial(nn.RMSNorm, eps=1e-5)).double()
    x, *tables = (value.double() for value in (rotary.hidden_states(), *rotary.tables()))

    def heads(proj):
        return proj(x).view(*x.shape[:-1], -1, DIM).transpose(1, 2)

    weights = [norm.weight.view(-1, 1, DIM) for norm in (block.q_norm, block.k_norm)]
    q, k = heads(block.q_proj), heads(block.k_proj)
    found = normfuse.qk_rms_norm_rope(q, k, *tables, *weights, 1e-5)
    parameters = list(block.parameters())
    ours = torch.autograd.grad(found.q.sin().sum() + found.k.cos().sum(), parameters)

    shape = (*x.shape[:-1], -1, DIM)
    normed = block.q_norm(block.q_proj(x)), block.k_norm(block.k_proj(x))
    turned = [rotary.llama(one.view(shape).transpose(1, 2), *tables) for one in normed]
    eagers = torch.autograd.grad(turned[0].sin().sum() + turned[1].cos().sum(), parameters)
    for one, other in zip(ours, eagers, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "weight",
    [torch.ones(3, 1, DIM), torch.ones(4, 5, DIM), torch.ones(4, DIM), torch.ones(4, 1, 8)],
    ids=lambda weight: str(tuple(weight.shape)),
)
def test_a_weight_that_does_not_fit_the_heads(weight):
    q = torch.randn(2, 4, 5, DIM)
    cos = torch.randn(2, 1, 5, DIM)
    with pytest.raises(ValueError, match=r"weight_q must have shape \(16,\), or \(H, 1, ..., 16\)"):
        normfuse.qk_rms_norm_rope(q, q, cos, cos, weight)


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_kernel_takes_it_and_its_key_says_so(dynamic):
    graphs = []

    def backend(module, examples):
        return inductor.interpret_graph(
            module,
            examples,
            patches(None, {"normfuse.lowering": "op"}),
            finished=lambda final: graphs.append(final.graph),
        )

    with torch.no_grad():
        block = torch.compile(Spelled().bfloat16(), backend=backend, dynamic=dynamic)
        block(rotary.hidden_states(), *rotary.tables())
    (node,) = graphs[-1].find_nodes(op="call_function", target=QK_RMS_NORM_ROPE)
    values = torch.fx.node.map_arg(node.args, lambda one: one.meta["val"])
    assert obstacle_to_kernel(node.target, values) in (None, "triton is not installed")
    key = key_of(node, "A GPU")
    assert key.widths == (DIM, DIM)
    assert key.parameters[-2:] == ("over 4 heads", "over 2 heads")


def captured(module, examples):
    """The graph behind our passes, run node by node."""
    return inductor.interpret_graph(module, examples, patches(None, {"normfuse.lowering": "op"}))


@DTYPES
def test_symbolic_tokens(dtype):
    block = Spelled().to(dtype)
    with torch.no_grad():
        compiled = torch.compile(block, backend=captured, dynamic=True)
        for tokens in (5, 7, 3):
            x = torch.randn(2, tokens, WIDTH, dtype=dtype)
            tables = [torch.randn(2, 1, tokens, DIM, dtype=dtype) for _ in range(2)]
            assert torch.equal(compiled(x, *tables), block(x, *tables))


def test_new_weights_are_seen():
    block = Spelled().bfloat16()
    inputs = (rotary.hidden_states(), *rotary.tables())
    with torch.no_grad():
        compiled = capture(block)
        first = compiled(*inputs)
        block.q_norm.weight.mul_(3)
        block.k_norm.weight.copy_(torch.randn(KEY_HEADS * DIM))
        assert torch.equal(compiled(*inputs), copy.deepcopy(block)(*inputs))
        assert not torch.equal(compiled(*inputs), first)
