"""How far a result may lie from its exact value: the roundings of plain torch, added up.

Running error analysis (Wilkinson, "Error analysis revisited", 1986; Higham, "Accuracy and Stability
of Numerical Algorithms", section 3.3). Beside every value stand the same in float64 and a bound of
its error, element by element, which each operation carries on:

    x * y         |x| err(y) + |y| err(x) + err(x) err(y)
    x + y         err(x) + err(y)
    f(x)          |f'| err(x), with f' where it is steepest within err(x)
    sum of n x    sum of err(x), + 2 sqrt(n) u sum of |x|
    then          + u |result|, for the rounding to a type of unit roundoff u

So the bound holds for every evaluation that takes these steps, rounds where this one rounds or not
at all, and adds in any order, in at least sqrt(n) lanes, as kernels, Inductor's code and torch do:
sqrt(n) terms in a lane, then the lanes, are 2 sqrt(n) additions. What a GPU approximates errs by up
to two units in the last place, a power by four ("CUDA C++ Programming Guide", Mathematical
Functions).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from normfuse.ops.rounding import is_exact_cast

aten = torch.ops.aten


class Twin(NamedTuple):
    """What stands beside a value: the same in float64, and a bound of its error."""

    exact: torch.Tensor
    error: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Twin:
        return Twin(function(self.exact), function(self.error))


class RunningError(TorchDispatchMode):
    """Bounds the errors of what is computed inside; what comes from outside is exact.

        with RunningError() as errors:
            y = function(x)
        errors.of(y).exact, errors.of(y).error

    Raises:
        NotImplementedError: an operation has no rule.
    """

    def __init__(self) -> None:
        super().__init__()
        self._twins = WeakTensorKeyDictionary()

    def of(self, value: torch.Tensor) -> Twin:
        """The twin of a value, of its shape; an error of complex numbers bounds each part."""
        if value not in self._twins:
            exact = value.to(torch.promote_types(value.dtype, torch.float64))
            self._twins[value] = Twin(exact, torch.zeros_like(exact))
        twin: Twin = self._twins[value]
        return twin

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        operation = function.overloadpacket
        if operation not in _KNOWN:
            return self._decomposed(function, args, kwargs)
        result = function(*args, **kwargs)
        if operation in _MOVES:
            self._move(function, args, kwargs, result)
        elif operation is aten.copy_:
            source = self.of(args[1]).map(lambda part: part.expand(result.shape))
            self._twins[result] = _rounded(source, result.dtype)
        elif operation in _RULES:
            operands = tree_map(lambda one: self._operand(one, result.dtype), args)
            twin = _RULES[operation](_computing(result.dtype), *operands, **kwargs)
            for dtype in _roundings(operation, args[0], result.dtype):
                twin = _rounded(twin, dtype)
            self._twins[result] = twin
        return result

    def _decomposed(self, function: Any, args: Any, kwargs: Any) -> Any:
        """What is made of other operations; below another mode they arrive here whole."""
        with self:
            result = function.decompose(*args, **kwargs)
        if result is NotImplemented:
            raise NotImplementedError(f"{function} has no rule in the running error analysis")
        return result

    def _operand(self, value: Any, dtype: torch.dtype) -> Any:
        """A tensor's twin, and a number's: both are cast to the type that is computed in."""
        if isinstance(value, torch.Tensor):
            twin = self.of(value)
            is_cast = value.dim() == 0 and not is_exact_cast(value.dtype, dtype)
            return _rounded(twin, dtype) if is_cast else twin
        return _rounded(_number(value), _computing(dtype)) if isinstance(value, float) else value

    def _move(self, function: Any, args: Any, kwargs: Any, result: Any) -> None:
        """What only moves elements moves those of the twins."""

        def moved(part: int) -> Any:
            operands = tree_map(
                lambda one: self.of(one)[part] if isinstance(one, torch.Tensor) else one, args
            )
            if function.overloadpacket is aten.view:  # whose strides the twins may not have
                return operands[0].reshape(operands[1])
            return function(*operands, **kwargs)

        parts = moved(0), moved(1)
        if isinstance(result, torch.Tensor):
            self._twins[result] = Twin(*parts)
        else:
            for one, *twin in zip(result, *parts, strict=True):
                self._twins[one] = Twin(*twin)


_MOVES = frozenset(
    {
        *(aten.alias, aten.cat, aten.clone, aten.complex, aten.detach, aten.expand),
        *(aten.index_select, aten.permute, aten.select, aten.slice, aten.split),
        *(aten.split_with_sizes, aten.squeeze, aten.stack, aten.t, aten.transpose, aten.unbind),
        *(aten.unsqueeze, aten._unsafe_view, aten.view, aten.view_as_complex, aten.view_as_real),
    }
)
_NEW_MEMORY = frozenset({aten.empty_like, aten.new_empty, aten.empty_strided, aten.zeros_like})


def _computing(dtype: torch.dtype) -> torch.dtype:
    """The type in which torch carries out an operation on narrower ones."""
    return torch.promote_types(dtype, torch.float32)


def _roundings(operation: Any, x: Any, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The types that a result in `dtype` is rounded to, one after the other."""
    if operation is aten._to_copy:
        return () if is_exact_cast(x.dtype, dtype) else (dtype,)
    return tuple(dict.fromkeys((_computing(dtype), dtype)))


