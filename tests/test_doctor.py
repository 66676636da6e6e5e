"""`python -m normfuse doctor`: the recorded table is true, and what differs from it is named."""

import json
import sys

import pytest
import torch

from normfuse.__main__ import main
from normfuse.cli import doctor, environment, examination
from normfuse.cli.examination import Table, examine, installed_versions
from normfuse.cli.micro_blocks import (
    BLOCKS,
    TOKENS,
    WEIGHT,
    add_norm,
    chain,
    from_transformers,
    llama_norm,
)

NORM, ADD_NORM = chain(llama_norm, TOKENS, WEIGHT), chain(add_norm, TOKENS, TOKENS, WEIGHT)
OLD = {"torch": "2.11.0", "transformers": "5.0.0", "triton": "3.6.0"}
EMPTY = Table(OLD, {})


def with_noise(x):
    return x + torch.rand_like(x)


@pytest.fixture(autouse=True)
def log_width(monkeypatch):
    """As in a pipe, whatever terminal the tests run in."""
    monkeypatch.setenv("COLUMNS", "120")


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Puts blocks and a table of their own in the place of the package's."""

    def put(blocks, expected, versions=OLD):
        monkeypatch.setattr(examination, "TABLE", tmp_path / "doctor.json")
        monkeypatch.setattr(doctor, "BLOCKS", blocks)
        Table(versions, expected).save()

    return put


def advice_of(report):
    """What follows the summary, as one line."""
    return " ".join(report.split("with eager's bits\n")[1].split())


def test_every_block_is_as_recorded():
    table = Table.load()
    examined = [examine(block, table) for block in BLOCKS]
    differing = [one for one in examined if one.verdict != "same"]
    assert differing == [], "if you changed a rule: python -m normfuse doctor --record"
    assert list(table.blocks) == [block.name for block in BLOCKS]


def test_report_of_a_good_installation(capsys, table):
    table((NORM, ADD_NORM), {"llama_norm": ["rms_norm"], "add_norm": ["add_rms_norm"]})
    assert main(["doctor"]) == 0
    report = capsys.readouterr().out
    assert "\nok  backend       entry point normfuse of torch_dynamo_backends\n" in report
    assert "\nok  compiling     a compiled norm gives the bits of eager\n" in report
    assert report.endswith(
        f"""
blocks
same  llama_norm  rms_norm
same  add_norm    add_rms_norm

recorded with torch 2.11.0, transformers 5.0.0, triton 3.6.0; here {_here()}
2 of 2 blocks as recorded, with eager's bits
everything matches: nothing to do
"""
    )


def test_changed_block_is_named(capsys, table):
    table((NORM, ADD_NORM), {"llama_norm": ["l2_norm"], "add_norm": ["add_rms_norm"]})
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert (
        "changed  llama_norm  expected l2_norm\n                     found    rms_norm\n" in report
    )
    assert "same     add_norm    add_rms_norm\n" in report
    assert advice_of(report) == (
        "results are still eager's, but norms are fused otherwise than recorded: install torch "
        "2.11.0, transformers 5.0.0, triton 3.6.0, or report it with the output of "
        "`python -m normfuse doctor --json`"
    )


def test_changed_block_with_the_recorded_versions(capsys, table):
    table((NORM,), {}, installed_versions())
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "new  llama_norm  expected nothing: the table does not have this block" in report
    assert "; here the same\n" in report
    assert advice_of(report) == (
        "normfuse itself changed: if that is what you want, python -m normfuse doctor --record; "
        "if you changed nothing, install it again"
    )


def test_results_that_differ_from_eager(capsys, table):
    table((chain(with_noise, TOKENS),), {"with_noise": []})
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "inexact  with_noise  no norm: results differ from eager's\n" in report
    assert advice_of(report).startswith(
        'results differ from eager\'s: do not use backend="normfuse" here; install torch 2.11.0'
    )


