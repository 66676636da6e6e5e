"""Rows that a launch of heads writes elsewhere: into caches, repeated, and of tensors that join."""

from itertools import product

import pytest
import torch

from normfuse.ops.destinations import Cached, Repeated, Writes
from normfuse.ops.qk_rms_norm_rope import qk_rms_norm_rope_reference
from normfuse.ops.rotation import Rotation
from normfuse.ops.rounding import RoundingPlan

PLAN = "f32 unit=f32>bf16 weight=bf16 out=bf16"
BATCH, PLACES = 2, 11
IN_MEMORY = {"tokens outside": (0, 2, 1, 3), "heads outside": (0, 1, 2, 3)}


def heads(num, tokens, width, memory="tokens outside"):
    """(batch, heads, tokens, width), of which tokens or heads lie outside."""
    shape = (BATCH, num, tokens, width)
    order = IN_MEMORY[memory]
    storage = torch.randn([shape[dim] for dim in order]).bfloat16()
    return storage.permute(order)


def operands(tokens, width, memory="tokens outside", num_keys=2):
    q, k, v = (heads(num, tokens, width, memory) for num in (4, num_keys, num_keys))
    weights = [torch.randn(width).bfloat16() for _ in range(2)]
    tables = [torch.randn(BATCH, 1, tokens, width).bfloat16() for _ in range(2)]
    return q, k, v, weights, tables


def norms(turn):
    return [1e-6] * 2, [0.0] * 2, [PLAN] * 2, [turn] * 2


def launched(launch, q, k, weights, tables, turn, writes):
    eps, offsets, plans, turns = norms(turn)
    plans = [RoundingPlan.parse(plan) for plan in plans]
    turns = [Rotation.parse(one) for one in turns]
    stores = [True, True, False, False]
    arguments = ([q, k], weights, *tables, eps, offsets, plans, turns)
    return launch("qk_rms_norm_rope", *arguments, stores=stores, writes=writes)


def cache_of(x, dims=(0, 1, 2, 3)):
    """A cache for x, permuted, with its third axis of places."""
    shape = [x.shape[dim] for dim in dims]
    shape[dims.index(2)] = PLACES
    return torch.randn(shape, device=x.device).bfloat16()


def put(cache, axis, positions, x):
    return cache.clone().index_copy_(axis, positions, x)


@pytest.mark.parametrize("counts_up", [True, False], ids=["from the first", "each"])
@pytest.mark.parametrize("memory", IN_MEMORY)
@pytest.mark.parametrize(("tokens", "num_keys"), [(1, 2), (5, 2), (5, 1)])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.guarantee
def test_keys_and_values_go_into_caches(layout, tokens, num_keys, memory, counts_up, launch):
    q, k, v, weights, tables = operands(tokens, 16, memory, num_keys)
    turn = f"{layout} 16 in=bf16 out=bf16"
    expected = qk_rms_norm_rope_reference([q, k], weights, *tables, *norms(turn))
    rows = torch.tensor([7, 2, 9, 0, 4][:tokens])
    if counts_up:
        rows = torch.arange(3, 3 + tokens)
    caches = cache_of(k), cache_of(v)
    wanted = [put(cache, 2, rows, x) for cache, x in zip(caches, (expected[1], v), strict=True)]
    told = (rows[0] if counts_up else rows), (0, 1, 2, 3), 2, counts_up
    into = [Cached(cache, *told) for cache in caches]
    writes = Writes((None, into[0], None, None), ((v, into[1]),))
    found = launched(launch, q, k, weights, tables, turn, writes)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    assert found[1:4] == [None] * 3
    for result, cache, right in zip(found[4:], caches, wanted, strict=True):
        torch.testing.assert_close(cache, right, rtol=0, atol=0)
        torch.testing.assert_close(result, right, rtol=0, atol=0)


@pytest.mark.parametrize("dims", [(0, 2, 1, 3), (1, 0, 2, 3), (2, 0, 1, 3)])
def test_the_axes_of_a_cache_may_be_others(dims, launch):
    q, k, _, weights, tables = operands(5, 16)
    turn = "half 16 in=bf16 out=bf16"
    expected = qk_rms_norm_rope_reference([q, k], weights, *tables, *norms(turn))
    cache, axis = cache_of(k, dims), dims.index(2)
    rows = torch.tensor([7, 2, 9, 0, 4], dtype=torch.int32)
    wanted = put(cache, axis, rows.long(), expected[1].permute(dims))
    cached = Cached(cache, rows, dims, axis, counts_up=False)
    launched(launch, q, k, weights, tables, turn, Writes((None, cached, None, None)))
    torch.testing.assert_close(cache, wanted, rtol=0, atol=0)