def _roundoff(dtype: torch.dtype) -> float:
    """The unit roundoff u: half a unit in the last place of 1."""
    return torch.finfo(dtype).eps / 2


def _rounded(twin: Twin, dtype: torch.dtype) -> Twin:
    """The same after one rounding; numbers below the normal ones may be flushed to zero."""
    lost = torch.finfo(dtype).smallest_normal

    def bound(exact: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        return error + (exact.abs() + error) * _roundoff(dtype) + lost

    return Twin(twin.exact, _by_parts(bound, *twin))


def _by_parts(function: Callable[..., torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
    """A function of real numbers, for the real and the imaginary parts of complex ones."""
    if not values[0].is_complex():
        return function(*values)
    parts = zip(*(torch.view_as_real(value).unbind(-1) for value in values), strict=True)
    return torch.complex(*(function(*part) for part in parts))


def _approximated(twin: Twin, dtype: torch.dtype, ulps: int = 2) -> Twin:
    """The same from an instruction that errs by units in the last place."""
    return Twin(twin.exact, twin.error + twin.exact.abs() * (2 * ulps * _roundoff(dtype)))


def _number(value: float) -> Twin:
    exact = torch.tensor(value, dtype=torch.float64)
    return Twin(exact, torch.zeros_like(exact))


def _twin(value: Any) -> Twin:
    """A whole number, such as a width, is exact."""
    return value if isinstance(value, Twin) else _number(value)


# Each rule takes the type in which its operation is carried out, then the operands, and leaves the
# rounding of the result to the caller.


def _to_copy(wide: torch.dtype, x: Twin, **_: Any) -> Twin:
    return x


def _neg(wide: torch.dtype, x: Twin) -> Twin:
    return Twin(-x.exact, x.error)


def _add(wide: torch.dtype, x: Any, y: Any, *, alpha: float = 1) -> Twin:
    x, y = _twin(x), _twin(y)
    return Twin(x.exact + alpha * y.exact, x.error + abs(alpha) * y.error)


def _sub(wide: torch.dtype, x: Any, y: Any, *, alpha: float = 1) -> Twin:
    return _add(wide, x, y, alpha=-alpha)


def _rsub(wide: torch.dtype, x: Any, y: Any, *, alpha: float = 1) -> Twin:
    return _sub(wide, y, x, alpha=alpha)


def _mul(wide: torch.dtype, x: Twin, y: Any) -> Twin:
    y = _twin(y)
    if x.exact.is_complex():
        return _mul_complex(wide, x, y)
    error = x.exact.abs() * y.error + y.exact.abs() * x.error + x.error * y.error
    return Twin(x.exact * y.exact, error)


def _mul_complex(wide: torch.dtype, x: Twin, y: Twin) -> Twin:
    """(a + ib) (c + id): each part is a sum of two products, which round before they are added."""
    (a, b), (c, d) = ((one.map(torch.real), one.map(torch.imag)) for one in (x, y))
    ac, bd, ad, bc = (
        _rounded(_mul(wide, *pair), a.exact.dtype if wide == torch.complex128 else torch.float32)
        for pair in ((a, c), (b, d), (a, d), (b, c))
    )
    parts = zip(_sub(wide, ac, bd), _add(wide, ad, bc), strict=True)
    return Twin(*(torch.complex(*part) for part in parts))


def _div(wide: torch.dtype, x: Any, y: Any) -> Twin:
    x, y = _twin(x), _twin(y)
    exact = x.exact / y.exact
    smallest = (y.exact.abs() - y.error).clamp(min=0)
    return _approximated(Twin(exact, (x.error + exact.abs() * y.error) / smallest), wide)


def _reciprocal(wide: torch.dtype, x: Twin) -> Twin:
    return _div(wide, 1, x)


def _pow(wide: torch.dtype, x: Twin, exponent: Any) -> Twin:
    power = float(_twin(exponent).exact)
    if power == 2:
        return _mul(wide, x, x)
    if power == -0.5:
        return _approximated(_rsqrt(wide, x), wide)
    raise NotImplementedError(f"the power {power} has no rule in the running error analysis")


def _sqrt(wide: torch.dtype, x: Twin) -> Twin:
    smallest = (x.exact - x.error).clamp(min=0)
    error = torch.where(x.error == 0, 0.0, x.error / 2 / smallest.sqrt())
    return _approximated(Twin(x.exact.sqrt(), error), wide)


def _rsqrt(wide: torch.dtype, x: Twin) -> Twin:
    smallest = (x.exact - x.error).clamp(min=0)
    return _approximated(Twin(x.exact.rsqrt(), x.error / 2 * smallest.pow(-1.5)), wide)


def _clamp(wide: torch.dtype, x: Twin, smallest: Any) -> Twin:
    """The larger of two errs no more than the one of them that errs more."""
    smallest = _twin(smallest)
    exact = torch.maximum(x.exact, smallest.exact)
    return Twin(exact, torch.maximum(x.error, smallest.error))


def _sigmoid(wide: torch.dtype, x: Twin) -> Twin:
    """1 / (1 + exp(-x)): exp multiplies x by log2(e), so that |x| roundings come on top.

    The slope s = y (1 - y) changes by no more than its own size, so that within e it stays below
    s exp(e), and nowhere above 1/4.
    """
    exact = x.exact.sigmoid()
    slope = exact * (1 - exact)
    steepest = (slope * x.error.exp()).clamp(max=0.25)
    of_exp = (4 + 2 * x.exact.abs()) * _roundoff(wide)
    return _approximated(Twin(exact, steepest * x.error + slope * of_exp), wide)


def _silu(wide: torch.dtype, x: Twin) -> Twin:
    return _mul(wide, x, _rounded(_sigmoid(wide, x), wide))


def _sum(
    wide: torch.dtype,
    x: Twin,
    axes: Sequence[int] | None = None,
    keepdim: bool = False,
    **_: Any,
) -> Twin:
    axes = list(axes or range(x.exact.dim()))
    terms = math.prod(x.exact.shape[axis] for axis in axes)
    error = x.error.sum(axes, keepdim)
    largest = x.exact.abs().sum(axes, keepdim) + error
    return Twin(
        x.exact.sum(axes, keepdim), error + 2 * math.sqrt(terms) * _roundoff(wide) * largest
    )


def _mean(wide: torch.dtype, x: Twin, *axes: Any, **keywords: Any) -> Twin:
    total = _sum(wide, x, *axes, **keywords)
    terms = x.exact.numel() // max(total.exact.numel(), 1)
    return _approximated(total.map(lambda part: part / terms), wide)


_RULES: dict[Any, Callable[..., Twin]] = {
    aten._to_copy: _to_copy,
    aten.neg: _neg,
    aten.add: _add,
    aten.sub: _sub,
    aten.rsub: _rsub,
    aten.mul: _mul,
    aten.div: _div,
    aten.reciprocal: _reciprocal,
    aten.pow: _pow,
    aten.sqrt: _sqrt,
    aten.rsqrt: _rsqrt,
    aten.clamp: _clamp,
    aten.sigmoid: _sigmoid,
    aten.silu: _silu,
    aten.sum: _sum,
    aten.mean: _mean,
}
_KNOWN = {*_MOVES, *_NEW_MEMORY, *_RULES, aten.copy_}
