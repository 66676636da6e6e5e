"""How rows are read changes no bit: every word that `chunks.py` knows, against held rows."""

from dataclasses import replace

import pytest
import torch

from normfuse.ops.residual_sum import Scales
from tests.kernels.inputs import BF16, gemma, llama, random

pytest.importorskip("triton", reason="tile.py asks triton what it runs on")
tile = pytest.importorskip("normfuse.ops.kernels.tile")
cross_compile = pytest.importorskip("tests.kernels.cross_compile")

# Rows of 29 elements: two tiles, the last of them not full; two rows a turn, and two turns.
WIDTH, LAUNCH = 29, tile.Launch(rows=2, block=16, num_warps=1)
WAYS = {
    "half": "half",
    "again": "",
    "weights late": "beside held",
    "rows leave": "ahead held streamed",
}


def results(launch, op, way):
    """The op on three rows, read in one way; the operands are always the same."""
    torch.manual_seed(0)
    xs = [random(3, WIDTH) for _ in range(3)]
    weights = [random(WIDTH), random(WIDTH), random(WIDTH), None]
    norm, again = (1e-6, 1.0, gemma(BF16)), (1e-5, 0.0, llama(BF16))
    scales = Scales(branch=0.7, total=1.3)
    keywords = {"tile": way}
    if op == "rms_norm":
        return launch(op, xs[0], weights[0], None, *norm, **keywords)
    if op == "rms_norms":
        eps, (offsets, plans) = norm[0], zip(norm[1:], again[1:], strict=True)
        return launch(op, xs[0], weights[:2], eps, offsets, [1.0, 0.5], plans, **keywords)
    if op == "rms_norm_add_rms_norm":
        return launch(op, *xs[:2], *weights[:2], scales, *norm, *again, **keywords)
    if op.startswith("dual"):
        return launch(op, *xs, weights, scales, [norm, again, norm, again], **keywords)
    return launch(op, *xs[:2], weights[0], scales, *norm, **keywords)


OPS = (
    "rms_norm",
    "rms_norm_add",
    "rms_norms",
    "add_rms_norm",
    "rms_norm_add_rms_norm",
    "dual_rms_norm_add_rms_norm",  # which `dual_rms_norm_add` is the beginning of
)


@pytest.mark.parametrize("op", OPS)
def test_how_rows_are_read_changes_no_bit(launch, op):
    held = results(launch, op, LAUNCH)
    for name, reads in WAYS.items():
        if "half" in reads and op.startswith("dual"):
            continue
        way = replace(LAUNCH, few=reads)
        for one, other in zip(results(launch, op, way), held, strict=True):
            assert torch.equal(one, other), name
