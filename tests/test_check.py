"""The option `check`: fused sites beside their inline form, on a sample of calls."""

import json
import logging

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import normfuse
from normfuse.ops import ADD_RMS_NORM, RMS_NORM, checking
from normfuse.ops.checking import is_sampled
from normfuse.passes import lower
from normfuse.settings import Settings
from normfuse.testing import capture
from tests import blocks
from tests.blocks import activation
from tests.planted import planted

SITES = {
    ("rms_norm_add_rms_norm", "pre_feedforward_layernorm"),
    ("rms_norm_add", "post_feedforward_layernorm"),
}


@pytest.fixture(autouse=True)
def no_checks_yet(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    normfuse.reset_checks()


def gemma():
    return blocks.GemmaBlock().bfloat16(), activation(4), activation(4)


def llama():
    return blocks.LlamaBlock().bfloat16(), activation(4), activation(4)


def compiled(block, dynamic=None, **options):
    """Compiled with opaque ops; the C++ compiler would take longer than all the rest."""
    options = {"lowering": "op", "disable_cpp_codegen": True, **options}
    return torch.compile(block, options=normfuse.options(**options), dynamic=dynamic)


@pytest.mark.guarantee
@torch.no_grad()
def test_a_right_model_stays_within_its_bounds():
    block, *inputs = gemma()

    compiled(block, check="all")(*inputs)

    report = normfuse.check_report()
    assert {(site.op, site.module) for site in report.sites} == SITES
    assert all(site.source.partition(":")[0].endswith("blocks.py") for site in report.sites)
    assert [(site.num_calls, site.num_checked) for site in report.sites] == [(1, 1)] * 2
    assert all(0 < site.error <= 1 for site in report.sites)
    assert report.beyond == []
    assert "2 sites checked on 2 of 2 calls: none beyond bounds" in str(report)


@pytest.mark.guarantee
@torch.no_grad()
def test_a_wrong_element_is_reported(caplog):
    block, *inputs = llama()

    def spoil(y):
        y = y.clone()
        y[2, 5] *= 1 + 2**-5  # four units in the last place
        return y

    with planted(ADD_RMS_NORM, spoil), caplog.at_level(logging.WARNING, "normfuse"):
        model = compiled(block, check="all")
        for _ in range(3):
            model(*inputs)

    (site,) = normfuse.check_report().beyond
    assert (site.op, site.num_checked, site.num_beyond) == ("add_rms_norm", 3, 3)
    assert site.error > 1 >= site.inline_error
    assert (site.first.call, site.first.result, site.first.index) == (1, "y", (2, 5))
    assert abs(site.first.fused - site.first.exact) > site.first.bound
    (message,) = caplog.messages
    assert message.startswith("add_rms_norm of ")
    assert "is beyond its bound: y[2, 5] is " in message
    text = str(normfuse.check_report())
    assert "1 beyond bounds" in text
    assert "y[2, 5] is" in text


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_beyond(value):
    block, *inputs = llama()

    with planted(ADD_RMS_NORM, lambda y: torch.full_like(y, value)):
        compiled(block, check="all")(*inputs)

    (site,) = normfuse.check_report().beyond
    assert site.error == float("inf")


@torch.no_grad()
def test_what_overflows_inline_is_not_judged():
    block, x, residual = llama()
    x[1] = float("inf")
    residual[2] = float("nan")

    compiled(block, check="all")(x, residual)

    (site,) = normfuse.check_report().sites
    assert (site.num_checked, site.num_beyond, site.not_checked) == (1, 0, None)


@pytest.mark.guarantee
@torch.no_grad()
def test_a_sample_of_the_calls_is_compared():
    block, *inputs = llama()
    model = compiled(block, check="sample")

    for _ in range(20):
        model(*inputs)

    (site,) = normfuse.check_report().sites
    assert (site.num_calls, site.num_checked) == (20, 5)


def test_which_calls_are_sampled():
    interval = Settings(check="sample").check_interval
    sampled = [call for call in range(1, 4097) if is_sampled(call, interval)]

    assert sampled == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096]
    assert all(is_sampled(call, Settings(check="all").check_interval) for call in range(1, 9))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"check": "all", "lowering": "inline"}])
def test_nothing_is_checked_unasked_or_inline(options):
    block, *inputs = llama()

    compiled(block, **options)(*inputs)

    assert normfuse.check_report().sites == []
    assert str(normfuse.check_report()).startswith("No site was checked. Compile with normfuse")


