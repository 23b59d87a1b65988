"""Guards: the properties of a module that a regrouped graph depends on, compared before each use of the graph.

The comparison runs in every forward. Therefore it compares lists over all submodules, which are built without a Python
call per submodule, and leaves out what the graph finds in the module itself when it runs: hooks and attributes of plain
layers of ``torch.nn``, and the dtypes and devices of tensors.
"""

from __future__ import annotations

import weakref
from operator import attrgetter
from typing import Any, Dict, List, Mapping, Tuple

import torch
from torch import nn

from ..layer import SyncBatchNorm
from .module_state import HOOKS, MISSING, is_foreign

__all__ = ["Guard", "has_global_hooks"]

_GROUPS = ("_modules", "_parameters", "_buffers")
_REQUIRES_GRAD = attrgetter("requires_grad")


class Guard:
    """The properties of a module that a graph depends on.

    These are submodules, their classes and modes, which parameters are trained, some hooks, and the attributes that the
    traced forward has read; see :meth:`add_attributes`.
    """

    def __init__(self, module: nn.Module) -> None:
        parts = list(module.modules())
        self._parts = [weakref.ref(part) for part in parts]
        self._classes = list(map(type, parts))
        self._guarded = [index for index, part in enumerate(parts) if not _is_plain(part)]
        # Tracing in another thread replaces the forward of SyncBatchNorm for a moment.
        distinct: List[Any] = [each for each in dict.fromkeys(self._classes) if not issubclass(each, SyncBatchNorm)]
        self._distinct = distinct
        self._forwards = [each.forward for each in self._distinct]
        guarded = [parts[index] for index in self._guarded]
        self._hooks = [(index, kind) for index, part in enumerate(guarded) for kind in _guarded_hooks(part)]
        self._attributes: List[Tuple[int, str]] = []
        self._expected_values: List[Any] = []
        self._expected_types: List[type] = []
        self._expected = self._state([part.__dict__ for part in parts])

    def add_attributes(self, attributes: Mapping[int, Mapping[str, Any]]) -> None:
        """Adds attributes of submodules to the guard.

        Args:
            attributes: for the index of a submodule in ``module.modules()`` the names of attributes and their values,
                as ``plain_copy`` returns them; ``MISSING`` for an attribute that does not exist.
        """
        for index, values in attributes.items():
            self._attributes += [(index, name) for name in values]
            self._expected_values += values.values()
        self._expected_types = list(map(type, self._expected_values))

    @property
    def expected_attributes(self) -> List[Tuple[int, str, Any]]:
        """The index of the submodule, the name and the value of each attribute that the traced forward has read."""
        return [(*each, value) for each, value in zip(self._attributes, self._expected_values)]

    def holds(self) -> bool:
        """Returns whether these properties are unchanged."""
        parts = [reference() for reference in self._parts]
        if list(map(type, parts)) != self._classes:  # the type of a freed part is that of None
            return False
        own = [part.__dict__ for part in parts]
        values = [own[index].get(name, MISSING) for index, name in self._attributes]
        # Types, too: 1 equals True and 1.0, with which a forward may compute in another dtype.
        if values != self._expected_values or list(map(type, values)) != self._expected_types:
            return False
        return self._state(own) == self._expected and [each.forward for each in self._distinct] == self._forwards

    @property
    def is_dead(self) -> bool:
        """Whether a part of the module has been freed, after which :meth:`holds` is always false."""
        return any(part() is None for part in self._parts)

    def _state(self, everything: List[Dict[str, Any]]) -> List[Any]:
        """Returns the state of the submodules, from their dictionaries."""
        own = [everything[index] for index in self._guarded]
        children, parameters, buffers = ([each[name] for each in own] for name in _GROUPS)
        return [
            [each["training"] for each in everything],
            list(map(len, children)),
            list(map(len, buffers)),
            [b is None for each in buffers if each for b in each.values()],
            [id(child) for each in children if each for child in each.values()],
            list(map(len, parameters)),
            [None if p is None else _REQUIRES_GRAD(p) for each in parameters if each for p in each.values()],
            [(index, id(f)) for index, f in enumerate([each.get("forward") for each in own]) if is_foreign(f)],
            [not own[index].get(kind) for index, kind in self._hooks],
        ]


def _is_plain(part: nn.Module) -> bool:
    """Returns whether a submodule is a layer of ``torch.nn`` without parameters, which the graph only calls."""
    own = part.__dict__
    return _is_leaf(part) and not own["_parameters"] and not own["_buffers"]


def _is_leaf(part: nn.Module) -> bool:
    return not part.__dict__["_modules"] and type(part).__module__.startswith("torch.nn.")


def _guarded_hooks(part: nn.Module) -> Tuple[str, ...]:
    """Returns the kinds of hooks of a submodule that the graph does not run."""
    if type(part).forward is SyncBatchNorm.forward:  # the round runs forward hooks of the layer
        return tuple(kind for kind in HOOKS if kind != "_forward_hooks")
    return () if _is_leaf(part) else HOOKS  # the graph calls a leaf, which runs its hooks


def has_global_hooks() -> bool:
    """Returns whether global module hooks are installed, which a graph does not run."""
    hooks = torch.nn.modules.module
    return any(
        getattr(hooks, name, None)
        for name in ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
    )
