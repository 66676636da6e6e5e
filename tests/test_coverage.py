"""docs/coverage.md is what `make coverage` writes now."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

from normfuse.cli import tiny_models

ROOT = Path(__file__).parent.parent
RENEW = "run: make coverage, or make coverage COVERAGE_ARGS='--only {}'"


@pytest.fixture(scope="module")
def tool():
    """tools/coverage.py as a module."""
    spec = importlib.util.spec_from_file_location("coverage_tool", ROOT / "tools/coverage.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["coverage_tool"] = module  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def document(tool):
    """The text, where the installed versions are those that it was written with."""
    text = tool.DOCUMENT.read_text(encoding="utf-8")
    if tool.versions() not in text:
        pytest.skip(f"docs/coverage.md is not of {tool.versions()}")
    return text


def test_document_is_of_the_pinned_versions(tool):
    text = tool.DOCUMENT.read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in _constraints() if "==" in line)
    assert f"\ntorch {pins['torch']}, transformers {pins['transformers']};" in text


def test_document_is_as_written(tool, document):
    rows = tool.read(document)
    assert tool.render(reversed(rows.values())) == document
    assert sorted(rows) == tiny_models.model_types()


@pytest.mark.parametrize("model_type", ["gemma3_text", "granite", "llama", "olmo2", "t5"])
def test_row_is_true(tool, document, model_type):
    assert tool.measure(model_type).line() in document.splitlines(), RENEW.format(model_type)


def test_model_type_that_is_not_built(tool, document):
    row = tool.measure("wav2vec2")
    assert row.failure == "a model type must take input_ids, got one that takes input_values"
    assert tool.read(document)["wav2vec2"] == row


def test_error_in_one_line(tool, tmp_path):
    error = RuntimeError(f"\nin {tmp_path}/x.py: `f` at 0x7fa0 | bad\n\nand more")
    assert tool._one_line(error) == "RuntimeError: in x.py: 'f' at 0x... / bad"


def test_only_keeps_the_other_rows(tool, monkeypatch, tmp_path, capsys):
    llama = tool.Row("llama", "bf16", 5, 5, "5 rms_norm")
    others = [
        tool.Row("cohere", "bf16", 3, 1, "1 rms_norm", "1 eps, a tensor; 1 odd"),
        tool.Row("bert", "any"),
        tool.Row("vit", failure="takes pixel_values"),
    ]
    monkeypatch.setattr(tool, "DOCUMENT", tmp_path / "coverage.md")
    monkeypatch.setattr(sys, "argv", ["coverage.py", "--only", "llama"])
    tool.DOCUMENT.write_text(tool.render([*others, tool.Row("llama", failure="broken")]))
    monkeypatch.setattr(tool, "measure_all", lambda names, jobs: iter([llama]))
    assert tool.main() == 0
    written = tool.DOCUMENT.read_text()
    assert written == tool.render([llama, *others])
    assert "\n- 1 eps, a tensor\n- 1 odd\n" in written
    assert capsys.readouterr().out.endswith("**2 model types with 8 norms: 6 fused (75.0 %).**\n")


def test_only_refuses_what_does_not_fit(tool, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "DOCUMENT", tmp_path / "coverage.md")
    tool.DOCUMENT.write_text("torch 2.0.0, transformers 4.0.0")
    for names, message in (("lama", "got lama: "), ("llama", "must run with the document's versi")):
        monkeypatch.setattr(sys, "argv", ["coverage.py", "--only", names])
        with pytest.raises(SystemExit):
            tool.main()
        assert message in capsys.readouterr().err


def die(connection):
    connection.recv()
    sys.exit(1)


def hang(connection):
    time.sleep(600)


def test_process_that_dies_costs_one_model_type(tool, monkeypatch):
    monkeypatch.setattr(tool, "_work", die)
    rows = sorted(tool.measure_all(["llama", "qwen3"], jobs=2), key=lambda row: row.model_type)
    assert rows == [
        tool.Row("llama", failure="the process died"),
        tool.Row("qwen3", failure="the process died"),
    ]


def test_process_that_hangs_costs_one_model_type(tool, monkeypatch):
    monkeypatch.setattr(tool, "_work", hang)
    monkeypatch.setattr(tool, "TIMEOUT", 0.1)
    (row,) = tool.measure_all(["llama"], jobs=1)
    assert row == tool.Row("llama", failure="took longer than 0.1 seconds")


def _constraints():
    return (ROOT / "constraints.txt").read_text().splitlines()
