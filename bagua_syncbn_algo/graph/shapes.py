"""Shapes of traced values, for forwards that ask for them: ``int(x.shape[-1])``, ``if x.shape[1] != 3``, ``len(x)``.

A first trace leaves shapes open, so that its graph serves inputs of any shape. A forward that turns a shape into a
Python number or a branch cannot be traced in this way. Its second trace computes every value on fake tensors, which
have a shape and no elements. The graph then serves inputs of the same shapes only.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, fx, nn

__all__ = [
    "KNOWN_BY_SHAPE",
    "UNKNOWN",
    "FakeValues",
    "has_fake_tensors",
    "is_evaluated",
    "is_plain_number",
    "shapes_of",
]

UNKNOWN = object()  # the example of a value that was not computed
#: Attributes and methods of a tensor that need no elements and return no tensor.
KNOWN_BY_SHAPE = frozenset(
    (
        *("shape", "ndim", "dtype", "device", "is_cuda", "layout", "size", "dim", "ndimension", "numel", "nelement"),
        *("stride", "is_contiguous", "is_floating_point", "is_complex", "element_size", "get_device"),
    )
)
_EVALUATED = ("torch", "_operator", "math", "builtins")  # modules whose functions have no effects besides their result


def has_fake_tensors() -> bool:
    """Returns whether this version of PyTorch has fake tensors (torch 2.0 and later)."""
    return hasattr(torch, "_subclasses") and hasattr(torch._subclasses, "FakeTensorMode")


def shapes_of(values: Sequence[Any], module: nn.Module) -> Tuple[Any, ...]:
    """Returns what a trace with fake tensors depends on: shapes, strides, dtypes and devices, and numbers.

    Args:
        values: the values of the call.
        module: the module, for the shapes and dtypes of its parameters and buffers.
    """
    own = tuple((tensor.shape, tensor.dtype) for tensor in (*module.parameters(), *module.buffers()))
    return own + tuple(
        (tuple(value.shape), value.stride(), value.dtype, value.device) if isinstance(value, Tensor) else value
        for value in values
    )


def is_plain_number(value: Any) -> bool:
    """Returns whether a value is no tensor and contains none: a number, a flag, a shape, a dtype or a device."""
    return isinstance(value, (bool, int, float, torch.Size, torch.dtype, torch.device))


class FakeValues:
    """Computes the values of a trace on fake tensors.

    Args:
        values: the values of the call.

    Attributes:
        inputs: the fake values of the call.
        busy: whether a computation runs, whose module calls must not be traced.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self._mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
        self.busy = False
        self.inputs = [self.of(value) for value in values]

    def of(self, value: Any) -> Any:
        """Returns the fake tensor of a tensor, a number as it is, and ``UNKNOWN`` for other values."""
        if not isinstance(value, Tensor):
            return value if is_plain_number(value) else UNKNOWN
        with self._computing():
            return self._mode.from_tensor(value.detach())

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns the result of a function of traced values; ``UNKNOWN`` if it cannot be computed on fake tensors."""
        missing: List[Any] = []

        def example(proxy: fx.Proxy) -> Any:
            found = proxy.__dict__.get("example", UNKNOWN)
            if found is UNKNOWN:
                missing.append(proxy)
            return found

        args, kwargs = (_map_proxies(each, example) for each in (args, kwargs))
        if missing:
            return UNKNOWN
        try:
            # Without gradients: activation checkpointing around the call counts the tensors that are saved.
            with self._computing(), torch.no_grad(), self._mode:
                return function(*args, **kwargs)
        except Exception:  # an operator without a rule for fake tensors, or one that reads elements
            return UNKNOWN

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        self.busy = True
        try:
            yield
        finally:
            self.busy = False


def _map_proxies(value: Any, example: Callable[[fx.Proxy], Any]) -> Any:
    if isinstance(value, fx.Proxy):
        return example(value)
    if isinstance(value, (list, tuple)):
        parts = [_map_proxies(part, example) for part in value]
        return type(value)(parts) if type(value) in (list, tuple) else parts
    if isinstance(value, dict):
        return {key: _map_proxies(part, example) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*(_map_proxies(part, example) for part in (value.start, value.stop, value.step)))
    return value


def is_evaluated(function: Any) -> bool:
    """Returns whether a function has no effects besides its result, so that it may be called on fake tensors."""
    module = getattr(function, "__module__", None) or ""
    return module.split(".")[0] in _EVALUATED
