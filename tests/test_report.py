"""What a report says: as a table, wide and narrow, as JSON and as HTML."""
# ruff: noqa: E501  tables are shown as they print

import io
import json

import pytest
import torch
import torch.nn.functional as F
from expecttest import TestCase
from rich.console import Console

import normfuse
from normfuse.explain import explain_with
from normfuse.passes import lower
from normfuse.report import Report, Site, group_sites, join_paths
from tests.blocks import activation

NO_CUDA = "the activations are on cpu, and the kernels are for CUDA"
SOURCE = "/lib/transformers/models/gemma3/modeling_gemma3.py:150"


def fused(module, op="add_rms_norm", graph=0):
    return Site(op, True, None, module, SOURCE, "inline", NO_CUDA, graph)


def declined(module, reason="x is changed in place by relu_ between the square and the product"):
    return Site(None, False, reason, module, SOURCE, None)


def layers(num_layers):
    """A stack of pre-norm layers whose key norms are declined, and the norm after it."""
    sites = [fused("model.layers.0.input_layernorm", "rms_norm")]
    for i in range(num_layers):
        sites += [fused(f"model.layers.{i}.input_layernorm")] if i else []
        sites += [declined(f"model.layers.{i}.self_attn.k_norm")]
        sites += [fused(f"model.layers.{i}.post_attention_layernorm")]
    return Report([*sites, fused("model.norm")], "graph <before>", "graph <after>")


def printed(report, width):
    """What rich prints on a terminal of this width, without trailing spaces."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(report)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


class Tables(TestCase):
    def test_wide(self):
        self.assertExpectedInline(
            printed(layers(6), 120),
            """\
 norms   not fused                              why not                                          source
------------------------------------------------------------------------------------------------------------------------
     6   model.layers.{0..5}.self_attn.k_norm   x is changed in place by relu_ between the       modeling_gemma3.py:150
                                                square and the product

 norms   fused                                          into           lowering   source
---------------------------------------------------------------------------------------------------------
     1   model.layers.0.input_layernorm                 rms_norm       inline     modeling_gemma3.py:150
     6   model.layers.{0..5}.post_attention_layernorm   add_rms_norm   inline     modeling_gemma3.py:150
     5   model.layers.{1..5}.input_layernorm            add_rms_norm   inline     modeling_gemma3.py:150
     1   model.norm                                     add_rms_norm   inline     modeling_gemma3.py:150

13 of 19 norms fused (68 %) in 1 graph
  12 norms in add_rms_norm
  1 norm in rms_norm
  13 norms lowered to inline: the activations are on cpu, and the kernels are for CUDA""",
        )

    def test_narrow(self):
        self.assertExpectedInline(
            printed(Report(layers(2).sites, "graph"), 72),
            """\
 norms   not fused
------------------------------------------------------------------------
     2   model.layers.{0..1}.self_attn.k_norm
         x is changed in place by relu_ between the square and the
         product
         modeling_gemma3.py:150

 norms   fused
------------------------------------------------------
     1   model.layers.0.input_layernorm
         rms_norm, inline
         modeling_gemma3.py:150
     2   model.layers.{0..1}.post_attention_layernorm
         add_rms_norm, inline
         modeling_gemma3.py:150
     1   model.layers.1.input_layernorm
         add_rms_norm, inline
         modeling_gemma3.py:150
     1   model.norm
         add_rms_norm, inline
         modeling_gemma3.py:150

5 of 7 norms fused (71 %) in 1 graph
  4 norms in add_rms_norm
  1 norm in rms_norm
  5 norms lowered to inline: the activations are on cpu, and the kernels
  are for CUDA""",
        )

    def test_all_declined_with_a_note(self):
        report = Report([declined("norm")], "graph", notes=["one graph break"])
        self.assertExpectedInline(
            printed(report, 120),
            """\
 norms   not fused   why not                                                             source
----------------------------------------------------------------------------------------------------------------
     1   norm        x is changed in place by relu_ between the square and the product   modeling_gemma3.py:150

