"""State of a module that a trace depends on or must not change: hooks, attributes, random numbers; clean copies."""

from __future__ import annotations

import builtins
import contextlib
import copy
import itertools
import random
import sys
import types
from collections import OrderedDict, deque
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from torch import Tensor, nn

__all__ = [
    "CONSTANT_TYPES",
    "DRAWS_RANDOM_NUMBERS",
    "FORWARD",
    "HOOKS",
    "MISSING",
    "ModuleSnapshot",
    "StateSnapshot",
    "UntraceableError",
    "attribute_of",
    "clean_copy",
    "has_own_forward",
    "hooks_of",
    "importing",
    "is_foreign",
    "plain_copy",
    "preserved_random_states",
    "replaced",
]

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
FORWARD = "_syncbn_forward"  # attribute of a module: its coalesced forward, also if other code wraps `forward`
MISSING = "an attribute that does not exist"
_MAX_ITEMS = 10000  # per container; later items are not compared
DRAWS_RANDOM_NUMBERS = "draws random numbers while it is traced"
CONSTANT_TYPES = (int, float, bool, str, type(None), torch.dtype, torch.device)
_HOOK_ATTRIBUTES = frozenset(name for name in nn.Module().__dict__ if "_hooks" in name)


def plain_copy(value: Any, depth: int = 4) -> Optional[Tuple[Any]]:
    """Returns a constant or a function, or a copy of a container of these; ``None`` for a value of another kind.

    The result is a tuple of one value.
    """
    if isinstance(value, (*CONSTANT_TYPES, types.FunctionType, types.BuiltinFunctionType, type)):
        return (value,)
    if depth == 0 or type(value) not in (list, tuple, set, frozenset, dict):
        return None
    copies = [plain_copy(item, depth - 1) for item in (value.values() if type(value) is dict else value)]
    items = [item[0] for item in copies if item is not None]
    if len(items) < len(copies):
        return None
    return (dict(zip(value, items)) if type(value) is dict else type(value)(items),)


class UntraceableError(Exception):
    """The error for a forward that cannot be traced faithfully. Its text is the reason."""


def hooks_of(module: nn.Module) -> Tuple[bool, ...]:
    """Returns whether a module has forward pre-hooks, forward hooks, backward hooks and backward pre-hooks."""
    return tuple(bool(module.__dict__.get(kind)) for kind in HOOKS)


def _original_class(part: nn.Module) -> type:
    """Returns the class of a module before FSDP2 or ``replicate`` replaced it by one that refuses ``deepcopy``."""
    kind: type = type(part)
    while str(getattr(vars(kind).get("__deepcopy__"), "__module__", "")).startswith("torch.distributed"):
        kind = next(each for each in kind.__mro__[1:] if issubclass(each, nn.Module))
    return kind


def _has_views(part: nn.Module) -> bool:
    """Returns whether parameters are views of a ``FlatParameter``, which refuse ``deepcopy``: in a forward of FSDP1."""
    tensors = (*part.__dict__["_parameters"].values(), *part.__dict__.values())
    views = [tensor for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_leaf]
    return any(getattr(tensor._base, "_is_flat_param", False) for tensor in views)


def _rebuilt(part: nn.Module, memo: Dict[int, Any]) -> nn.Module:
    """Returns a module of the original class with copied attributes and new parameters of the full shapes."""
    if id(part) in memo:
        known: nn.Module = memo[id(part)]
        return known
    kind: Any = _original_class(part)
    replica: nn.Module = kind.__new__(kind)
    memo[id(part)] = replica
    get_state: Any = getattr(part, "__getstate__", None)
    state: Dict[str, Any] = part.__dict__ if get_state is None else get_state()
    copies: Dict[str, Any] = {}
    for name, value in state.items():
        if name in ("_parameters", "_buffers"):
            copied: Any = {key: None if t is None else _like(t, memo) for key, t in value.items()}
        elif name == "_modules":
            copied = {key: None if child is None else _rebuilt(child, memo) for key, child in value.items()}
        elif isinstance(value, Tensor):
            copied = _like(value, memo)
        else:
            try:
                copied = copy.deepcopy(value, memo)
            except Exception:  # the wrapper's own state, such as process groups, which no forward uses
                copied = value
        copies[name] = copied
    replica.__setstate__(copies)
    return replica


def _like(tensor: Tensor, memo: Dict[int, Any]) -> Tensor:
    """Returns a tensor with the properties of a parameter or buffer, which may be sharded, and with its full shape."""
    if id(tensor) not in memo:
        if isinstance(tensor, nn.Parameter) or not tensor.is_leaf:
            generator = torch.Generator("cpu").manual_seed(tensor.numel())
            values = torch.randn(tensor.shape, generator=generator, device="cpu")
            copied: Tensor = nn.Parameter(values.to(tensor.device, tensor.dtype), tensor.requires_grad)
        else:
            copied = tensor.detach().clone()
        memo[id(tensor)] = copied
    known: Tensor = memo[id(tensor)]
    return known


def attribute_of(module: nn.Module, path: str) -> Any:
    """Returns the attribute of ``module`` at a path with dots, the target of a ``get_attr`` node."""
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def is_foreign(forward: Any) -> bool:
    """Returns whether a ``forward`` on the instance, or ``None``, was set by code other than this package."""
    return forward is not None and not getattr(forward, "regroups", False)


def has_own_forward(module: nn.Module) -> bool:
    """Returns whether code other than this package has set a ``forward`` on the instance."""
    return is_foreign(module.__dict__.get("forward"))


