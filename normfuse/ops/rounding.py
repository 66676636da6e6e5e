"""Where eager rounds inside one RMSNorm: the part of a norm that its formula does not show.

Two models can compute the same formula in bfloat16 and differ in a third of their bits, because one
rounds the normalised value before the weight (Llama) and the other after it (Gemma). A
`RoundingPlan` records every such choice of one norm, exactly; every normfuse op carries one per
norm and reproduces it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

import torch

SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
DTYPES = {short: dtype for dtype, short in SHORT.items()}

MEANS = ("mean", "sum_divided", "sum_scaled")
L2 = "sum"  # undivided: the statistic of an L2 norm
ROOTS = ("rsqrt", "pow", "reciprocal_sqrt", "divide_by_sqrt")

FLOATS = tuple(SHORT)


def is_exact_cast(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every value of `source` is a value of `target`, so that the cast rounds nothing."""
    return torch.promote_types(source, target) == target


@dataclass(frozen=True)
class RoundingPlan:
    """The rounding steps of one RMSNorm, in the order in which eager takes them.

        h      = x.to(compute)
        rstd   = root(mean(h * h) + eps)               in compute; max(root, eps) where bounded
        unit   = x * rstd.to(rstd)                     formed in unit[0], then cast to unit[1], ...
        factor = (weight.to(weight[0]) + offset).to(weight[1])
        y      = (unit * factor).to(out)               the product in the promoted type

    Attributes:
        compute: type in which the statistic is formed.
        mean: `"mean"`, `"sum_divided"` (sum / N), `"sum_scaled"` (sum * (1 / N)), or `"sum"` for an
            L2 norm.
        root: `"rsqrt"`, `"pow"` (v ** -0.5), `"reciprocal_sqrt"` (1 / sqrt(v), multiplied) or
            `"divide_by_sqrt"` (x / sqrt(v)).
        rstd: type to which the inverse root is rounded before it multiplies x.
        unit: type of the product, then the casts up to the weight. At most one of them rounds
            further.
        weight: type in which the offset is added, and type that multiplies; None for a weightless
            norm.
        out: type of the result.
        bounded: whether eps bounds the root from below, as in `torch.nn.functional.normalize`,
            instead of being added under it; only of an L2 norm that divides by its root.
    """

    compute: torch.dtype
    rstd: torch.dtype
    unit: tuple[torch.dtype, ...]
    weight: tuple[torch.dtype, torch.dtype] | None
    out: torch.dtype
    mean: str = "mean"
    root: str = "rsqrt"
    bounded: bool = False

    def __post_init__(self) -> None:
        for dtype in (self.compute, self.rstd, *self.unit, *(self.weight or ()), self.out):
            if dtype not in SHORT:
                names = ", ".join(str(d) for d in SHORT)
                raise TypeError(f"a rounding plan holds floating types ({names}), got {dtype}")
        if self.mean not in (*MEANS, L2) or self.root not in ROOTS:
            raise ValueError(
                f"mean must be one of {MEANS} and root one of {ROOTS}, got {self.mean}, {self.root}"
            )
        if self.bounded and (self.mean, self.root) != (L2, "divide_by_sqrt"):
            raise ValueError(
                f"eps bounds the root only of the mean {L2!r} and the root 'divide_by_sqrt', got "
                f"{self.mean!r} and {self.root!r}: leave out bounded=True"
            )

    @classmethod
    def once(cls, x: torch.dtype, weight: torch.dtype | None) -> RoundingPlan:
        """One rounding, at the end: `torch.nn.functional.rms_norm`."""
        compute = torch.promote_types(x, torch.float32)
        factor = None if weight is None else (weight, weight)
        unit = (compute, x) if weight is None else (compute,)
        return cls(compute=compute, rstd=compute, unit=_without_repeats(unit), weight=factor, out=x)

    @classmethod
    def before_weight(cls, x: torch.dtype, weight: torch.dtype) -> RoundingPlan:
        """The normalised value is rounded to x's type, then multiplied: `LlamaRMSNorm`."""
        compute = torch.promote_types(x, torch.float32)
        return cls(
            compute=compute,
            rstd=compute,
            unit=_without_repeats((compute, x)),
            weight=(weight, weight),
            out=torch.promote_types(x, weight),
        )

    def with_mean(self, mean: str) -> RoundingPlan:
        """The same roundings with another mean."""
        return replace(self, mean=mean)

    @property
    def statistic(self) -> tuple[torch.dtype, str, str, bool]:
        """What the inverse root is made with: plans that agree here can share one."""
        return self.compute, self.mean, self.root, self.bounded

    def with_out(self, out: torch.dtype) -> RoundingPlan:
        """The same norm with another type of its result."""
        unit = self.unit if self.weight is not None else _without_repeats((*self.unit, out))
        return replace(self, unit=unit, out=out)

    def fast(self) -> RoundingPlan:
        """The same norm with one rounding only, at the result (`numerics="fast"`)."""
        wide = torch.promote_types(self.compute, torch.float32)
        if self.weight is None:
            return replace(self, compute=wide, rstd=wide, unit=_without_repeats((wide, self.out)))
        return replace(self, compute=wide, rstd=wide, unit=(wide,), weight=(wide, wide))

    def __str__(self) -> str:
        """The form that ops carry, defaults left out: `f32 unit=f32>bf16 weight=bf16 out=bf16`."""
        words = [SHORT[self.compute]]
        if self.mean != "mean":
            words.append(self.mean)
        if self.root != "rsqrt":
            words.append(self.root)
        if self.bounded:
            words.append("bounded")
        if self.rstd != self.compute:
            words.append("rstd=" + SHORT[self.rstd])
        words.append("unit=" + ">".join(SHORT[dtype] for dtype in self.unit))
        if self.weight is not None:
            words.append("weight=" + ">".join(SHORT[d] for d in _without_repeats(self.weight)))
        words.append("out=" + SHORT[self.out])
        return " ".join(words)

    @staticmethod
    def parse(text: str) -> RoundingPlan:
        """The plan that `str(plan)` wrote; ValueError if `text` is none."""
        return _parse(text)


