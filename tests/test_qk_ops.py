"""`qk_rms_norm` and `qk_rms_norm_rope` as ops: the dispatcher, gradients, public functions."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

import normfuse
from normfuse.ops import QK_RMS_NORM, QK_RMS_NORM_ROPE, Rotation, RoundingPlan
from normfuse.ops.qk_rms_norm import checked_norms
from tests import rotary
from tests.rotary import BATCH, DIM, HEADS, KEY_HEADS, TOKENS

F64 = torch.float64
TURNS = ["half 16", "half 8", "interleaved 16", "interleaved 8 at=8", "complex 16"]


def operands(dtype, *, with_v):
    heads = (HEADS, KEY_HEADS, KEY_HEADS)[: 3 if with_v else 2]
    xs = [torch.randn(BATCH, TOKENS, num, DIM, dtype=dtype).transpose(1, 2) for num in heads]
    weights = [torch.randn(DIM, dtype=dtype) for _ in range(2)]
    return [x.requires_grad_() for x in (*xs, *weights)]


def turned(turn, dtype, num):
    """cos and sin as leaves, and the rotations of `num` tensors; the third stays."""
    columns = int(turn.split()[1])
    width = columns // 2 if turn.startswith("complex") else columns
    tables = [torch.randn(BATCH, 1, TOKENS, width, dtype=dtype) for _ in range(2)]
    short = {F64: "f64", torch.float32: "f32", torch.bfloat16: "bf16"}[dtype]
    rotations = [f"{turn} in={short} out={short}"] * 2 + ["none"] * (num - 2)
    return [table.requires_grad_() for table in tables], rotations


def norms(q, k, *rest):
    *v, weight_q, weight_k = rest
    args = (q, k, v[0] if v else None, weight_q, weight_k, 1e-5, 1.0, (None, None))
    return checked_norms(*args)


@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("turn", TURNS)
def test_qk_rms_norm_rope_keeps_the_rules_of_the_dispatcher(turn, with_v):
    dtype = torch.float32
    xs, weights, *numbers = norms(*operands(dtype, with_v=with_v))
    tables, rotations = turned(turn, dtype, len(xs))
    opcheck(QK_RMS_NORM_ROPE, (xs, weights, *tables, *numbers, rotations))


@pytest.mark.parametrize("with_v", [False, True])
def test_qk_rms_norm_keeps_the_rules_of_the_dispatcher(with_v):
    opcheck(QK_RMS_NORM, tuple(norms(*operands(torch.bfloat16, with_v=with_v))))


@pytest.mark.parametrize("with_v", [False, True])
@pytest.mark.parametrize("turn", TURNS)
def test_gradients_of_every_operand(turn, with_v):
    leaves = operands(F64, with_v=with_v)
    tables, rotations = turned(turn, F64, len(leaves) - 2)

    def op(cos, sin, *leaves):
        xs, weights, *numbers = norms(*leaves)
        return QK_RMS_NORM_ROPE(xs, weights, cos, sin, *numbers, rotations)

    assert gradcheck(op, (*tables, *leaves))


def test_gradients_without_rope():
    assert gradcheck(lambda *leaves: QK_RMS_NORM(*norms(*leaves)), operands(F64, with_v=True))


@pytest.mark.parametrize(
    ("layout", "function"), [("half", rotary.llama), ("interleaved", rotary.neighbours)]
)
def test_the_public_function_is_the_model(layout, function):
    q, k, v, weight_q, weight_k = operands(torch.float32, with_v=True)
    cos, sin = rotary.tables(torch.float32)

    found = normfuse.qk_rms_norm_rope(q, k, cos, sin, weight_q, weight_k, v=v, layout=layout)

    for x, weight, result in ((q, weight_q, found.q), (k, weight_k, found.k)):
        if layout == "interleaved":
            angles = [table[..., : DIM // 2].repeat_interleave(2, dim=-1) for table in (cos, sin)]
            expected = rotary.neighbours(normfuse.rms_norm(x, weight), cos, sin)
            half = [table[..., : DIM // 2] for table in (cos, sin)]
            again = normfuse.qk_rms_norm_rope(x, x, *half, weight, weight, layout=layout).q
            assert torch.equal(again, expected)
            result = normfuse.qk_rms_norm_rope(x, x, *angles, weight, weight, layout=layout).q
        else:
            expected = function(normfuse.rms_norm(x, weight), cos, sin)
        assert torch.equal(result, expected)
        assert result.stride() == x.stride()
    assert torch.equal(found.v, normfuse.rms_norm(v))


def test_the_public_function_without_rope():
    q, k, v, weight_q, weight_k = operands(torch.bfloat16, with_v=True)
    plan = RoundingPlan.before_weight(q.dtype, weight_q.dtype)

    found = normfuse.qk_rms_norm(q, k, weight_q, weight_k, v=v, plan_q=plan)

    assert torch.equal(found.q, normfuse.rms_norm(q, weight_q, plan=plan))
    assert torch.equal(found.k, normfuse.rms_norm(k, weight_k))
    assert torch.equal(found.v, normfuse.rms_norm(v))
    assert normfuse.qk_rms_norm(q, k, weight_q, weight_k).v is None


def test_tables_that_do_not_fit_are_refused():
    q, k, weight_q, weight_k = operands(torch.float32, with_v=False)
    cos, sin = rotary.tables(torch.float32)
    call = normfuse.qk_rms_norm_rope
    with pytest.raises(ValueError, match=r"cos must broadcast against q .* unsqueeze"):
        call(q, k, cos.expand(2, 3, TOKENS, DIM), sin, weight_q, weight_k)
    with pytest.raises(ValueError, match=r"rotary_dim must be even, from 2 to .* 16, got 18"):
        call(q, k, cos, sin, weight_q, weight_k, rotary_dim=18)
    with pytest.raises(ValueError, match="sin must have the shape and type of cos"):
        call(q, k, cos, sin.double(), weight_q, weight_k)
    with pytest.raises(ValueError, match="layout must be one of"):
        call(q, k, cos, sin, weight_q, weight_k, layout="quarter")
    with pytest.raises(ValueError, match="weight_k must have shape"):
        call(q, k, cos, sin, weight_q, weight_k[:4])


def test_a_rotation_survives_its_text():
    turn = Rotation("half", 8, torch.float32, torch.bfloat16, start=8, is_contiguous=True)
    assert str(turn) == "half 8 at=8 in=f32 out=bf16 contiguous"
    assert Rotation.parse(str(turn)) == turn
    assert Rotation.parse("none") is None
    with pytest.raises(ValueError, match="a rotation reads like"):
        Rotation.parse("half")
    with pytest.raises(ValueError, match="dim must be even"):
        Rotation("half", 7, torch.float32, torch.float32)
    with pytest.raises(ValueError, match="layout must be one of"):
        Rotation("third", 8, torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("width", "compute", "kept"),
    [
        pytest.param(128, torch.float32, 0, id="heads: taken anew in their backward"),
        pytest.param(2048, torch.float32, 2, id="whole projections: its kernel holds no row"),
        pytest.param(128, torch.bfloat16, 2, id="a statistic of 16 bits, for its rounding"),
    ],
)
def test_which_rstd_is_kept_for_the_backward(width, compute, kept):
    dtype, shapes = torch.bfloat16, []
    plan = replace(RoundingPlan.once(dtype, dtype), compute=compute, rstd=compute)
    xs = [torch.randn(5, width, dtype=dtype, requires_grad=True) for _ in range(2)]
    weights = [torch.randn(width, dtype=dtype) for _ in range(2)]

    def note(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        QK_RMS_NORM(xs, weights, [1e-6] * 2, [0.0] * 2, [str(plan)] * 2)

    assert shapes.count((5, 1)) == kept
