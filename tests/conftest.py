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


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """The Triton route without a GPU: a driver that only names a target, enough to make graphs."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class NamesATarget(DriverBase):
        def __init__(self):
            pass

        @classmethod
        def is_active(cls):
            return True

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

        def map_python_to_cpp_type(self, ty):
            return ty

        def get_active_torch_device(self):
            return torch.device("cpu")

        def get_benchmarker(self):
            raise NotImplementedError

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    from normfuse.passes import lower

    monkeypatch.setattr(lower, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(triton.runtime.driver, "_active", NamesATarget(), raising=False)
