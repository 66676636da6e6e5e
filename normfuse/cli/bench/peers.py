"""Other libraries' kernels, each behind the same two calls.

A library that is not installed is absent, with the reason; nothing here is needed to import.
Each is called with its fastest documented form: no gradient, no rstd where it can be left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from normfuse.cli.bench.record import without_directories
from normfuse.cli.bench.spellings import EPS, Tensor


class Peer(ABC):
    """A library with an RMSNorm, and a norm of a residual sum.

    `offset` is 1.0 where the norm multiplies by 1 + weight, as Gemma's do until Gemma 3.
    """

    name: str
    packages: tuple[str, ...]
    module: str
    stems: tuple[str, ...]
    # Whether `add_norm` writes its results over its operands.
    is_in_place = False
    # Whether 1 + weight must be formed beforehand; the time for it is not counted.
    folds_offset = False
    # Whether its norm reads heads (T, heads, N) between others; else they must be copied first.
    takes_strides = False
    # Whether it has `modulated_norm`, and `rope`.
    modulates = False
    turns = False

    def __init__(self) -> None:
        self._modules = [import_module(f"{self.module}.{stem}") for stem in self.stems]

    @abstractmethod
    def norm(self, x: Tensor, weight: Tensor, offset: float) -> Tensor:
        """(M, N), (N,) -> (M, N)."""

    @abstractmethod
    def add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, offset: float
    ) -> tuple[Tensor, Tensor]:
        """(M, N) twice, (N,) -> the norm of the sum, and the sum."""

    def modulated_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """(B, S, N), (B, 1, N) twice -> (B, S, N)."""
        raise NotImplementedError

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (1, T, N) -> what `rope` takes of them, formed outside the measured time."""
        return cos, sin

    def rope(self, q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        """q and k (T, heads, N), and `tables` -> both turned, where they lie if contiguous."""
        raise NotImplementedError

    @classmethod
    def installed_version(cls) -> str | None:
        """The version of the package; None if it is not installed."""
        for package in cls.packages:
            try:
                return version(package)
            except PackageNotFoundError:
                continue
        module: Any = import_module(cls.module)  # on the path without its metadata
        return getattr(module, "__version__", None)


class Liger(Peer):
    """liger_kernel.ops, in the casting mode of the model: Llama's, or Gemma's with the offset."""

    name, packages, module = "Liger", ("liger-kernel",), "liger_kernel.ops"
    stems = ("rms_norm", "fused_add_rms_norm", "modulated_rms_norm", "rope")
    modulates = turns = True

    def norm(self, x: Tensor, weight: Tensor, offset: float) -> Tensor:
        forward = self._modules[0].rms_norm_forward
        y: Tensor = forward(x, weight, EPS, offset, _mode(offset), None)[0]
        return y

    def add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, offset: float
    ) -> tuple[Tensor, Tensor]:
        forward = self._modules[1].fused_add_rms_norm_forward
        y, total = forward(x, residual, weight, EPS, offset, _mode(offset))[:2]
        return y, total

    def modulated_norm(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        forward = self._modules[2].modulated_rms_norm_forward
        y: Tensor = forward(x, None, scale, shift, EPS, 0.0, "llama")[0]
        return y

    def rope(self, q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        """It reads the left half of cos and sin alone."""
        heads_first = (x.unsqueeze(0).transpose(1, 2) for x in (q, k))
        q, k = self._modules[3].rope_forward(*heads_first, *tables)[:2]
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0]


def _mode(offset: float) -> str:
    return "gemma" if offset else "llama"


class Quack(Peer):
    """quack.rmsnorm, CuTe kernels; they know no offset."""

    name, packages, module = "QuACK", ("quack-kernels",), "quack"
    stems = ("rmsnorm",)
    folds_offset = True

    def norm(self, x: Tensor, weight: Tensor, offset: float) -> Tensor:
        y: Tensor = self._modules[0].rmsnorm_fwd(x, weight, eps=EPS)[0]
        return y

    def add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, offset: float
    ) -> tuple[Tensor, Tensor]:
        forward = self._modules[0].rmsnorm_fwd
        y, total = forward(x, weight, residual=residual, eps=EPS)[:2]
        return y, total


class FlashInfer(Peer):
    """flashinfer.norm; the norm of a sum writes the norm over x and the sum over the residual."""

    name, packages, module = "FlashInfer", ("flashinfer-python",), "flashinfer"
    stems = ("norm", "rope")
    is_in_place = True
    takes_strides = turns = True

    def norm(self, x: Tensor, weight: Tensor, offset: float) -> Tensor:
        function = self._modules[0].gemma_rmsnorm if offset else self._modules[0].rmsnorm
        y: Tensor = function(x, weight, EPS)
        return y

    def add_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, offset: float
    ) -> tuple[Tensor, Tensor]:
        module = self._modules[0]
        function = module.gemma_fused_add_rmsnorm if offset else module.fused_add_rmsnorm
        function(x, residual, weight, EPS)
        return x, residual

    def tables(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Positions, and for each the left halves of cos and sin side by side, in float32."""
        half = cos.shape[-1] // 2
        cache = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1).float()
        return torch.arange(cos.shape[1], dtype=torch.int32, device=cos.device), cache

    def rope(self, q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        positions, cache = tables
        q, k = q.contiguous(), k.contiguous()
        flat = q.flatten(1), k.flatten(1)
        turn = self._modules[1].apply_rope_with_cos_sin_cache_inplace
        turn(positions, *flat, q.shape[-1], cache, is_neox=True)
        return q, k

    def build(self) -> None:
        """Compiles its CUDA sources, or finds them compiled."""
        self._modules[0].get_norm_module()
        self._modules[1].get_rope_module()


PEERS: tuple[type[Peer], ...] = (Liger, Quack, FlashInfer)


@dataclass(frozen=True)
class Attendance:
    """Which peers take part.

    Attributes:
        present: those that could be imported.
        versions: of all that are installed.
        absent: the reason of each other one, by name.
    """

    present: tuple[Peer, ...]
    versions: dict[str, str]
    absent: dict[str, str]

    def without(self, name: str, reason: str) -> Attendance:
        """The same without one peer."""
        present = tuple(peer for peer in self.present if peer.name != name)
        return Attendance(present, self.versions, {**self.absent, name: reason})


def attendance() -> Attendance:
    """Looks for every peer."""
    present: list[Peer] = []
    versions: dict[str, str] = {}
    absent: dict[str, str] = {}
    for kind in PEERS:
        try:
            peer = kind()
            versions[kind.name] = kind.installed_version() or "unknown"
            present.append(peer)
        except Exception as error:  # a foreign import can fail in any way
            absent[kind.name] = one_line(error)
    return Attendance(tuple(present), versions, absent)


def one_line(error: BaseException) -> str:
    """An exception for a record: its kind, and 300 characters of its text, without directories."""
    return without_directories(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]
