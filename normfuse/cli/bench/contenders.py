"""Who competes in a cell: our kernel, Inductor, torch's own norm, other libraries, and a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from normfuse.cli.bench.cells import QK
from normfuse.cli.bench.compositions import OVERWRITTEN, composition
from normfuse.cli.bench.heads import Heads, Turned, combinations
from normfuse.cli.bench.peers import Peer
from normfuse.cli.bench.spellings import EPS, Tensor
from normfuse.cli.bench.subjects import Subject, norm_of_heads
from normfuse.ops.lowering import inline_form, kernel_form

OURS, INDUCTOR, MAX_AUTOTUNE, COPY = "normfuse", "Inductor", "Inductor max-autotune", "copy"
TORCH = "F.rms_norm"
# Liger's kernels are Triton's, which keeps what it compiles; CuTe and nvcc are not ours to keep.
CACHED = ("Liger", TORCH)
# Not rivals: the one is us, the other computes nothing.
NO_RIVALS = (OURS, COPY)

Operands = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """One way to compute a subject.

    Attributes:
        name: as tables and plots show it.
        prepare: makes the function of the operands; may compile, or fail.
        adapt: operands -> those that the function is called with, outside the measured time.
        overwrites: whether a call writes over its operands, so that it needs its own copies.
        is_exact: held to eager's error; of others the error is only reported.
        is_cached: whether what `prepare` and the first call compile is kept on disk, so that
            another process can do it beforehand.
    """

    name: str
    prepare: Callable[[], Callable[..., Sequence[Tensor]]]
    adapt: Callable[[Operands], Operands] = tuple
    overwrites: bool = False
    is_exact: bool = False
    is_cached: bool = True


def contenders(subject: Subject, peers: Sequence[Peer], *, on_gpu: bool) -> list[Contender]:
    """All that compete in a cell, ours first; `on_gpu` is False for a dry run."""
    rivals = [
        Contender(OURS, partial(_ours, subject, on_gpu), is_exact=True),
        Contender(INDUCTOR, partial(_compiled, subject, None, on_gpu)),
    ]
    if subject.cell.is_autotuned:
        mode = "max-autotune-no-cudagraphs"
        rivals.append(Contender(MAX_AUTOTUNE, partial(_compiled, subject, mode, on_gpu)))
    if subject.cell.op == "rms_norm":
        rivals.append(Contender(TORCH, lambda: _functional))
    if subject.cell.op in QK:
        _, offset, _ = norm_of_heads(subject.cell, subject.dtype)
        return [*rivals, *map(_of_heads, combinations(subject.cell, peers, offset))]
    if subject.cell.op == "rope":
        turning = [Turned(subject.cell, peer) for peer in peers if peer.turns]
        return [*rivals, *map(_of_rotation, turning)]
    for peer in peers:
        chain = composition(peer, subject.cell)
        if chain is not None:
            rivals.append(_of_peer(peer, subject, chain))
    return rivals


def _ours(subject: Subject, on_gpu: bool) -> Callable[..., Sequence[Tensor]]:
    """The launch as the compiler makes it: no result that nobody reads is stored."""
    if on_gpu:
        from normfuse.ops.kernels.tile import eager

        form = kernel_form(subject.op, subject.used, eager)
    else:
        form = inline_form(subject.op)

    def call(*operands: Tensor) -> Sequence[Tensor]:
        return subject.results_of(form(*subject.arguments(*operands)))

    return call


def _compiled(subject: Subject, mode: str | None, on_gpu: bool) -> Callable[..., Sequence[Tensor]]:
    """torch.compile of the eager chain, for this shape alone; a dry run only traces it."""
    backend = "inductor" if on_gpu else "eager"
    how: Any = {"mode": mode} if on_gpu else {}
    compiled: Callable[..., Sequence[Tensor]] = torch.compile(
        subject.eager, dynamic=False, fullgraph=True, backend=backend, **how
    )
    return compiled


def _functional(x: Tensor, weight: Tensor) -> Sequence[Tensor]:
    return (F.rms_norm(x, (x.shape[-1],), weight, EPS),)


def _of_peer(peer: Peer, subject: Subject, chain: Callable[..., Sequence[Tensor]]) -> Contender:
    adapt: Callable[[Operands], Operands] = tuple
    overwrites = peer.is_in_place and subject.cell.op in OVERWRITTEN
    if overwrites:
        adapt = _cloned
    elif peer.folds_offset and subject.cell.op == "rms_norm_add_rms_norm":
        adapt = _with_folded_weights
    return Contender(peer.name, lambda: chain, adapt, overwrites, is_cached=peer.name in CACHED)


def _of_heads(chain: Heads) -> Contender:
    is_cached = all(peer is None or peer.name in CACHED for peer in (chain.norm, chain.rope))
    return Contender(chain.name, lambda: chain, chain.adapt, is_cached=is_cached)


def _of_rotation(chain: Turned) -> Contender:
    is_cached = chain.name in CACHED
    return Contender(chain.name, lambda: chain, chain.adapt, overwrites=True, is_cached=is_cached)


def _cloned(operands: Operands) -> Operands:
    return tuple(operand.clone() for operand in operands)


def _with_folded_weights(operands: Operands) -> Operands:
    """1 + weight, formed once in float32, for a peer that knows no offset."""
    return tuple(x if x.dim() > 1 else 1.0 + x.float() for x in operands)
