"""RMSNorm and a gate, in either order, whole or in groups  =>  normfuse::gated_rms_norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from normfuse.ops import GATED_RMS_NORM, RMS_NORM
from normfuse.ops.gated_rms_norm import gated_rms_norm_fake
from normfuse.ops.gating import Gating
from normfuse.patterns.decline import Decline
from normfuse.patterns.gate import Gate, gate_behind
from normfuse.patterns.micro_ops import dtype, fake_mode, fake_of, same_sizes, tensor, width_of
from normfuse.patterns.replacement import replace_chain
from normfuse.patterns.rule import Context, Rule
from normfuse.patterns.scaling import uncast
from normfuse.patterns.tail import Tail, same_values, tails


@dataclass(frozen=True)
class GatedNorm:
    """A norm and its gate: `x` and the gate have the shape of `tail.last`, which ends the chain."""

    x: Node
    gate: Gate
    gate_first: bool
    gating: Gating
    tail: Tail


def _apply(node: Node, context: Context) -> Node | None:
    if node.target is not RMS_NORM or node.args[2] is not None:
        return None
    found = _gate_then_norm(node) or _norm_then_gate(node)
    return None if found is None else _rewrite(node, found, context)


def _normalised(node: Node) -> Node:
    x = node.args[0]
    assert isinstance(x, Node)
    return x


def _gate_then_norm(node: Node) -> GatedNorm | None:
    found = gate_behind(_normalised(node))
    if found is None:
        return None
    gate, out = found
    shape = fake_of(gate.product).shape
    ends = [
        tail
        for tail in tails(node, (gate.product,), takes_gate=False)
        if same_sizes(fake_of(tail.last).shape, shape)
    ]
    if not ends:
        return None
    return GatedNorm(uncast(gate.value), gate, True, gate.types(out), ends[-1])


def _norm_then_gate(node: Node) -> GatedNorm | None:
    sources = tuple(same_values(_normalised(node)))
    for tail in reversed([*tails(node, sources, takes_gate=True)]):
        gate = tail.gate
        if gate is None:
            return None
        shape = fake_of(gate.product).shape
        if not same_sizes(fake_of(tail.last).shape, shape):
            continue
        for x in reversed(sources):
            if same_sizes(fake_of(x).shape, shape):
                return GatedNorm(x, gate, False, gate.types(dtype(tail.last)), tail)
        raise Decline(
            f"the gate of shape {tuple(shape)} does not have the shape of the normalised value, "
            f"{tuple(fake_of(_normalised(node)).shape)}"
        )
    return None


def _rewrite(node: Node, found: GatedNorm, context: Context) -> Node:
    tail, gate = found.tail, found.gate.factor.gate
    nodes = (*tail.nodes, *found.gate.nodes)
    context.mutations.forbid_between((node, *nodes))
    operands = (found.x, gate, tail.weight)
    arguments = (
        *operands,
        node.args[3],
        tail.offset,
        _num_groups(node, found),
        found.gate_first,
        found.gate.factor.activation,
        context.plan(tail.plan),
        str(found.gating),
    )
    fakes = _fake_results(arguments)
    return replace_chain(
        context, GATED_RMS_NORM, arguments, fakes, norm=node, last=tail.last, nodes=nodes
    )


def _num_groups(node: Node, found: GatedNorm) -> int:
    """How many rows of the norm make one row of x.

    Raises:
        Decline: no whole number does, or the weight spans neither.
    """
    row, group = width_of(found.x), width_of(_normalised(node))
    if row is None or group is None or row % group:
        raise Decline(f"the norm runs over {group} elements, and a row of the gate has {row}")
    weight = found.tail.weight
    if weight is not None and fake_of(weight).shape[0] not in (row, group):
        raise Decline(f"the weight spans neither a row of {row} elements nor a group of {group}")
    return row // group


def _fake_results(arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    x, gate, weight = (tensor(operand) for operand in arguments[:3])
    assert x is not None
    assert gate is not None
    with torch.no_grad(), fake_mode(arguments[0]):
        return gated_rms_norm_fake(x, gate, weight, *arguments[3:])


RULE = Rule(
    name="gated_rms_norm",
    before="x -> RMSNorm -> * act(gate), or x -> * act(gate) -> RMSNorm; act is silu or sigmoid",
    families="Qwen3-Next, Qwen 3.5, Kimi Linear; Mamba 2, Bamba, Zamba 2, Falcon-H1, in groups",
    apply=_apply,
)
