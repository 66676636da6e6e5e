"""The ops behind one set of calls, so that a test of all of them is written once."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from normfuse.ops.residual_sum import Scales
from normfuse.ops.rounding import RoundingPlan
from tests import float64

STEMS = (
    "rms_norm",
    "rms_norms",
    "add_rms_norm",
    "rms_norm_add",
    "rms_norm_add_rms_norm",
    "dual_rms_norm_add",
    "dual_rms_norm_add_rms_norm",
)
# How many norms a chain has, if not one.
NUM_NORMS = {
    "rms_norm_add_rms_norm": 2,
    "dual_rms_norm_add": 3,
    "dual_rms_norm_add_rms_norm": 4,
}
FACTORS = [1.0, 0.3]  # of the results of `rms_norms`


@dataclass(frozen=True)
class Chain:
    """One op with its operands; where it has several norms, they take the same weight and plan.

    The second branch of a dual op is the first one backwards.
    """

    stem: str
    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor | None
    scales: Scales = field(default_factory=Scales)

    def launch(self, eps: float, offset: float, plan: RoundingPlan) -> Any:
        """What the launcher returns."""
        launch = import_module(f"normfuse.ops.kernels.{self.stem}").launch
        if self.stem == "rms_norms":
            return launch(self.x, [self.weight] * 2, eps, [offset] * 2, FACTORS, [plan] * 2)
        if self.stem.startswith("dual"):
            norms = [(eps, offset, plan)] * self._num_norms
            weights = [self.weight] * self._num_norms
            return launch(self.x, self.x_2, self.residual, weights, self.scales, norms)
        scales = (None,) if self.stem == "rms_norm" else (self.scales,)
        return launch(*self._tensors(), *scales, *self._norms(eps, offset, plan))

    def op(self, eps: float, offset: float, plan: RoundingPlan) -> Any:
        """What the op returns, through the dispatcher."""
        return getattr(torch.ops.normfuse, self.stem)(*self._schema_order(eps, offset, plan))

    def reference(self, eps: float, offset: float, plan: RoundingPlan) -> Any:
        """What eager returns."""
        return self._function("reference")(*self._schema_order(eps, offset, plan))

    def fake(self, eps: float, offset: float, plan: RoundingPlan) -> Any:
        """Results of the right shapes, types and strides."""
        return self._function("fake")(*self._schema_order(eps, offset, plan))

    def exact(self, eps: float, offset: float) -> tuple[torch.Tensor, ...]:
        """The results that have rows, in float64."""
        x = self.x
        if self.stem == "rms_norm":
            return (float64.rms_norm(x, self.weight, eps, offset),)
        if self.stem == "rms_norms":
            y = float64.rms_norm(x, self.weight, eps, offset)
            return tuple(y * factor for factor in FACTORS)
        if self.stem != "add_rms_norm":
            x = float64.rms_norm(x, self.weight, eps, offset)
        if self.stem.startswith("dual"):
            x = x + float64.rms_norm(self.x_2, self.weight, eps, offset)
            x = float64.rms_norm(x, self.weight, eps, offset)
        total = float64.residual_sum(x, self.residual, self.scales)
        if self.stem.endswith("add"):
            return (total,)
        return float64.rms_norm(total, self.weight, eps, offset), total

    @property
    def x_2(self) -> torch.Tensor:
        """The second branch."""
        return self.x.flip(-1)

    @property
    def _num_norms(self) -> int:
        return NUM_NORMS.get(self.stem, 1)

    def _tensors(self) -> tuple[torch.Tensor, ...]:
        if self.stem == "rms_norm":
            return self.x, self.weight
        branches = (self.x, self.x_2) if self.stem.startswith("dual") else (self.x,)
        return *branches, self.residual, *(self.weight,) * self._num_norms

    def _norms(self, *norm: Any) -> tuple[Any, ...]:
        return norm * self._num_norms

    def _schema_order(self, eps: float, offset: float, plan: RoundingPlan) -> tuple[Any, ...]:
        if self.stem == "rms_norms":
            weights = [] if self.weight is None else [self.weight] * 2
            return self.x, weights, eps, [offset] * 2, FACTORS, [str(plan)] * 2
        scales = (None,) if self.stem == "rms_norm" else self.scales
        return *self._tensors(), *scales, *self._norms(eps, offset, str(plan))

    def _function(self, kind: str) -> Any:
        return getattr(import_module(f"normfuse.ops.{self.stem}"), f"{self.stem}_{kind}")
