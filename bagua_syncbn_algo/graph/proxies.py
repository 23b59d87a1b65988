"""The values of a trace."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from .module_state import UntraceableError
from .shapes import KNOWN_BY_SHAPE, UNKNOWN

__all__ = ["IN_PLACE_OPERATORS", "TracedValue"]


class TracedValue(fx.Proxy):
    """An fx proxy that records in-place operators as in-place, and refuses assignments to attributes of a tensor.

    With an example, a fake tensor, it answers questions about its shape with numbers.
    """

    _is_param = False  # for isinstance(x, nn.Parameter), which asks everything that claims to be a tensor

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "example"):
            raise UntraceableError(f"assigns to a tensor's attribute {name}")
        super().__setattr__(name, value)

    def _example(self) -> Any:
        return self.__dict__.get("example", UNKNOWN)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # `isinstance(x, Tensor)` is the question of a branch or an assertion
        return Tensor if isinstance(self._example(), Tensor) else TracedValue

    def __getattr__(self, name: str) -> Any:
        example = self._example()
        if name in KNOWN_BY_SHAPE and isinstance(example, Tensor):
            return getattr(example, name)
        return super().__getattr__(name)

    def __len__(self) -> int:
        example = self._example()
        return len(example) if isinstance(example, (Tensor, tuple, list)) else super().__len__()

    def __iter__(self) -> Any:
        example = self._example()
        if isinstance(example, (Tensor, tuple, list)):
            return (operator.getitem(self, index) for index in range(len(example)))
        return super().__iter__()


def _in_place(name: str) -> Any:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


IN_PLACE_OPERATORS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)

for _name in IN_PLACE_OPERATORS:
    setattr(TracedValue, f"__{_name}__", _in_place(_name))
