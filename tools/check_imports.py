"""Checks the import rules that import-linter cannot express. `make lint` runs it.

import-linter sees an external package only as a whole (torch, never torch._inductor) and makes no
difference between an import at module level and one inside a function. Four rules need both:

* only normfuse/passes/inductor.py touches torch._inductor, which is private and changes with every
  release of torch;
* only files under normfuse/ops/kernels/ import triton, so that the package works without it;
* other modules import normfuse.ops.kernels inside a function, for the same reason;
* a kernel file is Triton only: no torch.library, nothing of normfuse outside normfuse.ops.kernels.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ADAPTER = "normfuse.passes.inductor"
KERNELS = "normfuse.ops.kernels"


class Use(NamedTuple):
    """One dotted name that a module imports or spells out, and where."""

    name: str
    line: int
    is_import: bool
    is_lazy: bool  # inside a function, or only for the type checker


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _dotted(node: ast.expr) -> str | None:
    """`torch._inductor.config` as text; None for anything but a chain of plain names."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=owner, attr=attr):
            prefix = _dotted(owner)
            return prefix and f"{prefix}.{attr}"
    return None


def _imported_names(node: ast.stmt, package: str) -> list[str]:
    """What an import statement brings in; `from a import b` names `a.b`."""
    match node:
        case ast.Import(names=aliases):
            return [alias.name for alias in aliases]
        case ast.ImportFrom(module=module, names=aliases, level=level):
            owner = module or ""
            if level:
                parent = package.split(".")[: len(package.split(".")) - level + 1]
                owner = ".".join([*parent, *filter(None, [module])])
            return [f"{owner}.{alias.name}" for alias in aliases]
    return []


def _named_by_string(node: ast.expr) -> str | None:
    """`torch._inductor` of `importlib.import_module("torch._inductor")`."""
    match node:
        case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
            callee = (_dotted(func) or "").rpartition(".")[2]
            return name if callee in ("import_module", "__import__") else None
    return None


def uses(tree: ast.AST, package: str, is_lazy: bool = False) -> Iterator[Use]:
    """Every dotted name below `tree` that an import rule could be about."""
    for node in ast.iter_child_nodes(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                for name in _imported_names(node, package):
                    yield Use(name, node.lineno, True, is_lazy)
            case ast.If(test=test) if (_dotted(test) or "").endswith("TYPE_CHECKING"):
                yield from uses(node, package, is_lazy=True)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from uses(node, package, is_lazy=True)
            case ast.Attribute() if name := _dotted(node):
                yield Use(name, node.lineno, False, is_lazy)
            case ast.Call() if name := _named_by_string(node):
                yield Use(name, node.lineno, True, is_lazy)
            case _:
                yield from uses(node, package, is_lazy)


def complaint(module: str, use: Use) -> str | None:
    """The rule that `module` breaks by `use`, as what holds, what came and what to do."""
    in_kernels = _within(module, KERNELS)
    if _within(use.name, "torch._inductor") and module != ADAPTER:
        return (
            f"only {ADAPTER} may touch torch._inductor, got {use.name}: "
            "add what you need to that adapter and import it from there"
        )
    if _within(use.name, "triton") and use.is_import and not in_kernels:
        return (
            f"only files under normfuse/ops/kernels/ may import triton, got {use.name}: "
            "move the kernel there and import its launcher inside the function that calls it"
        )
    if _within(use.name, KERNELS) and use.is_import and not use.is_lazy and not in_kernels:
        return (
            f"{KERNELS} must be imported inside a function, got a module-level import of "
            f"{use.name}: the package has to import where there is no triton"
        )
    if in_kernels and _within(use.name, "torch.library"):
        return (
            f"a kernel file must not use torch.library, got {use.name}: "
            "register the op in normfuse/ops/, which imports the launcher"
        )
    is_ours = _within(use.name, "normfuse") and not _within(use.name, KERNELS)
    if in_kernels and use.is_import and is_ours and not use.is_lazy:
        return (
            f"a kernel file must import nothing of normfuse but {KERNELS}, got {use.name}: "
            "pass the value to the launcher as an argument"
        )
    return None


def check(path: Path, root: Path) -> Iterator[str]:
    """One line `path:line: complaint` for each broken rule in one file."""
    relative = path.relative_to(root)
    parts = relative.with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    package = module if is_package else module.rpartition(".")[0]
    for use in uses(ast.parse(path.read_text(encoding="utf-8"), str(path)), package):
        if sentence := complaint(module, use):
            yield f"{relative}:{use.line}: {sentence}"


def main() -> int:
    """Checks the whole package; 1 when a rule is broken."""
    files = sorted((ROOT / "normfuse").rglob("*.py"))
    found = [line for path in files for line in check(path, ROOT)]
    print("\n".join(found) or f"import rules hold in {len(files)} files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
