"""The compile-time arguments of the kernels: plans and types of sums as strings and numbers.

Inductor writes a kernel's constants into generated source, so nothing else may be one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton

if TYPE_CHECKING:
    from normfuse.ops.residual_sum import Scales
    from normfuse.ops.rounding import RoundingPlan

NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}


def norm_constants(
    plan: RoundingPlan, eps: float, offset: float, suffix: str = ""
) -> dict[str, Any]:
    """The constants of one norm; `suffix` tells two norms of a kernel apart."""
    constants = {"EPS": float(eps), "OFFSET": float(offset), "PLAN": plan_text(plan)}
    return {name + suffix: value for name, value in constants.items()}


def plan_text(plan: RoundingPlan) -> str:
    """A rounding plan as `row.step` reads it.

    In it `form` is the type in which x meets its root, `unit` that of the one cast after it that
    rounds, `product` that of the weighted value.
    """
    form, last = plan.unit[0], plan.unit[-1]
    narrowing = [b for a, b in pairwise(plan.unit) if torch.promote_types(a, b) != b]
    assert len(narrowing) < 2, f"a plan rounds once before the weight, got '{plan}'"
    weight, factor = plan.weight or (None, None)
    product = None if factor is None else torch.promote_types(last, factor)
    steps = {
        "compute": NAMES[plan.compute],
        "mean": plan.mean,
        "root": plan.root,
        "eps": "bounds" if plan.bounded else "added",
        "rstd": NAMES[plan.rstd],
        "form": NAMES[form],
        "unit": NAMES[narrowing[0] if narrowing else last],
        "out": NAMES[plan.out],
        "on": target(),
    }
    if weight is not None and factor is not None and product is not None:
        steps |= {"weight": NAMES[weight], "factor": NAMES[factor], "product": NAMES[product]}
    return text(steps)


def target() -> str:
    """The GPU for which a kernel may use instructions of its own: "cuda", "hip" or none."""
    if triton.knobs.runtime.interpret:
        return "none"
    return "hip" if torch.version.hip else "cuda"


def text(steps: dict[str, str]) -> str:
    """Named steps as one constant, which `row.step` reads."""
    # In lower case: torch 2.13 takes a constant with a D in it for the mark of an aligned pointer.
    return " ".join(f"{name}={value}" for name, value in steps.items())


class SumTypes(NamedTuple):
    """The types of a residual sum: branch, branch times its tensor, sum, sum times its tensor."""

    branch: torch.dtype
    scaled: torch.dtype
    sum: torch.dtype
    total: torch.dtype

    @classmethod
    def of(cls, branch: torch.dtype, residual: torch.dtype, scales: Scales) -> SumTypes:
        """As torch promotes, which a number or a 0-d tensor never changes among floating types."""
        scaled = _promoted(branch, scales.branch_tensor)
        total = torch.promote_types(residual, scaled)
        return cls(branch, scaled, total, _promoted(total, scales.total_tensor))

    def constants(self, scales: Scales) -> dict[str, Any]:
        """The constants of `row.residual_sum`."""
        return {
            "BRANCH_SCALE": None if scales.branch is None else float(scales.branch),
            "TOTAL_SCALE": None if scales.total is None else float(scales.total),
            "SUM": text({name: NAMES[dtype] for name, dtype in self._asdict().items()}),
        }


def _promoted(dtype: torch.dtype, scale: torch.Tensor | None) -> torch.dtype:
    if scale is None or scale.dim() == 0:
        return dtype
    return torch.promote_types(dtype, scale.dtype)
