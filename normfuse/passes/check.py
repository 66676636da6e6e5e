"""Puts a check behind a fused site: an op that compares its two forms while the model runs."""

from __future__ import annotations

import logging
import operator

from torch.fx import Node

from normfuse.ops.checking import CHECKS
from normfuse.passes import inductor
from normfuse.passes.recorder import Place, module_path

log = logging.getLogger("normfuse")


def add_check(node: Node, interval: int) -> None:
    """Insert the check of an op node behind those results of it that something reads.

    Args:
        node: the op, before it is lowered: what replaces its results replaces them here, too.
        interval: how many calls lie between two that are compared, at most.
    """
    if not inductor.calls_python():
        log.warning(
            "no site is checked in code that runs without Python, as a package or a C++ wrapper "
            "does: check the model as torch.compile makes it by default"
        )
        return
    results = [user for user in node.users if user.target is operator.getitem and user.users]
    if not results:
        return
    by_number = {user.args[1]: user for user in results}
    place = Place.of(node)
    module = place.module or module_path(node.meta.get("fwd_nn_module_stack"))  # of a gradient
    last = max(results)  # nodes compare by their place in the graph
    with node.graph.inserting_after(last):
        arguments = (
            *node.args,
            [by_number.get(number) for number in range(len(node.meta["val"]))],
            *(module, place.source, interval),
        )
        check = node.graph.call_function(CHECKS[node.target], arguments)
    check.meta["val"] = None
    check.meta.update({key: last.meta[key] for key in ("stack_trace",) if key in last.meta})
