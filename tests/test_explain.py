"""`explain`, which keeps nothing, and `assert_fused`, which fails the tests of those who use it."""

import linecache

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfuse
from normfuse.cli.subject import load
from normfuse.explain import explain_with
from normfuse.testing import capture
from tests import blocks
from tests.blocks import CohereLayerNorm, GemmaBlock, LlamaRMSNorm, activation


class Model(nn.Module):
    """Two norms that fuse, with a graph break between them where the test wants one."""

    def __init__(self, graph_break=False):
        super().__init__()
        self.input_norm = LlamaRMSNorm()
        self.output_norm = LlamaRMSNorm()
        self.graph_break = graph_break

    def forward(self, x):
        x = self.input_norm(x)
        if self.graph_break:
            torch._dynamo.graph_break()
        return self.output_norm(x * 2)


class WithLayerNorm(nn.Module):
    """One norm that fuses, and one that is none of ours in spite of its looks."""

    def __init__(self):
        super().__init__()
        self.fused = LlamaRMSNorm()
        self.declined = CohereLayerNorm()

    def forward(self, x):
        return self.declined(self.fused(x))


GRAPH_BREAK = pytest.mark.parametrize("graph_break", [False, True], ids=["whole", "broken"])


def test_explain_says_what_became_of_each_norm():
    block, x = GemmaBlock().bfloat16(), activation(4)

    report = normfuse.explain(block, x, residual=x)

    assert [(site.module, site.op, site.lowering) for site in report.sites] == [
        ("post_attention_layernorm", "rms_norm_add_rms_norm", "inline"),
        ("pre_feedforward_layernorm", "rms_norm_add_rms_norm", "inline"),
        ("post_feedforward_layernorm", "rms_norm_add", "inline"),
    ]
    assert (report.num_sites, report.num_fused, report.coverage) == (3, 3, 1.0)
    assert {site.source.rpartition(":")[0] for site in report.sites} == {blocks.__file__}
    assert "rsqrt" in report.before
    assert "aten.rsqrt" in report.after


def test_explain_with_options():
    report = explain_with(Model(), [activation(4)], options={"normfuse.lowering": "op"})

    assert [site.lowering for site in report.sites] == ["op", "op"]
    assert report.after.count("torch.ops.normfuse.rms_norm.default(") == 2


def test_explain_counts_the_norms_that_an_option_leaves_alone():
    options = {"normfuse.skip": ["rms_norm"]}

    report = explain_with(Model(), [activation(4)], options=options)

    assert (report.num_sites, report.num_fused) == (2, 0)


@torch.no_grad()
@GRAPH_BREAK
@pytest.mark.parametrize("backend", ["normfuse", "eager"])
def test_explain_leaves_the_compiled_model_alone(backend, graph_break):
    model, x = Model(graph_break), activation(4)
    compiled = torch.compile(model, backend=backend)
    before = compiled(x)

    report = normfuse.explain(model, x)

    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(compiled(x), before)
    assert report.num_fused == 2


@torch.no_grad()
@GRAPH_BREAK
def test_explain_takes_a_compiled_model(graph_break):
    model, x = Model(graph_break), activation(4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)

    assert normfuse.explain(compiled, x).num_fused == 2


@torch.no_grad()
@GRAPH_BREAK
def test_explain_takes_a_model_that_was_compiled_in_place(graph_break):
    model, x = Model(graph_break), activation(4)
    model.compile(backend="eager")
    model(x)

    assert normfuse.explain(model, x).num_fused == 2


def test_explain_leaves_no_trace_in_the_model():
    model, x = Model(), activation(4).requires_grad_()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    normfuse.explain(model, x)

    assert x.grad is None
    assert all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_explain_works_for_any_number_of_models():
    reports = [normfuse.explain(Model(), activation(4)) for _ in range(10)]

    assert [report.num_fused for report in reports] == [2] * 10


def test_capture_works_for_any_number_of_models():
    graphs = []

    for _ in range(10):
        capture(LlamaRMSNorm(), activation(4), post_grad_custom_post_pass=graphs.append)

    assert len(graphs) == 10


def test_assert_fused_returns_the_report():
    report = normfuse.assert_fused(Model(), activation(4))

    assert (report.num_sites, report.coverage) == (2, 1.0)


def test_assert_fused_shows_the_report_when_it_fails():
    model, x = WithLayerNorm(), activation(4)

    with pytest.raises(AssertionError) as raised:
        normfuse.assert_fused(model, x)

    message, _, table = str(raised.value).partition("\n")
    assert message == "at least 100.0% of the norms must be fused, got 50.0%:"
    assert table == str(normfuse.explain(model, x))
    assert "declined" in table


def test_assert_fused_with_less_coverage():
    report = normfuse.assert_fused(WithLayerNorm(), activation(4), min_coverage=0.5)

    assert report.coverage == 0.5


def test_assert_fused_fails_without_any_norm():
    model, x = nn.Linear(8, 8), activation(4, dtype=torch.float32)

    with pytest.raises(AssertionError, match="at least one norm") as raised:
        normfuse.assert_fused(model, x)

    assert str(raised.value).startswith("at least one norm must be found, got none:\nNo RMS norms")
    assert normfuse.assert_fused(model, x, min_coverage=0).num_sites == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, 99])
def test_assert_fused_wants_a_share(share):
    with pytest.raises(ValueError, match="min_coverage") as raised:
        normfuse.assert_fused(Model(), activation(4), min_coverage=share)
    assert str(raised.value) == (
        f"min_coverage must be between 0 and 1, got {share}: pass a share, such as 0.99"
    )


def test_source_is_the_line_of_the_model_and_not_of_torch():
    def norm(x):
        return F.rms_norm(x, (8,))

    with torch.no_grad():
        report = normfuse.explain(norm, torch.randn(2, 8))
    (site,) = report.sites
    path, _, line = site.source.rpartition(":")
    assert path == __file__
    assert "F.rms_norm" in linecache.getline(path, int(line))


def test_a_second_model_with_another_number_is_counted_once():
    """Dynamo would take the scale of attention for a changing number, and start again."""
    counts = {}
    for model_type in ("llama", "gemma3_text"):
        subject = load(model_type, "bf16", "cpu", 1)
        counts[model_type] = explain_with(subject.model, subject.args, subject.kwargs).num_sites
    assert counts == {"llama": 3, "gemma3_text": 7}


class WithGetattr(torch.nn.Module):
    """As the models of diffusers do, it looks attributes up in a way of its own."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.RMSNorm(8))])

    def __getattr__(self, name):
        return super().__getattr__(name)

    def forward(self, x):
        return self.layers[0](x)


def test_the_path_of_a_module_below_one_that_looks_its_attributes_up_itself():
    report = normfuse.explain(WithGetattr(), torch.randn(2, 8))

    assert [site.module for site in report.sites] == ["layers.0.0"]


def test_a_graph_break_is_noted():
    norm = torch.nn.RMSNorm(8)

    def forward(x):
        y = norm(x)
        torch._dynamo.graph_break()
        return norm(y)

    with torch.no_grad():
        report = normfuse.explain(forward, torch.randn(2, 8))
        whole = normfuse.explain(norm, torch.randn(2, 8))

    assert [site.graph for site in report.sites] == [0, 1]
    assert report.notes == ["graph break: Call to `torch._dynamo.graph_break()`"]
    assert whole.notes == []
