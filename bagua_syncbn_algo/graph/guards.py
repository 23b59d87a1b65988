"""Guards: the properties of a module that a regrouped graph depends on, compared before each use of the graph."""

from __future__ import annotations

import weakref
from typing import Any, Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from ..layer import SyncBatchNorm
from .module_state import hooks_of

__all__ = ["Guard", "has_global_hooks"]


class Guard:
    """The properties of a module that a graph depends on: submodules, modes, tensor metadata and some hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [_Part(part) for part in module.modules()]

    def holds(self) -> bool:
        """Returns whether these properties are unchanged."""
        return all([part.is_unchanged() for part in self._parts])

    @property
    def is_dead(self) -> bool:
        """Whether a part of the module has been freed, after which :meth:`holds` is always false."""
        return any(part.reference() is None for part in self._parts)


class _Part:
    """The properties of one submodule. Every forward compares them, so that the comparison avoids new objects."""

    __slots__ = ("_buffers", "_children", "_class", "_forward", "_hooks", "_parameters", "_training", "reference")

    def __init__(self, part: nn.Module) -> None:
        own = part.__dict__
        self.reference = weakref.ref(part)
        self._class, self._forward, self._training = type(part), _forward_of(part), part.training
        self._children = tuple(map(id, own["_modules"].values()))
        self._parameters = _metadata(own["_parameters"])
        self._buffers = _metadata(own["_buffers"])
        self._hooks = _hooks_of(part)

    def is_unchanged(self) -> bool:
        part = self.reference()
        if part is None or type(part) is not self._class:
            return False
        own = part.__dict__
        return bool(
            own["training"] == self._training
            and _same(own["_parameters"], self._parameters)
            and _same(own["_buffers"], self._buffers)
            and tuple(map(id, own["_modules"].values())) == self._children
            and _forward_of(part) == self._forward
            and (not self._hooks or _hooks_of(part) == self._hooks)  # without any: a plain layer of torch.nn
        )


_Metadata = Optional[Tuple[torch.dtype, torch.device, bool]]


def _metadata(tensors: Dict[str, Optional[Tensor]]) -> Tuple[_Metadata, ...]:
    return tuple(None if t is None else (t.dtype, t.device, t.requires_grad) for t in tensors.values())


def _same(tensors: Dict[str, Optional[Tensor]], metadata: Tuple[_Metadata, ...]) -> bool:
    if len(tensors) != len(metadata):
        return False
    for tensor, expected in zip(tensors.values(), metadata):
        if tensor is None or expected is None:
            if tensor is not None or expected is not None:
                return False
        elif tensor.dtype != expected[0] or tensor.device != expected[1] or tensor.requires_grad != expected[2]:
            return False
    return True


def _forward_of(part: nn.Module) -> Tuple[Any, ...]:
    """Returns the forward of the class and that of the instance, if the latter is not a regrouped one."""
    own = part.__dict__.get("forward")
    instance = None if own is None or getattr(own, "regroups", False) else id(own)
    # Tracing in another thread replaces the forward of SyncBatchNorm for a moment.
    return (None if isinstance(part, SyncBatchNorm) else type(part).forward, instance)


def _hooks_of(part: nn.Module) -> Tuple[bool, ...]:
    """Returns the kinds of hooks that the graph does not run."""
    if type(part).forward is SyncBatchNorm.forward:  # the round runs forward hooks of the layer
        before, _, *backward = hooks_of(part)
        return (before, *backward)
    if not part.__dict__["_modules"] and type(part).__module__.startswith("torch.nn."):
        return ()  # the graph calls the module, which runs its hooks
    return hooks_of(part)


def has_global_hooks() -> bool:
    """Returns whether global module hooks are installed, which a graph does not run."""
    hooks = torch.nn.modules.module
    return any(
        getattr(hooks, name, None)
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    )
