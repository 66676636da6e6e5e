"""`lowering="auto"`: the form of a site, by what was measured, and the numbers in a sentence."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch.fx import Node

from normfuse import tuning
from normfuse.ops import ROPE
from normfuse.ops.lowering import backward_of
from normfuse.passes.destinations import Copies, copies_behind
from normfuse.passes.form import operands_of
from normfuse.passes.region import (
    cut_out,
    key_of,
    neighbours_of,
    normalised_widths,
    rows_of,
    sites_by_tables,
)
from normfuse.settings import Settings
from normfuse.tuning import Key, Measurement, Rows, Verdict, minor

log = logging.getLogger("normfuse")

_OFF = "the option normfuse.tune is off, so no measurement is read"
_COMMAND = "torch.compile with normfuse.tune=compile"
_failed: set[tuple[Key, int]] = set()


def choose(node: Node, settings: Settings) -> tuple[str, str]:
    """The form of a site whose kernel could be taken, and why."""
    if settings.tune == "off":
        return "inline", _OFF
    copies = copies_behind(node)
    key, rows = _asked(node, () if copies is None else copies.words)
    verdict = _verdict(node, key, rows, settings)
    if verdict is None and settings.tune == "compile" and _measure(node, copies, key, rows):
        verdict = _verdict(node, key, rows, settings)
    if verdict is None and copies is not None:
        verdict = _of_fewer_copies(node, copies, rows, settings)
    if verdict is None:
        return "inline", _unmeasured(key, rows)
    lowering = "triton" if verdict.wins else "inline"
    return lowering, _numbers(key, verdict, settings.margin)


def _of_fewer_copies(node: Node, copies: Copies, rows: Rows, settings: Settings) -> Verdict | None:
    """What is known of a site without some of its copies, where that speaks for it with them.

    A result that is kept is one store more in either form. A launch with norms that wins without
    copies wins with them: they cost it less than the kernels that make them otherwise. Without a
    norm all is pointwise, and Inductor may make them in the kernel that turns.
    """
    asked = [copies.words_but_kept, *([()] if node.target is not ROPE else [])]
    found = (_verdict(node, _asked(node, words)[0], rows, settings) for words in asked)
    return next((verdict for verdict in found if verdict is not None), None)


def why_hopeless_in_training(node: Node, settings: Settings) -> str | None:
    """Why no measurement can favour a site, whatever its neighbours are; None if one may.

    The backward counts as well, and is not taken on trust.
    """
    if settings.tune == "off":
        return _OFF
    key, rows = _asked(node)
    table = tuning.tables().table
    forward = table.verdicts(key, rows, settings.margin)
    of_backward = key._replace(op=backward_of(key.op))  # whatever gradients it was asked for
    backward = table.verdicts_of_any(of_backward, rows, settings.margin)
    if not forward or not backward:
        which = "the backward is " if forward else ""
        return which + _unmeasured(key, rows)
    best = max((*forward, *backward), key=lambda one: one.decisive.excess(settings.margin))
    return None if best.wins else _numbers(key, best, settings.margin)


def may_win(device_names: Iterable[str], settings: Settings) -> bool:
    """Whether any kernel can be chosen on these GPUs."""
    if settings.tune == "compile":
        return any(device_names)
    return settings.tune != "off" and any(_winners(device_names, settings))


class Widths(NamedTuple):
    """Sizes of the normalised axis.

    Attributes:
        whole: of norms over whole rows.
        in_groups: of rows whose norms may run over equal parts of them.
        turned: of heads that turn without a norm.
    """

    whole: frozenset[int]
    in_groups: frozenset[int]
    turned: frozenset[int]

    def may_include(self, width: int) -> bool:
        return width in self.whole or any(row % width == 0 for row in self.in_groups)


def widths_won(device_names: Iterable[str], settings: Settings) -> Widths:
    """The widths at which any kernel of a forward won anything."""
    keys = [key for key in _winners(device_names, settings) if not key.op.endswith("_backward")]
    whole, turned = (
        frozenset(
            width for key in keys if (key.op == "rope") is turns for width in normalised_widths(key)
        )
        for turns in (False, True)
    )
    grouped = (key.widths[0] for key in keys if key.op == "gated_rms_norm")
    return Widths(whole, frozenset(grouped), turned)


def _winners(device_names: Iterable[str], settings: Settings) -> Iterator[Key]:
    version = minor(torch.__version__)
    for name in device_names:
        yield from tuning.tables().table.winners(name, version, settings.margin)


def _asked(node: Node, copies: tuple[str, ...] = ()) -> tuple[Key, Rows]:
    """What the table is asked about a site, with the words for copies that its launch makes."""
    device = operands_of(node)[0].meta["val"].device
    return key_of(node, device_name(device), copies), rows_of(node)


def device_name(device: torch.device) -> str:
    """The name that tables know a GPU by, such as "NVIDIA H200"."""
    return torch.cuda.get_device_name(device)


def _verdict(node: Node, key: Key, rows: Rows, settings: Settings) -> Verdict | None:
    sites = sites_by_tables(node)
    return tuning.tables().table.verdict(key, rows, neighbours_of(node), settings.margin, sites)


def _measure(node: Node, copies: Copies | None, key: Key, rows: Rows) -> bool:
    """Measure a site at its hint and keep what came out; False if that is not possible."""
    from normfuse.passes import measure  # which lowers the two forms, as the caller does

    failed = (key, tuning.bucket(rows.typical))
    if failed in _failed or rows.typical == 0:
        return False
    try:
        document = measure.measure(cut_out(node, key.device, copies), _COMMAND)
    except Exception as error:  # whatever a compiler or a GPU raises must not end the compilation
        _failed.add(failed)
        log.warning("%s of %s is inline, measuring it failed: %s", key.op, key.widths, error)
        return False
    tuning.tables().add(document)
    return True


def _numbers(key: Key, verdict: Verdict, margin: float) -> str:
    """Such as "measured on NVIDIA H200: kernel 12.3 us, inline 15.1 us (1.23x)"."""
    found = verdict.decisive
    text = (
        f"measured on {key.device}{_what(found)}: kernel {found.triton_us:.1f} us, "
        f"inline {found.inline_us:.1f} us ({found.speedup:.2f}x)"
    )
    if verdict.asked > 1:
        text += f", the worst of {verdict.asked} row counts"
    if not verdict.wins:
        text += f", below the margin of {100 * margin:g} %"
    return text


def _what(found: Measurement) -> str:
    return f" in {found.timed}" if found.timed else f" at {found.rows} rows"


def _unmeasured(key: Key, rows: Rows) -> str:
    if tuning.tables().stale.has_measured(key, rows):
        return "measured with another version of the kernel: run `python -m normfuse tune`"
    widths = " and ".join(str(width) for width in dict.fromkeys(key.widths))
    return (
        f"not measured on {key.device} with torch {key.torch} for {key.op} of width {widths} at "
        f"{rows.typical} rows: run `python -m normfuse tune`"
    )
