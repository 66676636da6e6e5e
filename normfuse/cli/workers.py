"""A function called for each of many values, here or in several processes that share one GPU."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

turn: AbstractContextManager[Any] = nullcontext()
"""Held by the process whose turn it is on the GPU; look it up when it is needed."""


class Each(Protocol):
    """Calls a function for each value; yields a value with its result, or what it raised."""

    def __call__(
        self, function: Callable[[T], R], values: Sequence[T]
    ) -> Iterator[tuple[T, R | Exception]]: ...


@contextmanager
def workers(count: int) -> Iterator[Each]:
    """`Each` over this many processes; over this one, for 1."""
    if count == 1:
        yield _one_by_one
        return
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the processes are as many as the cores
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    with ProcessPoolExecutor(count, context, _start, (context.Lock(),)) as pool:

        def each(
            function: Callable[[T], R], values: Sequence[T]
        ) -> Iterator[tuple[T, R | Exception]]:
            futures = {pool.submit(function, value): value for value in values}
            for future in as_completed(futures):
                error = future.exception()
                if error is None:
                    yield futures[future], future.result()
                elif isinstance(error, Exception):
                    yield futures[future], error
                else:
                    raise error

        yield each


def _one_by_one(
    function: Callable[[T], R], values: Sequence[T]
) -> Iterator[tuple[T, R | Exception]]:
    for value in values:
        try:
            yield value, function(value)
        except Exception as error:
            yield value, error


def _start(lock: AbstractContextManager[Any]) -> None:
    global turn
    turn = lock