def _without_repeats(dtypes: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    return tuple(d for i, d in enumerate(dtypes) if i == 0 or d != dtypes[i - 1])


@cache
def _parse(text: str) -> RoundingPlan:
    short = "|".join(DTYPES)
    chain = rf"(?:{short})(?:>(?:{short}))*"
    match = re.fullmatch(
        rf"(?P<compute>{short})(?: (?P<mean>{'|'.join((*MEANS, L2))}))?"
        rf"(?: (?P<root>{'|'.join(ROOTS)}))?(?: (?P<bounded>bounded))?"
        rf"(?: rstd=(?P<rstd>{short}))? unit=(?P<unit>{chain})(?: weight=(?P<weight>{chain}))?"
        rf" out=(?P<out>{short})",
        text,
    )
    if match is None:
        raise ValueError(
            f"a rounding plan reads like 'f32 unit=f32>bf16 weight=bf16 out=bf16', got {text!r}: "
            "write it with str(RoundingPlan(...))"
        )
    words = match.groupdict()
    weight = words["weight"] and tuple(DTYPES[name] for name in words["weight"].split(">"))
    return RoundingPlan(
        compute=DTYPES[words["compute"]],
        mean=words["mean"] or "mean",
        root=words["root"] or "rsqrt",
        rstd=DTYPES[words["rstd"] or words["compute"]],
        unit=tuple(DTYPES[name] for name in words["unit"].split(">")),
        weight=(weight[0], weight[-1]) if weight else None,
        out=DTYPES[words["out"]],
        bounded=words["bounded"] is not None,
    )


@dataclass(frozen=True)
class Types:
    """A few named types that an op carries as one string: `gate=f32 product=f32 out=bf16`."""

    def __post_init__(self) -> None:
        for name, dtype in self._items():
            if dtype not in SHORT:
                raise TypeError(f"{name} must be one of {FLOATS}, got {dtype}: pass a float type")

    def __str__(self) -> str:
        return " ".join(f"{name}={SHORT[dtype]}" for name, dtype in self._items())

    @classmethod
    def parse(cls, text: str) -> Any:
        """The value that `str(value)` wrote; ValueError if `text` is none."""
        names = [field.name for field in fields(cls)]
        words = re.fullmatch(" ".join(f"{name}=({'|'.join(DTYPES)})" for name in names), text)
        if words is None:
            example = " ".join(f"{name}=f32" for name in names)
            raise ValueError(
                f"the types of a {cls.__name__} read like {example!r}, got {text!r}: "
                f"write them with str({cls.__name__}(...))"
            )
        return cls(*(DTYPES[short] for short in words.groups()))

    def _items(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]
