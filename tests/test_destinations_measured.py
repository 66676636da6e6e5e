"""Copies that a launch makes: how they are measured, chosen and reported."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from normfuse import tuning
from normfuse.cli import sites
from normfuse.cli.subject import Subject
from normfuse.ops import QK_RMS_NORM_ROPE, ROPE
from normfuse.passes import choice, lower, measure
from normfuse.passes.destinations import copies_behind
from normfuse.passes.recorder import Recorder
from normfuse.passes.region import key_of, neighbours_of
from normfuse.settings import Settings
from normfuse.tuning import Document, Entry, Measurement
from tests.cached_attention import (
    BATCH,
    HEADS,
    KEY_HEADS,
    PLACES,
    Cached,
    Uncached,
    inputs,
)
from tests.test_destinations import TOKENS, aten, count, inference_graph, puts

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("kernels_on_cpu")


def regions(model, *values, monkeypatch):
    monkeypatch.setattr(choice, "device_name", lambda device: "A GPU")
    return sites.regions_of(Subject("a model", model, values, {}))


@pytest.mark.parametrize(
    ("model", "words"),
    [(Cached, ("into a cache",) * 2), (Uncached, ("repeated 2 times",) * 2)],
)
def test_a_site_is_measured_with_the_copies_and_alone(model, words, monkeypatch):
    with_copies, alone = regions(model(), *inputs(TOKENS), monkeypatch=monkeypatch)
    assert with_copies.key.parameters == (*alone.key.parameters, *words)
    assert with_copies.rows == alone.rows
    assert len(with_copies.inputs) > len(alone.inputs)


def test_a_site_that_is_measured_alone_makes_no_copies(monkeypatch):
    """Its neighbours may be copies that a launch could make, as where it may not."""
    with_copies, alone = regions(Uncached(), *inputs(TOKENS), monkeypatch=monkeypatch)
    assert "after clone" in alone.neighbours
    assert [one.makes_copies for one in (with_copies, alone)] == [True, False]
    for region, clones in ((with_copies, 0), (alone, 1)):
        with FakeTensorMode():
            (filled,) = measure.input_sets(region.inputs, 1)
            graph = make_fx(region.module)(*filled).graph
        lower.Lower(Settings("triton"), makes_copies=region.makes_copies)(graph)
        assert count(graph, aten.clone.default) == clones


def test_a_region_holds_the_caches_and_what_fills_them(monkeypatch):
    torch.manual_seed(0)
    model = Cached()
    region, _ = regions(model, *inputs(1), monkeypatch=monkeypatch)
    graph = region.module.graph
    assert puts(graph) == count(graph, aten.copy_.default) == 2
    (results,) = graph.output_node().args
    assert len(results) == 1  # the query: caches are no results
    (filled,) = measure.input_sets(region.inputs, 1)
    kept = [one.clone() for one in filled]
    (query,) = region.module(*filled)
    compiled = measure.compiled(region, "inline")
    other = [one.clone() for one in kept]
    (again,) = compiled(other)
    torch.testing.assert_close(again, query, rtol=0, atol=0.05)  # Inductor rounds less often
    changed = [not torch.equal(a, b) for a, b in zip(kept, filled, strict=True)]
    assert sum(changed) == 2
    for one, right in zip(other, filled, strict=True):
        torch.testing.assert_close(one, right, rtol=0, atol=0.05)


PLAN, TURN = "f32 unit=f32>bf16 weight=bf16 out=bf16", "half 16 in=bf16 out=bf16"
TURNED = [(BATCH, HEADS, 1, 16), (BATCH, KEY_HEADS, 1, 16), *[(1, 1, 1, 16)] * 2]


def cached_site(op=QK_RMS_NORM_ROPE):
    """A site whose key goes into a cache, in a graph by hand."""

    def forward(q, k, cos, sin, weight, cache, rows):
        norms = [1e-6] * 2, [0.0] * 2, [PLAN] * 2
        if op is ROPE:
            q, k = ROPE([q, k], cos, sin, [TURN] * 2)
        else:
            q, k, *_ = op([q, k], [weight, weight], cos, sin, *norms, [TURN] * 2)
        cache.copy_(aten.index_put.default(cache, [None, None, rows], k))
        return q

    values = [torch.empty(shape, dtype=torch.bfloat16) for shape in (*TURNED, (16,))]
    cache = torch.empty(BATCH, KEY_HEADS, PLACES, 16, dtype=torch.bfloat16)
    return only_site(forward, op, *values, cache, torch.zeros(1, dtype=torch.int64))


def repeated_site(*, returned):
    """A turned key that is repeated, and perhaps returned."""

    def forward(q, k, cos, sin):
        q, k = ROPE([q, k], cos, sin, [TURN] * 2)
        copies = k.unsqueeze(2).expand(-1, -1, 2, -1, -1)
        copies = aten.clone.default(copies, memory_format=torch.contiguous_format)
        return (q, copies, k) if returned else (q, copies)

    values = [torch.empty(shape, dtype=torch.bfloat16) for shape in TURNED]
    return only_site(forward, ROPE, *values)


def only_site(forward, op, *values):
    (site,) = make_fx(forward)(*values).graph.find_nodes(op="call_function", target=op)
    return site


def test_positions_on_another_device_are_no_operand():
    site = cached_site()
    assert copies_behind(site) is not None
    rows = next(node for node in site.graph.nodes if node.meta["val"].dtype == torch.int64)
    rows.meta["val"] = torch.zeros(1, dtype=torch.int64, device="meta")
    assert copies_behind(site) is None


class TestChoice:
    """What a table says of a site with copies, or of the same without them."""

    @pytest.fixture(autouse=True)
    def empty_table(self, monkeypatch, tmp_path):
        monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(choice, "device_name", lambda device: "A GPU")

    def learn(self, inline_us, site, *, copies):
        key = key_of(site, "A GPU", copies_behind(site).words if copies else ())
        measured = Measurement(BATCH * (HEADS + KEY_HEADS), neighbours_of(site), inline_us, 10.0)
        provenance = ("A GPU", torch.__version__, "3.6.0", "0.1", "2026-01-31", "a test")
        tuning.tables().add(Document(*provenance, (Entry(key, measured),)))

    def chosen(self, site):
        return lower.Lower(Settings("auto")).form_of(site)[0]

    def test_what_was_measured_with_the_copies_decides(self):
        assert self.chosen(cached_site()) == "inline"
        self.learn(20.0, cached_site(), copies=True)
        assert self.chosen(cached_site()) == "triton"
        self.learn(9.0, cached_site(), copies=True)
        self.learn(20.0, cached_site(), copies=False)
        assert self.chosen(cached_site()) == "inline"

    @pytest.mark.parametrize(("inline_us", "form"), [(20.0, "triton"), (10.0, "inline")])
    def test_norms_that_win_without_the_copies_are_taken(self, inline_us, form):
        self.learn(inline_us, cached_site(), copies=False)
        assert self.chosen(cached_site()) == form

    def test_an_embedding_that_wins_without_the_copies_is_not(self):
        """Inductor may write a cache in the kernel that turns: on an H200 it was faster so."""
        self.learn(20.0, cached_site(ROPE), copies=False)
        assert self.chosen(cached_site(ROPE)) == "inline"

    def test_what_is_kept_is_answered_by_what_is_not(self):
        self.learn(20.0, repeated_site(returned=False), copies=True)
        assert self.chosen(repeated_site(returned=True)) == "triton"


def test_the_report_says_what_a_launch_writes_besides():
    recorder = Recorder()
    inference_graph(Cached(), *inputs(TOKENS), recorder=recorder)
    expected = "its launch also writes 2 of what attention reads into a cache"
    assert {site.lowering_reason for site in recorder.sites} == {expected}
    recorder = Recorder()
    inference_graph(Uncached(normed=False), *inputs(TOKENS), recorder=recorder)
    assert recorder.report().notes[1:] == [
        "1 `rope` lowered to triton: "
        "its launch also writes 2 of what attention reads repeated 2 times"
    ]


def test_a_cache_that_is_just_large_enough_is_measured_within_its_bounds(monkeypatch):
    """On a GPU a place that is not there would end the process."""
    model = Cached(places=TOKENS)
    model.length.zero_()
    region, _ = regions(model, *inputs(TOKENS), monkeypatch=monkeypatch)
    (filled,) = measure.input_sets(region.inputs, 1)
    before = [one.clone() for one in filled]
    region.module(*filled)
    assert sum(not torch.equal(a, b) for a, b in zip(before, filled, strict=True)) == 2
