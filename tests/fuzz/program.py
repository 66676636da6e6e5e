"""An eager program as a small value, whose `repr` is Python that one can run."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st

_SEED = 0
_NAMES = {"torch": torch, "F": F}


@dataclass(frozen=True)
class Program:
    """The lines that make its inputs, those of its body, and the names of what it returns.

    Attributes:
        inputs: `name = expression`; later ones may read earlier ones, and so alias them.
        learned: the inputs that require a gradient; with none, the program is for inference.
        dynamic: capture with symbolic sizes and numbers.
    """

    inputs: tuple[str, ...]
    body: tuple[str, ...]
    results: tuple[str, ...]
    learned: tuple[str, ...] = ()
    dynamic: bool = False

    @property
    def source(self) -> str:
        lines = (*self.body, f"return {', '.join(self.results)},")
        body = "".join(f"    {line}\n" for line in lines)
        return f"def program({', '.join(_name(line) for line in self.inputs)}):\n{body}"

    def function(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The program; Dynamo and tracebacks find its source."""
        filename = f"<program {hash(self.source)}>"
        linecache.cache[filename] = (len(self.source), None, self.source.splitlines(True), filename)
        namespace = dict(_NAMES)
        exec(compile(self.source, filename, "exec"), namespace)
        return namespace["program"]

    def make_inputs(self) -> list[Any]:
        """The same values at every call, in new memory."""
        torch.manual_seed(_SEED)
        values = dict(_NAMES)
        for line in self.inputs:
            exec(line, values)
        for name in self.learned:
            values[name].requires_grad_()
        return [values[_name(line)] for line in self.inputs]

    def __repr__(self) -> str:
        names = ", ".join(_name(line) for line in self.inputs)
        lines = [
            "",
            "import torch",
            "import torch.nn.functional as F",
            "from normfuse.testing import capture",
            "",
            self.source,
            f"torch.manual_seed({_SEED})",
            *self.inputs,
            *(f"{name}.requires_grad_()" for name in self.learned),
            f"with torch.set_grad_enabled({bool(self.learned)}):",
        ]
        if self.dynamic:
            lines.append("    torch._dynamo.config.assume_static_by_default = False")
        call = f"    print(capture(program, lowering='op')({names}), program({names}))"
        return "\n".join([*lines, call, ""])


def _name(line: str) -> str:
    return line.split(" = ")[0]


class Writer:
    """Writes a program line by line, and runs each line, so that types and shapes are known.

    Args:
        draw: hypothesis's source of choices.
        plain: draw only what must be recognised; then `pick` and `chance` never choose the odd.
    """

    def __init__(self, draw: Callable[[Any], Any], *, plain: bool) -> None:
        self.draw = draw
        self.plain = plain
        self.is_training = self.chance(25, plain=True)
        self.values: dict[str, Any] = {}
        self.inputs: list[str] = []
        self.learned: list[str] = []
        self.body: list[str] = []

    def pick(self, *options: Any, odd: tuple[Any, ...] = ()) -> Any:
        return self.draw(st.sampled_from(odd if odd and self.chance(12) else options))

    def chance(self, percent: int, *, plain: bool = False) -> bool:
        """True that often; never in a plain program, unless it is `plain` itself."""
        return (plain or not self.plain) and self.draw(st.integers(0, 99)) >= 100 - percent

    def input(self, stem: str, expression: str, *, learnable: bool = False) -> str:
        name = self._free(stem)
        exec(f"{name} = {expression}", self._names(), self.values)
        self.inputs.append(f"{name} = {expression}")
        if learnable and self.is_training:
            self.values[name].requires_grad_()
            self.learned.append(name)
        return name

    def let(self, stem: str, expression: str) -> str:
        """Write `name = expression`; a lone name is taken as it is."""
        if expression in self.values:
            return expression
        name = self._free(stem)
        self.do(f"{name} = {expression}")
        return name

    def do(self, statement: str) -> None:
        """Write a statement; eager refuses some, and hypothesis then draws another program."""
        if not self.attempt(statement):
            reject()

    def attempt(self, statement: str) -> bool:
        """Write a statement unless eager refuses it, as it does a write to an expanded tensor."""
        try:
            with torch.set_grad_enabled(self.is_training):
                exec(statement, self._names(), self.values)
        except (RuntimeError, IndexError):
            return False
        self.body.append(statement)
        return True

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: v for name, v in self.values.items() if isinstance(v, torch.Tensor)}

    def finish(self, results: list[str]) -> Program:
        return Program(
            tuple(self.inputs),
            tuple(self.body),
            tuple(results),
            tuple(self.learned),
            self.chance(10),
        )

    def _free(self, stem: str) -> str:
        count = 1 + sum(name.rstrip("0123456789") == stem for name in self.values)
        return f"{stem}{count}"

    def _names(self) -> dict[str, Any]:
        return dict(_NAMES)
