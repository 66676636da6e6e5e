"""benchmarks/models.py without a GPU: a tiny model goes through it, made-up numbers are summed."""

import argparse
import importlib
import json
import sys
from collections import Counter, namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.test_readme import tool_named

pytest.importorskip("transformers")

FOLDER = Path(__file__).parent.parent / "benchmarks"


def benchmark(name):
    """A file of benchmarks/ as a module, which finds its neighbours as a script does."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


models, model_cells, model_zoo = map(benchmark, ("models", "model_cells", "model_zoo"))
models_summary, model_floor = map(benchmark, ("models_summary", "model_floor"))


def test_a_tiny_model_goes_through_every_step(tmp_path, capsys):
    out = tmp_path / "models.json"
    argv = "--device cpu --tiny --jobs 1 --models llama3_8b --cells decode1 --layers 1 --rounds 1"
    models.main([*argv.split(), "--no-compile-times", "--out", str(out)])

    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert (row["model"], row["cell"]) == ("llama3_8b", "decode1")
    for one in row["contenders"].values():
        assert one["gpu_ms"] > 0
        assert one["wall_ms"] > 0
    assert row["contenders"].keys() == {"plain", "auto"}
    assert record["not_reached"] == record["summary"]["failed"] == []
    assert record["summary"]["cells"] == 1
    assert "llama3_8b" in capsys.readouterr().out
    with pytest.raises(ValueError, match="must be measured, got a trial"):
        tool_named("models_table").section(record)


@pytest.mark.parametrize(
    ("jobs", "expected"),
    [
        (1, [("abc", "xyz")]),
        (2, [("ac", "xyz"), ("b", "xyz")]),
        (3, [("a", "xyz"), ("b", "xyz"), ("c", "xyz")]),
        (7, [(model, cells) for cells in ("xz", "y") for model in "abc"]),
        (99, [(model, cell) for cell in "xyz" for model in "abc"]),
    ],
)
def test_every_cell_is_one_process_s(jobs, expected):
    arguments = argparse.Namespace(models=list("abc"), cells=list("xyz"))
    groups = [("".join(a), "".join(b)) for a, b in models._groups(arguments, jobs)]
    assert groups == expected


class Interpreted:
    """A contender that compiles nothing; `wrong` is added to the logits of auto."""

    wrong = 0.0

    def __init__(self, name, model, turn, options):
        self.name, self.model, self.turn, self.running = name, model, turn, 0.0

    def __call__(self, inputs):
        return self.model(**inputs).logits + (self.wrong if self.name == "auto" else 0)


@pytest.fixture(scope="module")
def model():
    return model_zoo.build("gemma3_4b", "cpu", 2, tiny=True)


class TestMeasure:
    @pytest.fixture(autouse=True)
    def without_a_compiler(self, monkeypatch):
        monkeypatch.setattr(model_cells, "Contender", Interpreted)

    def measured(self, model, cell="prefill512"):
        plan = model_cells.Plan(("plain", "auto"), 2, {}, nullcontext())
        make = model_cells.TINY_CELLS[cell]
        return model_cells.measure(model, make, plan, cold=False, reverse=True)

    def test_every_step_of_decoding_is_the_same(self, model):
        """Else the third call, which is compared, would be further than the first, eager's."""
        found = self.measured(model, "decode64")
        assert found["plain"]["error"] == found["auto"]["error"] == 0
        assert list(found) == ["plain", "auto"]

    def test_a_wrong_result_is_reported_and_not_timed(self, model, monkeypatch):
        monkeypatch.setattr(Interpreted, "wrong", 1.0)
        found = self.measured(model)
        assert found["auto"]["failed"].startswith("differs from eager by ")
        assert "gpu_ms" not in found["auto"]
        assert found["plain"]["gpu_ms"] > 0

    def test_a_contender_that_raises_is_reported(self, model, monkeypatch):
        monkeypatch.setattr(Interpreted, "wrong", "no number")
        found = self.measured(model)
        assert found["auto"]["failed"].startswith("TypeError: ")
        assert found["plain"]["gpu_ms"] > 0

    def test_the_rest_of_a_model_may_compute_something_else(self, model):
        plan = model_cells.Plan(("plain", model_cells.WITHOUT), 1, {}, nullcontext())
        make = model_cells.TINY_CELLS["prefill512"]
        found = model_cells.measure(model, make, plan, cold=False, reverse=False)
        assert found[model_cells.WITHOUT]["error"] > 0.1
        assert found[model_cells.WITHOUT]["gpu_ms"] > 0


