"""The kernels on a GPU, against float64 and against eager on the same GPU."""

from dataclasses import replace
from itertools import product

import pytest
import torch

import normfuse.ops  # noqa: F401  (registers the ops)
from normfuse.ops.l2_norm import l2_norm_reference
from normfuse.ops.residual_sum import Scales
from normfuse.ops.rms_norm import rms_norm_reference
from normfuse.ops.rounding import L2, MEANS, ROOTS, RoundingPlan
from tests import float64
from tests.gpu.chains import STEMS, Chain
from tests.kernels.inputs import (
    BF16,
    F16,
    F32,
    F64,
    PAIRS,
    PLANS,
    SCALES,
    VIEWS,
    assert_same_bits,
    gemma,
    integers,
    layouts,
    llama,
    random,
)

pytestmark = pytest.mark.gpu
EPS = 1e-6


@pytest.fixture(autouse=True)
def on_device(device):
    """Every tensor is made on the device, and every `torch.empty` comes filled with NaN."""
    torch.use_deterministic_algorithms(True)
    with torch.device(device):
        yield
    torch.use_deterministic_algorithms(False)


def assert_errs_no_more_than_eager(chain, plan, results, offset=1.0):
    eager, exact = chain.reference(EPS, offset, plan), chain.exact(EPS, offset)
    for result, other, truth in zip(results, eager, exact, strict=False):  # rstd has no rows
        float64.assert_as_close_as_eager(result, other, truth)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
