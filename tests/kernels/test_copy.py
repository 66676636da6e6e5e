"""The copy that the benchmark measures against: it moves every element of every stream."""

import pytest
import torch

from tests.kernels.inputs import random


@pytest.mark.parametrize(("num_operands", "num_results"), [(1, 1), (1, 3), (2, 2), (3, 2)])
def test_copies_every_element(launch, num_operands, num_results):
    xs = [random(3, 769) for _ in range(num_operands)]
    ys = launch("copy", xs, num_results)
    total = torch.stack(xs).float().sum(0).bfloat16()
    others = [xs[index] if index < num_operands else xs[0] for index in (1, 2)]
    for y, expected in zip(ys, [total, *others], strict=False):
        assert torch.equal(y, expected)