def test_class_that_transformers_no_longer_has(capsys, table):
    table((from_transformers("llama.modeling_llama", "GoneRMSNorm"),), {"GoneRMSNorm": []})
    assert main(["doctor"]) == 1
    report = capsys.readouterr().out
    assert "failed  GoneRMSNorm  AttributeError: module 'transformers.models.llama" in report
    assert advice_of(report).startswith("a block must build, compile and run: install torch 2.11.0")


def test_json(capsys, table):
    table((NORM, ADD_NORM), {"llama_norm": ["l2_norm"], "add_norm": ["add_rms_norm"]})
    assert main(["doctor", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert (document["recorded"], document["installed"]) == (OLD, installed_versions())
    assert {check["name"]: check["is_good"] for check in document["environment"]}["hooks"]
    assert document["blocks"][0] == {
        "verdict": "changed",
        "name": "llama_norm",
        "expected": ["l2_norm"],
        "found": ["rms_norm"],
        "is_exact": True,
        "error": None,
        "skipped": None,
    }
    assert [block["verdict"] for block in document["blocks"]] == ["changed", "same"]
    assert len(document["advice"]) == 1


def test_record(capsys, table):
    table((NORM, ADD_NORM), {"llama_norm": ["l2_norm"], "gone": []})
    assert main(["doctor", "--record"]) == 0
    assert capsys.readouterr().out.endswith(f"recorded 2 blocks with {_here()}\n")
    expected = {"llama_norm": ["rms_norm"], "add_norm": ["add_rms_norm"]}
    assert Table.load() == Table(installed_versions(), expected)
    assert main(["doctor"]) == 0


def test_record_refuses_what_is_wrong(capsys, table):
    table((NORM, chain(with_noise, TOKENS)), {})
    assert main(["doctor", "--record"]) == 2
    assert "got trouble with with_noise: nothing is recorded" in capsys.readouterr().err
    assert Table.load() == EMPTY


def test_record_into_a_package_that_cannot_be_written(capsys, table, monkeypatch, tmp_path):
    table((NORM,), {})
    monkeypatch.setattr(Table, "load", lambda: EMPTY)
    monkeypatch.setattr(examination, "TABLE", tmp_path / "gone" / "doctor.json")
    assert main(["doctor", "--record"]) == 2
    assert "--record must be able to write doctor.json into the package" in capsys.readouterr().err


def test_blocks_of_transformers_are_skipped_without_it(monkeypatch):
    versions = {**installed_versions(), "transformers": None}
    monkeypatch.setattr(examination, "installed_versions", lambda: versions)
    monkeypatch.setitem(sys.modules, "transformers", None)
    skipped = [block for block in BLOCKS if block.needs_transformers]
    assert len(skipped) == 6
    examined = examine(skipped[0], Table.load())
    assert (examined.verdict, examined.is_good) == ("skipped", True)
    assert examined.skipped == "transformers is not installed"


def problem(name):
    """The only check that is not good, which must have this name."""
    (check,) = (check for check in environment.check_environment() if not check.is_good)
    assert check.name == name
    assert check.advice
    return check.finding


@pytest.mark.filterwarnings("ignore:normfuse is tested with torch")
def test_torch_outside_the_tested_range(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert problem("torch") == "2.99.0, tested: >= 2.11 and < 2.16"


def test_backend_that_is_not_registered(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "list_backends", lambda tags: ["inductor"])
    assert problem("backend") == "no entry point normfuse of torch_dynamo_backends"


def test_hook_that_inductor_does_not_have(monkeypatch):
    monkeypatch.setattr(environment, "HOOKS", ("pre_grad_custom_pas",))
    assert "got 'pre_grad_custom_pas': did you mean pre_grad_custom_pass" in problem("hooks")


def test_compiler_that_breaks(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("not today\n\nand a long tale")

    monkeypatch.setattr(environment.backend, "normfuse", broken)
    assert "raised: RuntimeError: not today" in problem("compiling")


def test_cuda_device_without_triton(monkeypatch):
    monkeypatch.setattr(environment, "has_triton_package", lambda: False)
    assert environment._triton().is_good is not torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert environment._triton().finding == "not importable, but there is a CUDA device"


def _here():
    return ", ".join(f"{name} {version}" for name, version in installed_versions().items())
