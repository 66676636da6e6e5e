"""benchmarks/launches.py: what it tries, and what it makes of the times; without a GPU."""

import json
from importlib import import_module
from pathlib import Path

import pytest

from normfuse.cli.bench.cells import QK

WORDS = {"held", "half", "ahead", "beside", "streamed"}
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def candidates(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module("launch_candidates")


@pytest.fixture
def launches(candidates):
    return import_module("launches")


@pytest.mark.parametrize("preset", ["weak", "whole", "between", "reads"])
def test_every_candidate_can_be_launched(candidates, preset):
    for cell, tried in candidates.PRESETS[preset](list(candidates.OPS), None):
        assert len(set(tried)) == len(tried) > 0
        for rows, block, warps, reads in tried:
            assert block & (block - 1) == 0
            assert block * max(1, rows) >= 32 * warps, "every lane has an element"
            words = reads.split()
            assert set(words) <= WORDS
            assert rows or cell.op in QK


def test_the_weak_preset_tries_what_the_table_does_not_know(candidates):
    plan = candidates.weak(list(candidates.OPS), None)

    words = {word for _, tried in plan for one in tried for word in one.reads.split()}
    assert words >= {"half", "beside"}
    assert {(cell.op, cell.width) for cell, _ in plan} >= {
        ("rms_norm", 65536),
        ("rms_norm_add_rms_norm", 5120),
        ("modulated_rms_norm", 3584),
        ("qk_rms_norm_rope", 128),
    }


def test_dry_run(launches, tmp_path, capsys):
    out = tmp_path / "weak.json"

    launches.main(["--preset", "weak", "--dry-run", "--ops", "rms_norm", "--out", str(out)])

    record = json.loads(out.read_text())
    assert record["not_reached"] == []
    for cell in record["cells"]:
        assert {entry["wins"] for entry in cell["final"].values()} == {False}, "all times are equal"
        assert all(entry.get("is_right", True) for entry in cell["final"].values())
    assert "no gain" in capsys.readouterr().out


def test_an_entry_is_one_order_of_summing_for_few_rows_and_for_many(launches):
    """The fastest of either cell would be two orders, and a row's bits depend on its batch."""
    few = [[1.0, 1, 8192, 8, "held"], [1.1, 1, 2048, 8, "ahead held"]]
    many = [[5.0, 1, 2048, 8, "held"], [5.1, 1, 2048, 8, "ahead held"]]
    many += [[10.0, 1, 8192, 8, "held"], [4.0, 1, 1024, 8, "held"]]
    cells = {
        "few": {"ships_us": 1.1, "tries": few},
        "many": {"ships_us": 5.0, "tries": sorted(many)},
    }

    entry = launches._entry(cells)

    assert entry["order"] == (1, 2048, 8)
    assert entry["gain"] == pytest.approx(1.0)
    assert entry["reads"] == {"few": "ahead held", "many": "held"}
