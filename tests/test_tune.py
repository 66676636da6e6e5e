"""`python -m normfuse tune`, with a stopwatch that says what it is told instead of a GPU."""

import math
import pickle

import pytest
import torch

from normfuse import tuning
from normfuse.__main__ import main
from normfuse.cli import real_models, sites, subject, tune, workers
from normfuse.cli.errors import UsageError
from normfuse.passes import choice, lower, measure
from normfuse.tuning import Document, Rows, kernel_digest
from tests import blocks

pytest.importorskip("triton")
pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


class Model(torch.nn.Module):
    """A first norm, and one behind a sum; of two widths, so that there are two models."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = blocks.LlamaRMSNorm(width), blocks.LlamaRMSNorm(width)
        self.branch = torch.nn.Linear(width, width, bias=False)

    def forward(self, x):
        return self.second(x + self.branch(self.first(x)))


def small(spec, dtype, layers, rows):
    """`load_real` on the CPU."""
    width = {"llama": 64, "qwen3": 32}[spec]
    x = torch.randn(1, rows, width, dtype=torch.bfloat16)
    return subject.Subject(spec, Model(width).bfloat16(), (x,), {})


@pytest.fixture(autouse=True)
def a_gpu(monkeypatch, tmp_path):
    """The CPU in the part of a GPU, on which every kernel is twice as fast as the inline form."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(lower, "KERNEL_DEVICES", ("cpu",))
    monkeypatch.setattr(choice, "device_name", lambda device: "A GPU")
    monkeypatch.setattr(measure, "_times", lambda region, turn: measure.Times(20.0, 10.0))
    monkeypatch.setattr(tune, "load_real", small)
    monkeypatch.setattr(tune, "_check_device", lambda: None)


def test_fills_the_users_table_with_every_site_once(capsys):
    assert main(["tune", "llama", "--rows", "8", "16"]) == 0
    entries = list(tuning.tables()._users)
    found = sorted((entry.key.op, entry.measurement.rows) for entry in entries)
    assert found == [("add_rms_norm", 8), ("add_rms_norm", 16), ("rms_norm", 8), ("rms_norm", 16)]
    assert {entry.key.device for entry in entries} == {"A GPU"}
    output = capsys.readouterr().out
    assert len([line for line in output.splitlines() if "2.00x" in line]) == 4
    assert "4 measured, kept in " in output


def test_what_is_known_is_measured_only_again(capsys):
    for _ in range(2):
        assert main(["tune", "llama", "--rows", "8"]) == 0
    assert "0 measured" in capsys.readouterr().out.splitlines()[-1]
    assert main(["tune", "llama", "--rows", "8", "--again"]) == 0
    assert "2 measured" in capsys.readouterr().out.splitlines()[-1]


def test_out_writes_a_table_as_it_is_shipped(tmp_path, capsys):
    path = tmp_path / "tables" / "a_gpu.json"
    assert main(["tune", "qwen3", "llama", "--rows", "8", "--out", str(path)]) == 0
    document = Document.parse(path.read_text())
    assert document.text() == path.read_text()
    assert (document.device, document.torch) == ("A GPU", torch.__version__)
    assert document.command.startswith("python -m normfuse tune")
    assert document.kernels == {op: kernel_digest(op) for op in ("add_rms_norm", "rms_norm")}
    found = [(entry.key.op, *entry.key.widths) for entry in document.entries]
    assert found == [(op, width) for op in ("add_rms_norm", "rms_norm") for width in (32, 64)]
    assert len(tuning.tables()._users) == 0
    shipped = tuning.Tables(tmp_path / "none", path.parent)
    for entry in document.entries:
        assert shipped.table.verdict(entry.key, Rows.exactly(8), (), 0.03).wins


def test_a_model_that_fails_does_not_end_the_others(capsys):
    assert main(["tune", "mamba", "llama", "--rows", "8"]) == 1
    output = capsys.readouterr()
    assert "2 measured" in output.out
    assert "capturing failed: mamba at 8 rows: KeyError: 'mamba'" in output.err


def test_a_site_that_fails_does_not_end_the_others(capsys, monkeypatch):
    def times(region, turn):
        if region.key.op == "rms_norm":
            raise RuntimeError("out of memory")
        return measure.Times(20.0, 10.0)

    monkeypatch.setattr(measure, "_times", times)
    assert main(["tune", "llama", "--rows", "8"]) == 1
    output = capsys.readouterr()
    assert "1 measured" in output.out
    assert "measuring failed: rms_norm of (64,) at 8 rows: RuntimeError: out of" in output.err


