"""Steps that two GPUs divide, through NCCL: kernels inside DDP, FSDP2 and tensor parallelism."""

import pytest
import torch

from tests import parallel
from tests.ranks import Ranks
from tests.test_distributed import BACKWARD, FORWARD, assert_exact_on_every_rank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
PLACE = ("cuda", torch.bfloat16)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, "nccl", tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.mark.guarantee
@pytest.mark.parametrize("lowering", ["inline", "triton"])
@pytest.mark.parametrize("way", [*parallel.DATA, parallel.divided_products])
def test_training(way, lowering, ranks):
    steps = ranks.run(parallel.step, way, lowering, *PLACE, True)

    assert steps[0].ops == FORWARD + BACKWARD
    assert_exact_on_every_rank(steps)


@pytest.mark.guarantee
@pytest.mark.parametrize("way", [parallel.divided_rows, parallel.divided_columns])
def test_distributed_tensors_are_declined_in_training(way, ranks):
    steps = ranks.run(parallel.step, way, "triton", *PLACE, True)

    assert steps[0].ops == []
    assert_exact_on_every_rank(steps)


@pytest.mark.guarantee
@pytest.mark.parametrize(
    ("way", "ops"), [(parallel.divided_rows, FORWARD), (parallel.divided_columns, [])]
)
def test_distributed_tensors_in_inference(way, ops, ranks):
    steps = ranks.run(parallel.step, way, "triton", *PLACE, False)

    assert steps[0].ops == ops
    assert_exact_on_every_rank(steps)
