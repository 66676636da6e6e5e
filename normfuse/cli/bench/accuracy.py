"""Whether a result is right: against float64, with eager's own error as the measure.

No more than twice eager's largest error, plus one rounding, at every element.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from normfuse.cli.bench.spellings import Tensor
from normfuse.cli.bench.subjects import Subject

CHUNK_ELEMENTS = 2**25  # of one operand: 256 MiB in float64
# Of the largest value. A kernel that rounds otherwise than eager is off by a few hundredths of it
# at most; one that computes something else, or leaves elements out, is off by more.
GARBAGE = 0.05


@dataclass(frozen=True)
class Accuracy:
    """Errors against float64 over all results of a contender.

    Attributes:
        error: the largest.
        excess: the largest part of an error that one rounding does not explain.
        eager_error: eager's largest.
        largest: the largest value.
    """

    error: float
    excess: float
    eager_error: float
    largest: float

    @property
    def is_as_close_as_eager(self) -> bool:
        """False also where something is not a number."""
        return self.excess <= 2 * self.eager_error

    @property
    def is_the_same_function(self) -> bool:
        """Whether it computes the chain at all, roundings aside."""
        return self.error <= GARBAGE * self.largest


def poison(results: Sequence[Tensor]) -> None:
    """Fills results with NaN: an element that is not written again shows."""
    for result in results:
        result.fill_(float("nan"))


def accuracy(subject: Subject, operands: tuple[Tensor, ...], results: Sequence[Tensor]) -> Accuracy:
    """Compares results of these operands, in pieces that fit the memory.

    Raises:
        ValueError: number, shape or type of the results are not eager's.
    """
    num_cuts = subject.num_cuts
    step = max(1, min(num_cuts, CHUNK_ELEMENTS * num_cuts // operands[0].numel()))
    worst = [0.0] * 4
    for start in range(0, num_cuts, step):
        length = min(step, num_cuts - start)
        part = subject.part(operands, start, length)
        pieces = [result.narrow(subject.result_axis, start, length) for result in results]
        eager = subject.eager(*part)
        _check_like(pieces, eager)
        for piece, plain, exact in zip(pieces, eager, subject.exact(part), strict=True):
            found = _errors(piece, plain, exact)
            worst = [_larger(old, new) for old, new in zip(worst, found, strict=True)]
    return Accuracy(*worst)


def _larger(first: float, second: float) -> float:
    """The larger; NaN if one of them is, which `max` would drop."""
    return first if first >= second or math.isnan(first) else second


def _errors(result: Tensor, eager: Tensor, exact: Tensor) -> tuple[float, float, float, float]:
    limits = torch.finfo(result.dtype)
    rounding = 0.5 * limits.eps * exact.abs() + 0.5 * limits.smallest_normal * limits.eps
    error = (result.double() - exact).abs()
    values = (
        error.amax(),
        (error - rounding).amax(),
        (eager.double() - exact).abs().amax(),
        exact.abs().amax(),
    )
    first, second, third, fourth = torch.stack(values).tolist()
    return first, second, third, fourth


def _check_like(results: Sequence[Tensor], eager: Sequence[Tensor]) -> None:
    found = [(tuple(result.shape), result.dtype) for result in results]
    expected = [(tuple(result.shape), result.dtype) for result in eager]
    if found != expected:
        raise ValueError(
            f"results must have eager's shapes and types, {expected}, got {found}: "
            "correct the contender"
        )
