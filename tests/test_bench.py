"""`python -m normfuse bench`: how it times and judges, what it reports, and a run without a GPU."""

import copyreg
import json
import math
import multiprocessing
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch

from normfuse.cli.bench import contenders as contenders_of
from normfuse.cli.bench import measuring, plots, precompiling
from normfuse.cli.bench.accuracy import accuracy
from normfuse.cli.bench.cells import Cell
from normfuse.cli.bench.contenders import COPY, INDUCTOR, OURS, Contender
from normfuse.cli.bench.subjects import subject
from normfuse.cli.bench.summary import compared, geometric_mean, summarise
from normfuse.cli.bench.timing import (
    FLUSH_BYTES,
    GRAPH_BYTES,
    L2_BYTES,
    CudaClock,
    DryClock,
    Rotation,
    Timing,
    measure,
)

SIZES = [2**n for n in range(8, 36)]


class TestRotation:
    @pytest.mark.parametrize("size", SIZES)
    def test_no_call_finds_its_operands_in_the_cache(self, size):
        cold = Rotation.cold(size)
        spans = cold.num_sets * size > 3 * L2_BYTES
        emptied = cold.flushes and cold.cycles == cold.replays == 1
        assert spans or (emptied and FLUSH_BYTES > 3 * L2_BYTES)
        assert cold.num_sets <= 256

    @pytest.mark.parametrize("size", SIZES)
    def test_a_graph_is_long_enough_for_its_launch_not_to_count(self, size):
        cold = Rotation.cold(size)
        assert cold.num_sets * cold.cycles >= 256 or cold.num_calls * size >= GRAPH_BYTES

    def test_as_the_protocol_says(self):
        assert Rotation.cold(10**6).num_sets == 200
        assert Rotation.cold(150 * 10**6).num_sets == 3
        assert Rotation.cold(10**9).num_sets == 1
        assert Rotation.cold(24_000) == Rotation(256, 1, 1, True)

    def test_hot_only_where_the_cache_holds_it(self):
        assert Rotation.hot(10**6).num_sets == 1
        assert Rotation.hot(100 * 10**6) is None


class TestTiming:
    def test_is_a_median_with_the_spread_of_rounds(self):
        timing = Timing.of([[1.0, 2.0, 9.0], [2.0, 2.0, 2.0], [2.2, 2.2, 2.2]])
        assert timing.us == 2.0
        assert timing.spread == pytest.approx(0.1)
        assert timing.fastest_us == 1.0

    def test_contenders_take_turns(self):
        turns = []

        class Log(DryClock):
            def samples(self, recording, rotation, count):
                turns.append(recording)
                return [1.0] * count

        measure(Log(), {"a": "a", "b": "b"}, Rotation(1, 1, 1, False))
        assert "".join(turns) == "abbaab"


class TestAccuracy:
    """One element decides."""

    @pytest.fixture
    def case(self):
        torch.manual_seed(0)
        what = subject(Cell("add_rms_norm", 4, 64))
        operands = what.operands("cpu")
        return what, operands, [result.clone() for result in what.eager(*operands)]

    def test_eager_is_as_close_as_eager(self, case):
        found = accuracy(*case)
        assert found.is_as_close_as_eager
        assert found.is_the_same_function
        assert found.error == found.eager_error > 0

    def test_an_element_that_is_not_written(self, case):
        case[2][1][2, 5] = math.nan
        found = accuracy(*case)
        assert not found.is_as_close_as_eager
        assert not found.is_the_same_function

    def test_an_element_that_is_rounded_away(self, case):
        case[2][0][3, 60] += 8 * accuracy(*case).eager_error
        found = accuracy(*case)
        assert not found.is_as_close_as_eager
        assert found.is_the_same_function

    def test_another_function(self, case):
        case[2][0].mul_(1.5)
        assert not accuracy(*case).is_the_same_function

    def test_in_pieces(self, case, monkeypatch):
        whole = accuracy(*case)
        monkeypatch.setattr("normfuse.cli.bench.accuracy.CHUNK_ELEMENTS", 64)
        assert accuracy(*case) == whole

    def test_another_type_is_an_error(self, case):
        what, operands, results = case
        with pytest.raises(ValueError, match=r"results must have eager's shapes and types"):
            accuracy(what, operands, [result.float() for result in results])


def cell_record(name="add_rms_norm", rows=4096, **times):
    entries = {
        key: {"cold_us": us, "hot_us": None, "cold_spread": 0.01, "failure": None}
        for key, us in times.items()
    }
    entries = {{"ours": OURS, "inductor": INDUCTOR}.get(k, k): v for k, v in entries.items()}
    return {**Cell(name, rows, 5376).to_json(), "bytes": 4_000_000, "contenders": entries}


