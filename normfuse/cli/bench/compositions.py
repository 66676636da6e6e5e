"""Our chains put together from a peer's kernels, with as few of torch's own as need be.

Where a library has no op for a chain, this is the best that its users can do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from normfuse.cli.bench.cells import Cell
from normfuse.cli.bench.peers import Peer
from normfuse.cli.bench.spellings import Tensor

Results = tuple[Tensor, ...]
# Ops whose operands a peer that works in place writes over.
OVERWRITTEN = ("add_rms_norm", "rms_norm_add_rms_norm")


def composition(peer: Peer, cell: Cell) -> Callable[..., Results] | None:
    """The chain of a cell from this peer's kernels, of the subject's operands; None if it cannot"""
    if cell.op == "modulated_rms_norm" and not peer.modulates:
        return None
    chain = _CHAINS.get(cell.op)
    return None if chain is None else partial(chain, peer)


def _rms_norm(peer: Peer, x: Tensor, weight: Tensor) -> Results:
    return (peer.norm(x, weight, 0.0),)


def _add_rms_norm(peer: Peer, x: Tensor, residual: Tensor, weight: Tensor) -> Results:
    return peer.add_norm(x, residual, weight, 0.0)


def _rms_norm_add(peer: Peer, x: Tensor, residual: Tensor, weight: Tensor) -> Results:
    return (peer.norm(x, weight, 0.0).add_(residual),)


def _sandwich(
    peer: Peer, x: Tensor, residual: Tensor, weight_1: Tensor, weight_2: Tensor
) -> Results:
    return peer.add_norm(peer.norm(x, weight_1, 1.0), residual, weight_2, 1.0)


def _dual(peer: Peer, x_1: Tensor, x_2: Tensor, residual: Tensor, *more: Tensor) -> Results:
    *weights, layer_scalar = more
    first, second = peer.norm(x_1, weights[0], 0.0), peer.norm(x_2, weights[1], 0.0)
    branch, _ = peer.add_norm(first, second, weights[2], 0.0)
    total = branch.add_(residual).mul_(layer_scalar)
    return (total,) if len(weights) == 3 else (peer.norm(total, weights[3], 0.0), total)


def _rms_norms(peer: Peer, x: Tensor, *weights: Tensor) -> Results:
    first, router, second = (peer.norm(x, weight, 0.0) for weight in weights)
    return first, router.mul_(x.shape[-1] ** -0.5), second


def _modulated(peer: Peer, x: Tensor, scale: Tensor, shift: Tensor) -> Results:
    return (peer.modulated_norm(x, scale, shift),)


_CHAINS: dict[str, Callable[..., Results]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "rms_norm_add": _rms_norm_add,
    "rms_norm_add_rms_norm": _sandwich,
    "dual_rms_norm_add": _dual,
    "dual_rms_norm_add_rms_norm": _dual,
    "rms_norms": _rms_norms,
    "modulated_rms_norm": _modulated,
}
