"""Checks of fused ops while a model runs: ops of namespace `normfuse_check::`, one for each op.

A check stands behind a site in the compiled code. It takes what the op takes, and what came out of
the fused form. On most calls it only counts. On a sample of them it runs the inline form, eagerly,
beside its running error analysis, and compares every element with what that allows:

    |fused - exact| <= bound

where exact and bound come from `running_error`, for the inline form and the roundings of this site.
The inline form meets this by construction, as does every other form that rounds where it does.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import has_side_effect

from normfuse.ops.lowering import ALL_OPS, inline_form
from normfuse.ops.running_error import RunningError

log = logging.getLogger("normfuse")


@dataclass(frozen=True)
class Violation:
    """An element of a result that is farther from its exact value than the site's bound.

    Attributes:
        call: the number of the call, from 1.
        result: the name of the result in the op's schema, or its number.
        index: where in the result.
        fused: the element of the fused form.
        inline: that of the inline form.
        exact: the same in float64.
        bound: how far from `exact` it may be.
    """

    call: int
    result: str
    index: tuple[int, ...]
    fused: float
    inline: float
    exact: float
    bound: float

    def __str__(self) -> str:
        place = f"{self.result}[{', '.join(map(str, self.index))}]"
        return (
            f"{place} is {self.fused:.9g}, must be {self.exact:.9g} to within {self.bound:.3g}, "
            f"and is {self.inline:.9g} inline (call {self.call})"
        )


@dataclass(frozen=True)
class CheckedSite:
    """What the checks of one site have seen.

    Attributes:
        op: the fused op.
        module: path of the module, such as "model.layers.0.input_layernorm".
        source: the line of the user's code, "path/to/file.py:123".
        num_calls: how often the site ran.
        num_checked: how many of these calls were compared.
        num_beyond: how many of them had an element beyond its bound.
        error: the largest error of the fused form, in units of its bound: above 1 is beyond.
        inline_error: the same of the inline form, for comparison.
        first: the first element that was beyond; None if none was.
        not_checked: why calls that were due were not compared; None if all were.
    """

    op: str
    module: str
    source: str
    num_calls: int = 0
    num_checked: int = 0
    num_beyond: int = 0
    error: float = 0.0
    inline_error: float = 0.0
    first: Violation | None = None
    not_checked: str | None = None


class Comparison(NamedTuple):
    """The two forms of a site, compared; errors in units of the bound."""

    error: float
    inline_error: float
    worst: Violation | None


_sites: dict[tuple[str, str, str], CheckedSite] = {}
_lock = threading.Lock()


def checked_sites() -> list[CheckedSite]:
    """What all checks of this process have seen, in the order in which the sites first ran."""
    with _lock:
        return list(_sites.values())


def forget_checked_sites() -> None:
    """Begin anew: the next call of each site is its first."""
    with _lock:
        _sites.clear()


def is_sampled(call: int, interval: int) -> bool:
    """Whether a call is compared: 1, 2, 4, 8, ..., and every multiple of the interval."""
    return call % interval == 0 or (call < interval and call & (call - 1) == 0)


def compare(
    op: Any, arguments: Sequence[Any], results: Sequence[torch.Tensor | None], call: int = 1
) -> Comparison:
    """The results of a fused form, None where nothing reads them, beside those of the inline form.

    Elements whose inline form leaves the bound itself, because it overflows, are not judged.
    """
    device = next(result.device for result in results if result is not None)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), RunningError() as errors:
        plain = inline_form(op)(*arguments)
    found = [
        _compare_one(errors, fused, inline, _name(op, number), call)
        for number, (fused, inline) in enumerate(zip(results, plain, strict=True))
        if fused is not None and inline is not None and fused.numel()
    ]
    worst = max(found, key=lambda one: one.error, default=Comparison(0.0, 0.0, None))
    return worst._replace(inline_error=max((one.inline_error for one in found), default=0.0))


def _compare_one(
    errors: RunningError, fused: torch.Tensor, inline: torch.Tensor, name: str, call: int
) -> Comparison:
    assert (fused.shape, fused.dtype) == (inline.shape, inline.dtype)
    exact, bound = errors.of(inline)
    if fused.dtype == torch.float64:
        bound = 2 * bound  # `exact` is no more exact than that
    largest = torch.finfo(fused.dtype).max
    error, inline_error = ((form.double() - exact).abs() / bound for form in (fused, inline))
    error = torch.where(exact.abs() + bound > largest, 0.0, error.nan_to_num(torch.inf, torch.inf))
    is_judged = inline_error <= 1
    error, inline_error = (torch.where(is_judged, e, 0.0) for e in (error, inline_error))
    place = int(error.argmax())
    if error.flatten()[place] <= 1:
        return Comparison(float(error.max()), float(inline_error.max()), None)
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), fused.shape))
    numbers = (float(value[index]) for value in (fused, inline, exact, bound))
    return Comparison(
        float(error[index]), float(inline_error.max()), Violation(call, name, index, *numbers)
    )


def _name(op: Any, number: int) -> str:
    returns = op._schema.returns
    return (returns[number].name if number < len(returns) else "") or f"result {number}"


def _check(op: Any, *arguments: Any) -> None:
    """The implementation of every check; whatever goes wrong in it, the model runs on."""
    *arguments_of_op, results, module, source, interval = arguments
    key = (op._schema.name.partition("::")[2], module, source)
    with _lock:
        site = _sites.setdefault(key, CheckedSite(*key))
        call = site.num_calls + 1
        _sites[key] = replace(site, num_calls=call)
    if not is_sampled(call, interval):
        return
    if _is_captured(results):
        _note(key, not_checked="a CUDA graph was being captured, whose replays run no Python")
        return
    try:
        found = compare(op, arguments_of_op, results, call)
    except Exception as error:  # such as a lack of memory
        _note(key, not_checked=f"{type(error).__name__}: {error}")
        return
    _add(key, found)


def _is_captured(results: Sequence[torch.Tensor | None]) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may wait for the GPU."""
    on_cuda = any(result is not None and result.is_cuda for result in results)
    return on_cuda and torch.cuda.is_current_stream_capturing()