@pytest.mark.parametrize("name", model_zoo.MODELS)
def test_a_model_without_norms_and_rotary_embeddings(name):
    whole = model_zoo.build(name, "cpu", 2, tiny=True)
    bare = model_floor.without_norms(whole)
    steps = []

    def note(module, inputs):
        steps.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    torch._dynamo.reset()
    with torch.no_grad():
        inputs = model_zoo.prefill(whole, 8)
        before = whole(**inputs).logits
        result = torch.compile(bare, backend=note, dynamic=False)(**inputs).logits

        assert result.shape == before.shape
        assert not any("rsqrt" in step or "neg" in step for step in steps)
        assert torch.equal(whole(**inputs).logits, before), "the model itself is as it was"
    ids = {id(one) for one in whole.parameters()}
    assert all(id(one) in ids for one in bare.parameters()), "no weight is there twice"


def test_a_model_without_norms_must_have_some():
    with pytest.raises(ValueError, match="got none"):
        model_floor.without_norms(torch.nn.Linear(2, 2))


def test_what_norms_cost_is_the_difference_to_the_rest():
    found = {
        "plain": {"compiled_us": 10.0},
        "auto": {"compiled_us": 7.0},
        "triton": {"failed": "no memory"},
        model_cells.WITHOUT: {"compiled_us": 4.0},
    }
    model_cells.note_costs(found)
    assert (found["plain"]["cost_us"], found["auto"]["cost_us"]) == (6.0, 3.0)
    assert "cost_us" not in found["triton"]
    assert "cost_us" not in found[model_cells.WITHOUT]
    rows = [{"model": "qwen3_8b", "cell": "decode1", "contenders": found}]
    assert models_summary._cost_ratio(rows) == 0.5


@pytest.mark.parametrize("layers", [2, 4, 6])
@pytest.mark.parametrize("name", ["gemma3_4b", "gemma4_experts"])
def test_fewer_layers_keep_both_kinds(name, layers):
    from transformers import CONFIG_MAPPING

    model_type, sizes = model_zoo.MODELS[name]
    kinds = model_zoo._cut(CONFIG_MAPPING[model_type], layers, sizes).layer_types
    assert len(kinds) == layers
    assert set(kinds) == {"sliding_attention", "full_attention"}
    if layers == 6:
        assert kinds.count("full_attention") == 1


def test_kernels_are_told_apart_by_their_names():
    kernels = [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", 60.0),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3", 15.0),
        ("triton_poi_fused_add_cat_mul_neg_slice_4", 5.0),
        ("triton_poi_fused_mul_silu_5", 6.0),
        ("add_rms_norm_kernel_0", 9.0),
        ("qk_rms_norm_rope_kernel_1", 1.0),
        ("Memcpy DtoD (Device -> Device)", 100.0),
        ("pytorch_flash::flash_fwd_kernel", 4.0),
    ]
    found = model_cells.shares(kernels)
    assert found["kernels_us"] == 100
    assert found["compiled_us"] == 36
    assert found["norm_us"] == 30
    assert found["norm_share"] == 0.3
    assert "profile_failed" in model_cells.shares([])


def row(model, cell, plain, auto, compile_s=(None, None)):
    """A row whose contenders took so many milliseconds, a tenth of them in Triton."""
    found = {
        name: {"gpu_ms": ms, "wall_ms": ms, "compiled_us": 100 * ms, "kernels_us": 1000 * ms}
        for name, ms in (("plain", plain), ("auto", auto))
    }
    for one, seconds in zip(found.values(), compile_s, strict=True):
        one["compile_s"] = seconds
    return {"model": model, "cell": cell, "layers": 6, "contenders": found}


ROWS = [
    row("qwen3_8b", "decode1", 2.0, 1.0, (10.0, 12.0)),
    row("llama3_8b", "decode1", 1.0, 2.0),
    row("llama3_8b", "prefill512", 1.0, 1.0),
    {"model": "glm4_9b", "cell": "decode1", "layers": 6, "failed": "RuntimeError: no memory"},
]


