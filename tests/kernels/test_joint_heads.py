"""Norms over all heads of a token, which turn one by one: the kernel, interpreted."""

import pytest
import torch

from normfuse.ops.destinations import Cached, Repeated, Writes
from normfuse.ops.joint import obstacle_to_joint_norms
from normfuse.ops.qk_rms_norm import qk_rms_norm_reference
from normfuse.ops.qk_rms_norm_rope import qk_rms_norm_rope_fake, qk_rms_norm_rope_reference
from normfuse.ops.rounding import RoundingPlan
from tests import float64
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    assert_same_bits,
    gemma,
    integers,
    layouts,
    llama,
    random,
)
from tests.kernels.test_qk_rms_norm_rope import EPS, ROTATIONS, rotation, run, tables

PLACES = 11


def heads(make, num, dtype=BF16, tokens=5):
    """A projection as its heads, heads first, and a weight of its own for each of them."""
    x = make(2, tokens, num * 64, dtype=dtype).view(2, tokens, num, 64).transpose(1, 2)
    return x, random(num * 64, dtype=dtype).view(num, 1, 64)


def operands(name, dtype=BF16, plan=gemma, counts=(4, 2), make=random):
    """The arguments of the op for q and k."""
    xs, weights = zip(*(heads(make, num, dtype) for num in counts), strict=True)
    plans, turns = [str(plan(dtype))] * 2, [rotation(name, dtype)] * 2
    numbers = ([EPS] * 2, [1.0] * 2)
    return list(xs), list(weights), *tables(name, dtype), *numbers, plans, turns


@pytest.mark.parametrize("contiguous", [False, True], ids=["as x", "contiguous"])
@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_every_rotation_has_eagers_bits(launch, dtype, name, contiguous):
    (q, weight_q), (k, weight_k) = heads(integers, 4, dtype), heads(integers, 2, dtype)
    plans = [str(llama(dtype)), str(RoundingPlan.once(dtype, dtype))]
    turns = [rotation(name, dtype, contiguous=contiguous)] * 2
    numbers = ([0.0] * 2, [0.0, 1.0], plans, turns)
    arguments = ([q, k], [weight_q, weight_k], *tables(name, dtype), *numbers)

    results = run(launch, arguments)

    assert_same_bits(results, qk_rms_norm_rope_reference(*arguments))
    assert layouts(results) == layouts(qk_rms_norm_rope_fake(*arguments))


@pytest.mark.parametrize("counts", [(4, 2), (3, 1), (5, 5)])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_errs_no_more_than_eager(launch, dtype, counts):
    """Also where the heads are no power of 2."""
    arguments = operands("half", dtype, counts=counts)

    results = run(launch, arguments)

    eager = qk_rms_norm_rope_reference(*arguments)
    exact = float64.qk_rms_norm_rope(*arguments)
    assert layouts(results) == layouts(qk_rms_norm_rope_fake(*arguments))
    for result, other, truth in zip(results[:2], eager, exact, strict=False):
        float64.assert_as_close_as_eager(result, other, truth)


def test_one_beside_a_norm_of_each_head_and_a_value(launch):
    q, weight_q = heads(integers, 4)
    k, v = (integers(2, 5, 2, 64).transpose(1, 2) for _ in range(2))
    plans = [str(llama(BF16))] * 2 + [str(RoundingPlan.once(BF16, None))]
    turns = [rotation("half", BF16)] * 2 + ["none"]
    numbers = ([0.0] * 3, [0.0] * 3, plans, turns)
    arguments = ([q, k, v], [weight_q, random(64)], *tables("half", BF16), *numbers)

    assert_same_bits(run(launch, arguments), qk_rms_norm_rope_reference(*arguments))


@pytest.mark.parametrize("cut", [slice(None), slice(2, None), slice(0, 1)], ids=str)
def test_heads_that_lie_in_a_packed_projection(launch, cut):
    packed = integers(2, 5, 8 * 64).view(2, 5, 8, 64)[:, cut]
    xs = [packed[:, :, :4].transpose(1, 2), packed[:, :, 4:6].transpose(1, 2)]
    weights = [random(num * 64).view(num, 1, 64) for num in (4, 2)]
    cos, sin = (table[:, :, cut] for table in tables("half", BF16))
    numbers = ([0.0] * 2, [0.0] * 2, [str(llama(BF16))] * 2, [rotation("half", BF16)] * 2)
    arguments = (xs, weights, cos, sin, *numbers)
    assert obstacle_to_joint_norms(xs, weights, cos) is None

    results = run(launch, arguments)

    assert_same_bits(results, qk_rms_norm_rope_reference(*arguments))