def _note(key: tuple[str, str, str], not_checked: str) -> None:
    with _lock:
        site = _sites.get(key, CheckedSite(*key))
        _sites[key] = replace(site, not_checked=not_checked)
    if site.not_checked is None:
        log.warning("%s of %s (%s) was not checked: %s", *key, not_checked)


def _add(key: tuple[str, str, str], found: Comparison) -> None:
    with _lock:
        site = _sites.get(key, CheckedSite(*key))
        _sites[key] = replace(
            site,
            num_checked=site.num_checked + 1,
            num_beyond=site.num_beyond + (found.worst is not None),
            error=max(site.error, found.error),
            inline_error=max(site.inline_error, found.inline_error),
            first=site.first or found.worst,
        )
    if site.first is None and found.worst is not None:
        log.warning("%s of %s (%s) is beyond its bound: %s", *key, found.worst)


_LIBRARY = torch.library.Library("normfuse_check", "DEF")


def _register(op: Any) -> torch._ops.OpOverload:
    """`normfuse_check::NAME(the op's arguments, results, module, source, interval) -> ()`."""
    name, _, rest = str(op._schema).partition("::")[2].partition("(")
    arguments = rest.rpartition(") ->")[0]
    # Not into CUDA graphs, which would replay no Python: Inductor puts them around it.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    own = "Tensor?[] results, str module, str source, int interval"
    _LIBRARY.define(f"{name}({arguments}, {own}) -> ()", tags=tags)
    _LIBRARY.impl(name, partial(_check, op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"normfuse_check::{name}", lambda *_: None, lib=_LIBRARY)
    overload: torch._ops.OpOverload = getattr(torch.ops.normfuse_check, name).default
    has_side_effect(overload)  # or it would be dead code: it has no result
    return overload


CHECKS = {op: _register(op) for op in ALL_OPS}
