"""Choice by measurement on a real GPU: what is timed, what is chosen, and what the report says."""

import copy

import pytest
import torch
import torch._inductor.config

import normfuse
from normfuse import tuning
from normfuse.__main__ import main
from normfuse.cli.sites import regions_of
from normfuse.cli.subject import Subject
from normfuse.explain import explain_with
from normfuse.passes import measure
from normfuse.tuning import Measurement, Rows
from tests import blocks

pytestmark = pytest.mark.gpu

WIDTH = 4096
# No GPU reads faster from its memory; what takes less time was in the cache.
BYTES_PER_US = 10_000_000


class Block(torch.nn.Module):
    """A sum, a norm, and a pointwise neighbour between two products."""

    def __init__(self):
        super().__init__()
        self.norm = blocks.LlamaRMSNorm(WIDTH)
        self.before = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.after = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, residual):
        total = residual + torch.relu(self.before(x))
        return self.after(self.norm(total)), total


@pytest.fixture(autouse=True)
def users_table(monkeypatch, tmp_path):
    """A user's table of its own, without entries."""
    monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    return Block().cuda().bfloat16()


def inputs(rows):
    return tuple(torch.randn(rows, WIDTH, device="cuda").bfloat16() for _ in range(2))


def reasons(block, rows, **options):
    """The forms of all sites of the block, and the sentences about them."""
    named = {f"normfuse.{name}": value for name, value in options.items()}
    with torch.no_grad():
        report = explain_with(block, inputs(rows), options=named)
    return [(site.lowering, site.lowering_reason) for site in report.sites]


def test_a_large_region_takes_as_long_as_memory_does(block):
    rows = 4096
    (region,) = regions_of(Subject("block", block, inputs(rows), {}))
    assert (region.rows, region.neighbours) == (rows, ("before relu",))

    document = measure.measure(region, "a test")

    (entry,) = document.entries
    assert entry.key.device == torch.cuda.get_device_name()
    moved = 4 * rows * WIDTH * 2  # two tensors read, two written
    for time in (entry.measurement.inline_us, entry.measurement.triton_us):
        assert moved / BYTES_PER_US < time < 100 * moved / BYTES_PER_US


def test_compile_measures_once_keeps_it_and_reports_it(block, monkeypatch):
    options = normfuse.options(tune="compile")
    x, residual = inputs(64)
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        compiled = torch.compile(block, options=options)
        ours = compiled(x, residual)
        eager = block(x, residual)
        exact = copy.deepcopy(block).double()(x.double(), residual.double())
    for mine, theirs, truth in zip(ours, eager, exact, strict=True):
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()

    def never(*arguments):
        raise AssertionError("what is kept must not be measured again")

    (kept,) = tuning.store.read(tuning.tables().directory)
    monkeypatch.setattr(measure, "measure", never)
    monkeypatch.setattr(tuning, "_tables", {})  # as in a new process
    ((lowering, reason),) = reasons(block, 64, tune="compile")
    measured = kept.entries[0].measurement
    assert lowering == ("triton" if measured.speedup > 1.03 else "inline")
    assert f"kernel {measured.triton_us:.1f} us, inline {measured.inline_us:.1f} us" in reason
    assert reason.startswith(f"measured on {torch.cuda.get_device_name()} at 64 rows")


def learn(block, rows, inline_us, triton_us):
    (region,) = regions_of(Subject("block", block, inputs(rows), {}))
    entry = tuning.Entry(region.key, Measurement(rows, region.neighbours, inline_us, triton_us))
    provenance = (region.key.device, torch.__version__, "3.6.0", "0.1", "2026-01-31", "a test")
    tuning.tables().add(tuning.Document(*provenance, (entry,)))


def test_tables_decide_and_a_slow_kernel_is_never_taken(block):
    ((lowering, reason),) = reasons(block, 64)
    assert lowering == "inline"
    assert reason.startswith("not measured on")
    learn(block, 64, 1.0, 1000.0)
    assert [form for form, _ in reasons(block, 64)] == ["inline"]
    learn(block, 64, 12.0, 10.0)
    assert [form for form, _ in reasons(block, 64)] == ["triton"]


def test_one_graph_with_the_kernel_serves_all_row_counts(block):
    for rows in (16, 64, 256):
        learn(block, rows, 12.0, 10.0)
    compiled = torch.compile(block, options=normfuse.options(), dynamic=True)
    with torch.no_grad():
        compiled(*inputs(64))
        with torch.compiler.set_stance("fail_on_recompile"):
            for rows in (3, 16, 200, 5000):
                x, residual = inputs(rows)
                exact = copy.deepcopy(block).double()(x.double(), residual.double())
                for mine, theirs, truth in zip(
                    compiled(x, residual), block(x, residual), exact, strict=True
                ):
                    assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()


def test_the_command_fills_the_table_with_two_processes(users_table, capsys):
    path = users_table / "mine.py"
    path.write_text(
        "import torch\n"
        "def factory(rows):\n"
        "    norm = torch.nn.RMSNorm(2048, eps=1e-6, device='cuda', dtype=torch.bfloat16)\n"
        "    return norm, (torch.randn(rows, 2048, device='cuda', dtype=torch.bfloat16),)\n"
    )
    assert main(["tune", f"{path}:factory", "--rows", "1", "64", "--jobs", "2"]) == 0
    assert "2 measured" in capsys.readouterr().out
    entries = list(tuning.tables()._users)
    assert sorted(entry.measurement.rows for entry in entries) == [1, 64]
    verdict = tuning.tables().table.verdict(entries[0].key, Rows.exactly(64), (), 0.03)
    assert verdict is not None