@pytest.mark.parametrize("width", [769, 4096, 5377, 8192, 70000])
@pytest.mark.parametrize("rows", [1, 7, 4096])
def test_errs_no_more_than_eager(rows, width, dtype, stem):
    rows = min(rows, 2**25 // width)  # float64 copies of all operands fit beside each other
    x, residual = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
    chain, plan = Chain(stem, x, residual, random(width, dtype=dtype)), gemma(dtype)

    results = chain.launch(EPS, 1.0, plan)

    assert_errs_no_more_than_eager(chain, plan, results)


@pytest.mark.parametrize("width", [64, 128, 769, 4096])
def test_l2_norm_errs_no_more_than_eager(width):
    x, plan = random(1000, width), str(RoundingPlan.once(BF16, None).with_mean(L2))
    y, _ = torch.ops.normfuse.l2_norm(x, None, EPS, plan)
    exact = x.double() / (x.double().square().sum(-1, keepdim=True) + EPS).sqrt()
    float64.assert_as_close_as_eager(y, l2_norm_reference(x, None, EPS, plan)[0], exact)


@pytest.mark.parametrize("compute", [F32, F64, BF16, F16])
@pytest.mark.parametrize(("mean", "root"), [*product(MEANS, ROOTS)])
def test_every_mean_and_root_has_eagers_bits(mean, root, compute):
    plan = replace(llama(BF16), compute=compute, rstd=compute, mean=mean, root=root)
    chain = Chain("rms_norm", integers(4, 64), random(4, 64), random(64))

    results = chain.launch(0.0, 1.0, plan)

    assert_same_bits(results, chain.reference(0.0, 1.0, plan))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_every_rounding_of_the_plan_has_eagers_bits(plan, offset):
    steps = RoundingPlan.parse(plan)
    x = integers(4, 64, dtype=steps.unit[-1])
    weight = None if steps.weight is None else random(64, dtype=steps.weight[1])
    chain = Chain("rms_norm", x, x, weight)

    results = chain.launch(0.0, offset, steps)

    assert_same_bits(results, chain.reference(0.0, offset, steps))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("plan", [llama(BF16), gemma(BF16), RoundingPlan.once(F32, F32)])
def test_every_sum_has_eagers_bits(plan, scales, device):
    """In float32 this also shows that no product is contracted with the sum that reads it."""
    scales = Scales(*(s.to(device) if isinstance(s, torch.Tensor) else s for s in SCALES[scales]))
    x, residual = integers(4, 64, dtype=plan.out), random(4, 64, dtype=plan.out)
    chain = Chain("rms_norm_add", x, residual, random(64, dtype=plan.out), scales)

    results = chain.launch(0.0, 1.0, plan)

    assert_same_bits(results, chain.reference(0.0, 1.0, plan))


@pytest.mark.parametrize("stem", ["rms_norm_add", "rms_norm_add_rms_norm"])
def test_casts_a_scale_of_no_dimension_before_it_multiplies(stem):
    scales = Scales(
        torch.tensor(0.22), torch.tensor(1.3)
    )  # float32, which eager rounds to bfloat16
    chain = Chain(stem, integers(4, 64), random(4, 64), random(64), scales)
    total = 0 if stem.endswith("add") else 1

    results = chain.launch(0.0, 1.0, llama(BF16))

    assert_same_bits((results[total],), (chain.reference(0.0, 1.0, llama(BF16))[total],))


@pytest.mark.parametrize(
    ("x", "residual", "weight"),
    [(BF16, F32, BF16), (F32, BF16, F32), (F16, BF16, F32), (BF16, F64, F64), (F64, F16, BF16)],
)
@pytest.mark.parametrize("stem", STEMS)
def test_mixed_types(stem, x, residual, weight):
    chain = Chain(
        stem, random(7, 769, dtype=x), random(7, 769, dtype=residual), random(769, dtype=weight)
    )
    plan = RoundingPlan.before_weight(x, weight)

    results = chain.launch(EPS, 1.0, plan)

    assert_errs_no_more_than_eager(chain, plan, results)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("stem", STEMS[:2])
def test_takes_rows_of_any_strides(stem, view):
    x = VIEWS[view]()
    chain = Chain(stem, x, x, random(64))

    results = chain.launch(EPS, 1.0, llama(BF16))

    assert_errs_no_more_than_eager(chain, llama(BF16), results)
    assert layouts(results) == layouts(chain.fake(EPS, 1.0, llama(BF16)))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("stem", STEMS[2:])
def test_takes_two_operands_of_any_strides(stem, pair):
    chain = Chain(stem, *PAIRS[pair](), random(64))

    results = chain.launch(EPS, 1.0, llama(BF16))

    assert_errs_no_more_than_eager(chain, llama(BF16), results)
    assert layouts(results) == layouts(chain.fake(EPS, 1.0, llama(BF16)))


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("width", [128, 4096, 5377])
def test_takes_misaligned_rows(stem, width):
    x, residual = random(130, width + 1)[:, 1:], random(130, 2 * width + 3)[:, 3 : width + 3]
    chain = Chain(stem, x, residual, random(width + 1)[1:])

    results = chain.launch(EPS, 1.0, gemma(BF16))

    assert_errs_no_more_than_eager(chain, gemma(BF16), results)


@pytest.mark.parametrize("stem", STEMS)
def test_reads_rows_beyond_2_to_the_31_elements(stem):
    rows = torch.zeros(2**31 + 2**20, dtype=BF16).as_strided((3, 4096), (2**30 + 2**18, 1))
    rows.copy_(random(3, 4096))
    chain = Chain(stem, rows, rows, random(4096))

    results = chain.launch(EPS, 1.0, gemma(BF16))

    dense = Chain(stem, rows.contiguous(), rows.contiguous(), chain.weight)
    assert_same_bits(results, dense.launch(EPS, 1.0, gemma(BF16)))


@pytest.mark.parametrize("stem", STEMS)
def test_writes_rows_beyond_2_to_the_31_elements(stem):
    row = random(1, 4096)
    many = row.expand(2**19 + 8, 4096)

    results = Chain(stem, many, many, row[0]).launch(EPS, 1.0, gemma(BF16))

    first = Chain(stem, row, row, row[0]).launch(EPS, 1.0, gemma(BF16))
    for part in (slice(0, 8), slice(2**18, 2**18 + 8), slice(-8, None)):
        expected = tuple(result.expand(8, -1) for result in first)
        assert_same_bits(tuple(result[part] for result in results), expected)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("width", [64, 128, 769, 1152, 4096, 5377, 8192, 16384])
def test_a_row_does_not_depend_on_its_batch(stem, width):
    """Not on how many there are either: few, some and many are read in different ways."""
    x, residual, weight = random(3000, width), random(3000, width), random(width)

    whole = Chain(stem, x, residual, weight).launch(EPS, 1.0, llama(BF16))

    for part in (slice(0, 1), slice(0, 7), slice(3, 133), slice(5, 905), slice(7, 2900)):
        alone = Chain(stem, x[part], residual[part], weight).launch(EPS, 1.0, llama(BF16))
        assert_same_bits(alone, tuple(result[part] for result in whole))


@pytest.mark.parametrize("stem", STEMS)
def test_the_op_launches_the_kernel(stem):
    chain = Chain(stem, random(7, 4096), random(7, 4096), random(4096))

    results = chain.op(EPS, 1.0, llama(BF16))

    assert_same_bits(results, chain.launch(EPS, 1.0, llama(BF16)))


@pytest.mark.parametrize("stem", STEMS)
def test_no_rows(stem):
    chain = Chain(stem, random(2, 0, 64), random(2, 0, 64), random(64))

    results = chain.op(EPS, 1.0, llama(BF16))

    assert layouts(results) == layouts(chain.fake(EPS, 1.0, llama(BF16)))


@pytest.mark.parametrize("stem", STEMS)
def test_runs_in_a_cuda_graph(stem):
    chain = Chain(stem, random(7, 4096), random(7, 4096), random(4096))
    chain.op(EPS, 1.0, llama(BF16))  # compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = chain.op(EPS, 1.0, llama(BF16))

    chain.x.copy_(random(7, 4096))
    graph.replay()

    assert_same_bits(results, chain.op(EPS, 1.0, llama(BF16)))


def test_eps_of_a_buffer():
    x, weight, eps = integers(1, 64).expand(3, 64), random(64), torch.tensor(11.0)
    plan = llama(BF16)

    results = torch.ops.normfuse.rms_norm(x, weight, eps, 0.0, 0.0, str(plan))

    assert_same_bits(results, rms_norm_reference(x, weight, eps, 0.0, 0.0, str(plan)))
