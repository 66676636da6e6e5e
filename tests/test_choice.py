"""`lowering="auto"`: every way in which a site gets its form, and the sentence about it."""

import logging
import re

import pytest
import torch
import torch._inductor.config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import normfuse
from normfuse import tuning
from normfuse.ops import RMS_NORM, ROPE
from normfuse.passes import choice, lower, measure
from normfuse.passes.inductor import HOOKS
from normfuse.passes.recognise import is_op
from normfuse.passes.region import key_of
from normfuse.settings import Settings
from normfuse.tuning import Document, Entry, Key, Measurement, minor
from tests import blocks
from tests.blocks import activation
from tests.test_cache import HIT, MISS, WITHOUT_CODE, compile_elsewhere

pytest.importorskip("triton")

PLAN = "f32 unit=f32>bf16 weight=bf16 out=bf16"
TORCH = minor(torch.__version__)


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch, tmp_path):
    """The CPU in the part of a GPU that no table knows, and a user's table without entries."""
    monkeypatch.setattr(lower, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(choice, "device_name", lambda device: "A GPU")
    monkeypatch.setattr(choice, "_failed", set())
    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))


@pytest.fixture
def timer(monkeypatch):
    """A stopwatch that says what it is told: `timer.says = (inline us, triton us)`."""

    class Timer:
        says = (20.0, 10.0)
        measured = ()

        def __call__(self, region, turn):
            self.measured = (*self.measured, region.rows)
            if isinstance(self.says, Exception):
                raise self.says
            return measure.Times(*self.says)

    timer = Timer()
    monkeypatch.setattr(measure, "_times", timer)
    return timer


def norm(x, weight):
    return RMS_NORM(x, weight, None, 1e-6, 0.0, PLAN)[0]


def site(rows=64, width=4096, function=norm):
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((rows, width), (width,))]
        graph = make_fx(function)(*inputs).graph
    (node,) = filter(is_op, graph.nodes)
    return node


def chosen(node, **options):
    """The form of a site, and the sentence."""
    return lower.Lower(Settings("auto", **options)).form_of(node)


def learn(inline_us, triton_us, *, rows=64, neighbours=(), node=None):
    """A measurement in the user's table."""
    key = key_of(node or site(rows), "A GPU")
    entry = Entry(key, Measurement(rows, neighbours, inline_us, triton_us))
    tuning.tables().add(
        Document("A GPU", torch.__version__, "3.6.0", "0.1", "2026-01-31", "a test", (entry,))
    )


def test_a_measured_win_takes_the_kernel_and_says_the_numbers():
    learn(15.1, 12.3)
    assert chosen(site()) == (
        "triton",
        "measured on A GPU at 64 rows: kernel 12.3 us, inline 15.1 us (1.23x)",
    )


def test_a_win_below_the_margin_stays_inline():
    learn(10.1, 10.0)
    assert chosen(site()) == (
        "inline",
        "measured on A GPU at 64 rows: kernel 10.0 us, inline 10.1 us (1.01x), "
        "below the margin of 3 %",
    )
    assert chosen(site(), margin=0.005)[0] == "triton"
    assert chosen(site(), margin=0.125)[1].endswith("below the margin of 12.5 %")


@pytest.mark.parametrize("tune", ["cached", "compile"])
@pytest.mark.guarantee
def test_a_slow_kernel_in_a_table_is_never_chosen(timer, tune):
    for rows in (1, 16, 64, 256, 1024):
        learn(10.0, 1000.0, rows=rows)
    for rows in (1, 2, 16, 33, 64, 100, 1000):
        assert chosen(site(rows), tune=tune)[0] == "inline"
    assert timer.measured == ()


def test_an_unmeasured_site_stays_inline_and_says_what_to_do():
    learn(20.0, 10.0)
    expected = (
        f"not measured on A GPU with torch {TORCH} for rms_norm of width 2048 at 64 rows: "
        "run `python -m normfuse tune`"
    )
    assert chosen(site(width=2048)) == ("inline", expected)


def test_rows_between_two_measurements():
    learn(20.0, 10.0, rows=64)
    learn(11.0, 10.0, rows=256)
    assert chosen(site(100)) == (
        "triton",
        "measured on A GPU at 256 rows: kernel 10.0 us, inline 11.0 us (1.10x), "
        "the worst of 2 row counts",
    )


