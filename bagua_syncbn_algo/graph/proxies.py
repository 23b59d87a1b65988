"""The values of a trace."""

from __future__ import annotations

import operator
import sys
from typing import Any, Callable

from torch import Tensor, fx

from .module_state import UntraceableError
from .shapes import KNOWN_BY_SHAPE, UNKNOWN

__all__ = ["IN_PLACE_OPERATORS", "TracedValue", "checking_types"]


_EXEMPT = ("torch", __name__.split(".")[0])  # whose own code must see what a traced value is


class TracedValue(fx.Proxy):
    """An fx proxy that records in-place operators as in-place, and refuses assignments to attributes of a tensor.

    With an example, a fake tensor, it answers questions about its shape with numbers.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "example", "is_tensor"):
            raise UntraceableError(f"assigns to a tensor's attribute {name}")
        super().__setattr__(name, value)

    def _example(self) -> Any:
        return self.__dict__.get("example", UNKNOWN)

    @property
    def is_known_tensor(self) -> bool:
        """Whether the value is a tensor in every call of the graph's pattern."""
        return isinstance(self._example(), Tensor) or bool(self.__dict__.get("is_tensor"))

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


def checking_types(original: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """Returns an ``isinstance`` that takes a traced tensor for a tensor, outside of ``torch`` and of this package.

    The answer decides branches and assertions of a forward. A property ``__class__`` of the value would have the same
    effect, but also on code in C++, which would then read a tensor that does not exist.
    """

    def is_instance(value: Any, kind: Any) -> bool:
        if type(value) is TracedValue and (kind is Tensor or (type(kind) is tuple and Tensor in kind)):
            caller = str(sys._getframe(1).f_globals.get("__name__"))
            if caller.split(".")[0] not in _EXEMPT and value.is_known_tensor:
                return True
        return original(value, kind)

    return is_instance