def test_heads_behind_the_tokens_that_do_not_turn(launch):
    """(tokens, heads, columns), and a weight of (heads, columns)."""
    xs = [integers(7, num, 64) for num in (4, 2)]
    weights = [random(num, 64) for num in (4, 2)]
    arguments = (xs, weights, [0.0] * 2, [0.0] * 2, [str(llama(BF16))] * 2)

    assert_same_bits(run(launch, arguments), qk_rms_norm_reference(*arguments))


def test_a_tokens_bits_do_not_depend_on_the_others(launch):
    xs, weights, cos, sin, *rest = operands("half")

    def of_tokens(some):
        cut = ([x[:, :, some] for x in xs], weights, cos[:, :, some], sin[:, :, some], *rest)
        return run(launch, cut)[:2]

    whole = of_tokens(slice(None))
    for some in (slice(1), slice(2, 4), slice(4, 5)):
        assert_same_bits(of_tokens(some), [result[:, :, some] for result in whole])


@pytest.mark.parametrize("counts_up", [True, False], ids=["from the first", "each"])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.guarantee
def test_keys_and_values_go_into_caches(launch, contiguous, kept, counts_up):
    *arguments, _ = operands("partial")
    arguments.append([rotation("partial", BF16, contiguous=contiguous)] * 2)
    q, k = qk_rms_norm_rope_reference(*arguments)[:2]
    v = random(2, 5, 2, 64).transpose(1, 2)
    rows = torch.arange(3, 8) if counts_up else torch.tensor([7, 2, 9, 0, 4])
    caches = [random(2, 2, PLACES, 64) for _ in range(2)]
    wanted = [cache.index_copy(2, rows, x) for cache, x in zip(caches, (k, v), strict=True)]
    told = (rows[0] if counts_up else rows), (0, 1, 2, 3), 2, counts_up
    of_k, of_v = (Cached(cache, *told) for cache in caches)
    writes = Writes((None, of_k._replace(kept=kept), None, None), ((v, of_v),))

    stores = [True, True, False, False]
    found = run(launch, tuple(arguments), stores=stores, writes=writes)

    torch.testing.assert_close(found[0], q, rtol=0, atol=0)
    assert (found[1] is not None) is kept
    if kept:
        torch.testing.assert_close(found[1], k, rtol=0, atol=0)
        assert found[1].stride() == k.stride()
    for result, right in zip(found[4:], wanted, strict=True):
        torch.testing.assert_close(result, right, rtol=0, atol=0)


def test_keys_are_repeated(launch):
    arguments = operands("half")
    k = qk_rms_norm_rope_reference(*arguments)[1]
    writes = Writes((None, Repeated((0, 1, 2, 3), 2, 3), None, None))

    found = run(launch, arguments, stores=[True, True, False, False], writes=writes)

    copies = k[:, :, None].expand(-1, -1, 3, -1, -1)
    torch.testing.assert_close(found[4], copies, rtol=0, atol=0)


X = heads(random, 4)[0]
HEADS_OUTSIDE = random(2, 4, 5, 64)
BATCH_INSIDE = random(5, 2, 4, 64).permute(1, 2, 0, 3)


@pytest.mark.parametrize(
    ("x", "weight", "cos", "sentence"),
    [
        (X, (4, 1, 64), (2, 1, 5, 64), None),
        (X, (64,), (2, 4, 5, 64), None),
        (HEADS_OUTSIDE, (64,), (2, 1, 5, 64), None),
        (HEADS_OUTSIDE, (4, 1, 64), (2, 1, 5, 64), "the heads of a token do not lie side by side"),
        (BATCH_INSIDE, (4, 1, 64), (2, 1, 5, 64), "the tokens do not lie in order"),
        (X, (4, 1, 64), (2, 4, 5, 64), "turn by different angles"),
        (random(1, 1, 200, 96).transpose(1, 2), (200, 1, 96), (96,), "wider than the 16384"),
    ],
)
def test_what_the_kernel_cannot_take(x, weight, cos, sentence):
    obstacle = obstacle_to_joint_norms([x], [torch.empty(weight)], torch.empty(cos))

    assert obstacle is sentence if sentence is None else sentence in obstacle
