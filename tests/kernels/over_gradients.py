"""Launches that write their results over gradients, as compiled training steps do."""

from __future__ import annotations

from typing import Any

import torch

from normfuse.passes.memory import PLACES


class Over:
    """A kernel that writes over its gradients wherever the compiler may have it do so."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.places = PLACES.get(kernel.fn.__name__, {})

    def __getitem__(self, grid: Any) -> Any:
        def launch(*arguments: Any, **constants: Any) -> None:
            names = self.kernel.arg_names[: len(arguments)]
            operands = dict(zip(names, arguments, strict=True))
            written = dict(self._pairs(operands))
            assert written or not self.places, "no gradient is like a result"
            self.kernel[grid](*(written.get(name, operands[name]) for name in names), **constants)
            for result, gradient in written.items():
                operands[result].copy_(gradient)

        return launch

    def _pairs(self, operands: dict[str, Any]) -> Any:
        """(result, gradient): every result takes the place of another one."""
        free = {name: value for name, value in operands.items() if isinstance(value, torch.Tensor)}
        for result, gradients in self.places.items():
            for name in gradients:
                if result in free and name in free and _layout(free[name]) == _layout(free[result]):
                    yield result, free.pop(name)
                    break


def _layout(value: torch.Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.stride()
