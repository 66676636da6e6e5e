"""Arguments of every op, in the order of its schema."""

from __future__ import annotations

import torch

from normfuse.ops.gating import Gating
from normfuse.ops.modulation import Modulation
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import L2, RoundingPlan

EPS, OFFSET = 1e-5, 1.0
ROWS, WIDTH = (2, 5), 96


def of(op, dtype, plan=RoundingPlan.before_weight):
    """Arguments of an op for rows of random numbers.

    Args:
        op: the overload.
        dtype: of activations, weights and gradients.
        plan: makes the rounding plan of a weighted norm from the types of x and weight.
    """
    name = op._schema.name.partition("::")[2]
    return globals()[f"_{name}"](dtype, str(plan(dtype, dtype)))


def rows(dtype):
    return 3 * torch.randn(*ROWS, WIDTH).to(dtype)


def weight(dtype):
    return torch.randn(WIDTH).to(dtype)


def scales(dtype):
    """A tensor and a number for the branch, and for the sum."""
    return torch.tensor([0.7]).to(dtype), torch.tensor([1.3]).to(dtype), 0.22, None


def rstd(*shape):
    return torch.rand(*(shape or ROWS), 1) + 0.5


def _rms_norm(dtype, plan):
    return rows(dtype), weight(dtype), None, EPS, OFFSET, plan


def _rms_norms(dtype, plan):
    plans = [plan, str(RoundingPlan.once(dtype, None)), plan]
    weights = [weight(dtype), weight(dtype)]
    return rows(dtype), weights, EPS, [0.0, 0.0, 1.0], [1.0, 0.3, 1.0], plans


def _l2_norm(dtype, _):
    return rows(dtype), None, EPS, str(RoundingPlan.once(dtype, None).with_mean(L2))


def _gated_rms_norm(dtype, plan):
    gating = str(Gating.once(dtype))
    norm = (EPS, OFFSET, 2, True, "silu", plan, gating)
    return rows(dtype), rows(dtype), weight(dtype)[: WIDTH // 2], *norm


def _modulated_rms_norm(dtype, plan):
    modulation = str(Modulation.once(dtype))
    operands = (rows(dtype)[:, :1], rows(dtype)[:, :1], weight(dtype))
    return rows(dtype), *operands, EPS, OFFSET, 1.0, plan, modulation


def _add_rms_norm(dtype, plan):
    return rows(dtype), rows(dtype), weight(dtype), *scales(dtype), EPS, OFFSET, plan


_rms_norm_add = _add_rms_norm


def _rms_norm_add_rms_norm(dtype, plan):
    weights = (weight(dtype), weight(dtype))
    return rows(dtype), rows(dtype), *weights, *scales(dtype), *(EPS, OFFSET, plan) * 2


def _dual_rms_norm_add(dtype, plan, num_norms=3):
    weights = [weight(dtype) for _ in range(num_norms)]
    norms = (EPS, OFFSET, plan) * num_norms
    return *(rows(dtype) for _ in range(3)), *weights, *scales(dtype), *norms


def _dual_rms_norm_add_rms_norm(dtype, plan):
    return _dual_rms_norm_add(dtype, plan, num_norms=4)


def _qk_rms_norm(dtype, plan):
    heads, weights = [heads_of(4, dtype), heads_of(2, dtype)], [weight(dtype), weight(dtype)]
    return heads, weights, [EPS] * 2, [OFFSET] * 2, [plan] * 2


def _qk_rms_norm_rope(dtype, plan):
    heads, weights, *norms = _qk_rms_norm(dtype, plan)
    return heads, weights, table(dtype), table(dtype), *norms, turns(dtype)


def _rope(dtype, _):
    return [heads_of(4, dtype), heads_of(2, dtype)], table(dtype), table(dtype), turns(dtype)


def heads_of(num, dtype):
    return torch.randn(2, 5, num, WIDTH).to(dtype).transpose(1, 2)


def table(dtype):
    return torch.rand(2, 1, 5, WIDTH // 2).to(dtype)


def turns(dtype):
    return [str(Rotation(layout, WIDTH // 2, dtype, dtype)) for layout in ("half", "interleaved")]


def _rms_norm_backward(dtype, plan):
    return rows(dtype), rows(dtype), weight(dtype), rstd(), OFFSET, plan, [True] * 2


def _add_rms_norm_backward(dtype, plan):
    norm = (weight(dtype), rstd(), *scales(dtype), OFFSET, plan)
    return rows(dtype), rows(dtype), rows(dtype), *norm, dtype, dtype, [True] * 3


def _rms_norm_add_backward(dtype, plan):
    norm = (weight(dtype), rstd(), *scales(dtype), OFFSET, plan)
    return rows(dtype), rows(dtype), *norm, dtype, [True] * 3


def _rms_norm_add_rms_norm_backward(dtype, plan):
    norms = (weight(dtype), weight(dtype), rstd(), rstd(), *scales(dtype), *(OFFSET, plan) * 2)
    return *(rows(dtype) for _ in range(4)), *norms, dtype, [True] * 4


def _qk_rms_norm_rope_backward(dtype, plan):
    heads, weights, *numbers = _qk_rms_norm(dtype, plan)
    grads = [torch.randn_like(x) for x in heads]
    stds = [rstd(*x.shape[:-1]) for x in heads]
    tables = (table(dtype), table(dtype))
    return heads, grads, weights, stds, *tables, *numbers, turns(dtype), [True] * 4


def _rms_norms_backward(dtype, plan):
    x, weights, _, *numbers = _rms_norms(dtype, plan)
    return x, [rows(dtype) for _ in range(3)], weights, rstd(), *numbers, [True] * 3


def _dual_rms_norm_add_backward(dtype, plan):
    operands = ([weight(dtype) for _ in range(3)], [rstd() for _ in range(3)], *scales(dtype))
    numbers = ([OFFSET] * 3, [plan] * 3, dtype, [True] * 6)
    return *(rows(dtype) for _ in range(3)), *operands, *numbers


def _dual_rms_norm_add_rms_norm_backward(dtype, plan):
    operands = ([weight(dtype) for _ in range(4)], [rstd() for _ in range(4)], *scales(dtype))
    numbers = ([OFFSET] * 4, [plan] * 4, dtype, [True] * 7)
    return *(rows(dtype) for _ in range(5)), *operands, *numbers


def _gated_rms_norm_backward(dtype, plan):
    x, gate, shared, _, offset, *gating, plan, _ = _gated_rms_norm(dtype, plan)
    return rows(dtype), x, gate, shared, rstd(*ROWS, 2), offset, *gating, plan, [True] * 3


def _modulated_rms_norm_backward(dtype, plan):
    x, *operands, _, offset, scale_offset, plan, _ = _modulated_rms_norm(dtype, plan)
    return rows(dtype), x, *operands, rstd(), offset, scale_offset, plan, [True] * 4
