"""Which version of an op's kernel a measurement is of: a digest of the code that it comes from.

The code is followed from the op's launcher through every function, class and constant that it
names, in all kernel files. Of the table of launches, only the op's own entries count. Comments,
docstrings, the order of definitions and code that the op does not reach change nothing.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

_PACKAGE = "normfuse.ops.kernels"
_ROOT = Path(__file__).parent.parent / "ops" / "kernels"
_LAUNCHES = "launches"  # values that were measured, not code

Place = tuple[str, str]  # a kernel file and a name in it; the name "" is the file


class _Definition(NamedTuple):
    """A statement of a kernel file that gives a name its value.

    Attributes:
        text: the statement as code, without docstrings.
        named: what it names, in any kernel file.
    """

    text: str
    named: tuple[Place, ...]


@cache
def kernel_digest(op: str) -> str:
    """The digest of the kernel form of an op, such as "rms_norm"; "" if it has none."""
    if not (_ROOT / f"{op}.py").exists():
        return ""
    lines: list[str] = []
    tables: list[str] = []
    for file, name in sorted(_reached(op)):
        if file == _LAUNCHES:
            tables.append(name)
        else:
            lines += [f"{file}.{name} {one.text}" for one in _definitions(file).get(name, ())]
    words = {word for line in lines for word in line.split("'")[1::2]}
    lines += [f"{name} {_measured(name, words)}" for name in tables]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _reached(op: str) -> set[Place]:
    """Every name in the kernel files that the launcher of an op reaches."""
    pending, found = [(op, "launch")], set()
    while pending:
        file, name = place = pending.pop()
        if place not in found:
            found.add(place)
            if file != _LAUNCHES:
                pending += [up for one in _definitions(file).get(name, ()) for up in one.named]
    return found


@cache
def _definitions(file: str) -> dict[str, list[_Definition]]:
    """What gives each name of a kernel file its value, imports from other kernel files included."""
    body = ast.parse((_ROOT / f"{file}.py").read_text(encoding="utf-8")).body
    imports = [one for one in body if isinstance(one, ast.ImportFrom)]
    modules = dict(pair for one in imports for pair in _imported(one))
    found = {name: [_Definition("", (place,))] for name, place in modules.items() if place[1]}
    for statement in body:
        for name in _defined(statement):
            named = tuple(dict.fromkeys(_named(statement, file, modules)))
            found.setdefault(name, []).append(_Definition(_text(statement), named))
    return found


def _imported(statement: ast.ImportFrom) -> Iterator[tuple[str, Place]]:
    module = statement.module or ""
    for alias in statement.names:
        if module == _PACKAGE:
            yield alias.asname or alias.name, (alias.name, "")
        elif module.startswith(f"{_PACKAGE}."):
            yield alias.asname or alias.name, (module.removeprefix(f"{_PACKAGE}."), alias.name)


def _defined(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _named(statement: ast.stmt, file: str, modules: dict[str, Place]) -> Iterator[Place]:
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            yield file, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module, name = modules.get(node.value.id, ("", ""))
            if module and not name:  # `from normfuse.ops.kernels import rows`, then `rows.known`
                yield module, node.attr


def _text(node: Any) -> str:
    """A syntax tree without docstrings and places, the same in every version of Python."""
    if isinstance(node, list):
        return f"[{' '.join(map(_text, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name == "body" and isinstance(value, list):
            value = [one for one in value if not _is_docstring(one)]
        if value is not None and value != []:
            fields.append(f"{name}={_text(value)}")
    return f"{type(node).__name__}({' '.join(fields)})"


def _is_docstring(node: Any) -> bool:
    is_constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_constant and isinstance(node.value.value, str)


def _measured(name: str, words: set[str]) -> str:
    """A value of the table of launches; of what it says by op, only the ops among the words."""
    from normfuse.ops.kernels import launches

    value = getattr(launches, name)
    if isinstance(value, type):
        return ""
    if not isinstance(value, dict):
        return repr(value)
    own = {key: one for key, one in value.items() if key in words or isinstance(key, int)}
    return repr({key: _without_speedups(one) for key, one in own.items()})


def _without_speedups(entries: Any) -> Any:
    """Launches without what they gained when they were chosen, which changes no launch."""
    if not isinstance(entries, tuple):
        return entries
    return [one._replace(speedups=None) if hasattr(one, "speedups") else one for one in entries]
