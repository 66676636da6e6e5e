"""Results have the strides of eager, whatever those of the operands: a `view` may rely on them."""

import pytest
import torch
import torch.nn.functional as F

from normfuse.testing import capture
from tests.blocks import WIDTH, activation

EPS = 1e-6


def norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def functional_norm_of_heads(heads, rows):
    return F.rms_norm(heads, (WIDTH,), eps=EPS)


def functional_norm_of_heads_viewed(heads, rows):
    return F.rms_norm(heads, (WIDTH,), eps=EPS).view(-1, WIDTH)


def handwritten_norm_of_heads(heads, rows):
    return norm(heads)


def norm_before_a_sum(heads, rows):
    return norm(heads) + rows, rows + norm(heads)


def scaled_sum_before_a_norm(heads, rows):
    total = heads * 0.5 + rows
    return total, norm(total)


def sandwich(heads, rows):
    total = norm(heads) + rows
    return total, norm(total)


BLOCKS = [
    functional_norm_of_heads,
    functional_norm_of_heads_viewed,
    handwritten_norm_of_heads,
    norm_before_a_sum,
    scaled_sum_before_a_norm,
    sandwich,
]


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_strides_of_eager(block, grad):
    heads = activation(2, 5, 3).transpose(1, 2).requires_grad_(grad)
    eager = flat(block(heads, activation(2, 3, 5)))
    torch.manual_seed(0)
    heads = activation(2, 5, 3).transpose(1, 2).requires_grad_(grad)
    rewritten, num_ops = counted(block, heads, activation(2, 3, 5))
    assert num_ops > 0
    for ours, theirs in zip(flat(rewritten), eager, strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


def counted(block, *inputs):
    """What the rewritten block returns, and how many ops are in its graph."""
    graphs = []
    captured = capture(block, lowering="op", post_grad_custom_post_pass=graphs.append)
    results = captured(*inputs)
    return results, sum("normfuse" in str(node.target) for node in graphs[0].nodes)


def flat(value):
    return value if isinstance(value, tuple) else (value,)