@pytest.mark.guarantee
def test_training_is_checked_too():
    block, x, residual = gemma()
    model = compiled(block, check="all")

    sum(y.float().sum() for y in model(x.requires_grad_(), residual)).backward()

    sites = normfuse.check_report().sites
    backward = {(f"{op}_backward", module) for op, module in SITES}
    assert {(site.op, site.module) for site in sites} == SITES | backward
    assert all(site.num_checked == 1 and 0 < site.error <= 1 for site in sites)


@torch.no_grad()
def test_rows_may_change():
    block, *_ = llama()
    model = compiled(block, dynamic=True, check="all")

    for rows in (3, 7):
        model(activation(rows), activation(rows))

    (site,) = normfuse.check_report().sites
    assert (site.num_checked, site.num_beyond) == (2, 0)


@torch.no_grad()
def test_autocast_around_the_call_changes_no_check():
    block, *inputs = llama()
    model = compiled(block, check="all")

    with torch.autocast("cpu", torch.float16):
        model(*inputs)

    (site,) = normfuse.check_report().sites
    assert (site.num_checked, site.num_beyond, site.not_checked) == (1, 0, None)


@pytest.mark.guarantee
@torch.no_grad()
def test_caches_keep_checked_code_apart():
    block, *inputs = llama()
    words = []
    with fresh_cache():
        for check in ("off", "all", "all"):
            torch._dynamo.reset()
            counters.clear()
            compiled(block, check=check)(*inputs)
            words.append(bool(counters["inductor"]["fxgraph_cache_hit"]))

    (site,) = normfuse.check_report().sites
    assert words == [False, False, True]
    assert site.num_checked == 2


@pytest.mark.guarantee
@torch.no_grad()
def test_a_check_that_fails_does_not_end_the_model(monkeypatch, caplog):
    def fail(*arguments):
        raise MemoryError("no memory")

    block, *inputs = llama()
    monkeypatch.setattr(checking, "compare", fail)

    with caplog.at_level(logging.WARNING, "normfuse"):
        results = compiled(block, check="all")(*inputs)

    expected = block(*inputs)
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))
    (site,) = normfuse.check_report().sites
    assert (site.num_calls, site.num_checked) == (1, 0)
    assert site.not_checked == "MemoryError: no memory"
    assert "was not checked: MemoryError: no memory" in caplog.text
    assert "calls of 1 site were due and not compared: MemoryError: no memory" in str(
        normfuse.check_report()
    )


@torch.no_grad()
def test_code_without_python_is_not_checked(caplog):
    block, *inputs = llama()

    with caplog.at_level(logging.WARNING, "normfuse"):
        capture(block, *inputs, lowering="op", check="all", cpp_wrapper=True)

    assert normfuse.check_report().sites == []
    assert "no site is checked in code that runs without Python" in caplog.text


@pytest.mark.usefixtures("kernels_on_cpu")
def test_a_kernel_is_followed_by_its_check():
    def norm(x, weight):
        return RMS_NORM(x, weight, None, 1e-6, 0.0, "f32 unit=f32 weight=f32 out=f32")[0]

    with FakeTensorMode():
        graph = make_fx(norm)(torch.empty(4, 8), torch.empty(8)).graph
    lower.Lower(Settings("triton", check="sample"))(graph)

    nodes = [node for node in graph.nodes if node.op == "call_function"]
    (check,) = [node for node in nodes if "normfuse_check" in str(node.target)]
    *operands, results, _, _, interval = check.args
    assert [str(one) for one in operands[:2]] == ["x_1", "weight_1"]
    assert [one and one.op for one in results] == ["call_function", None]
    assert interval == 1024
    assert nodes.index(check) > max(i for i, node in enumerate(nodes) if "triton" in str(node))


@torch.no_grad()
def test_the_report_as_json():
    block, *inputs = llama()
    compiled(block, check="all")(*inputs)

    document = json.loads(normfuse.check_report().to_json())

    (site,) = document["sites"]
    assert document["schema"] == 1
    assert (site["op"], site["num_checked"], site["first"]) == ("add_rms_norm", 1, None)


def test_an_unknown_value_is_refused():
    with pytest.raises(ValueError, match="check must be one of off, sample, all, got 'yes'"):
        normfuse.options(check="yes")
