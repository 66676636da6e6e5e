"""Processes that are the ranks of one process group, and run what a test hands them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config

# A rank that waits for one that has failed gives up after this.
PATIENCE = timedelta(seconds=120)


class Ranks:
    """One process for each rank, which lives until `close`; they meet in a file, at no port."""

    def __init__(self, size: int, backend: str, directory: Path):
        self.pools = [
            ProcessPoolExecutor(
                1,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_join,
                initargs=(rank, size, backend, str(directory / "store")),
            )
            for rank in range(size)
        ]

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returns; the first exception of a rank is raised here."""
        futures = [pool.submit(function, *arguments) for pool in self.pools]
        return [future.result(PATIENCE.total_seconds() * 2) for future in futures]

    def close(self) -> None:
        for pool in self.pools:
            pool.submit(torch.distributed.destroy_process_group)
        for pool in self.pools:
            pool.shutdown()


def _join(rank: int, size: int, backend: str, store: str) -> None:
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # no pool of processes for what is so small
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
    )
