"""Compiling beforehand, in many processes: most of a run would else be one process compiling.

Inductor and Triton keep what they compile on disk, and the measuring process finds it there. What
Inductor has *chosen* by timing, in processes that disturb each other, it must not find: those files
are removed, and every choice is made again where nothing else runs.
"""

from __future__ import annotations

import copyreg
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normfuse.cli.bench.cells import Cell
from normfuse.cli.bench.contenders import contenders
from normfuse.cli.bench.measuring import copies
from normfuse.cli.bench.peers import FlashInfer, Liger, Peer, one_line
from normfuse.cli.bench.subjects import subject

MAX_BYTES = 2 * 10**9  # of a cell; larger ones would not fit the memory beside each other
CHOICES = "*.best_config"  # what Inductor's autotuning has chosen


def use_cache(directory: Path) -> None:
    """Lets this process, and those that it starts, keep and find compiled kernels there."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(directory / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(directory / "triton")
    share_cache_keys()


def share_cache_keys() -> None:
    """Gives equal graphs equal keys in every process.

    Inductor's key of a graph contains pickled memory formats. Python pickles one by the name of
    some module that has a `torch` in it, and in a worker that is another one than in its parent.
    """
    copyreg.pickle(torch.memory_format, _reduced)


def _reduced(memory_format: torch.memory_format) -> tuple[Any, tuple[str]]:
    return _memory_format, (str(memory_format).removeprefix("torch."),)


def _memory_format(name: str) -> torch.memory_format:
    found: torch.memory_format = getattr(torch, name)
    return found


def precompile(
    cells: Sequence[Cell],
    workers: int,
    seconds: float,
    progress: Callable[[int], None] = lambda done: None,
    device: str = "cuda",
) -> dict[str, Any]:
    """Compiles the contenders of cells, in order, for at most so many seconds.

    Returns:
        What the run's record says of it: seconds, cells compiled and left, failures, and whether
        FlashInfer could be built (None, or why not).
    """
    start = time.monotonic()
    small = [cell for cell in cells if subject(cell).num_bytes <= MAX_BYTES]
    failures: dict[str, str] = {}
    done = 0
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # for the workers: they are many already
    with multiprocessing.get_context("spawn").Pool(workers, share_cache_keys) as pool:
        build = pool.apply_async(build_flashinfer)
        results = pool.imap_unordered(partial(compile_cell, device=device), small)
        try:
            for _ in small:
                failures |= results.next(max(0.0, start + seconds - time.monotonic()))
                done += 1
                progress(done)
            built = build.get(max(0.0, start + seconds - time.monotonic()))
        except multiprocessing.TimeoutError:
            built = build.get() if build.ready() else f"not built within {seconds:.0f} s"
        pool.terminate()
    return {
        "seconds": time.monotonic() - start,
        "workers": workers,
        "cells": done,
        "left": len(cells) - done,
        "failures": failures,
        "choices_removed": forget_choices(Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])),
        "flashinfer": built,
    }


def forget_choices(directory: Path) -> int:
    """Removes what autotuning has chosen, and says how many choices there were."""
    found = list(directory.rglob(CHOICES))
    for path in found:
        path.unlink(missing_ok=True)  # another share may have forgotten it
    return len(found)


def compile_cell(cell: Cell, device: str) -> dict[str, str]:
    """Calls every contender that keeps its kernels once; returns the failures, by name."""
    try:
        return _compile_cell(cell, torch.device(device))
    except Exception as error:  # one cell must not end the run
        return {cell.name: one_line(error)}


def _compile_cell(cell: Cell, device: torch.device) -> dict[str, str]:
    failures = {}
    torch.compiler.reset()
    what = subject(cell)
    try:
        peers: list[Peer] = [Liger()]
    except Exception:  # the measuring process says why
        peers = []
    with torch.no_grad():
        operands = what.operands(device)
        for contender in contenders(what, peers, on_gpu=device.type == "cuda"):
            if not contender.is_cached:
                continue
            try:
                contender.prepare()(*contender.adapt(operands))
                _synchronize(device)
            except Exception as error:
                failures[f"{cell.name}: {contender.name}"] = one_line(error)
        num_read, num_written = what.streams
        for call in copies(num_written, device).values():
            call(*[torch.ones(4096, dtype=what.dtype, device=device) for _ in range(num_read)])
    del operands
    _synchronize(device)
    return failures


def _synchronize(device: torch.device) -> None:
    """Waits, and makes room for the other processes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def build_flashinfer() -> str | None:
    """Compiles FlashInfer's norms with nvcc, which keeps them; returns why it could not."""
    try:
        FlashInfer().build()
    except Exception as error:
        return one_line(error)
    return None