0 of 1 norm fused (0 %) in 1 graph
note: one graph break""",
        )


def test_empty_report_says_what_to_check():
    assert str(Report()).startswith("No graph reached normfuse")
    text = str(Report(before="graph", notes=["the model has a graph break"])).replace("\n", " ")
    assert text.startswith("No RMS norms were found. Check that the model has any")
    assert text.endswith("note: the model has a graph break")
    assert Report().coverage == 1.0


def test_str_is_plain_and_fits_a_log(monkeypatch):
    def no_terminal(descriptor):
        raise OSError

    monkeypatch.setattr("os.get_terminal_size", no_terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("COLUMNS", raising=False)
    text = str(layers(6))
    assert "\x1b" not in text
    assert text.isascii()
    assert text == printed(layers(6), 120)


def test_str_takes_the_width_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "72")
    assert str(layers(6)) == printed(layers(6), 72)


def test_rich_prints_in_colour():
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard", width=120)
    console.print(layers(1))
    assert "\x1b[32mmodel.norm" in console.file.getvalue()
    assert "\x1b[33mmodel.layers.0.self_attn.k_norm" in console.file.getvalue()


def test_brackets_are_not_markup():
    report = Report([declined("blocks[0]", "it has shape [bold]")], "graph")
    assert "blocks[0]" in str(report)
    assert "it has shape [bold]" in str(report)


def test_deep_model_stays_on_one_screen():
    assert len(printed(layers(48), 120).splitlines()) < 24


def test_coverage_is_rounded_down():
    report = Report([*(fused(f"layers.{i}") for i in range(999)), declined("last")])
    assert report.coverage == 0.999
    assert report.summary() == "999 of 1000 norms fused (99 %) in 1 graph"


def test_summary_counts_graphs():
    assert Report([fused("a"), fused("b", graph=1)]).summary() == (
        "2 of 2 norms fused (100 %) in 2 graphs"
    )


@pytest.mark.parametrize(
    ("paths", "joined"),
    [
        (["norm"], "norm"),
        (["a.3.b"], "a.3.b"),
        (["a.0.b", "a.1.b", "a.2.b", "a.5.b"], "a.{0..2,5}.b"),
        (["a.5", "a.11", "a.17"], "a.{5..17..6}"),
        (["a.0", "a.2", "a.5", "a.9", "a.14"], "a.{0,2,5,...,14}"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0", "a.1.b.1"], "a.{0..1}.b.{0..1}"),
        (["a.0.b.0", "a.0.b.1", "a.1.b.0"], "a.*.b.*"),
        (["a.0.b.3", "a.1.b.3", "a.1.b.3"], "a.{0..1}.b.3"),
        (["layer1.0.norm2", "layer1.1.norm2"], "layer1.{0..1}.norm2"),
    ],
)
def test_join_paths(paths, joined):
    assert join_paths(paths) == joined


def test_groups_differ_in_what_is_shown():
    sites = [fused("a.0"), fused("a.1", op="rms_norm"), fused("a.2", graph=1), declined("a.3")]
    groups = [(group.module, group.num_sites) for group in group_sites(sites)]
    assert groups == [("a.{0,2}", 2), ("a.1", 1), ("a.3", 1)]


def test_json_round_trip():
    report = layers(2)
    report.notes.append("one graph break")
    document = json.loads(report.to_json())
    assert list(document) == [
        *("schema", "num_sites", "num_fused", "coverage"),
        *("sites", "notes", "before", "after"),
    ]
    assert document["schema"] == 1
    assert document["coverage"] == report.num_fused / report.num_sites
    assert document["sites"][0] == {
        "op": "rms_norm",
        "fused": True,
        "reason": None,
        "module": "model.layers.0.input_layernorm",
        "source": SOURCE,
        "lowering": "inline",
        "lowering_reason": NO_CUDA,
        "graph": 0,
    }
    again = Report.from_json(report.to_json())
    assert again.sites == report.sites
    assert again.to_json() == report.to_json()


@pytest.mark.parametrize(("text", "came"), [('{"schema": 2}', "2"), ("[]", "None")])
def test_json_of_another_schema(text, came):
    with pytest.raises(ValueError, match=f"with schema 1, got schema {came}: write it again"):
        Report.from_json(text)


def test_html_is_escaped():
    report = Report([declined("<b>", "a < b & c")], "graph <before>", "graph <after>", ["<note>"])
    text = report._repr_html_()
    assert "<td>&lt;b&gt;</td>" in text
    assert "<td>a &lt; b &amp; c</td>" in text
    assert "<details><summary>Graph before</summary><pre>graph &lt;before&gt;</pre>" in text
    assert "<p>&lt;note&gt;</p>" in text
    assert "<note>" not in text


def test_html_lists_declined_sites_first():
    text = layers(2)._repr_html_()
    assert text.index("<td>model.layers.{0..1}.self_attn.k_norm</td>") < text.index("<td>model.n")


def test_html_of_no_sites():
    assert "<p>No RMS norms were found." in Report(before="graph")._repr_html_()


def norm(x):
    """The one function that all norms of a model share, as in nanochat (gpt.py)."""
    return F.rms_norm(x, (x.size(-1),))


def sandwich(x, residual):
    """A norm by itself, two that one op joins around a sum, and one whose sum comes first."""
    residual = residual + norm(norm(x).sin())
    return norm(residual), residual, norm(residual.cos() + x)


def two_widths(x):
    return norm(x), norm(torch.cat([x, x.sin()], dim=-1))


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
class TestNormsThatShareALine:
    """All sites have one module and one source; each says what became of itself."""

    def test_each_names_its_own_op(self, grad):
        x, residual = (activation(4).requires_grad_(grad) for _ in range(2))

        report = explain_with(sandwich, [x, residual], options={"normfuse.lowering": "op"})

        assert len({(site.module, site.source) for site in report.sites}) == 1
        ops = ["rms_norm", "rms_norm_add_rms_norm", "rms_norm_add_rms_norm", "add_rms_norm"]
        assert [(site.op, site.lowering) for site in report.sites] == [(op, "op") for op in ops]
        assert all(report.after.count(f"normfuse.{op}.default(") == 1 for op in ops)
        assert "1 norm in rms_norm\n" in str(report)
        assert "2 norms in rms_norm_add_rms_norm\n" in str(report)
        assert "1 norm in add_rms_norm\n" in str(report)

    def test_each_has_its_own_form(self, grad, monkeypatch):
        def form_of(self, node):
            width = node.args[0].meta["val"].shape[-1]
            return ("op", "wide") if width == 16 else ("inline", "narrow")

        monkeypatch.setattr(lower.Lower, "form_of", form_of)
        x = activation(4).requires_grad_(grad)

        report = explain_with(two_widths, [x], options={"normfuse.lowering": "op"})

        assert [(site.lowering, site.lowering_reason) for site in report.sites] == [
            ("inline", "narrow"),
            ("op", "wide"),
        ]

    def test_each_has_the_numbers_of_its_own_measurement(self, grad, monkeypatch, tmp_path):
        monkeypatch.setattr(lower, "KERNEL_DEVICES", ("cpu",))
        monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))
        monkeypatch.setattr("normfuse.passes.choice.device_name", lambda device: "A GPU")

        report = normfuse.explain(two_widths, activation(4).requires_grad_(grad))

        for site, width in zip(report.sites, (8, 16), strict=True):
            assert f"for rms_norm of width {width} at 4 rows" in site.lowering_reason

    def test_one_that_is_declined_leaves_the_others_alone(self, grad):
        def blocks(x, angles):
            return norm(x.sin() + x), norm(angles), norm(x)

        def norm(x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

        x = activation(4).requires_grad_(grad)
        report = normfuse.explain(blocks, x, torch.randn(4, 8, dtype=torch.complex64))

        became = {(site.op, site.reason) for site in report.sites}
        complex_ = "the statistic is computed in torch.complex64, which no kernel has"
        assert became == {("add_rms_norm", None), (None, complex_), ("rms_norm", None)}
        assert [site.lowering for site in report.sites if not site.fused] == [None]
