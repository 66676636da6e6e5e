"""Steps that two processes divide: fused or declined with a sentence, as exact as eager's."""

import pytest
import torch

from tests import parallel
from tests.float64 import assert_as_close_as_eager
from tests.ranks import Ranks

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
FORWARD = ["add_rms_norm", "add_rms_norm"]  # of the two layers
BACKWARD = ["add_rms_norm_backward", "add_rms_norm_backward"]
PLACE = ("cpu", torch.float32)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, "gloo", tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def assert_exact_on_every_rank(steps):
    for step in steps:
        for ours, eager, exact in zip(step.values, step.eager, step.exact, strict=True):
            assert_as_close_as_eager(ours, eager, exact)
    (_, *gradients), (_, *others) = (step.values for step in steps)
    assert all(map(torch.equal, gradients, others))


@pytest.mark.guarantee
@pytest.mark.parametrize(
    ("way", "lowering"),
    [
        (parallel.replicated, "op"),
        (parallel.replicated_whole, "inline"),
        (parallel.sharded_layers, "op"),
        (parallel.sharded_whole, "inline"),
    ],
)
def test_gradients_are_the_mean_over_all_ranks(way, lowering, ranks):
    steps = ranks.run(parallel.step, way, lowering, *PLACE, True)

    assert steps[0].ops == FORWARD + BACKWARD
    assert_exact_on_every_rank(steps)


@pytest.mark.guarantee
@pytest.mark.parametrize("lowering", ["inline", "op"])
def test_norms_between_divided_products_are_fused(lowering, ranks):
    steps = ranks.run(parallel.step, parallel.divided_products, lowering, *PLACE, True)

    assert steps[0].ops == FORWARD + BACKWARD
    assert_exact_on_every_rank(steps)


@pytest.mark.guarantee
def test_norms_of_divided_rows_are_fused_in_inference(ranks):
    steps = ranks.run(parallel.step, parallel.divided_rows, "op", *PLACE, False)

    assert steps[0].ops == FORWARD
    assert_exact_on_every_rank(steps)


@pytest.mark.guarantee
def test_norms_of_distributed_tensors_are_declined_in_training(ranks):
    way = parallel.divided_rows
    report, _ = ranks.run(parallel.reasons, way, *PLACE, True)
    steps = ranks.run(parallel.step, way, "inline", *PLACE, True)

    sentence = "an operand is a tensor subclass (DTensor), for which the op has no rule"
    assert report == [(None, sentence), (None, sentence)]
    assert steps[0].ops == []
    assert_exact_on_every_rank(steps)


@pytest.mark.guarantee
def test_norms_of_divided_columns_are_left_alone(ranks):
    """Their statistic is a sum over ranks, which no kernel has."""
    steps = ranks.run(parallel.step, parallel.divided_columns, "op", *PLACE, False)

    assert steps[0].ops == []
    assert_exact_on_every_rank(steps)
