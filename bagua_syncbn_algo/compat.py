"""Shims for versions of PyTorch, and every private function of PyTorch that this package calls.

Each says from which version on it exists, and what happens before.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Callable, Optional, TypeVar

import torch

__all__ = [
    "any_autocast",
    "aten_op_draws",
    "autocast_dtype",
    "current_node",
    "graph_task",
    "saved_tensors_hooks",
    "sequence_of",
    "uncompiled",
    "will_run",
]

_F = TypeVar("_F", bound=Callable[..., Any])

#: The id of the backward pass that this thread runs; -1 outside of one, and always before torch 2.0.
graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

#: The autograd node that this thread runs; ``None`` outside of one, and in versions without the function.
current_node: Callable[[], Any] = getattr(torch._C, "_current_autograd_node", lambda: None)

#: Whether the backward pass that runs will run a node; before torch 2.0 always yes.
will_run: Callable[[Any], bool] = getattr(torch._C, "_will_engine_execute_node", lambda node: True)

#: Whether autocast is on for any device; before torch 2.4 always yes, and :func:`autocast_dtype` decides.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

_top_hooks: Optional[Callable[[bool], Any]] = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def saved_tensors_hooks() -> Optional[Any]:
    """Returns the hooks that pack and unpack saved tensors; ``None`` without any, and in versions that do not tell."""
    return None if _top_hooks is None else _top_hooks(True)


def sequence_of(node: Any) -> int:
    """Returns the position of an autograd node in program order; 0 in versions that do not tell."""
    number: Optional[Callable[[], int]] = getattr(node, "_sequence_nr", None)
    return 0 if number is None else number()


@functools.lru_cache(maxsize=1024)
def aten_op_draws(name: str) -> Optional[bool]:
    """Returns whether an ATen operator draws random numbers; ``None`` if there is no operator of this name.

    Before torch 1.13, which is the first to tag its operators, never ``True``.
    """
    try:
        packet = getattr(torch.ops.aten, name)
    except (AttributeError, RuntimeError):
        return None
    tag = getattr(getattr(torch, "Tag", None), "nondeterministic_seeded", None)
    if tag is None:
        return False
    return any(tag in getattr(packet, overload).tags for overload in packet.overloads())


def autocast_dtype(device: str) -> Optional[torch.dtype]:
    """Returns the dtype to which autocast casts on a type of device; ``None`` where it is off."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except (AttributeError, TypeError):  # before torch 2.4
        if device == "cuda":
            return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


def uncompiled(function: _F) -> _F:
    """Excludes a function from torch.compile: communication with other ranks is no part of a graph."""
    disabled: Any = None

    @functools.wraps(function)
    def outer(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
            if disable is None:  # nobody compiles; importing the compiler takes seconds
                return function(*args, **kwargs)
            disabled = disable(function)
        return disabled(*args, **kwargs)

    outer._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outer  # type: ignore[return-value]