def test_negative_positions_count_from_the_end(launch):
    q, k, _, weights, tables = operands(5, 16)
    turn = "half 16 in=bf16 out=bf16"
    expected = qk_rms_norm_rope_reference([q, k], weights, *tables, *norms(turn))
    cache = cache_of(k)
    rows = torch.tensor([-1, 2, -PLACES, 3, -4])
    wanted = put(cache, 2, rows % PLACES, expected[1])
    cached = Cached(cache, rows, (0, 1, 2, 3), 2, counts_up=False)
    launched(launch, q, k, weights, tables, turn, Writes((None, cached, None, None)))
    torch.testing.assert_close(cache, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("memory", "width", "dim"), list(product(IN_MEMORY, (16, 24), (16, 8))))
@pytest.mark.parametrize("num_keys", [1, 2])
@pytest.mark.guarantee
def test_keys_and_values_are_repeated(num_keys, memory, width, dim, launch):
    q, k, v, weights, tables = operands(5, width, memory, num_keys)
    tables = [table[..., :dim] for table in tables]
    turn = f"half {dim} in=bf16 out=bf16"
    expected = qk_rms_norm_rope_reference([q, k], weights, *tables, *norms(turn))
    repeated = Repeated((0, 1, 2, 3), 2, 3)
    writes = Writes((None, repeated, None, None), ((v, repeated),))
    found = launched(launch, q, k, weights, tables, turn, writes)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)
    for result, one in zip(found[4:], (expected[1], v), strict=True):
        assert result.is_contiguous()
        copies = one[:, :, None].expand(-1, -1, 3, -1, -1)
        torch.testing.assert_close(result, copies, rtol=0, atol=0)


@pytest.mark.parametrize("memory", IN_MEMORY)
@pytest.mark.guarantee
def test_what_is_copied_may_be_kept(memory, launch):
    q, k, v, weights, tables = operands(5, 16, memory)
    turn = "half 16 in=bf16 out=bf16"
    expected = qk_rms_norm_rope_reference([q, k], weights, *tables, *norms(turn))
    cache = cache_of(q)
    wanted = put(cache, 2, torch.arange(3, 8), expected[0])
    cached = Cached(cache, torch.tensor(3), (0, 1, 2, 3), 2, counts_up=True, kept=True)
    repeated = Repeated((0, 1, 2, 3), 2, 3, kept=True)
    writes = Writes((cached, repeated, None, None), ((v, repeated._replace(kept=False)),))
    found = launched(launch, q, k, weights, tables, turn, writes)
    copies = [one[:, :, None].expand(-1, -1, 3, -1, -1) for one in (expected[1], v)]
    assert found[2:4] == [None, None]
    for result, right in zip(
        [*found[:2], *found[4:]], [*expected[:2], wanted, *copies], strict=True
    ):
        torch.testing.assert_close(result, right, rtol=0, atol=0)
    assert [one.stride() for one in found[:2]] == [one.stride() for one in expected[:2]]


def test_rows_of_several_groups_find_their_places(launch):
    """Programs that take several tiles of heads which share their angles."""
    from normfuse.ops.kernels.slots import HeadsLaunch

    q, k, v, _, tables = operands(5, 16, num_keys=8)
    turn = Rotation.parse("half 16 in=bf16 out=bf16")
    plain = launch("rope", [q, k], *tables, [turn] * 2)
    tile = HeadsLaunch(32, num_warps=1, groups=4, programs=1)
    caches = cache_of(k), cache_of(v)
    rows = torch.tensor([7, 2, 9, 0, 4])
    wanted = [put(cache, 2, rows, x) for cache, x in zip(caches, (plain[1], v), strict=True)]
    into = [Cached(cache, rows, (0, 1, 2, 3), 2, False) for cache in caches]
    writes = Writes((None, into[0]), ((v, into[1]),))
    found = launch("rope", [q, k], *tables, [turn] * 2, writes=writes, tile=tile)
    assert found[1] is None
    for result, right in zip([found[0], *found[2:]], (plain[0], *wanted), strict=True):
        torch.testing.assert_close(result, right, rtol=0, atol=0)


def test_what_joins_counts_among_the_tensors_of_a_launch(launch):
    q, k, v, weights, tables = operands(5, 16)
    repeated = Repeated((0, 1, 2, 3), 2, 3)
    writes = Writes((None, None, None, None), ((v, repeated), (v, repeated)))
    with pytest.raises(AssertionError, match="up to 3 tensors, got 4"):
        launched(launch, q, k, weights, tables, "half 16 in=bf16 out=bf16", writes)
