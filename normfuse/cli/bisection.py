"""A model with some of its sites fused, and the search for those that change its outputs."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from normfuse.backend import patches
from normfuse.capturing import fresh
from normfuse.cli.subject import Subject
from normfuse.passes import inductor
from normfuse.passes.lower import Lower
from normfuse.passes.recorder import Place
from normfuse.settings import Settings

_HOOK = "post_grad_custom_post_pass"

Outputs = list[torch.Tensor]


@dataclass(frozen=True)
class FusedSite:
    """A site that can be fused or left inline.

    Attributes:
        number: its place in the order of the graphs, from 0; sites that are inline anyway count.
        op: the fused op.
        module: path of the module.
        source: the line of the user's code, "path/to/file.py:123".
        lowering: what the op becomes.
    """

    number: int
    op: str
    module: str
    source: str
    lowering: str


class Trials:
    """Runs of one model, each with other sites fused and all else the same.

    Args:
        subject: the model and its inputs.
        lowering: what sites become that are fused.
        generates_code: compile with Inductor; else the rewritten graph runs node by node, so that
            runs differ in nothing but the forms of the sites.
    """

    def __init__(self, subject: Subject, lowering: str, *, generates_code: bool = False) -> None:
        self.subject = subject
        self.lowering = lowering
        self.generates_code = generates_code
        self.num_runs = 0

    def inline(self) -> tuple[list[FusedSite], Outputs]:
        """The sites that can be fused, and the outputs with none of them fused."""
        lower = Lower(Settings(self.lowering))
        found: list[FusedSite] = []
        count = 0

        def note(node: Node) -> bool:
            nonlocal count
            form, _ = lower.form_of(node)
            if form != "inline":
                place = Place.of(node)
                op = str(node.target).split(".")[1]
                found.append(FusedSite(count, op, place.module, place.source, form))
            count += 1
            return False

        return found, self._outputs(note)

    def run(self, fused: Iterable[FusedSite]) -> Outputs:
        """The outputs with these sites fused, and all others inline."""
        numbers = {site.number for site in fused}
        count = iter(range(2**62))
        return self._outputs(lambda node: next(count) in numbers)

    def exact(self) -> Outputs:
        """The outputs of the model in float64, not compiled.

        Raises:
            Exception: whatever a model raises that was not written for float64.
        """
        wide = Subject(
            self.subject.title,
            copy.deepcopy(self.subject.model),
            self.subject.args,
            self.subject.kwargs,
        ).to(torch.float64, None)
        with torch.no_grad():
            return _tensors(wide.model(*wide.args, **wide.kwargs))

    def _outputs(self, only: Callable[[Node], bool]) -> Outputs:
        ours = patches(None, {"normfuse.lowering": self.lowering})
        # What is in no cache's key must not come from one.
        ours |= {_HOOK: Lower(Settings(self.lowering), only=only), "force_disable_caches": True}
        run = inductor.compile_graph if self.generates_code else inductor.interpret_graph

        def backend(graph_module: GraphModule, example_inputs: Sequence[Any]) -> Any:
            return run(graph_module, example_inputs, ours)

        self.num_runs += 1
        torch._dynamo.reset()  # what it learned in one run must not change the graphs of the next
        torch.manual_seed(0)
        args, kwargs = tree_map_only(
            torch.Tensor, torch.clone, (self.subject.args, self.subject.kwargs)
        )
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and the model's
            compiled = torch.compile(fresh(self.subject.model), backend=backend, dynamic=False)
            return _tensors(compiled(*args, **kwargs))


def _tensors(outputs: Any) -> Outputs:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return [leaf.detach().clone() for leaf in leaves if leaf.is_floating_point()]


def differences(outputs: Outputs, reference: Outputs) -> list[float]:
    """The largest difference of each output; inf where one is a number and the other is none."""
    return [_difference(*pair) for pair in zip(outputs, reference, strict=True)]


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    if not one.numel():
        return 0.0
    same = (one == other) | (one.isnan() & other.isnan())
    distance = (one.double() - other.double()).abs().nan_to_num(torch.inf, torch.inf)
    return float(torch.where(same, 0.0, distance).max())


def magnitudes(outputs: Outputs) -> list[float]:
    """The largest finite element of each output."""
    finite = [output.double().abs().nan_to_num(0.0, 0.0, 0.0) for output in outputs]
    return [float(one.max()) if one.numel() else 0.0 for one in finite]


def allowed_by_roundings(reference: Outputs, exact: Outputs) -> list[float]:
    """How far each output may be: twice the reference's own error, and one rounding.

    That is what the tests of this package allow a kernel.
    """
    roundings = [
        torch.finfo(output.dtype).eps / 2 * size
        for output, size in zip(reference, magnitudes(exact), strict=True)
    ]
    errors = differences(reference, exact)
    return [2 * error + rounding for error, rounding in zip(errors, roundings, strict=True)]


def smallest_set(
    sites: Sequence[FusedSite],
    is_beyond: Callable[[Sequence[FusedSite]], bool],
    ruled_out: Callable[[int], None] = lambda count: None,
) -> list[FusedSite]:
    """Sites that are beyond together, and no longer if any of them is left out.

    Delta debugging (Zeller and Hildebrandt, "Simplifying and isolating failure-inducing input",
    2002): halves first, which finds a single site in the logarithm of their number.

    Args:
        sites: beyond together.
        is_beyond: whether the outputs are with these sites fused.
        ruled_out: gets how many sites are out of question, whenever that changes.
    """
    suspects, parts = list(sites), 2
    while len(suspects) > 1:
        chunks = _split(suspects, min(parts, len(suspects)))
        others = [[site for site in suspects if site not in chunk] for chunk in chunks]
        candidates = chunks if parts == 2 else [*chunks, *others]
        smaller = next((one for one in candidates if is_beyond(one)), None)
        if smaller is not None:
            parts = 2 if smaller in chunks else max(parts - 1, 2)
            suspects = smaller
            ruled_out(len(sites) - len(suspects))
        elif parts >= len(suspects):
            break
        else:
            parts *= 2
    return suspects


def _split(sites: list[FusedSite], parts: int) -> list[list[FusedSite]]:
    """Nearly equal parts, in order."""
    bounds = [len(sites) * part // parts for part in range(parts + 1)]
    return [sites[first:last] for first, last in pairwise(bounds)]
