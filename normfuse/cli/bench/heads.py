"""Norms of heads and RoPE put together from other libraries' kernels: each norm with each rotation.

No library has them in one. A norm that cannot read heads between others copies them first, as its
users must.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch.nn.functional as F

from normfuse.cli.bench.cells import Cell
from normfuse.cli.bench.peers import Peer
from normfuse.cli.bench.spellings import EPS, Tensor, heads


class TorchNorm:
    """F.rms_norm in a peer's place."""

    name = "F.rms_norm"
    takes_strides = True

    def norm(self, x: Tensor, weight: Tensor, offset: float) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight + offset if offset else weight, EPS)


@dataclass(frozen=True)
class Heads:
    """One norm, and one rotation or none.

    Attributes:
        cell: whose heads.
        offset: what is added to the weights, outside the measured time.
        norm: the peer that norms.
        rope: the peer that turns.
    """

    cell: Cell
    offset: float
    norm: Peer | TorchNorm
    rope: Peer | None

    @property
    def name(self) -> str:
        """`QuACK + Liger`, or `Liger` for both; without a rotation, the norm's name."""
        if self.rope is None or self.rope is self.norm:
            return self.norm.name
        return f"{self.norm.name} + {self.rope.name}"

    def adapt(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The offset in the weights, and the tables as the rotation takes them."""
        qkv, *weights = operands[:3]
        if self.offset:
            weights = [(self.offset + weight.float()).to(weight.dtype) for weight in weights]
        tables = () if self.rope is None else self.rope.tables(*operands[3:])
        return qkv, *weights, *tables

    def __call__(
        self, qkv: Tensor, weight_q: Tensor, weight_k: Tensor, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        """q and k (1, heads, T, N), of `adapt`'s operands."""
        heads_q, heads_k = self.cell.heads
        q, k = (x[0] for x in heads(qkv, heads_q, heads_k, self.cell.width))
        q, k = self._normed(q, weight_q), self._normed(k, weight_k)
        if self.rope is not None:
            q, k = self.rope.rope(q, k, *tables)
        return tuple(x.unsqueeze(0).transpose(1, 2) for x in (q, k))

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        """Heads (T, heads, N), contiguous."""
        if self.norm.takes_strides:
            return self.norm.norm(x, weight, 0.0)
        return self.norm.norm(x.reshape(-1, x.shape[-1]), weight, 0.0).view(x.shape)


@dataclass(frozen=True)
class Turned:
    """A peer's rotation alone; it writes over its operands, which are contiguous."""

    cell: Cell
    rope: Peer

    @property
    def name(self) -> str:
        return self.rope.name

    def adapt(self, operands: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Operands of its own, and the tables as it takes them."""
        q, k, *tables = operands
        return q.clone(), k.clone(), *self.rope.tables(*tables)

    def __call__(self, q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        """q and k (1, heads, T, N), of `adapt`'s operands."""
        shape = (self.cell.rows, -1, self.cell.width)
        turned = self.rope.rope(q.view(shape), k.view(shape), *tables)
        return tuple(x.unsqueeze(0).transpose(1, 2) for x in turned)


def combinations(cell: Cell, peers: Sequence[Peer], offset: float) -> Iterator[Heads]:
    """Every norm, torch's own included, with every rotation where the cell turns."""
    ropes: list[Peer | None] = [None]
    if cell.op == "qk_rms_norm_rope":
        ropes = [peer for peer in peers if peer.turns]
    norms: list[Peer | TorchNorm] = [*peers, TorchNorm()]
    for norm in norms:
        yield from (Heads(cell, offset, norm, rope) for rope in ropes)
