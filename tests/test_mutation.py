"""In-place writes beside a norm: what is read before the write must not be read after it."""

import pytest
import torch

from normfuse.testing import capture
from tests.blocks import WIDTH, activation
from tests.float64 import assert_as_close_as_eager

EPS = 1e-6


def norm(h):
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def weight_changes_after_its_cast(x, weight):
    factor = weight.float()
    weight.add_(1)
    return norm(x.float()) * factor


def weight_changes_after_the_offset(x, weight):
    factor = 1 + weight.float()
    weight.mul_(2)
    return norm(x.float()) * factor


def x_changes_after_its_cast(x, weight):
    h = x.float()
    x.add_(1)
    return norm(h) * weight


def x_changes_between_two_casts(x, weight):
    variance = x.float().pow(2).mean(-1, keepdim=True)
    x.add_(1)
    return x.float() * torch.rsqrt(variance + EPS) * weight


def sum_changes_before_the_norm(x, weight):
    total = x + x
    total *= 3
    return norm(total.float()) * weight, total


def sum_changes_after_the_norm(x, weight):
    total = x + x
    y = norm(total.float()) * weight
    total *= 3
    return y, total


def residual_grows_in_place(x, weight):
    residual = x * 2
    residual += x
    return norm(residual.float()) * weight, residual


def result_changes_in_place(x, weight):
    y = norm(x.float()) * weight
    y.mul_(2)
    return y, x


def result_is_written_into_a_slice(x, weight):
    out = torch.zeros(2, 2 * WIDTH)
    out[:, :WIDTH] = norm(x.float()) * weight
    return out


BLOCKS = [
    weight_changes_after_its_cast,
    weight_changes_after_the_offset,
    x_changes_after_its_cast,
    x_changes_between_two_casts,
    sum_changes_before_the_norm,
    sum_changes_after_the_norm,
    residual_grows_in_place,
    result_changes_in_place,
    result_is_written_into_a_slice,
]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_writes_keep_their_place(block):
    x, weight = activation(2), torch.randn(WIDTH).bfloat16()
    theirs, ours = (x.clone(), weight.clone()), (x.clone(), weight.clone())
    with torch.no_grad():
        eager = block(*theirs)
        rewritten = capture(block, lowering="op")(*ours)
    values = zip(flat(rewritten) + ours, flat(eager) + theirs, strict=True)
    assert all(torch.equal(mine, other) for mine, other in values)


def residual_grows_after_its_norm(x, weight):
    residual = x * 2
    residual += norm(residual.float()).to(x.dtype) * weight
    return residual


def unit_changes_between_two_uses(x, weight):
    unit = norm(x.float()).view(-1, WIDTH)
    variance = unit.pow(2).mean(-1, keepdim=True).detach()
    unit.mul_(2)
    return unit * torch.rsqrt(variance + EPS) * weight


@pytest.mark.parametrize(
    "block",
    [residual_grows_after_its_norm, unit_changes_between_two_uses],
    ids=lambda b: b.__name__,
)
def test_writes_keep_their_place_in_training(block):
    x, weight = activation(2).requires_grad_(), torch.randn(WIDTH).bfloat16().requires_grad_()
    eager = block(x, weight)
    rewritten = capture(block, lowering="op")(x, weight)
    assert torch.equal(rewritten, eager)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    found = [torch.autograd.grad(y.sum(), (x, weight)) for y in (rewritten, eager)]
    exact = torch.autograd.grad(block(*wide).sum(), wide)
    for ours, theirs, expected in zip(*found, exact, strict=True):
        assert_as_close_as_eager(ours, theirs, expected)


def flat(value):
    return value if isinstance(value, tuple) else (value,)
