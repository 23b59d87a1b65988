"""Guards: the properties of a module that a regrouped graph depends on, compared before each use of the graph."""

from __future__ import annotations

import weakref
from typing import Any, Tuple

import torch
from torch import nn

from ..layer import SyncBatchNorm
from .module_state import hooks_of

__all__ = ["Guard", "has_global_hooks"]


class Guard:
    """The properties of a module that a graph depends on: submodules, modes, tensor metadata and some hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = [(weakref.ref(part), self._state(part)) for part in module.modules()]

    def holds(self) -> bool:
        """Returns whether these properties are unchanged."""
        for reference, state in self._parts:
            part = reference()
            if part is None or self._state(part) != state:
                return False
        return True

    @property
    def is_dead(self) -> bool:
        """Whether a part of the module has been freed, after which :meth:`holds` is always false."""
        return any(reference() is None for reference, _ in self._parts)

    @classmethod
    def _state(cls, part: nn.Module) -> Tuple[Any, ...]:
        own = part.__dict__
        forward = own.get("forward")
        return (
            type(part),
            None if isinstance(part, SyncBatchNorm) else type(part).forward,  # tracing in any thread replaces it
            None if forward is None or getattr(forward, "regroups", False) else id(forward),
            part.training,
            [id(child) for child in own["_modules"].values()],
            [None if t is None else (t.dtype, t.device, t.requires_grad) for t in own["_parameters"].values()],
            [None if t is None else (t.dtype, t.device) for t in own["_buffers"].values()],
            cls._hooks(part),
        )

    @staticmethod
    def _hooks(part: nn.Module) -> Tuple[bool, ...]:
        if type(part).forward is SyncBatchNorm.forward:  # the round runs forward hooks of the layer
            before, _, *backward = hooks_of(part)
            return (before, *backward)
        if type(part).__module__.startswith("torch.nn.") and not part._modules:
            return ()  # the graph calls the module, which runs its hooks
        return hooks_of(part)


def has_global_hooks() -> bool:
    """Returns whether global module hooks are installed, which a graph does not run."""
    hooks = torch.nn.modules.module
    return any(
        getattr(hooks, name, None)
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    )