def test_neighbours_that_were_not_measured_with_the_site():
    def with_neighbour(x, weight):
        return torch.relu(norm(x, weight))

    learn(20.0, 10.0)
    node = site(function=with_neighbour)
    assert chosen(node)[0] == "inline"
    learn(20.0, 10.0, neighbours=("after relu",))
    assert chosen(node)[0] == "triton"


def test_off_reads_no_table():
    learn(20.0, 10.0)
    assert chosen(site(), tune="off") == (
        "inline",
        "the option normfuse.tune is off, so no measurement is read",
    )


class TestCompile:
    def test_measures_what_is_missing_once_and_keeps_it(self, timer):
        for _ in range(2):
            lowering, reason = chosen(site(), tune="compile")
            assert lowering == "triton"
            assert reason == "measured on A GPU at 64 rows: kernel 10.0 us, inline 20.0 us (2.00x)"
        assert timer.measured == (64,)
        (kept,) = tuning.store.read(tuning.tables().directory)
        assert (kept.device, kept.torch) == ("A GPU", torch.__version__)
        assert kept.command == "torch.compile with normfuse.tune=compile"
        assert kept.entries[0].measurement == Measurement(64, (), 20.0, 10.0)

    @pytest.mark.parametrize(("layers", "form"), [(1, "inline"), (3, "triton")])
    def test_layers_pay_together_for_their_tables(self, timer, layers, form):
        def embeddings(q, angles):
            cos, sin = angles.cos(), angles.sin()
            for _ in range(layers):
                q = ROPE([q], cos, sin, ["half 128 in=bf16 out=bf16"])[0]
            return q

        with FakeTensorMode():
            shapes = (2, 4, 5, 128), (5, 128)
            inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
            graph = make_fx(embeddings)(*inputs).graph
        timer.says = (3.0, 4.0, 2.0)  # the last by tables that are there
        sites = [node for node in graph.nodes if is_op(node)]
        assert {chosen(node, tune="compile")[0] for node in sites} == {form}

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_regions_in_the_middle_of_a_compilation(self, monkeypatch, dynamic):
        """For real, except that the opaque op is what becomes of the kernel on a CPU."""
        ran = []

        def times(region, turn):
            (inputs,) = measure.input_sets(region.inputs, 1)
            with torch.no_grad():
                ran.extend(measure.compiled(region, form)(inputs) for form in ("inline", "op"))
            return measure.Times(10.0, 1000.0)

        monkeypatch.setattr(measure, "_times", times)
        block, inputs = blocks.LlamaBlock(), (activation(4).float(), activation(4).float())
        options = {"normfuse.tune": "compile", **WITHOUT_CODE}
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            ours = torch.compile(block, backend="normfuse", options=options, dynamic=dynamic)(
                *inputs
            )
            assert torch.equal(ours, block(*inputs))
        assert len(ran) == 2
        for mine, theirs in zip(*ran, strict=True):
            assert mine.shape == theirs.shape == (4, blocks.WIDTH)
        (kept,) = tuning.tables()._users
        assert (kept.key.op, kept.measurement.rows) == ("add_rms_norm", 4)

    def test_a_slow_kernel_is_inline(self, timer):
        timer.says = (10.0, 1000.0)
        assert chosen(site(), tune="compile")[0] == "inline"

    def test_cached_measures_nothing(self, timer):
        assert chosen(site(), tune="cached")[0] == "inline"
        assert timer.measured == ()

    def test_a_failure_is_inline_and_tried_once(self, timer, caplog):
        timer.says = RuntimeError("out of memory")
        with caplog.at_level(logging.WARNING, "normfuse"):
            for _ in range(2):
                lowering, reason = chosen(site(), tune="compile")
                assert lowering == "inline"
                assert reason.startswith("not measured on A GPU")
        assert timer.measured == (64,)
        (record,) = caplog.records
        assert "measuring it failed: out of memory" in record.getMessage()

    def test_a_site_without_rows_is_not_measured(self, timer):
        assert chosen(site(rows=0), tune="compile")[0] == "inline"
        assert timer.measured == ()


def test_all_choices_of_a_graph_are_made_before_it_changes(monkeypatch):
    """Else the second norm would have the pointwise inside of the first as its neighbour."""
    seen = []

    def note(node, settings):
        seen.append(choice.neighbours_of(node))
        return "inline", ""

    def two_norms(x, weight):
        return norm(norm(x, weight), weight)

    monkeypatch.setattr(lower, "choose", note)
    with FakeTensorMode():
        inputs = [torch.empty(shape, dtype=torch.bfloat16) for shape in ((4, 8), (8,))]
        module = make_fx(two_norms)(*inputs)
    lower.Lower(Settings("auto"))(module.graph)
    assert seen == [(), ()]