class TestSummary:
    def test_geometric_mean(self):
        assert geometric_mean([1.0, 4.0, None]) == pytest.approx(2.0)
        assert geometric_mean([None]) is None

    def test_of_one_cell(self):
        row = compared(cell_record(ours=2.0, inductor=3.0, Liger=2.5, copy=1.5), 4000.0)
        assert row == {
            "limit_us": pytest.approx(1.0),
            "vs_inductor": 1.5,
            "vs_best": 1.25,
            "best": "Liger",
            "of_copy": 0.75,
            "of_limit": pytest.approx(0.5),
        }

    def test_a_copy_and_ourselves_are_no_rivals(self):
        row = compared(cell_record(ours=2.0, copy=1.0), 4000.0)
        assert (row["best"], row["vs_best"]) == (None, None)

    def test_means_by_op_and_regime(self):
        cells = [
            cell_record(ours=1.0, inductor=2.0),
            cell_record(rows=1, ours=1.0, inductor=8.0),
            cell_record("rms_norm", ours=1.0, inductor=4.0),
        ]
        means = summarise(cells, 4000.0)["cold"]
        assert means["overall"]["vs_inductor"] == pytest.approx(4.0)
        assert means["ops"]["add_rms_norm"]["vs_inductor"] == pytest.approx(4.0)
        assert means["regimes"]["prefill"]["vs_inductor"] == pytest.approx(8**0.5)
        decode = means["ops_and_regimes"]["add_rms_norm"]["decode"]
        assert (decode["cells"], decode["vs_inductor"]) == (1, pytest.approx(8.0))

    def test_losses_are_listed_worst_first(self):
        cells = [
            cell_record(rows=1, ours=1.00, inductor=0.99),  # noise
            cell_record(rows=8, ours=1.00, inductor=0.97),
            cell_record(rows=32, ours=1.00, inductor=2.0, Liger=0.5),
        ]
        losses = summarise(cells, 4000.0)["losses"]
        assert [(loss["vs_best"], loss["best"]) for loss in losses] == [
            (0.5, "Liger"),
            (0.97, INDUCTOR),
        ]

    def test_failures_of_ours_come_first(self):
        cell = cell_record(Liger=None, ours=None)
        for entry in cell["contenders"].values():
            entry["failure"] = "wrong"
        names = [failure["contender"] for failure in summarise([cell], 4000.0)["failures"]]
        assert names == [OURS, "Liger"]


class TestCell:
    """A contender that fails is recorded, and the others are timed."""

    @pytest.fixture
    def rivals(self, monkeypatch):
        """Adds contenders to every cell."""
        added = []

        def extended(what, peers, on_gpu):
            return [*contenders_of.contenders(what, peers, on_gpu=on_gpu), *added]

        monkeypatch.setattr(measuring, "contenders", extended)
        return added

    def entries(self, cell=Cell("add_rms_norm", 4, 64)):  # noqa: B008
        return measuring.measure_cell(cell, (), DryClock())["contenders"]

    def test_everyone_is_timed(self):
        entries = self.entries()
        assert list(entries) == [OURS, INDUCTOR, COPY]
        assert all(entry["cold_us"] and entry["failure"] is None for entry in entries.values())

    def test_one_that_raises(self, rivals):
        def raising(*operands):
            raise RuntimeError("no kernel image")

        rivals.append(Contender("broken", lambda: raising))
        entries = self.entries()
        assert entries["broken"]["failure"] == "RuntimeError: no kernel image"
        assert entries["broken"]["cold_us"] is None
        assert entries[OURS]["cold_us"]

    def test_a_launch_that_is_refused_is_forgotten_before_the_next(self, rivals):
        """CUDA keeps its error, and torch would raise it from the next contender's launch."""
        refused = []

        class Gpu(DryClock):
            def record(self, *arguments):
                if refused:
                    raise RuntimeError(refused[0])
                return super().record(*arguments)

            def forget_error(self):
                refused.clear()

        def refusing(*operands):
            refused.append("invalid argument")
            raise RuntimeError(refused[0])

        rivals.append(Contender("refused", lambda: refusing))
        cell = Cell("add_rms_norm", 4, 64)
        entries = measuring.measure_cell(cell, (), Gpu())["contenders"]
        assert entries["refused"]["failure"] == "RuntimeError: invalid argument"
        assert entries[COPY]["failure"] is None

    def test_one_that_breaks_when_it_is_timed_is_the_one_to_blame(self, rivals):
        """All were recorded and checked by then, the copy as the last."""

        class Gpu(DryClock):
            is_lost = False

            def samples(self, recording, rotation, count):
                if getattr(recording.call, "breaks", False):
                    self.is_lost = True
                    raise RuntimeError("an illegal memory access was encountered")
                return super().samples(recording, rotation, count)

            def synchronize(self):
                if self.is_lost:
                    raise RuntimeError("an illegal memory access was encountered")

        def breaking(*operands):
            return contenders_of._functional(*operands)

        breaking.breaks = True
        rivals.append(Contender("breaking", lambda: breaking))
        with pytest.raises(measuring.ContextLost) as lost:
            measuring.measure_cell(Cell("rms_norm", 4, 64), (), Gpu())
        record, name = lost.value.args
        assert name == "breaking"
        assert "illegal memory access" in record["contenders"]["breaking"]["failure"]

    def test_a_recording_keeps_what_it_reads(self, monkeypatch):
        """A CUDA graph replays with addresses; freed ones would hold other tensors by then."""
        graph = SimpleNamespace(replay=lambda: None)
        monkeypatch.setattr(CudaClock, "_captured", lambda self, body: graph)
        operand = torch.ones(4)
        reference = weakref.ref(operand)
        clock = object.__new__(CudaClock)
        recording = clock.record(lambda x: (x + 1,), [(operand,)], 1, None)
        del operand
        assert reference() is not None
        del recording
        assert reference() is None

    def test_one_that_writes_nothing(self, rivals):
        """The first call is right; the recorded one leaves the poison where it is."""
        what = subject(Cell("add_rms_norm", 4, 64))
        kept = []

        def forgetful(*operands):
            if len(kept) < 20:
                kept.append(what.eager(*operands))
                return kept[-1]
            return [torch.full_like(y, math.nan) for y in kept[0]]

        rivals.append(Contender("forgetful", lambda: forgetful))
        # The first call, and six recorded ones: three sets, two cycles.
        kept.extend([what.eager(*what.operands("cpu"))] * 13)
        entries = self.entries()
        assert entries["forgetful"]["failure"].startswith("wrong: its error is nan")
        assert entries["forgetful"]["cold_us"] is None
        json.dumps(entries, allow_nan=False)

    def test_one_that_writes_over_its_operands(self, rivals):
        def in_place(x, residual, weight):
            residual += x
            x.copy_(contenders_of._functional(residual, weight)[0])
            return x, residual

        adapt = contenders_of._cloned
        rivals.append(Contender("in place", lambda: in_place, adapt, overwrites=True))
        entries = self.entries()
        assert entries["in place"]["failure"] is None
        assert entries["in place"]["cold_us"]
        assert entries["in place"]["error"] < 0.1

    def test_ours_is_held_to_eagers_error(self, monkeypatch):
        def narrow(what, on_gpu):
            return lambda *operands: [y * (1 + 2**-6) for y in what.eager(*operands)]

        monkeypatch.setattr(contenders_of, "_ours", narrow)
        entry = self.entries()[OURS]
        assert "must be at most twice eager's" in entry["failure"]
        assert entry["cold_us"] is None


