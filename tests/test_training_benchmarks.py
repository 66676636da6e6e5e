"""The benchmarks of training run on a CPU, at tiny sizes, and write what they promise."""

import json

import pytest
import torch

from benchmarks import backward, backward_launches, training


@pytest.fixture(autouse=True)
def without_code():
    """No C++ compiler runs; what is compiled is interpreted."""
    with torch._inductor.config.patch(disable_cpp_codegen=True, compile_threads=1):
        yield


TINY = ["--device", "cpu", "--tiny", "--layers", "1", "--shapes", "1x16", "--rounds", "1"]


def test_a_training_step(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "training.json"
    models = ["--models", "qwen3 8b", "gemma3 4b", "--contenders", "inline"]

    training.main([*TINY, *models, "--optimizer", "--time-limit", "1", "--out", str(out)])

    record = json.loads(out.read_text())
    (cell,) = record["cells"]
    assert record["left_out"] == ["gemma3 4b 1x16"]
    assert str(tmp_path) not in out.read_text()
    assert (cell["model"], cell["shape"], cell["layers"]) == ("qwen3 8b", "1x16", 1)
    found = cell["contenders"]["inline"]
    assert found["lowered"] == ["lowered 4 as inline", "lowered 4 as inline"]  # and backward
    assert found["step_ms"] > 0
    assert found["changed_gradients"] == 0
    assert 0 < found["error"] <= 2 * found["eager_error"]


def test_the_backward_of_norms(tmp_path):
    out = tmp_path / "backward.json"

    backward.main(
        ["--device", "cpu", "--widths", "64", "--rows", "8", "--ops", "add", "--out", str(out)]
    )

    record = json.loads(out.read_text())
    (row,) = record["rows"]
    assert record["is_dry"]
    assert str(tmp_path) not in out.read_text()
    assert (row["op"], row["width"], row["rows"]) == ("add", 64, 8)
    assert row["bytes"] == 4 * 2 * 64 * 8
    assert {"normfuse", "inductor", "aten", "copy"} <= row.keys()
    assert set(row["failures"]) <= {"liger", "quack"}  # where they are installed, without a GPU


def test_a_wrong_gradient_stops_the_benchmark():
    def wrong(x, weight):
        return (backward.our_norm(x, weight) * 1.1,)

    tensors, rest = backward.leaves("norm", 64, 8, None, torch.device("cpu"))

    backward.check("right", "norm", backward.OPS["norm"][1], tensors, rest)
    with pytest.raises(AssertionError, match="wrong errs by"):
        backward.check("wrong", "norm", wrong, tensors, rest)


def test_launches_of_a_backward(tmp_path):
    out = tmp_path / "launches.json"
    sizes = ["--widths", "64", "--rows", "8", "--ops", "norm", "sums"]

    backward_launches.main(["--dry-run", *sizes, "--out", str(out)])

    record = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    assert list(record["cells"]) == ["norm 8 x 64"]
    assert list(record["sums"]) == ["132 x 64", "264 x 64", "396 x 64"]


@pytest.mark.parametrize("width", backward_launches.WIDTHS)
def test_candidates_cover_a_row(width):
    found = list(backward_launches.candidates(width))

    assert len(set(found)) == len(found) > 0
    for one in found:
        tile = backward_launches.tile_of(one, width, 4096)
        assert tile.block * (tile.chunks - 1) < width <= tile.block * tile.chunks
        assert tile.num_warps * 32 * one.each <= 2048