@pytest.mark.parametrize("out", [True, False])
def test_an_interrupted_run_keeps_what_it_has(monkeypatch, tmp_path, out):
    def times(region, turn):
        if region.key.op == "add_rms_norm":
            raise KeyboardInterrupt
        return measure.Times(20.0, 10.0)

    monkeypatch.setattr(measure, "_times", times)
    path = tmp_path / "table.json"
    with pytest.raises(KeyboardInterrupt):
        main(["tune", "llama", "--rows", "8", *(["--out", str(path)] if out else [])])
    document = Document.parse(path.read_text()) if out else None
    (kept,) = document.entries if out else tuning.tables()._users
    assert kept.key.op == "rms_norm"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rows", "0"], "--rows must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
    ],
)
def test_wrong_arguments(argv, message, capsys):
    assert main(["tune", "llama", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu(monkeypatch, capsys):
    monkeypatch.undo()
    assert main(["tune", "llama"]) == 2
    assert "tune must have a CUDA device, got none: run it on the GPU" in capsys.readouterr().err


def test_every_model_has_all_its_rows():
    def rows(*argv):
        import argparse

        parser = argparse.ArgumentParser()
        tune.add_parser(parser.add_subparsers())
        return [job.rows for job in tune._jobs(parser.parse_args(["tune", *argv]))]

    assert rows("llama") == list(tune.ROWS)
    assert rows("my.py:make") == [None]
    assert rows("my.py:make", "llama", "--rows", "1", "64") == [1, 64, 1, 64]


class TestFactories:
    @pytest.fixture
    def path(self, tmp_path):
        path = tmp_path / "mine.py"
        path.write_text(
            "import torch\n"
            "def sized(rows=3):\n"
            "    return torch.nn.RMSNorm(8), (torch.ones(rows, 8),)\n"
            "def fixed():\n"
            "    return torch.nn.RMSNorm(8), (torch.ones(5, 8),)\n"
        )
        return path

    def test_get_the_rows(self, path):
        for rows, came in [(7, 7), (None, 3)]:
            (x,) = subject._from_factory(f"{path}:sized", rows).args
            assert x.shape == (came, 8)

    def test_without_a_parameter_for_them(self, path):
        (x,) = subject._from_factory(f"{path}:fixed", None).args
        assert x.shape == (5, 8)
        with pytest.raises(UsageError, match="must have a parameter `rows`"):
            subject._from_factory(f"{path}:fixed", 7)


class TestRealModels:
    def test_only_depth_vocabulary_and_experts_shrink(self):
        sizes = {**SMALL, "moe_intermediate_size": 32, "num_experts": 128}
        model, inputs = real_models.build("qwen3_moe", 5, device="cpu", **sizes)
        assert model.config.hidden_size == 64
        assert model.config.num_hidden_layers == 2
        assert model.config.vocab_size == real_models.VOCABULARY
        assert model.config.num_experts == real_models.EXPERTS
        assert model.config.num_experts_per_tok == 8
        assert inputs["input_ids"].shape == (1, 5)
        assert next(model.parameters()).dtype is torch.bfloat16

    def test_one_layer_of_each_kind_stays(self):
        model, _ = real_models.build("gemma3_text", 5, device="cpu", **SMALL)
        assert sorted(model.config.layer_types) == ["full_attention", "sliding_attention"]

    def test_an_unknown_model_type(self):
        with pytest.raises(UsageError, match="must be a model type of transformers, got lama"):
            real_models.build("lama", 5)


def test_regions_go_to_other_processes():
    region, _ = sites.regions_of(small("llama", None, None, 8))
    other = pickle.loads(pickle.dumps(region))
    assert (other.key, other.rows, other.neighbours, other.inputs) == (
        *(region.key, region.rows, region.neighbours, region.inputs),
    )
    (inputs,) = measure.input_sets(region.inputs, 1)
    assert torch.equal(other.module(*inputs)[0], region.module(*inputs)[0])
    assert torch.equal(measure.compiled(other, "op")(inputs)[0], region.module(*inputs)[0])


@pytest.mark.parametrize("count", [1, 2])
def test_workers_return_results_and_errors(count):
    with workers.workers(count) as each:
        ((value, error),) = each(math.sqrt, [-1.0])
        ((_, root),) = each(math.sqrt, [4.0])  # in the process that is already there
    assert value == -1.0
    assert isinstance(error, ValueError)
    assert root == 2.0
