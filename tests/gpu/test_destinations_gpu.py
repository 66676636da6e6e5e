"""Caches that launches write, and copies for attention, on a GPU."""

import subprocess
import sys
from textwrap import dedent

import pytest
import torch
from torch.utils._pytree import tree_leaves

import normfuse
from tests.cached_attention import Cached, CachedAt, ReturnsBoth, Uncached, inputs

pytestmark = pytest.mark.gpu

STEPS = 3


def steps(model, tokens, mode, lowering):
    """The results of some steps over a cache, and what the cache holds then."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = model.cuda()
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    options = normfuse.options(mode, lowering=lowering)
    compiled = torch.compile(model, options=options)
    results = []
    with torch.no_grad():
        for _ in range(STEPS):
            x, cos, sin = inputs(tokens, model.width, "cuda")
            results.append(compiled(x, cos, sin).clone())
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    return results, found


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize(("tokens", "key_heads"), [(1, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize(
    ("width", "normed"), [(128, True), (128, False), (80, True), (128, "jointly")]
)
@pytest.mark.guarantee
def test_caches_hold_the_bits_of_the_op(width, normed, tokens, key_heads, mode):
    model = Cached(width, normed=normed, key_heads=key_heads, places=16)
    expected, held = steps(model, tokens, mode, "op")
    results, found = steps(model, tokens, mode, "triton")
    for name in held:
        assert torch.equal(found[name], held[name]), name
    for result, right in zip(results, expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("width", [128, 80])
@pytest.mark.parametrize("normed", [True, False, "jointly"])
@pytest.mark.parametrize("kind", [Uncached, ReturnsBoth])
def test_repeated_heads_have_the_bits_of_the_op(kind, normed, width):
    model = kind(width, normed=normed).cuda()
    values = inputs(300, width, "cuda")
    found = []
    for lowering in ("op", "triton"):
        torch._dynamo.reset()
        options = normfuse.options(lowering=lowering)
        with torch.no_grad():
            found.append(torch.compile(model, options=options)(*values))
    for result, right in zip(*map(tree_leaves, found), strict=True):
        assert torch.equal(result, right)


@pytest.mark.guarantee
def test_positions_are_read_anew_by_a_cuda_graph():
    model = CachedAt(128, places=16).cuda()
    options = normfuse.options("reduce-overhead", lowering="triton")
    compiled = torch.compile(model, options=options)
    values = inputs(3, 128, "cuda")
    written = []
    with torch.no_grad():
        for first in (0, 5, -3, 9):
            model.values.zero_()
            compiled(*values, torch.tensor([first, first + 1, first + 2], device="cuda"))
            rows = (model.values != 0).any(-1).all(1).all(0).nonzero().flatten()
            written.append(rows.tolist())
    assert written == [[0, 1, 2], [5, 6, 7], [13, 14, 15], [9, 10, 11]]


@pytest.mark.parametrize("lowering", ["inline", "triton"])
@pytest.mark.guarantee
def test_a_position_out_of_bounds_is_an_error(lowering):
    script = f"""
        import torch, normfuse
        from tests.cached_attention import CachedAt, inputs
        model = CachedAt(128, places=16).cuda()
        options = normfuse.options(lowering={lowering!r})
        compiled = torch.compile(model, options=options)
        values = inputs(3, 128, "cuda")
        with torch.no_grad():
            compiled(*values, torch.tensor([0, 1, 2], device="cuda"))
            torch.cuda.synchronize()
            print("in bounds", flush=True)
            compiled(*values, torch.tensor([0, 1, 16], device="cuda"))
            torch.cuda.synchronize()
            print("out of bounds", flush=True)
    """
    command = [sys.executable, "-c", dedent(script)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.stdout.split("\n")[:2] == ["in bounds", ""], ran.stderr[-2000:]
    assert "device-side assert" in ran.stderr