def clean_copy(module: nn.Module) -> nn.Module:
    """Returns a deep copy without hooks, without a ``forward`` set on an instance and without Bagua's state.

    A module that refuses to be copied, as those of FSDP do, is rebuilt: from its original class and attributes, with
    other values of parameters, which are the same in every copy.

    Raises:
        UntraceableError: if the module cannot be copied.
    """
    memo: Dict[int, Any] = {}
    for part in module.modules():
        for name, value in part.__dict__.items():
            if name in _HOOK_ATTRIBUTES and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
            elif name in ("forward", FORWARD, "bagua_ddp") and value is not None:
                memo[id(value)] = None
    try:
        if any(_original_class(part) is not type(part) or _has_views(part) for part in module.modules()):
            replica = _rebuilt(module, memo)
        else:
            replica = copy.deepcopy(module, memo)
    except Exception as error:
        raise UntraceableError(f"cannot be copied ({type(error).__name__}: {error})") from error
    pairs = itertools.zip_longest(module.modules(), replica.modules())
    if any(_original_class(part) is not type(copied) for part, copied in pairs):
        raise UntraceableError("has a __deepcopy__ whose copy has other submodules or classes")
    for part in replica.modules():
        for name in ("forward", FORWARD):
            if part.__dict__.get(name, 0) is None:
                del part.__dict__[name]
    return replica


class ModuleSnapshot:
    """The attributes of a module at one time."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(module.__dict__)
        self._contents = {name: _comparable(value) for name, value in module.__dict__.items()}
        self._containers = {
            name: copy.copy(value) for name, value in module.__dict__.items() if isinstance(value, (list, dict, set))
        }
        self._versions = {name: value._version for name, value in self._tensors()}

    def _tensors(self) -> List[Tuple[str, Tensor]]:
        own = self._module.__dict__
        groups = (own, own["_buffers"], own["_parameters"])
        return [(name, value) for group in groups for name, value in group.items() if isinstance(value, Tensor)]

    def difference(self) -> Optional[str]:
        """Returns the first change since the snapshot, in words; ``None`` without one."""
        now = self._module.__dict__
        for name in {**self._attributes, **now}:
            if now.get(name, self) is not self._attributes.get(name, self):
                return f"changes its attribute {name}"
            if self._contents[name] != _comparable(now[name]):
                return f"changes the contents of its attribute {name}"
        for name, value in self._tensors():
            if self._versions.get(name) != value._version:
                return f"changes its tensor {name}"
        return None

    def restore(self) -> None:
        """Restores the attributes and the contents of containers; tensors keep their values."""
        now = self._module.__dict__
        now.clear()
        now.update(self._attributes)
        for name, contents in self._containers.items():
            if self._contents[name] != _comparable(now[name]):
                now[name] = contents


class StateSnapshot:
    """The state that tracing a forward must not change: the module's attributes and the random number generators."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes, self._random = ModuleSnapshot(module), _random_states()

    def difference(self) -> Optional[str]:
        """Returns the first change since the snapshot, in words; ``None`` without one."""
        if not _equal(self._random, _random_states()):
            return DRAWS_RANDOM_NUMBERS
        return self._attributes.difference()

    def restore(self) -> None:
        """Restores the attributes and the random number generators."""
        self._attributes.restore()
        _set_random_states(self._random)


def _comparable(value: Any, depth: int = 4) -> Any:
    """Returns a value for later comparison: contents of containers and plain objects, else the identity."""
    if isinstance(value, (*CONSTANT_TYPES, bytes, complex)):
        return repr(value)
    opaque = (Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)
    if depth == 0 or isinstance(value, opaque):
        return id(value)
    if hasattr(value, "getstate"):  # random.Random
        return repr(value.getstate())
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().tolist())
    if hasattr(value, "bit_generator"):  # numpy.random.Generator
        return repr(value.bit_generator.state)
    if hasattr(value, "__next__"):  # an iterator of itertools, whose position is part of its text
        return repr(value)
    if isinstance(value, dict):
        return id(value), [
            (_comparable(key, 1), _comparable(item, depth - 1)) for key, item in list(value.items())[:_MAX_ITEMS]
        ]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return id(value), len(value), [_comparable(item, depth - 1) for item in list(value)[:_MAX_ITEMS]]
    return id(value), _comparable(getattr(value, "__dict__", None), depth - 1)


def _random_states() -> List[Any]:
    states: List[Any] = [torch.get_rng_state(), random.getstate()]
    numpy = sys.modules.get("numpy")
    states.append(None if numpy is None else numpy.random.get_state(legacy=False))
    states += torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return states


def _set_random_states(states: List[Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    if states[2] is not None:
        sys.modules["numpy"].random.set_state(states[2])
    if states[3:]:
        torch.cuda.set_rng_state_all(states[3:])


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return all(_equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return all(_equal(a, b) for a, b in zip(first, second))
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if hasattr(first, "tobytes"):  # the key array in numpy's state
        return bool((first == second).all())
    return bool(first == second)


@contextlib.contextmanager
def preserved_random_states() -> Iterator[None]:
    """Restores the states of the random number generators after the block."""
    states = _random_states()
    try:
        yield
    finally:
        _set_random_states(states)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute of a class or module during the block."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)  # the original is inherited
        else:
            setattr(owner, name, own)


def importing(import_module: Callable[..., Any], check: Callable[..., bool]) -> Callable[..., Any]:
    """Returns a replacement for ``__import__`` in a block that replaces ``isinstance``.

    Dynamo keeps the identities of builtin functions when it is imported, as a forward may do. If that was a replaced
    ``isinstance``, every call of the original one would break the graphs of this process.

    Args:
        import_module: the original ``__import__``.
        check: the original ``isinstance``, which imported code gets.
    """

    def imported(*args: Any, **kwargs: Any) -> Any:
        with replaced(builtins, "isinstance", check):
            return import_module(*args, **kwargs)

    return imported
