"""A package of AOTInductor holds our Triton kernels as machine code."""

import copy
import zipfile

import pytest
import torch

from tests.blocks import activation
from tests.export import package_block, run_elsewhere
from tests.float64 import assert_as_close_as_eager

pytestmark = pytest.mark.gpu


@pytest.mark.guarantee
@torch.no_grad()
def test_a_package_holds_our_kernels(tmp_path):
    block, package, ops = package_block(tmp_path, "cuda", lowering="triton")
    pairs = [(activation(rows).cuda(), activation(rows).cuda()) for rows in (4, 7)]

    try:
        results = run_elsewhere(package, pairs, tmp_path)
    except AssertionError:
        skip_if_torch_fails_too(pairs, tmp_path)
        raise

    assert ops == ["rms_norm_add_rms_norm", "rms_norm_add"]
    assert kernels_in(package, "rms_norm_add_rms_norm_kernel", "rms_norm_add_kernel")
    wide = copy.deepcopy(block).double()
    for y, (x, residual) in zip(results, pairs, strict=True):
        exact = wide(x.double(), residual.double())
        assert_as_close_as_eager(y, block(x, residual), exact)


def skip_if_torch_fails_too(pairs, directory):
    """Skips where the package that torch makes without us cannot be run either."""
    _, plain, _ = package_block(directory, "cuda", plain=True)
    try:
        run_elsewhere(plain, pairs, directory)
    except AssertionError as failure:
        pytest.skip(f"torch's own package of the block fails here, too: {failure}"[:300])


def kernels_in(package, *names):
    """Whether the sources or libraries in a package name these kernels."""
    with zipfile.ZipFile(package) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    return all(any(name.encode() in content for content in contents) for name in names)
