"""Rounding plans: their text form, the two common ones, and what `numerics="fast"` makes of one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import normfuse
from normfuse import RoundingPlan
from normfuse.ops.rounding import FLOATS, MEANS, ROOTS
from tests import float64

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

dtypes = st.sampled_from(FLOATS)
plans = st.builds(
    RoundingPlan,
    compute=dtypes,
    rstd=dtypes,
    unit=st.lists(dtypes, min_size=1, max_size=3).map(tuple),
    weight=st.none() | st.tuples(dtypes, dtypes),
    out=dtypes,
    mean=st.sampled_from(MEANS),
    root=st.sampled_from(ROOTS),
)


@given(plans)
def test_the_text_of_a_plan_reads_back_as_the_plan(plan):
    assert RoundingPlan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (RoundingPlan.once(BF16, BF16), "f32 unit=f32 weight=bf16 out=bf16"),
        (RoundingPlan.once(BF16, None), "f32 unit=f32>bf16 out=bf16"),
        (RoundingPlan.once(F32, F16), "f32 unit=f32 weight=f16 out=f32"),
        (RoundingPlan.once(F64, None), "f64 unit=f64 out=f64"),
        (RoundingPlan.before_weight(BF16, BF16), "f32 unit=f32>bf16 weight=bf16 out=bf16"),
        (RoundingPlan.before_weight(F16, F32), "f32 unit=f32>f16 weight=f32 out=f32"),
        (
            RoundingPlan(F32, BF16, (BF16,), None, BF16, "sum", "divide_by_sqrt", bounded=True),
            "f32 sum divide_by_sqrt bounded rstd=bf16 unit=bf16 out=bf16",
        ),
        (
            RoundingPlan(BF16, F32, (BF16, F32), (F32, BF16), F16, "sum_divided", "divide_by_sqrt"),
            "bf16 sum_divided divide_by_sqrt rstd=f32 unit=bf16>f32 weight=f32>bf16 out=f16",
        ),
    ],
    ids=str,
)
def test_text(plan, text):
    assert str(plan) == text
    assert RoundingPlan.parse(text) == plan


@given(plans)
def test_fast_is_wide_until_the_result(plan):
    fast = plan.fast()

    wide = torch.promote_types(plan.compute, F32)
    unit = (wide,) if plan.weight else dict.fromkeys((wide, plan.out))
    assert (fast.compute, fast.rstd, fast.unit) == (wide, wide, tuple(unit))
    assert fast.weight == (plan.weight and (wide, wide))
    assert (fast.out, fast.mean, fast.root) == (plan.out, plan.mean, plan.root)


@given(plans)
def test_fast_is_fast_already(plan):
    fast = plan.fast()

    assert fast.fast() == fast


def test_fast_rounds_once():
    x, weight = torch.randn(16, 64).bfloat16(), torch.randn(64).bfloat16()
    plan = RoundingPlan.before_weight(BF16, BF16)

    y = normfuse.rms_norm(x, weight, 1e-5, offset=1.0, plan=plan.fast())

    once = normfuse.rms_norm(x.float(), weight.float(), 1e-5, offset=1.0)
    assert torch.equal(y, once.bfloat16())
    assert not torch.equal(y, normfuse.rms_norm(x, weight, 1e-5, offset=1.0, plan=plan))


def test_fast_is_closer_to_the_formula():
    x, weight = torch.randn(16, 64).bfloat16(), torch.randn(64).bfloat16()
    plan = RoundingPlan.before_weight(BF16, BF16)
    exact = float64.rms_norm(x, weight, 1e-5, 1.0)

    def error(plan):
        y = normfuse.rms_norm(x, weight, 1e-5, offset=1.0, plan=plan)
        return (y.double() - exact).square().sum()

    assert error(plan.fast()) < error(plan)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "f32",
        "f32 unit=f32",
        "i32 unit=f32 out=f32",
        "f32 unit=f32 out=f32 ",
        "f32 unit= out=f32",
    ],
)
def test_parse_refuses_other_texts(text):
    with pytest.raises(ValueError, match="a rounding plan") as raised:
        RoundingPlan.parse(text)
    assert str(raised.value) == (
        "a rounding plan reads like 'f32 unit=f32>bf16 weight=bf16 out=bf16', "
        f"got {text!r}: write it with str(RoundingPlan(...))"
    )


def test_a_plan_refuses_types_that_are_not_floating():
    with pytest.raises(TypeError) as raised:
        RoundingPlan(F32, F32, (F32, torch.int32), None, F32)
    assert str(raised.value) == (
        "a rounding plan holds floating types "
        "(torch.float64, torch.float32, torch.float16, torch.bfloat16), got torch.int32"
    )


@pytest.mark.parametrize(("mean", "root"), [("median", "rsqrt"), ("mean", "cbrt")])
def test_a_plan_refuses_other_means_and_roots(mean, root):
    with pytest.raises(ValueError, match="mean must be one of") as raised:
        RoundingPlan(F32, F32, (F32,), None, F32, mean, root)
    assert str(raised.value) == (
        f"mean must be one of {MEANS} and root one of {ROOTS}, got {mean}, {root}"
    )
