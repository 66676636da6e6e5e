"""The losses of a training stay inside the band of eager's own runs, as the example defines it."""

import os

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from examples import training

# The guarantee speaks of 200; `make check` looks at the first steps of the same curve.
STEPS = int(os.environ.get("NORMFUSE_TRAINING_STEPS", "40"))
PLACE = ("cpu", torch.float32)


@pytest.fixture(scope="module")
def eager():
    """The same training in four orders of summation."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of what is so small, a second thread waits more than it works
    yield training.eager_runs(STEPS, *PLACE)
    torch.set_num_threads(before)


def test_the_runs_are_one_function_in_other_orders(eager):
    first = [run[0] for run in eager]

    rounding = torch.finfo(torch.float32).eps * first[0]
    assert len(set(map(tuple, eager))) == training.ORDERS
    assert max(first) - min(first) <= 8 * rounding


@pytest.mark.guarantee
def test_losses_stay_inside_eagers_band(eager, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "eager_runs", lambda *_: eager)
    monkeypatch.setenv("MPLBACKEND", "agg")
    picture = tmp_path / "losses.png"
    arguments = ["--steps", str(STEPS), "--lowering", "op", "--plot", str(picture)]

    with torch._inductor.config.patch(disable_cpp_codegen=True):
        status = training.main([*arguments, "--device", "cpu"])

    assert status == 0, capsys.readouterr().out
    assert picture.stat().st_size > 10_000


def test_another_eps_leaves_the_band(eager):
    """So small a difference of one norm is seen."""
    learner = training.model(*PLACE)
    learner.model.layers[0].input_layernorm.eps *= 10

    other = training.losses(learner, learner, 0, STEPS, "wrong")

    assert training.nearest(other, eager) > training.width(eager)
