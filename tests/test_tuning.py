"""Tables of measurements: what they answer, and how they are kept."""

import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from normfuse import tuning
from normfuse.passes import choice
from normfuse.passes.region import key_of
from normfuse.settings import Settings
from normfuse.tuning import (
    MARGIN,
    Document,
    Entry,
    Key,
    Measurement,
    Rows,
    Table,
    Tables,
    bucket,
    kernel_digest,
    store,
)

KEY = Key("A GPU", "2.11", "rms_norm", ("f32 unit=f32 out=f32",), (4096,), "f32")
FASTER, TIED, SLOWER = 1.25, 1.02, 0.5


def measured(rows, speedup, *neighbours, share=1.0):
    return Entry(KEY, Measurement(rows, neighbours, 10.0 * speedup, 10.0, share))


def document(*entries, kernels=None):
    words = ("A GPU", "2.11.0+cu130", "3.6.0", "0.1", "2026-01-31", "a command")
    return Document(*words, entries, {"rms_norm": kernel_digest("rms_norm"), **(kernels or {})})


def wins(table, rows, *neighbours, margin=MARGIN, key=KEY):
    verdict = table.verdict(key, rows, neighbours, margin)
    return None if verdict is None else verdict.wins


class TestVerdict:
    def test_the_kernel_wins_beyond_the_margin_only(self):
        for speedup, won in [(FASTER, True), (TIED, False), (1 + MARGIN, False), (SLOWER, False)]:
            assert wins(Table([measured(64, speedup)]), Rows.exactly(64)) is won

    def test_the_margin_is_the_callers(self):
        table = Table([measured(64, TIED)])
        assert wins(table, Rows.exactly(64), margin=0.01)
        assert not wins(table, Rows.exactly(64), margin=0.05)

    def test_a_gain_of_a_whole_model_is_that_of_a_share(self):
        assert wins(Table([measured(64, TIED, share=0.33)]), Rows.exactly(64))
        assert not wins(Table([measured(64, TIED, share=1.0)]), Rows.exactly(64))

    def test_sites_pay_together_for_the_tables_that_they_read(self):
        table = Table([Entry(KEY, Measurement(64, (), 3.0, 4.0, tables_us=2.0))])

        def verdict(sites):
            return table.verdict(KEY, Rows.exactly(64), (), MARGIN, sites)

        assert [verdict(sites).wins for sites in (1, 2, 3, 32)] == [False, False, True, True]
        assert [verdict(sites).decisive.triton_us for sites in (1, 2, 4)] == [4.0, 3.0, 2.5]
        assert table.winners("A GPU", "2.11", MARGIN) == [KEY]

    def test_an_empty_table_says_nothing(self):
        assert wins(Table(), Rows.exactly(64)) is None

    @pytest.mark.parametrize(
        "changed",
        [
            {"device": "Another GPU"},
            {"torch": "2.12"},
            {"op": "l2_norm"},
            {"parameters": ("f32 unit=f32 weight=f32 out=f32",)},
            {"widths": (2048,)},
            {"dtype": "bf16"},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_every_part_of_the_key_counts(self, changed):
        table = Table([measured(64, FASTER)])
        assert wins(table, Rows.exactly(64)) is True
        assert wins(table, Rows.exactly(64), key=KEY._replace(**changed)) is None

    def test_a_bucket_is_a_power_of_two(self):
        assert [bucket(rows) for rows in (0, 1, 2, 3, 4, 5, 4096, 4097)] == [
            *(1, 1, 2, 4, 4, 8, 4096, 8192)
        ]

    def test_rows_of_one_bucket_share_a_measurement(self):
        table = Table([measured(500, FASTER)])
        assert wins(table, Rows.exactly(257))
        assert wins(table, Rows.exactly(512))
        assert wins(table, Rows.exactly(513)) is None
        assert wins(table, Rows.exactly(256)) is None

    @pytest.mark.parametrize(
        ("low", "high", "won"),
        [(FASTER, FASTER, True), (FASTER, SLOWER, False), (SLOWER, FASTER, False)],
    )
    def test_rows_between_two_buckets_must_win_in_both(self, low, high, won):
        table = Table([measured(64, low), measured(1024, high)])
        assert wins(table, Rows.exactly(200)) is won

    def test_far_apart_buckets_say_nothing_of_what_is_between(self):
        table = Table([measured(64, FASTER), measured(2048, FASTER)])
        assert wins(table, Rows.exactly(200)) is None

    def test_the_worst_row_count_is_named(self):
        table = Table([measured(64, FASTER), measured(1024, TIED)])
        verdict = table.verdict(KEY, Rows.exactly(200), (), MARGIN)
        assert (verdict.decisive.rows, verdict.asked) == (1024, 2)

    def test_a_newer_measurement_replaces_an_older(self):
        table = Table([measured(64, FASTER), measured(60, SLOWER)])
        assert wins(table, Rows.exactly(64)) is False
        assert len(table) == 1


class TestSymbolicRows:
    def test_win_where_every_bucket_of_the_range_wins(self):
        table = Table([measured(rows, FASTER) for rows in (16, 64, 1024)])
        assert wins(table, Rows(2, 64, 2**62))

    def test_lose_where_one_bucket_of_the_range_loses(self):
        table = Table([measured(16, FASTER), measured(64, FASTER), measured(1024, SLOWER)])
        assert wins(table, Rows(2, 64, 2**62)) is False
        assert wins(table, Rows(2, 64, 512)) is True

    def test_need_a_measurement_at_the_hint(self):
        assert wins(Table([measured(16, FASTER)]), Rows(2, 64, 2**62)) is None


class TestNeighbours:
    def test_fewer_than_measured_do_no_harm_to_the_kernel(self):
        table = Table([measured(64, FASTER, "after add", "before mul")])
        assert wins(table, Rows.exactly(64), "before mul")
        assert wins(table, Rows.exactly(64))

    def test_others_than_measured_need_a_measurement(self):
        table = Table([measured(64, FASTER, "before mul")])
        assert wins(table, Rows.exactly(64), "after add") is None
        assert wins(table, Rows.exactly(64), "before mul", "before mul") is None

    def test_the_closest_measurement_decides(self):
        table = Table([measured(64, FASTER, "after add"), measured(64, SLOWER)])
        assert wins(table, Rows.exactly(64)) is False
        assert wins(table, Rows.exactly(64), "after add") is True


class TestDocument:
    def test_comes_back_as_it_was(self):
        written = document(measured(64, FASTER), measured(1, TIED, "after add", share=0.5))
        assert Document.parse(written.text()) == written

    def test_has_one_line_for_each_entry(self):
        lines = document(measured(64, FASTER), measured(1, TIED)).text().splitlines()
        assert [line.lstrip()[:5] for line in lines].count('{"op"') == 2

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "Expecting"),
            ("[]", "schema 1, got schema None"),
            ('{"schema": 2}', "schema 1, got schema 2"),
            ('{"schema": 1}', "every field of its schema, got KeyError 'device'"),
        ],
    )
    def test_anything_else_is_refused(self, text, message):
        with pytest.raises(ValueError, match=message):
            Document.parse(text)

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("triton_us", 0, "times and rows above 0"),
            ("rows", -1, "times and rows above 0"),
            ("share", 0, "above 0 and at most 1"),
            ("unheard_of", 1, "every field of its schema"),
        ],
    )
    def test_an_impossible_entry_is_refused(self, field, value, message):
        text = json.loads(document(measured(64, FASTER)).text())
        text["entries"][0][field] = value
        with pytest.raises(ValueError, match=message):
            Document.parse(json.dumps(text))


