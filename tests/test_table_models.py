"""benchmarks/table_models.py on tiny models: its tables know the sites of benchmarks/models.py."""

import pytest
import torch

from normfuse.cli.errors import UsageError
from normfuse.cli.sites import regions_of
from normfuse.cli.subject import Subject
from normfuse.passes import choice, lower, measure
from normfuse.tuning import Entry, Measurement, Rows, Table
from tests.float64 import assert_as_close_as_eager
from tests.test_models_benchmark import benchmark

pytest.importorskip("transformers")
pytest.importorskip("triton")

table_models, model_zoo = benchmark("table_models"), benchmark("model_zoo")


@pytest.fixture(autouse=True, scope="module")
def a_gpu():
    """The CPU in the part of a GPU, tiny models in that of real ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower, "KERNEL_DEVICES", ("cpu",))
        patch.setattr(choice, "device_name", lambda device: "A GPU")
        patch.setattr(table_models, "DEVICE", "cpu")
        patch.setattr(table_models, "TINY", True)
        yield


def subject(name, rows):
    model, args, kwargs = getattr(table_models, name)(rows=rows)
    return Subject(name, model, args, kwargs)


@pytest.mark.parametrize("cell", ["decode", "prefill_cached"])
def test_forwards_over_a_cache_are_covered(cell):
    """Prefill without one is: it is the same graph. Their heads have other neighbours."""
    name, table = "qwen3_8b", Table()
    for region in regions_of(subject(name, 8)):
        table.add(Entry(region.key, Measurement(region.rows, region.neighbours, 20.0, 10.0)))
    model = model_zoo.build(name, "cpu", 2, tiny=True)
    settings = {"filled": 3, "cache_size": 6} if cell == "decode" else {}
    step = getattr(model_zoo, cell)(model, 8, **settings)
    regions = regions_of(Subject(name, model, (), step))
    assert len(regions) == 4  # that of the heads with its copies, and alone
    for region in regions:
        assert table.knows(region.key, Rows.exactly(region.rows), region.neighbours), region.key


@pytest.fixture(scope="module")
def trained(a_gpu):
    """The regions of a training step."""
    return regions_of(subject("gemma3_4b_training", 8), training=True)


def test_a_training_step_has_its_gradients_as_sites(trained):
    assert {region.key.op for region in trained} == {
        *("rms_norm", "rms_norm_add_rms_norm", "qk_rms_norm_rope"),
        *("rms_norm_backward", "rms_norm_add_rms_norm_backward", "qk_rms_norm_rope_backward"),
    }
    last = [one for one in trained if "no grad_total" in one.key.parameters]
    assert [one.key.op for one in last] == ["rms_norm_add_rms_norm_backward"]


@pytest.mark.parametrize("form", ["inline", "op"])
def test_a_compiled_gradient_computes_what_the_graph_did(trained, form):
    region = next(one for one in trained if one.key.op == "rms_norm_backward")
    assert region.neighbours.count("before add") == 2
    (inputs,) = measure.input_sets(region.inputs, 1)
    with torch.no_grad():
        eager = region.module(*inputs)
        ours = measure._apart(lambda: measure.compiled(region, form)(inputs))
        exact = region.module(*[x.double() if x.is_floating_point() else x for x in inputs])
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert_as_close_as_eager(mine, theirs, truth)


def test_training_needs_something_to_train():
    frozen = torch.nn.RMSNorm(8).requires_grad_(False)
    with pytest.raises(UsageError, match="must return a tensor that wants a gradient, got none"):
        regions_of(Subject("frozen", frozen, (torch.ones(2, 8),), {}), training=True)


def test_names_of_factories():
    assert callable(table_models.qwen3_8b)
    with pytest.raises(AttributeError, match=r"one of gemma3_4b, .*, got qwen9"):
        table_models.qwen9  # noqa: B018
