"""What every test shares: the device, and a compiler that remembers nothing."""

import os
import tempfile

import pytest
import torch

# No test goes by what was measured on this machine; those that write have a directory of their own.
os.environ["NORMFUSE_CACHE_DIR"] = os.path.join(tempfile.gettempdir(), f"normfuse-{os.getpid()}")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def device():
    """The best device here; tests that only make sense on CUDA are marked `gpu` besides."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """No test sees code or shapes that another has compiled."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