class TestUsersTable:
    def test_another_process_reads_what_one_has_measured(self, tmp_path):
        first = Tables(tmp_path, shipped=tmp_path / "none")
        first.add(document(measured(64, FASTER)))
        second = Tables(tmp_path, shipped=tmp_path / "none")
        assert wins(second.table, Rows.exactly(64))
        assert first.digest() == second.digest()

    def test_the_users_own_measurement_replaces_the_shipped_one(self, tmp_path):
        shipped = tmp_path / "shipped"
        store.replace_file(shipped / "table.json", document(measured(64, FASTER)).text())
        store.write(document(measured(64, SLOWER)), tmp_path / "own")
        assert wins(Tables(tmp_path / "own", shipped).table, Rows.exactly(64)) is False
        assert wins(Tables(tmp_path / "empty", shipped).table, Rows.exactly(64)) is True

    def test_every_change_changes_the_digest(self, tmp_path):
        tables = Tables(tmp_path)
        digests = [tables.digest()]
        for entry in (measured(64, FASTER), measured(64, SLOWER), measured(1, FASTER)):
            tables.add(document(entry))
            digests.append(tables.digest())
        assert len(set(digests)) == len(digests)
        assert Tables(tmp_path).digest() == digests[-1]

    @pytest.mark.parametrize("damage", ["", "{", "[1, 2]", "\0\0\0", '{"schema": 99}'])
    def test_a_damaged_file_is_ignored_with_a_line_in_the_log(self, tmp_path, caplog, damage):
        store.write(document(measured(64, FASTER)), tmp_path)
        (tmp_path / "damaged.json").write_text(damage)
        with caplog.at_level(logging.WARNING, "normfuse"):
            tables = Tables(tmp_path)
        assert wins(tables.table, Rows.exactly(64))
        (record,) = caplog.records
        assert f"the table {tmp_path / 'damaged.json'} is ignored" in record.getMessage()

    def test_a_directory_that_cannot_be_written_costs_only_the_memory(self, tmp_path, caplog):
        (tmp_path / "file").touch()
        tables = Tables(tmp_path / "file" / "below")
        with caplog.at_level(logging.WARNING, "normfuse"):
            tables.add(document(measured(64, FASTER)))
        assert wins(tables.table, Rows.exactly(64))
        assert "the measurement of rms_norm is not kept" in caplog.text

    def test_writers_at_the_same_time_lose_nothing(self, tmp_path):
        entries = [measured(2**power, FASTER) for power in range(16)] * 4
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda entry: store.write(document(entry), tmp_path), entries))
        assert len(Tables(tmp_path, shipped=tmp_path / "none").table) == 16
        assert not list(tmp_path.glob(".*"))

    def test_two_processes_at_the_same_time_lose_nothing(self, tmp_path):
        code = (
            "import sys; from pathlib import Path; from normfuse.tuning import store;"
            "from tests.test_tuning import document, measured;"
            "[store.write(document(measured(2**n, 1.25)), Path(sys.argv[1])) for n in range(8, 16)]"
        )
        other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
        while other.poll() is None:
            for power in range(8):
                store.write(document(measured(2**power, FASTER)), tmp_path)
            time.sleep(0.01)
        assert other.returncode == 0
        assert len(Tables(tmp_path, shipped=tmp_path / "none").table) == 16

    @pytest.mark.parametrize(
        ("variables", "root"),
        [
            ({"NORMFUSE_CACHE_DIR": "/own"}, "/own"),
            ({"XDG_CACHE_HOME": "/cache"}, "/cache/normfuse"),
            ({"HOME": "/hers"}, "/hers/.cache/normfuse"),
        ],
    )
    def test_where_it_is(self, monkeypatch, variables, root):
        for name in ("NORMFUSE_CACHE_DIR", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(store.user_directory()) == f"{root}/tuning/{store.ops_digest()}"

    def test_a_process_reads_each_directory_once(self, monkeypatch, tmp_path):
        monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path))
        assert tuning.tables() is tuning.tables()
        monkeypatch.setenv("NORMFUSE_CACHE_DIR", str(tmp_path / "other"))
        assert tuning.tables().directory.is_relative_to(tmp_path / "other")


