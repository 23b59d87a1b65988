"""The pattern of a call: which arguments are constants of a graph, and which are its inputs."""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compat import autocast_dtype
from .module_state import CONSTANT_TYPES

__all__ = ["CallPattern"]


class CallPattern(NamedTuple):
    """The arguments of a call: constants, and slots for values that may differ between calls."""

    structure: Any  # the TreeSpec of (args, kwargs)
    constants: Tuple[Tuple[int, type, Any], ...]  # position, type and value of each constant leaf
    slots: Tuple[int, ...]  # index into the values, for each other leaf; a tensor passed twice has one index
    kinds: Tuple[type, ...]  # type of each value: Tensor, int or float
    autocast: Tuple[Optional[torch.dtype], ...]  # its dtype for CUDA and CPU; None where it is disabled

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Dict[str, Any]) -> Tuple[Optional[CallPattern], List[Any]]:
        """Returns the pattern of a call and its values; the pattern is ``None`` for leaves of unsupported types."""
        leaves, structure = pytree.tree_flatten((tuple(args), kwargs))
        values: List[Any] = []
        constants, slots = [], []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) or type(leaf) in (int, float):
                same = [i for i, value in enumerate(values) if value is leaf and isinstance(leaf, Tensor)]
                slots.append(same[0] if same else len(values))
                values += [] if same else [leaf]
            elif isinstance(leaf, CONSTANT_TYPES):
                constants.append((position, type(leaf), leaf))
            else:
                return None, values
        kinds = tuple(Tensor if isinstance(value, Tensor) else type(value) for value in values)
        autocast = autocast_dtype("cuda"), autocast_dtype("cpu")
        return cls(structure, tuple(constants), tuple(slots), kinds, autocast), values

    def fill(self, values: Sequence[Any]) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """Returns the positional and keyword arguments of a call with ``values``."""
        constants, rest = {position: value for position, _, value in self.constants}, iter(self.slots)
        leaves = [constants[i] if i in constants else values[next(rest)] for i in range(self.structure.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs
