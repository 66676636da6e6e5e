"""Finds norms in a graph, replaces each by one op, and joins the ops with the sums around them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Graph, Node

from normfuse.passes.recorder import Place, Recorder
from normfuse.patterns import COMPOSE, RECOGNISE, TURN
from normfuse.patterns.decline import Decline
from normfuse.patterns.functional import write_out_of_place
from normfuse.patterns.identity import skip_to_sum
from normfuse.patterns.mutation import Mutations
from normfuse.patterns.rms_norm import find_site
from normfuse.patterns.rule import Context, Rule
from normfuse.patterns.statistic import Candidate
from normfuse.patterns.templates import write_types
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

    def __call__(
        self, graph: Graph, leaves: Callable[[Candidate | Node], bool] | None = None
    ) -> dict[Node, list[Node]]:
        """Rewrite a graph.

        Args:
            graph: the graph.
            leaves: whether a site is to be left as it is; None leaves none.

        Returns:
            For each op, the roots of its statistics: nodes that are in the graph no more.
        """
        write_out_of_place(graph)
        write_types(graph)
        context = Context(graph, Mutations(graph), self.fake_key, self.settings.numerics)
        sites: dict[Node, list[Node]] = {}
        for node in list(graph.nodes):
            site = None if node._erased else find_site(node)
            if site is not None and not (leaves and leaves(site)):
                self._recognise(node, sites, context)
        for value in [value for op in sites for value in op.users]:
            skip_to_sum(value)
        for rule in COMPOSE:
            if self.settings.allows(rule.name):
                self._compose(rule, sites, context)
        return sites

    def turn(self, graph: Graph, leaves: Callable[[Node], bool] | None = None) -> None:
        """Rewrite the rotary embeddings that no norm took; after the call, and in inference only.

        Args:
            graph: after recognition, without writes.
            leaves: whether a value that may turn is to be left as it is; None leaves none.
        """
        context = Context(graph, Mutations(graph), self.fake_key, self.settings.numerics)
        for rule in (one for one in TURN if self.settings.allows(one.name)):
            for node in list(graph.nodes):
                if not node._erased and not (leaves and leaves(node)):
                    self._turn(rule, node, context)

    def _turn(self, rule: Rule, node: Node, context: Context) -> None:
        try:
            op = None if self._skips(node) else rule.apply(node, context)
        except Decline as decline:
            place = Place.of(node)
            log.debug("%s (%s): no %s: %s", place.module, place.source, rule.name, decline)
            return
        if op is not None and self.recorder is not None:
            self.recorder.turned()

    def _skips(self, node: Node) -> bool:
        """Whether an option names the module of a node."""
        if not self.settings.skip:
            return False
        return self.settings.skipped_by(Place.of(node).module) is not None

    def _recognise(self, node: Node, sites: dict[Node, list[Node]], context: Context) -> None:
        place = Place.of(node)
        try:
            rule, op = self._first_that_applies(node, place, context)
        except Decline as decline:
            log.debug("%s (%s): left alone: %s", place.module, place.source, decline)
            if self.recorder is not None:
                self.recorder.declined(place, str(decline))
            return
        sites[op] = [node]
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

    def _compose(self, rule: Rule, sites: dict[Node, list[Node]], context: Context) -> None:
        nodes = [node for node in context.graph.nodes if is_op(node)]
        places = {node: Place.of(node) for node in nodes} if self.recorder else {}
        for node in nodes:
            fused: Node | None = node
            while fused is not None and not fused._erased:
                context.erased.clear()
                fused = self._compose_once(rule, fused, places, context)
                if fused is not None:
                    parts = [part for part in context.erased if part in sites]
                    sites[fused] = [site for part in parts for site in sites.pop(part)]

    def _compose_once(
        self, rule: Rule, node: Node, places: dict[Node, Place], context: Context
    ) -> Node | None:
        """The op that a rule makes of one op and what is around it; it may then grow further."""
        try:
            fused = rule.apply(node, context)
        except Decline as decline:
            log.debug("%s: no %s: %s", Place.of(node).module, rule.name, decline)
            return None
        if fused is not None and self.recorder is not None:
            joined = [places.pop(part) for part in context.erased if part in places]
            places[fused] = Place.of(fused)
            self.recorder.composed(places[fused], rule.name, joined)
        return fused


def is_op(node: Node) -> bool:
    """Whether a node calls one of our ops."""
    return node.op == "call_function" and getattr(node.target, "namespace", "") == "normfuse"
