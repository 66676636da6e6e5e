"""What the eager functions refuse: one case a sentence."""

import pytest
import torch

import normfuse
from normfuse import RoundingPlan

X, WEIGHT, ON_META = torch.ones(2, 8), torch.ones(8), torch.ones(2, 8, device="meta")
NO_WEIGHT = RoundingPlan.once(torch.float32, None)
WITH_WEIGHT = RoundingPlan.once(torch.float32, torch.float32)
FLOATS = "torch.float64, torch.float32, torch.float16, torch.bfloat16"


def refusal(name, call, error, message):
    return pytest.param(call, error, message, id=name)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        refusal(
            "x is no tensor",
            lambda: normfuse.rms_norm([1.0]),
            TypeError,
            "x must be a tensor, got list: pass a torch.Tensor",
        ),
        refusal(
            "x holds integers",
            lambda: normfuse.rms_norm(X.int()),
            TypeError,
            f"x must have one of the types {FLOATS}, got torch.int32: cast it",
        ),
        refusal(
            "x has no dimension",
            lambda: normfuse.rms_norm(torch.tensor(1.0)),
            ValueError,
            "x must have at least one dimension, got a 0-d tensor: "
            "the norm is taken over the last dimension",
        ),
        refusal(
            "x has empty rows",
            lambda: normfuse.rms_norm(torch.ones(2, 0)),
            ValueError,
            "x must have a last dimension of at least 1, got shape (2, 0): "
            "the mean of no values is undefined",
        ),
        refusal(
            "weight of another width",
            lambda: normfuse.rms_norm(X, torch.ones(4)),
            ValueError,
            "weight must have shape (8,), got (4,): pass the weight of the normalised axis",
        ),
        refusal(
            "weight of two dimensions",
            lambda: normfuse.rms_norm(X, X),
            ValueError,
            "weight must have shape (8,), got (2, 8): pass the weight of the normalised axis",
        ),
        refusal(
            "weight holds integers",
            lambda: normfuse.add_rms_norm(X, X, WEIGHT.long()),
            TypeError,
            f"weight must have one of the types {FLOATS}, got torch.int64: cast it",
        ),
        refusal(
            "weight on another device",
            lambda: normfuse.rms_norm_add(X, X, WEIGHT.to("meta")),
            ValueError,
            "weight must be on the device of x, cpu, got meta: move it there",
        ),
        refusal(
            "residual of another shape",
            lambda: normfuse.add_rms_norm(X, X[:1]),
            ValueError,
            "residual must have the shape of x, (2, 8), got (1, 8): expand it before the call",
        ),
        refusal(
            "residual holds integers",
            lambda: normfuse.rms_norm_add(X, X.int()),
            TypeError,
            f"residual must have one of the types {FLOATS}, got torch.int32: cast it",
        ),
        refusal(
            "residual on another device",
            lambda: normfuse.rms_norm_add_rms_norm(X, ON_META),
            ValueError,
            "residual must be on the device of x, cpu, got meta: move it there",
        ),
        refusal(
            "negative eps",
            lambda: normfuse.rms_norm(X, WEIGHT, -1e-6),
            ValueError,
            "eps must be at least 0, got -1e-06: pass the eps of the model's norm",
        ),
        refusal(
            "eps is no number",
            lambda: normfuse.add_rms_norm(X, X, WEIGHT, torch.tensor(1e-6)),
            TypeError,
            "eps must be a number, got Tensor: pass a float",
        ),
        refusal(
            "second eps is not a number",
            lambda: normfuse.rms_norm_add_rms_norm(X, X, eps_2=float("nan")),
            ValueError,
            "eps_2 must be at least 0, got nan: pass the eps of the model's norm",
        ),
        refusal(
            "scale of two elements",
            lambda: normfuse.add_rms_norm(X, X, branch_scale=torch.ones(2)),
            ValueError,
            "branch_scale must have shape () or (1,), got (2,): pass one factor for all rows",
        ),
        refusal(
            "scale of two dimensions",
            lambda: normfuse.rms_norm_add(X, X, total_scale=torch.ones(1, 1)),
            ValueError,
            "total_scale must have shape () or (1,), got (1, 1): pass one factor for all rows",
        ),
        refusal(
            "scale holds integers",
            lambda: normfuse.rms_norm_add_rms_norm(X, X, branch_scale=torch.tensor(2)),
            TypeError,
            "branch_scale must be a number or a floating-point tensor, got torch.int64: cast it",
        ),
        refusal(
            "scale is no number",
            lambda: normfuse.add_rms_norm(X, X, total_scale="2"),
            TypeError,
            "total_scale must be a number or a floating-point tensor, got str: cast it",
        ),
        refusal(
            "scale on another device",
            lambda: normfuse.add_rms_norm(X, X, total_scale=ON_META[0, :1]),
            ValueError,
            "total_scale must be on the device of x, cpu, got meta: move it there",
        ),
        refusal(
            "plan without the weight",
            lambda: normfuse.rms_norm(X, WEIGHT, plan=NO_WEIGHT),
            ValueError,
            "plan must name the weight types for this call, got 'f32 unit=f32 out=f32': "
            "build it for the weight that is passed",
        ),
        refusal(
            "plan with a weight that is missing",
            lambda: normfuse.rms_norm_add_rms_norm(X, X, WEIGHT, plan_2=WITH_WEIGHT),
            ValueError,
            "plan_2 must have no weight types for this call, got "
            "'f32 unit=f32 weight=f32 out=f32': build it for the weight that is passed",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message
