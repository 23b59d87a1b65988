"""What is special about a model on this rank: hooks, for errors of ranks with different rounds, and its state."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Dict, Iterator, List, Optional, Sequence

import torch
from torch import nn

from ..ops.running_stats import digest_of_statistics
from .coalesce import plan_of
from .module_state import HOOKS

__all__ = ["Remarks", "State"]

_GLOBAL_HOOKS = ("_global_forward_pre_hooks", "_global_forward_hooks", "_global_backward_hooks")


class Remarks:
    """A function that lists the hooks of a model, and its modules that are not coalesced.

    Hooks on one rank only are the usual reason why ranks with the same model run different rounds.

    Args:
        module: the model. A weak reference is kept, and none in a copy.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module: Optional[weakref.ref[nn.Module]] = weakref.ref(module)

    def __getstate__(self) -> Dict[str, Any]:
        return {"_module": None}

    def __call__(self) -> List[str]:
        module = None if self._module is None else self._module()
        if module is None:
            return []
        lines = list(_hooks(module))
        with contextlib.suppress(Exception):  # remarks must not replace the error that they explain
            lines += [f"{name} is not coalesced because it {reason}" for name, reason in plan_of(module).skipped]
        return lines


class State:
    """A function that returns the digest of the running statistics of layers, before their first round.

    Args:
        layers: the layers. Weak references are kept, and none in a copy, whose digest is unknown.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]

    def __getstate__(self) -> Dict[str, Any]:
        return {"_layers": []}

    def __call__(self, process_group: Any) -> int:
        layers = [layer for layer in (reference() for reference in self._layers) if layer is not None]
        # Layers of other groups may have had rounds already.
        return digest_of_statistics([layer for layer in layers if layer.process_group is process_group])


def _hooks(module: nn.Module) -> Iterator[str]:
    for kind in _GLOBAL_HOOKS:
        for hook in getattr(torch.nn.modules.module, kind, {}).values():
            yield f"all modules have the {_words(kind)} {_name(hook)}"
    root = type(module).__name__
    for path, part in module.named_modules():
        for kind in HOOKS:
            for hook in (part.__dict__.get(kind) or {}).values():
                yield (
                    f"{root}.{path} has the {_words(kind)} {_name(hook)}"
                    if path
                    else (f"{root} has the {_words(kind)} {_name(hook)}")
                )


def _words(kind: str) -> str:
    """Returns e.g. ``forward pre hook`` for ``_forward_pre_hooks``."""
    return kind.strip("_").replace("_", " ")[:-1]


def _name(hook: Any) -> str:
    """Returns the name of a hook, which is equal on all ranks."""
    function = getattr(hook, "func", hook)  # of a functools.partial
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"
