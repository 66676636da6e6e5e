"""Finds norms in a graph, replaces each by one op, and joins the ops with the sums around them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from torch.fx import Graph, Node

from normfuse.passes.recorder import Place, Recorder
from normfuse.patterns import COMPOSE, RECOGNISE
from normfuse.patterns.decline import Decline
from normfuse.patterns.mutation import Mutations
from normfuse.patterns.rms_norm import find_site
from normfuse.patterns.rule import Context, Rule
from normfuse.settings import Settings

log = logging.getLogger("normfuse")


@dataclass(frozen=True)
class Recognise:
    """Recognise and compose on one graph.

    Attributes:
        fake_key: "example_value" before autograd, "val" after it.
        settings: which rules, where, and with which numerics.
        recorder: gets what was done; None in ordinary compilations.
    """

    fake_key: str
    settings: Settings
    recorder: Recorder | None = None

    def __call__(self, graph: Graph) -> None:
        context = Context(graph, Mutations(graph), self.fake_key, self.settings.numerics)
        for node in list(graph.nodes):
            self._recognise(node, context)
        for rule in COMPOSE:
            if self.settings.allows(rule.name):
                self._compose(rule, context)

    def _recognise(self, node: Node, context: Context) -> None:
        if node._erased or find_site(node) is None:
            return
        place = Place.of(node)
        try:
            rule, op = self._first_that_applies(node, place, context)
        except Decline as decline:
            log.debug("%s (%s): left alone: %s", place.module, place.source, decline)
            if self.recorder is not None:
                self.recorder.declined(place, str(decline))
            return
        if self.recorder is not None:
            self.recorder.fused(Place.of(op), rule.name)

    def _first_that_applies(self, node: Node, place: Place, context: Context) -> tuple[Rule, Node]:
        glob = self.settings.skipped_by(place.module)
        if glob is not None:
            raise Decline(f"the option normfuse.skip names this module ({glob})")
        for rule in RECOGNISE:
            op = rule.apply(node, context) if self.settings.allows(rule.name) else None
            if op is not None:
                return rule, op
        left_out = [rule.name for rule in RECOGNISE if not self.settings.allows(rule.name)]
        raise Decline(f"the options leave out the rule {' and '.join(left_out)}")

    def _compose(self, rule: Rule, context: Context) -> None:
        parts = [node for node in context.graph.nodes if is_op(node)]
        for node in list(parts):
            if node._erased:
                continue
            try:
                fused = rule.apply(node, context)
            except Decline as decline:
                log.debug("%s: no %s: %s", Place.of(node).module, rule.name, decline)
                continue
            if fused is not None and self.recorder is not None:
                joined = [Place.of(part) for part in parts if part._erased]
                self.recorder.composed(Place.of(fused), rule.name, joined)
                parts = [part for part in parts if not part._erased] + [fused]


def is_op(node: Node) -> bool:
    """Whether a node calls one of our ops."""
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "normfuse"
