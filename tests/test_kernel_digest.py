"""Which changes of the sources make a measurement of a kernel stale."""

import ast
import shutil

import pytest

from normfuse.ops.kernels import launches
from normfuse.tuning import digest, kernel_digest

OPS = ("rms_norm", "add_rms_norm", "qk_rms_norm_rope", "rms_norm_backward")


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A copy of the kernel files that a test may edit."""
    root = shutil.copytree(digest._ROOT, tmp_path / "kernels")
    monkeypatch.setattr(digest, "_ROOT", root)
    yield root
    forget()


def forget():
    kernel_digest.cache_clear()
    digest._definitions.cache_clear()


def changed(change):
    """The ops whose digests an edit changes."""
    forget()
    before = {op: kernel_digest(op) for op in OPS}
    change()
    forget()
    return {op for op in OPS if kernel_digest(op) != before[op]}


@pytest.mark.parametrize(
    ("file", "old", "new", "ops"),
    [
        ("rms_norm", "y_ptr += row * N", "y_ptr += row * (N + 1)", {"rms_norm"}),
        ("chunks", "index * BLOCK +", "BLOCK * index +", {"rms_norm", "add_rms_norm"}),
        ("slots", "SLOTS = 3", "SLOTS = 4", {"qk_rms_norm_rope"}),
        ("tile", "VECTOR_BYTES = 16 ", "VECTOR_BYTES = 8 ", {"rms_norm", "add_rms_norm"}),
        ("tile", "MAX_THREADS = 1024", "MAX_THREADS = 512", set(OPS[:3])),
    ],
)
def test_follows_the_code_that_an_op_reaches(sources, file, old, new, ops):
    path = sources / f"{file}.py"
    text = path.read_text()
    assert old in text
    assert changed(lambda: path.write_text(text.replace(old, new, 1))) == ops


def test_ignores_words_and_what_an_op_does_not_reach(sources):
    path = sources / "chunks.py"
    text = path.read_text()
    text = text.replace('"""The columns of one tile', '"""All columns of the tile')
    text = text.replace("    tiles = ()\n", "    # A comment.\n\n    tiles = ()\n")
    text += "\n\ndef for_another_op(x):\n    return columns(x)\n"
    assert text != path.read_text()
    assert changed(lambda: path.write_text(text)) == set()


def test_follows_the_launches_of_an_op_only(sources, monkeypatch):
    def replace(op, **fields):
        entries = tuple(one._replace(**fields) for one in launches.LAUNCHES[op])
        monkeypatch.setitem(launches.LAUNCHES, op, entries)

    assert changed(lambda: replace("rms_norm", num_warps=2)) == {"rms_norm"}
    assert changed(lambda: replace("rms_norm", speedups=(9.0, 9.0))) == set()
    assert changed(lambda: replace("rms_norm_add", num_warps=2)) == set()


def test_is_the_same_for_every_python():
    """Of a tree whose form differs between the versions that we run on."""
    (function,) = ast.parse("def f(x, *, y=1.0): return f'{x!r} {y}'").body
    assert digest._text(function) == (
        "FunctionDef(name='f' args=arguments(args=[arg(arg='x')] kwonlyargs=[arg(arg='y')] "
        "kw_defaults=[Constant(value=1.0)]) body=[Return(value=JoinedStr(values=["
        "FormattedValue(value=Name(id='x' ctx=Load()) conversion=114) Constant(value=' ') "
        "FormattedValue(value=Name(id='y' ctx=Load()) conversion=-1)]))])"
    )
