"""Calls that change nothing between a norm and what it is joined with."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normfuse.explain import explain_with
from normfuse.testing import capture
from tests.blocks import GemmaRMSNorm, activation

SAME = {
    "dropout in eval": lambda x: F.dropout(x, 0.1, training=False),
    "dropout of nothing": lambda x: F.dropout(x, 0.0, training=True),
    "torch.dropout": lambda x: torch.dropout(x, 0.1, False),
    "a view of the same shape": lambda x: x.view(x.shape),
    "contiguous": lambda x: x.contiguous(),
    "all of it": lambda x: x[:],
}
OTHERS = {
    "a write, as far as one can tell": lambda x: F.dropout(x, training=False, inplace=True),
    "dropout in training": lambda x: F.dropout(x, 0.1, training=True),
    "another layout": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "a part": lambda x: x[:, :2],
}


class Between(nn.Module):
    """norm -> `between` -> + residual -> norm."""

    def __init__(self, between):
        super().__init__()
        self.between = between
        self.first, self.second = GemmaRMSNorm(), GemmaRMSNorm()

    def forward(self, x, residual):
        total = residual + self.between(self.first(x))
        return self.second(total), total


def is_one_op(block, inputs):
    """Whether both norms are the one of a sandwich."""
    with torch.no_grad():
        report = explain_with(block, inputs, options={"normfuse.lowering": "op"})
    return {site.op for site in report.sites} == {"rms_norm_add_rms_norm"}


@pytest.mark.parametrize("name", SAME)
def test_norms_join_across_what_changes_nothing(name):
    block = Between(SAME[name]).bfloat16()
    inputs = activation(2, 3), activation(2, 3)

    with torch.no_grad():
        found = capture(block, *inputs, lowering="op")(*inputs)
        expected = block(*inputs)

    assert is_one_op(block, inputs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_but_not_across_what_changes_something(name):
    inputs = activation(2, 3), activation(2, 2 if name == "a part" else 3)

    assert not is_one_op(Between(OTHERS[name]).bfloat16(), inputs)


def test_gradients_go_through():
    block = Between(nn.Dropout(0.1)).eval()
    inputs = [activation(2, 3, dtype=torch.float32).requires_grad_() for _ in range(2)]

    def gradients(function):
        y, total = function(*inputs)
        return torch.autograd.grad((y * y + total).sum(), [*inputs, *block.parameters()])

    compiled = torch.compile(block, backend="normfuse", options={"normfuse.lowering": "inline"})
    torch.testing.assert_close(gradients(compiled), gradients(block))


@pytest.mark.guarantee
@pytest.mark.parametrize("lowering", ["op", "inline"])
@pytest.mark.parametrize("between", [lambda x: F.dropout(x, 0.1, False), lambda x: x.view(x.shape)])
def test_what_is_written_behind_it_is_seen(between, lowering):
    norm = GemmaRMSNorm()

    def written(x, residual):
        value = between(norm(x))
        value.mul_(2)
        total = between(residual + x)
        total.mul_(3)
        return residual + value, total

    inputs = activation(2, 3), activation(2, 3)
    with torch.no_grad():
        found = capture(written, *inputs, lowering=lowering)(*inputs)
        expected = written(*inputs)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
