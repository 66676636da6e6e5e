"""The running error analysis: bounds that hold, and are no larger than they must be."""

import pytest
import torch

from normfuse.ops.l2_norm import l2_norm_reference
from normfuse.ops.lowering import ALL_OPS, inline_form
from normfuse.ops.rms_norm import rms_norm_reference
from normfuse.ops.rounding import RoundingPlan
from normfuse.ops.running_error import RunningError
from tests import op_arguments
from tests.kernels.inputs import PLANS, random

DTYPES = (torch.bfloat16, torch.float32)


def errors(function, *arguments):
    """For each result, its errors in units of their bounds, and the bounds.

    What only passes through has neither.
    """
    with RunningError() as running:
        results = function(*arguments)
    for result in results:
        exact, bound = running.of(result)
        error = (result.double() - exact).abs()
        yield torch.where(error == 0, 0, error / bound), bound / exact.abs()


@pytest.mark.guarantee
@pytest.mark.parametrize("op", ALL_OPS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op_stays_within_its_bounds(op, dtype):
    for plan in (RoundingPlan.before_weight, RoundingPlan.once):
        for error, _ in errors(inline_form(op), *op_arguments.of(op, dtype, plan)):
            assert error.max() <= 1


@pytest.mark.parametrize("plan", PLANS)
def test_every_rounding_of_the_plan_stays_within_its_bounds(plan):
    for width in (1, 64, 769):
        for error, _ in errors(rms_norm_reference, *norm(plan, 64, width)):
            assert error.max() <= 1


@pytest.mark.parametrize("eps", [1e-12, 8.0, torch.tensor(8.0)])
def test_a_bounded_root_stays_within_its_bounds(eps):
    number, tensor = (0.0, eps) if isinstance(eps, torch.Tensor) else (eps, None)
    plan = "f32 sum divide_by_sqrt bounded rstd=bf16 unit=bf16 out=bf16"
    x = random(64, 64, dtype=torch.bfloat16)
    for error, bound in errors(l2_norm_reference, x, tensor, number, plan):
        assert error.max() <= 1
        assert bound.isfinite().all()


def norm(plan, *shape):
    """Arguments of `rms_norm` for this plan."""
    steps = RoundingPlan.parse(plan)
    weight = None if steps.weight is None else random(shape[-1], dtype=steps.weight[1])
    x = random(*shape, dtype=steps.unit[0])
    if steps.compute == torch.float16:
        x = x.sign() * (x.abs() + 0.1)  # the square of a smaller number has fewer bits in float16
    return x, weight, None, 1e-6, 0.0, plan


@pytest.mark.parametrize(
    ("plan", "roundings"),
    [
        ("f32 unit=f32 weight=f32 out=bf16", 1),  # Gemma
        ("f32 unit=f32>bf16 weight=bf16 out=bf16", 2),  # Llama
        ("f32 rstd=bf16 unit=bf16 weight=bf16 out=bf16", 3),
    ],
)
def test_bounds_are_the_roundings_of_the_plan_and_are_reached(plan, roundings):
    (error, bound), _ = errors(rms_norm_reference, *norm(plan, 64, 4096))

    unit = torch.finfo(torch.bfloat16).eps / 2
    last_bits = 1.1
    assert roundings <= bound.median() / unit <= roundings * last_bits
    assert error.max() > 0.8


def test_another_plan_is_beyond():
    llama, gemma, *_ = PLANS
    x, weight = random(64, 4096), random(4096)

    with RunningError() as running:
        y, _ = rms_norm_reference(x, weight, None, 1e-6, 0.0, gemma)
    other, _ = rms_norm_reference(x, weight, None, 1e-6, 0.0, llama)

    exact, bound = running.of(y)
    assert ((y.double() - exact).abs() <= bound).all()
    assert ((other.double() - exact).abs() > bound).any()


def test_a_cancelled_sum_keeps_the_error_of_its_terms():
    x = torch.full((4,), 1.0)

    with RunningError() as running:
        y = (x / 3) - (x / 3 * (1 + 2**-20))

    exact, bound = running.of(y)
    assert (exact.abs() < 4e-7).all()
    assert (bound > 1 / 3 * 2**-24).all()


def test_an_operation_without_a_rule_is_named():
    x = torch.ones(2)

    with RunningError(), pytest.raises(NotImplementedError, match=r"aten\.tanh\.default has no"):
        x.tanh()
