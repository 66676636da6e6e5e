"""The interpreter, one process for the session."""

import pytest

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
