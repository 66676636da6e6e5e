"""What the passes did to each site, collected while one model is compiled."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.fx import Node

from normfuse.report import Report, Site, plural


@dataclass(frozen=True)
class Place:
    """Where in the user's model a node comes from; it survives autograd, unlike the node.

    Attributes:
        module: path of the module.
        source: the line of the user's code, "path/to/file.py:123".
        call: names of the call in Dynamo's graph, outermost first: the norms of a model that has
            one function `norm(x)` share its line, and in one module everything but their calls.
    """

    module: str
    source: str
    call: tuple[str, ...] = ()

    @classmethod
    def of(cls, node: Node) -> Place:
        path = module_path(node.meta.get("nn_module_stack"))
        return cls(path, _source(node), tuple(name for name, _ in _calls(node)))


def module_path(stack: Any) -> str:
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = path.replace("__dict__['_modules']", "_modules")  # of a class with a `__getattr__`
    path = re.sub(r"_modules\['([^']+)'\]", r"\1", path)
    path = re.sub(r"L\['(\w+)'\]", r"\1", path).replace("['", ".").replace("']", "")
    path = re.sub(r"\[(\w+)\]", r".\1", path)
    return path.removeprefix("self").removeprefix(".")


_TORCH = str(Path(torch.__file__).parent)


def _source(node: Node) -> str:
    """The last line outside torch: the model's own, even for `torch.nn.RMSNorm`."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    theirs = [frame for frame in frames if not frame[0].startswith(_TORCH)]
    return ":".join((theirs or frames)[-1]) if frames else ""


def _calls(node: Node) -> list[tuple[str, Any]]:
    """The calls that Dynamo captured around a node; a gradient has none of its own."""
    return node.meta.get("source_fn_stack") or []


@dataclass
class Recorder:
    """Sites and graph texts of the graphs that one compilation sees.

    The sites that the pass before autograd declines are looked at again after it, where in-place
    writes are gone; in an inference graph only the second word counts.
    """

    sites: list[Site] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    num_turned: int = 0
    embeddings: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    _pending: list[Site] = field(default_factory=list)
    _fused: dict[Place, list[int]] = field(default_factory=lambda: defaultdict(list))
    _is_lowered: bool = False

    def start(self, text: str) -> None:
        """A new graph arrives from Dynamo: a whole one, or one that the next whole one calls."""
        self._settle()
        if self._is_lowered:
            self._fused.clear()
            self._is_lowered = False
        self.before.append(text)

    def reconsider(self) -> None:
        """The same graph is recognised again: what was declined before is open."""
        self._pending.clear()

    def finish(self, text: str) -> None:
        """A graph is ready for code generation."""
        self._settle()
        self._is_lowered = True
        self.after.append(text)

    def fused(self, place: Place, op: str) -> None:
        self._fused[place].append(len(self.sites))
        self.sites.append(self._site(place, op, None))

    def declined(self, place: Place, reason: str) -> None:
        self._pending.append(self._site(place, None, reason))

    def _site(self, place: Place, op: str | None, reason: str | None) -> Site:
        graph = max(len(self.before) - 1, 0)
        return Site(op, op is not None, reason, place.module, place.source, None, graph=graph)

    def composed(self, place: Place, op: str, parts: list[Place]) -> None:
        """Sites at `parts` became one op, which stands at `place`."""
        indices = [index for part in dict.fromkeys(parts) for index in self._fused.pop(part, [])]
        self._fused[place].extend(indices)
        for index in indices:
            self.sites[index] = replace(self.sites[index], op=op)

    def turned(self) -> None:
        """A rotary embedding without a norm became part of an op; it is no site."""
        self.num_turned += 1

    def lowered_embedding(self, lowering: str, reason: str | None) -> None:
        """The form of a `rope`, and why."""
        self.embeddings[lowering, reason] += 1

    def lowered(self, place: Place, lowering: str, reason: str | None) -> None:
        for index in self._fused.get(place, []):
            self.sites[index] = replace(
                self.sites[index], lowering=lowering, lowering_reason=reason
            )

    def report(self) -> Report:
        self._settle()
        notes = []
        if self.num_turned:
            what = plural(self.num_turned, "rotary embedding")
            notes.append(f"Beside the norms, {what} that no norm precedes became part of a `rope`.")
        for (lowering, reason), num in self.embeddings.most_common():
            notes.append(f"{num} `rope` lowered to {lowering}" + (f": {reason}" if reason else ""))
        return Report(self.sites, "\n\n".join(self.before), "\n\n".join(self.after), notes)

    def _settle(self) -> None:
        self.sites += self._pending
        self._pending.clear()
