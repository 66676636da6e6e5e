"""What the README says is what the code does."""

import importlib.util
from pathlib import Path

import torch

from normfuse.explain import explain_with
from normfuse.patterns import RULES
from normfuse.settings import RULE_NAMES
from tests import blocks
from tests.blocks import activation

ROOT = Path(__file__).parent.parent


def tool_named(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def test_table_of_rules():
    tool = tool_named("rules_table")
    text = (ROOT / "README.md").read_text()
    assert tool.with_table(text) == text, "run: python tools/rules_table.py --write"


def test_table_of_kernels():
    tool = tool_named("kernels_table")
    text = (ROOT / "README.md").read_text()
    assert tool.with_section(text, tool.committed()) == text, (
        "run: python tools/kernels_table.py --write"
    )


def test_table_of_models():
    tool = tool_named("models_table")
    text = (ROOT / "README.md").read_text()
    assert text.count(tool.BEGIN) == text.count(tool.END) == 1
    assert tool.with_section(text, tool.committed()) == text, (
        "run: python tools/models_table.py --write"
    )


def test_numbers_of_training():
    tool = tool_named("training_table")
    text = (ROOT / "README.md").read_text()
    assert tool.with_section(text, tool.committed()) == text, (
        "run: python tools/training_table.py --write"
    )


def test_graph_after():
    """The call that the README shows for a Gemma 3 block stands in the rewritten graph."""
    readme = (ROOT / "README.md").read_text()
    call = next(line.strip() for line in readme.splitlines() if "rms_norm_add_rms_norm(" in line)
    with torch.no_grad():
        report = explain_with(
            blocks.GemmaBlock().bfloat16(),
            (activation(2), activation(2)),
            options={"normfuse.lowering": "op"},
        )
    assert "torch.ops.normfuse.rms_norm_add_rms_norm.default(" in report.after
    numbers = call.split("eps_1=")[1].rstrip(")")
    assert "1e-06, 1.0, 'f32 unit=f32 weight=f32 out=bf16'" in report.after
    assert "offset_1=1.0" in numbers
    assert "'f32 unit=f32 weight=f32 out=bf16'" in numbers


def test_options_know_every_rule():
    assert tuple(rule.name for rule in RULES) == RULE_NAMES
