"""The interpreter, one process for the session."""

import pytest
import torch

from tests.kernels import interpreted


@pytest.fixture(scope="session")
def interpreter():
    with interpreted.start() as process:
        yield process


@pytest.fixture
def launch(interpreter):
    """`launch("rms_norm", x, ...)`: what that file's launcher returns, its kernel interpreted."""

    def call(stem, *arguments, **keywords):
        return interpreter.submit(interpreted.launch, stem, arguments, keywords).result()

    return call


@pytest.fixture(params=["", "ahead held"], ids=["read again", "held"])
def narrow_tile(request):
    """Rows of 64 elements in four tiles, two rows at a time; held, or read again for every step."""
    from normfuse.ops.kernels.tile import Launch

    return Launch(rows=2, block=16, num_warps=1, few=request.param)


@pytest.fixture
def few_programs():
    """The launch of the backward kernels for a width, with three programs for all rows."""
    from dataclasses import replace

    from normfuse.ops.kernels.tile_backward import BackwardLaunch

    def launch(width, dtype=torch.float32, **settings):
        return replace(BackwardLaunch.for_shape(width, 3, dtype, **settings), programs=3)

    return launch


@pytest.fixture
def streamed():
    """A launch of the backward kernels that holds no row: chunks of 32 elements, three programs."""
    from normfuse.ops.kernels.tile_backward import BackwardLaunch

    return BackwardLaunch(rows=1, block=32, chunks=4, held=False, num_warps=1, programs=3)