def test_summary():
    found = models_summary.summary(ROWS)
    assert found["cells"] == 3
    assert found["speedup"] == pytest.approx(1)
    assert found["speedup_qk_norm"] == pytest.approx(2)
    assert found["speedup_by_cell"] == pytest.approx({"decode1": 1, "prefill512": 1})
    assert found["worst"] == ["llama3_8b", "decode1", 0.5]
    assert found["slower"] == ["llama3_8b decode1"]
    assert found["compile_time_ratio"] == pytest.approx(1.2)
    assert found["failed"] == ["glm4_9b decode1: RuntimeError: no memory"]
    assert models_summary.summary([])["speedup"] is None


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        models.arguments_of(["--cells", "prefill"])
    assert "a name must be one of gemma3_4b, " in capsys.readouterr().err


def test_what_the_time_limit_cuts_off_is_listed():
    arguments = models.arguments_of(["--models", "qwen3_8b,llama3_8b", "--cells", "decode1"])
    assert models.record_of(arguments, ROWS[:1], "")["not_reached"] == ["llama3_8b decode1"]


def test_section_of_the_readme():
    arguments = models.arguments_of([])
    record = models.record_of(arguments, ROWS, "python benchmarks/models.py")
    record = json.loads(models_summary.json_text(record))
    section = tool_named("models_table").section
    text = section({**record, "gpu": "A GPU", "not_reached": ["one"]})
    sentences = " ".join(text.split())
    assert "Geometric mean 1.000x, of models with QK-norm 2.000x; the worst is" in sentences
    assert "llama3_8b decode 1 at 0.500x" in sentences
    assert "Compiling takes 1.200x as long." in sentences
    assert "cost nothing" not in sentences
    assert "Cells without a number: 2." in sentences
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("|"))
    assert "| `llama3_8b` | 1.00x |  | 0.50x |  | 0.71x | 10 % -> 10 % |" in text
    assert "| all | 1.00x |  | 1.00x |  | 1.00x | 10 % -> 10 % |" in text


def test_section_of_the_readme_says_what_norms_cost_where_that_was_measured():
    record = models.record_of(models.arguments_of([]), ROWS, "python benchmarks/models.py")
    floor = {
        "compile_time_ratio": None,
        "cost_ratio": 0.5,
        "speedup_if_norms_cost_nothing": 1.25,
        "speedup_if_norms_cost_nothing_qk_norm": 1.5,
    }
    measured = {**record, "gpu": "A GPU", "summary": {**record["summary"], **floor}}
    text = " ".join(tool_named("models_table").section(measured).split())
    assert "Norms and RoPE cost 0.500x of what they cost plain `torch.compile`; if" in text
    assert (
        "models without experts would be 1.250x as fast, those of them with QK-norm 1.500x" in text
    )
    assert "Compiling takes" not in text


def test_a_kernel_takes_the_launch_of_one_with_another_name(monkeypatch):
    same_launches = benchmark("same_launches")
    tuner, launcher = same_launches.CachingAutotuner, namedtuple("launcher", "config")
    times = iter([1, 2, 2, 1, 2, 1, 2, 1, 1, 2])  # of both launches, each time that they are timed

    def timed(self, *args):
        return {one: next(times) for one in self.launchers}

    monkeypatch.setattr(tuner, "benchmark_all_configs", timed)
    monkeypatch.setattr(same_launches, "counts", Counter())
    same_launches.share_launches()

    def fastest(name, size, *launches, text="load, store", dtype=torch.bfloat16):
        kernel = object.__new__(tuner)
        kernel.fn = SimpleNamespace(__name__=name, src=f"def {name}({size}): {text}")
        kernel.launchers = list(map(launcher, launches))
        found = kernel.benchmark_all_configs(torch.ones(1, dtype=dtype), size)
        return min(found, key=found.get).config

    assert fastest("poi_3", 64, "narrow", "wide") == "narrow"
    assert fastest("poi_7", 64, "narrow", "wide") == "narrow"
    assert fastest("poi_7", 32, "narrow", "wide") == "wide"
    assert fastest("poi_3", 64, "narrow", "wide", text="load, add, store") == "wide"
    assert fastest("poi_3", 64, "narrow", "wide", dtype=torch.float32) == "wide"
    assert fastest("poi_3", 64, "narrow", "wider") == "narrow"
    assert same_launches.counts == {"timed": 5, "known": 1}