class TestOptions:
    def test_max_autotune_measures_unless_told_otherwise(self):
        def tune(mode, **options):
            hook = normfuse.options(mode=mode, **options)["post_grad_custom_post_pass"]
            return re.search(r"tune='(\w+)'", str(hook.uuid()))[1]

        assert tune(None) == "cached"
        assert tune("reduce-overhead") == "cached"
        assert tune("max-autotune") == "compile"
        assert tune("max-autotune-no-cudagraphs") == "compile"
        assert tune(None, max_autotune=True) == "compile"
        assert tune("max-autotune", tune="cached") == "cached"

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"tune": "always"}, ValueError, "normfuse.tune must be one of off, cached, compile"),
            ({"margin": 1}, ValueError, "normfuse.margin must be at least 0 and below 1, got 1"),
            ({"margin": "3 %"}, TypeError, "normfuse.margin must be a number, got '3 %'"),
        ],
    )
    def test_wrong_values(self, options, error, message):
        with pytest.raises(error, match=message):
            normfuse.options(**options)
        named = {f"normfuse.{name}": value for name, value in options.items()}
        with pytest.raises(error, match=message):
            Settings.split(named)

    @pytest.mark.parametrize("hook", HOOKS)
    def test_the_users_table_is_in_the_identity_of_every_pass(self, hook, tmp_path, monkeypatch):
        """Dynamo keeps the options of a compiled model: their passes must follow the table."""
        default = normfuse.options()[hook]
        others = [normfuse.options(tune="off")[hook], normfuse.options(lowering="inline")[hook]]
        before = default.uuid(), [other.uuid() for other in others]
        learn(20.0, 10.0)
        after = default.uuid(), [other.uuid() for other in others]
        assert before[0] != after[0]
        assert before[1] == after[1]
        monkeypatch.setattr(tuning, "_tables", {})  # as in a new process
        assert default.uuid() == after[0]


def test_a_new_measurement_misses_the_caches_of_compiled_graphs(tmp_path):
    cache = tmp_path / "inductor"
    cache.mkdir()
    assert compile_elsewhere(cache, WITHOUT_CODE, WITHOUT_CODE)[0] == [MISS, HIT]
    learn(20.0, 10.0)
    assert compile_elsewhere(cache, WITHOUT_CODE)[0] == [MISS]


def test_dynamic_rows_are_chosen_by_range_and_guarded_by_nothing(monkeypatch):
    """One graph serves all row counts: the kernel must win in every measured bucket."""
    reasons, compiled = [], 0
    original = choice.choose

    def note(*arguments):
        nonlocal compiled
        compiled += 1
        lowering, reason = original(*arguments)
        reasons.append((lowering, reason))
        return "inline", reason

    monkeypatch.setattr(lower, "choose", note)
    model = torch.nn.RMSNorm(64, eps=1e-6)

    def run(*row_counts):
        torch._dynamo.reset()
        options = normfuse.options(disable_cpp_codegen=True)
        forward = torch.compile(model, options=options, dynamic=True)
        with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
            for rows in row_counts:
                forward(torch.randn(rows, 64))
        return reasons.pop()

    key = None

    def remember(node, device, copies=()):
        nonlocal key
        key = key_of(node, device, copies)
        return key

    monkeypatch.setattr(choice, "key_of", remember)
    provenance = ("A GPU", torch.__version__, "3.6.0", "0.1", "2026-01-31", "a test")
    other = Key("A GPU", TORCH, "l2_norm", (), (64,), "f32")  # so that the width is worth a look
    entry = Entry(other, Measurement(8, (), 12.0, 10.0))
    tuning.tables().add(Document(*provenance, (entry,)))
    assert run(12, 5, 300)[1].startswith("not measured on A GPU")
    for rows, inline_us in ((8, 12.0), (16, 12.0), (256, 11.0)):
        entry = Entry(key, Measurement(rows, (), inline_us, 10.0))
        tuning.tables().add(Document(*provenance, (entry,)))
    lowering, reason = run(12, 5, 300)
    assert lowering == "triton"
    assert "at 256 rows" in reason
    assert "the worst of 3 row counts" in reason
    slow = Entry(key, Measurement(4096, (), 9.0, 10.0))
    tuning.tables().add(Document(*provenance, (slow,)))
    assert run(12, 5, 300)[0] == "inline"
    assert compiled == 3