def test_no_panel_is_cut_off(tmp_path, monkeypatch):
    """The panels share an axis, which must reach the highest of all, not of the first."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    limits = []
    close = pyplot.close
    monkeypatch.setattr(
        pyplot, "close", lambda figure: (limits.append(figure.axes[0].get_ylim()), close(figure))
    )
    cells = [cell_record(ours=4.0, inductor=4.0), cell_record(ours=1.0, inductor=1.0)]
    cells[1]["width"] = 8192
    facts = {"gpu": "H200", "torch": "2.11"}
    record = {"cells": cells, "ceiling_gb_s": 2000.0, "environment": facts}
    plots.draw(record, tmp_path)
    ((bottom, top),) = limits
    assert bottom == 0
    assert top > 2.0


def test_colours_are_distinct():
    assert len(set(plots.STYLES.values())) == len(plots.STYLES)


class TestPrecompiling:
    @pytest.fixture(autouse=True)
    def restored(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
        yield
        copyreg.dispatch_table.pop(torch.memory_format, None)

    def test_choices_are_forgotten(self, tmp_path):
        (tmp_path / "ab").mkdir()
        for name in ("ab/x.best_config", "ab/x.py"):
            (tmp_path / name).write_text("")
        assert precompiling.forget_choices(tmp_path) == 1
        assert [path.name for path in (tmp_path / "ab").iterdir()] == ["x.py"]

    def test_in_a_process_of_its_own(self, tmp_path):
        """Cells are called there, and FlashInfer's absence is said."""
        precompiling.use_cache(tmp_path)
        cells = [Cell("rms_norm", 2, 64), Cell("add_rms_norm", 2, 64)]
        done = []
        report = precompiling.precompile(cells, 1, 300.0, done.append, device="cpu")
        assert (report["cells"], report["left"], report["failures"]) == (2, 0, {})
        assert done == [1, 2]
        assert report["flashinfer"].startswith("ModuleNotFoundError")

    def test_a_cell_that_cannot_be_compiled(self, monkeypatch):
        def failing(what):
            raise RuntimeError("no memory")

        monkeypatch.setattr(precompiling, "subject", failing)
        name = "rms_norm 2 x 64 bf16"
        assert precompiling.compile_cell(Cell("rms_norm", 2, 64), "cpu") == {
            name: "RuntimeError: no memory"
        }

    def test_keys_of_graphs_are_those_of_the_parent(self):
        """Python names a module that has a `torch` in it, another one in each process."""
        precompiling.share_cache_keys()
        with multiprocessing.get_context("spawn").Pool(1, precompiling.share_cache_keys) as pool:
            theirs = pool.apply(pickle.dumps, (torch.contiguous_format,))
        assert theirs == pickle.dumps(torch.contiguous_format)
        assert b"_memory_format" in theirs  # our function, not what happens to be imported first
        assert pickle.loads(theirs) is torch.contiguous_format
