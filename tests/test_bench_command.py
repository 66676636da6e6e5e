"""`python -m normfuse bench` from the command line, without a GPU."""

from pathlib import Path

import pytest
import torch

from normfuse.__main__ import main
from normfuse.cli.bench import measuring
from normfuse.cli.bench import record as records
from normfuse.cli.bench.cells import grid
from normfuse.cli.bench.peers import one_line
from normfuse.cli.bench.precompiling import forget_choices
from normfuse.cli.bench.summary import summarise


class TestCommand:
    @pytest.fixture
    def dry(self, tmp_path, capsys):
        """Runs `bench --dry-run`; its status, its record and what it printed."""

        def call(*arguments):
            out = tmp_path / "record.json"
            status = main(["bench", "--dry-run", "--out", str(out), *arguments])
            return status, records.read(out), capsys.readouterr().out

        return call

    def test_needs_a_gpu(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["bench"]) == 2
        assert "bench must have a CUDA device, got none" in capsys.readouterr().err

    def test_dry_run(self, dry):
        status, record, text = dry("--quick", "--ops", "add_rms_norm", "qk_rms_norm_rope")
        assert status == 0
        assert record["is_complete"]
        assert record["dry_run"]
        assert {cell["op"] for cell in record["cells"]} == {"add_rms_norm", "qk_rms_norm_rope"}
        assert len(record["environment"]["sources"]) == 16
        assert "dry run: the times are made up" in text
        assert text.index("no losses") < text.index("geometric means")

    def test_a_record_survives_writing(self, dry, tmp_path):
        _, record, _ = dry("--quick", "--ops", "l2_norm")
        records.write(record, tmp_path / "again.json")
        assert records.read(tmp_path / "again.json") == record
        assert summarise(record["cells"], record["ceiling_gb_s"]) == record["summary"]

    def test_lists_what_it_did_not_reach(self, dry):
        _, record, text = dry("--ops", "rms_norm", "--time-limit", "0.001")
        assert record["cells"] == []
        assert len(record["not_reached"]) == len(grid(["rms_norm"]))
        assert not record["is_complete"]
        assert "not reached" in text

    def test_resumes_a_record(self, dry, tmp_path):
        """The cells that it lacks, and one that broke; each cell says in which run it was taken."""
        _, first, _ = dry("--quick", "--ops", "rms_norm")
        names = [cell["name"] for cell in first["cells"]]
        broken = names[0]
        earlier = tmp_path / "earlier.json"
        records.write({**first, "cells": first["cells"][:2], "broken": {broken: "lost"}}, earlier)
        arguments = ("--quick", "--ops", "rms_norm", "--resume", str(earlier))

        status, record, _ = dry(*arguments)

        assert status == 0
        assert {cell["name"]: cell["run"] for cell in record["cells"]} == {
            name: 0 if name == names[1] else 1 for name in names
        }
        assert record["is_complete"]
        runs = [run["environment"]["command"] for run in record["runs"]]
        assert len(runs) == 2
        assert all(run["environment"]["date"] and run["seconds"] > 0 for run in record["runs"])
        again = summarise(record["cells"], record["ceiling_gb_s"])
        assert record["summary"] == again

    def test_does_not_resume_what_other_kernels_measured(self, dry, tmp_path, capsys):
        _, first, _ = dry("--quick", "--ops", "l2_norm")
        first["environment"] |= {"sources": "0123456789abcdef", "gpu": "H100"}
        earlier = tmp_path / "earlier.json"
        records.write(first, earlier)

        assert main(["bench", "--dry-run", "--resume", str(earlier)]) == 2

        complaint = capsys.readouterr().err
        assert "gpu was H100, is None" in complaint
        assert "sources was 0123456789abcdef, is " in complaint

    def test_plots_and_shows_a_record(self, dry, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        dry("--quick", "--ops", "rms_norm", "qk_rms_norm_rope")
        out, drawn = tmp_path / "record.json", tmp_path / "plots"
        assert main(["bench", "--show", str(out), "--plots", str(drawn)]) == 0
        assert "drawn: " in capsys.readouterr().out
        assert sorted(path.name for path in drawn.iterdir()) == [
            "qk_rms_norm_rope.png",
            "rms_norm.png",
        ]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn.iterdir())

    def test_two_shares_make_a_whole(self, dry, tmp_path, capsys):
        _, whole, _ = dry("--quick", "--ops", "rms_norm")
        parts = []
        for share in ("1/2", "2/2"):
            _, part, _ = dry("--quick", "--ops", "rms_norm", "--share", share)
            parts.append(tmp_path / f"{share[0]}.json")
            records.write(part, parts[-1])
        out = tmp_path / "both.json"

        assert main(["bench", "--show", *map(str, parts), "--out", str(out)]) == 0

        both = records.read(out)
        names = [{cell["name"] for cell in one["cells"]} for one in (whole, both)]
        assert names[0] == names[1]
        assert len(both["runs"]) == 2
        assert both["is_complete"]
        assert both["summary"] == summarise(both["cells"], both["ceiling_gb_s"])

    def test_goes_on_in_a_new_process_without_what_broke_the_context(self, dry, monkeypatch):
        """A process whose context is lost measures nothing more, whatever it measures."""
        measure, commands = measuring.measure_cell, []

        def fragile(cell, peers, clock, left_out=()):
            if "Inductor" in left_out:
                return measure(cell, peers, clock, left_out)
            entries = {name: {"failure": "lost"} for name in ("normfuse", "Inductor")}
            record = {**measure(cell, peers, clock), "contenders": entries}
            raise measuring.ContextLost(record, "Inductor")

        def restart(python, command):
            commands.append(command[3:])
            main(command[3:])

        monkeypatch.setattr(measuring, "measure_cell", fragile)
        monkeypatch.setattr("os.execv", restart)
        _, record, text = dry("--quick", "--ops", "rms_norm", "--time-limit", "600")

        assert [command[-2:] for command in commands] == [["--without", "rms_norm: Inductor"]]
        assert "going on without rms_norm: Inductor" in text
        found = {cell["contenders"]["Inductor"]["failure"] for cell in record["cells"]}
        assert found == {measuring.LEFT_OUT}
        assert not record["not_reached"]

    def test_does_not_join_what_other_kernels_measured(self, dry, tmp_path, capsys):
        _, first, _ = dry("--quick", "--ops", "l2_norm")
        other = tmp_path / "other.json"
        first["environment"]["sources"] = "0123456789abcdef"
        records.write(first, other)

        assert main(["bench", "--show", str(tmp_path / "record.json"), str(other)]) == 2
        assert "--show must put together runs on the same GPU" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("arguments", "complaint"),
        [
            (["--time-limit", "-1"], "--time-limit must be positive, got -1"),
            (["--cells", "nonsense"], "--cells must match some cell, got nonsense"),
            (["--show", "nowhere.json"], "--show must name a file, got nowhere.json"),
            (["--resume", "nowhere.json"], "--resume must name a file, got nowhere.json"),
        ],
    )
    def test_what_it_refuses(self, arguments, complaint, capsys):
        assert main(["bench", "--dry-run", *arguments]) == 2
        assert complaint in capsys.readouterr().err


def test_a_record_names_no_directory():
    said = RuntimeError('("/a/b-1/c.py":17:8): a/b is not https://x.org/y/z, as in\n /d/e.py')
    assert one_line(said) == (
        'RuntimeError: ("c.py":17:8): a/b is not https://x.org/y/z, as in e.py'
    )
    assert one_line(RuntimeError("/a/b " * 200)) == f"RuntimeError: {'b ' * 200}"[:300]
    command = "python -m normfuse bench --out=/a/b.json --cache /cache --share 1/2"
    assert records.without_directories(command) == (
        "python -m normfuse bench --out=b.json --cache cache --share 1/2"
    )


def test_choices_that_another_share_has_forgotten_are_no_error(tmp_path, monkeypatch):
    gone = tmp_path / "gone.best_config"
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: iter([gone]))
    assert forget_choices(tmp_path) == 1
