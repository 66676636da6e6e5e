"""Piecewise CUDA graphs: Inductor's partitions around an operation that cannot be captured."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import normfuse
from tests.float64 import assert_as_close_as_eager
from tests.weight_updates import data_copy, norms_and_input

pytestmark = pytest.mark.gpu


@torch.library.custom_op(
    "normfuse_tests::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,)
)
def attend(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@attend.register_fake
def _(x):
    return torch.empty_like(x)


@pytest.mark.guarantee
@torch.no_grad()
def test_kernels_stand_in_the_partitions_around_an_operation_that_cannot_be_captured():
    first, x = norms_and_input("cuda")
    second, _ = norms_and_input("cuda")

    def model(x):
        return second(attend(first(x)))

    options = normfuse.options("reduce-overhead", lowering="triton", graph_partition=True)
    compiled = torch.compile(model, options=options, dynamic=False)

    _, (code, *_) = run_and_get_code(compiled, x)

    assert "def partition_1" in code
    assert "normfuse_tests.attend" in code
    for _ in range(4):  # recording and replay, with weights that change
        data_copy(first)
        data_copy(second)
        exact = second.exact(first.exact(x) * 2)
        assert_as_close_as_eager(compiled(x).clone(), model(x), exact)