class TestStaleMeasurements:
    """Shipped measurements of a kernel that has changed since."""

    @pytest.fixture
    def shipped(self, tmp_path):
        def write(**kernels):
            path = tmp_path / "shipped" / "table.json"
            store.replace_file(path, document(measured(64, FASTER), kernels=kernels).text())
            return Tables(tmp_path / "own", path.parent)

        return write

    def test_decide_nothing(self, shipped):
        assert wins(shipped().table, Rows.exactly(64)) is True
        tables = shipped(rms_norm="of another kernel")
        assert wins(tables.table, Rows.exactly(64)) is None
        assert [entry.key for entry in tables.stale] == [KEY]

    def test_include_those_of_an_unknown_kernel(self, shipped, tmp_path):
        shipped()
        path = tmp_path / "shipped" / "table.json"
        head = json.loads(path.read_text())
        del head["kernels"]
        path.write_text(json.dumps(head))
        assert wins(Tables(tmp_path / "own", path.parent).table, Rows.exactly(64)) is None

    def test_are_replaced_by_new_ones(self, shipped):
        tables = shipped(rms_norm="of another kernel")
        assert not tables.table.knows(KEY, Rows.exactly(64), ())
        tables.add(document(measured(64, FASTER)))
        assert wins(tables.table, Rows.exactly(64)) is True

    def test_are_named_in_the_report(self, monkeypatch, tmp_path):
        pytest.importorskip("triton")
        from tests.test_choice import site

        node, path = site(64), tmp_path / "shipped" / "table.json"
        key = key_of(node, "A GPU")
        entry = Entry(key, Measurement(64, (), 20.0, 10.0))
        head = ("A GPU", torch.__version__, "3.6.0", "0.1", "2026-01-31", "a command")
        monkeypatch.setattr(choice, "device_name", lambda device: "A GPU")

        def chosen(node, kernel):
            store.replace_file(path, Document(*head, (entry,), {"rms_norm": kernel}).text())
            tables = Tables(tmp_path / "own", path.parent)
            monkeypatch.setattr(tuning, "tables", lambda: tables)
            return choice.choose(node, Settings("auto", tune="cached"))

        assert chosen(node, kernel_digest("rms_norm"))[0] == "triton"
        assert chosen(node, "another") == (
            "inline",
            "measured with another version of the kernel: run `python -m normfuse tune`",
        )
        assert chosen(site(16384), "another")[1].startswith("not measured on A GPU")


def test_shipped_tables_are_whole(caplog):
    paths = sorted(store.SHIPPED.glob("*.json"))
    documents = store.read(store.SHIPPED)
    assert len(documents) == len(paths) > 0
    for path, found in zip(paths, documents, strict=True):
        assert found.text() == path.read_text(), f"{path.name} is not as Document.text() writes it"
        assert found.command, path.name
        assert found.entries, path.name
        assert found.kernels.keys() == {entry.key.op for entry in found.entries}, path.name
