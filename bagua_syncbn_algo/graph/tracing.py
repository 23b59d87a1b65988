"""Faithful tracing: a graph of what a module's forward does, or the reason why there is none.

``torch.fx`` drops or bakes in much without a word: contexts, random choices, changes to attributes, hooks, in-place
arithmetic. Each of these is looked for here. A submodule whose forward cannot be traced faithfully stays one opaque
step of the graph around it, and is named.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import operator
import threading
import time
import weakref
from collections import OrderedDict
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..layer import SyncBatchNorm
from .module_state import (
    DRAWS,
    SIMPLE,
    ModuleState,
    StateWatch,
    UntraceableError,
    clean_copy,
    has_own_forward,
    hooks_of,
    random_states_kept,
)

__all__ = [
    "IN_PLACE_OPERATORS",
    "CallPattern",
    "Trace",
    "normalize_standalone",
    "trace",
]

_LOCK = threading.RLock()  # tracing changes torch.nn.Module while it runs
_ATTEMPTS = 3  # where random numbers were drawn, perhaps by another thread
_FUNCTION = "applies an autograd function of its own"
_is_grad_enabled = torch.is_grad_enabled  # which tracing takes away from others


class CallPattern(NamedTuple):
    """How a forward is called: which arguments may differ from call to call, and what the others are."""

    structure: Any  # of the arguments, as torch.utils._pytree has it
    constants: Tuple[Tuple[int, type, Any], ...]  # leaves that are the same in every call: position, type, value
    slots: Tuple[int, ...]  # of each other leaf: which of the call's values it is; a tensor may be there twice
    kinds: Tuple[type, ...]  # of the values: Tensor, int or float
    autocast: Tuple[bool, ...]  # on CUDA, on the CPU

    @classmethod
    def of(cls, args: Sequence[Any], kwargs: Dict[str, Any]) -> Tuple[Optional[CallPattern], List[Any]]:
        """Returns the pattern of a call and its values; ``None`` if there are some that no pattern can hold."""
        leaves, structure = pytree.tree_flatten((tuple(args), kwargs))
        values: List[Any] = []
        constants, slots = [], []
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) or type(leaf) in (int, float):
                known = [i for i, value in enumerate(values) if value is leaf and isinstance(leaf, Tensor)]
                slots.append(known[0] if known else len(values))
                values += [] if known else [leaf]
            elif isinstance(leaf, SIMPLE):
                constants.append((position, type(leaf), leaf))
            else:
                return None, values
        kinds = tuple(Tensor if isinstance(value, Tensor) else type(value) for value in values)
        return cls(structure, tuple(constants), tuple(slots), kinds, _autocast()), values

    def fill(self, values: Sequence[Any]) -> Tuple[Tuple[Any, ...], Dict[str, Any]]:
        """Returns the arguments of a call with these values."""
        constants, rest = {position: value for position, _, value in self.constants}, iter(self.slots)
        leaves = [constants[i] if i in constants else values[next(rest)] for i in range(self.structure.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure)
        return args, kwargs


def _autocast() -> Tuple[bool, ...]:
    try:
        cpu = torch.is_autocast_enabled("cpu")
    except TypeError:  # before torch 2.4
        cpu = torch.is_autocast_cpu_enabled()
    return torch.is_autocast_enabled(), cpu


class Trace(NamedTuple):
    """What tracing found."""

    graph: fx.Graph  # takes the call's values, returns the leaves of the output
    outputs: Any  # the structure of the output, as torch.utils._pytree has it
    opaque: Dict[str, str]  # paths of submodules that stay one step, and why
    uncoalesced: Dict[str, str]  # paths of SyncBatchNorm layers that must run by themselves, and why
    replica: nn.Module  # the copy that was traced


def normalize_standalone(layer: SyncBatchNorm, input: Tensor) -> Tensor:
    """What a layer of a subclass does within its own forward: stands in traced graphs."""
    return SyncBatchNorm.forward(layer, input)


def trace(module: nn.Module, pattern: CallPattern) -> Trace:
    """Traces ``module.forward`` for calls of ``pattern``, in the modes (training, evaluation) that its parts are in.

    The module itself is never run: a replica of it is.

    Raises:
        UntraceableError: if the forward of ``module`` itself cannot be traced.

    Collectives:
        None.
    """
    for attempt in range(_ATTEMPTS):
        with contextlib.suppress(_RandomError):
            return _trace(module, pattern, last=attempt == _ATTEMPTS - 1)
    raise AssertionError("the last attempt says why")


class _RandomError(Exception):
    """Random numbers were drawn: by the forward, or by another thread meanwhile."""


def _trace(module: nn.Module, pattern: CallPattern, last: bool) -> Trace:
    replica = clean_copy(module)
    pairs = list(zip(module.modules(), replica.modules()))
    hooks = {replica_: hooks_of(part) for part, replica_ in pairs}
    tracer = _Tracer(pattern, hooks, [replica_ for part, replica_ in pairs if has_own_forward(part)])
    with _LOCK, random_states_kept(), torch.enable_grad(), tracer.watching():
        everything = {part: ModuleState(part) for part in replica.modules()}
        here = StateWatch(replica)
        try:
            graph = tracer.trace(replica)
        except Exception as error:
            raise UntraceableError(tracer.reason(error)) from error
        reason = here.difference() or next(filter(None, (s.difference() for s in everything.values())), None)
        if reason is None and tracer.swallowed:
            reason = tracer.swallowed[0]
        if reason is None and tracer.has_leaked():
            reason = "keeps a tensor of its forward, in a global, a default argument or an object of its own"
    if DRAWS in (reason, *tracer.opaque.values()) and not last:
        raise _RandomError
    if reason is not None:
        raise UntraceableError(reason)
    return Trace(graph, tracer.outputs, tracer.opaque, tracer.uncoalesced, replica)


class _Proxy(fx.Proxy):
    """A traced value. Unlike fx's own it keeps in-place arithmetic in place, and refuses to be changed unseen."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer"):
            raise UntraceableError(f"assigns to a tensor's attribute {name}")
        super().__setattr__(name, value)


def _in_place(name: str) -> Any:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


IN_PLACE_OPERATORS = (
    *("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
)

for _name in IN_PLACE_OPERATORS:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self, pattern: CallPattern, hooks: Dict[nn.Module, Tuple[bool, ...]], overridden: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        self._pattern, self._hooks, self._overridden = pattern, hooks, set(overridden)
        self._proxies: List[weakref.ref[Any]] = []
        self.outputs: Any = None
        self.opaque: Dict[str, str] = {}
        self.uncoalesced: Dict[str, str] = {}
        self._thread = threading.get_ident()  # others that run modules meanwhile are not to be traced
        self.swallowed: List[str] = []  # reasons raised, which the module's own code may have caught

    # -- what fx asks -----------------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Tuple[Any, List[Any]]:
        pattern = self._pattern
        values = [self.create_proxy("placeholder", f"value_{i}", (), {}) for i in range(len(pattern.kinds))]
        args, kwargs = pattern.fill(values)
        given = pytree.tree_flatten((args, kwargs))[0]

        def call() -> List[Any]:
            leaves, self.outputs = pytree.tree_flatten(root_fn(self.root, *args, **kwargs))
            now, structure = pytree.tree_flatten((args, kwargs))
            if structure != pattern.structure or any(a is not b for a, b in zip(now, given)):
                self.refuse("changes its arguments")
            for leaf in leaves:
                if not isinstance(leaf, (fx.Proxy, Tensor, *SIMPLE)):
                    self.refuse(f"returns a {type(leaf).__name__}")
            return leaves

        return call, []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if not _is_grad_enabled():  # as it is inside of one, however it was called
            self.refuse(_FUNCTION)
        proxy = _Proxy(node, self)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def has_leaked(self) -> bool:
        """Whether the forward has left traced values anywhere."""
        for pause in (0.0, 0.01, 0.1):
            if not any(proxy() is not None for proxy in self._proxies):
                return False
            time.sleep(pause)
            gc.collect()  # Frees values in reference cycles; does nothing while another thread is collecting.
        return any(proxy() is not None for proxy in self._proxies)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        # Without fx's cache: it would hold nodes of a forward that was given up half-way.
        return super().getattr(attr, attr_val, {})

    def create_arg(self, a: Any) -> Any:
        own = isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs
        if own and not any(a is buffer for buffer in self.root.buffers()):
            raise UntraceableError("makes a tensor of its own")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        before, after, *backward = self._hooks.get(m, (False,) * 4)
        name = module_qualified_name
        if isinstance(m, SyncBatchNorm) and type(m).forward is SyncBatchNorm.forward:
            if before or any(backward):
                self.uncoalesced[name] = "has hooks before or in backward"
            return True
        if super().is_leaf_module(m, name):
            return True
        if before or after or any(backward):
            self.opaque[name] = "has hooks"
            return True
        if m in self._overridden or type(m).__call__ is not nn.Module.__call__:
            self.opaque[name] = "has a forward or __call__ of its own making"
            return True
        return False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if path in self.opaque:
            return self.create_proxy("call_module", path, args, kwargs)
        state = _TraceState(self)
        here = StateWatch(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            reason = here.difference()
            if reason is None and len(self.swallowed) > state.swallowed:
                reason = self.swallowed[state.swallowed]
        except Exception as error:
            reason = self.reason(error)
        if reason is None:
            return result
        # In the graph around it, a forward that cannot be traced is one step.
        here.restore()
        state.restore()
        for inner in [name for name in self.opaque if name.startswith(f"{path}.")]:
            del self.opaque[inner]
        self.opaque[path] = reason
        return self.create_proxy("call_module", path, args, kwargs)

    # -- what it looks for ------------------------------------------------------------------------------------------

    def reason(self, error: BaseException) -> str:
        """Returns in words why a forward was given up."""
        if isinstance(error, UntraceableError):
            return str(error)
        if isinstance(error, fx.proxy.TraceError):
            return "has a branch or loop that depends on data"
        return f"cannot be traced ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"

    def refuse(self, reason: str) -> None:
        self.swallowed.append(reason)
        raise UntraceableError(reason)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Refuses contexts and custom gradients while the block runs; passes a subclass's normalization on to fx."""

        def refusing(owner: Any, name: str, what: str) -> Any:
            usual = getattr(owner, name)

            def refuse(*args: Any, **kwargs: Any) -> Any:
                return self.refuse(what) if threading.get_ident() == self._thread else usual(*args, **kwargs)

            return refuse

        def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:
                self.refuse(_FUNCTION)
            return usual_apply.__get__(None, function)(*args, **kwargs)

        usual_apply: Any = inspect.getattr_static(torch.autograd.Function, "apply")
        original = SyncBatchNorm.forward

        def normalize(layer: SyncBatchNorm, input: Any) -> Any:
            if not isinstance(input, fx.Proxy):
                return original(layer, input)
            path = self.create_proxy("get_attr", self.path_of_module(layer), (), {})
            return self.create_proxy("call_function", normalize_standalone, (path, input), {})

        hooks = torch.autograd.graph.saved_tensors_hooks
        contexts = [
            (torch.no_grad, "__enter__", "enters no_grad"),
            (torch.enable_grad, "__enter__", "enters enable_grad"),
            (torch.set_grad_enabled, "__init__", "sets the gradient mode"),
            (torch.inference_mode, "__enter__", "enters inference_mode"),
            (torch.autocast, "__enter__", "enters autocast"),
            (hooks, "__enter__", "enters a context for saved tensors, as checkpointing does"),
            (torch.utils.checkpoint, "checkpoint", "calls checkpoint"),
            (torch, "is_grad_enabled", "asks for the gradient mode"),
            *((Tensor, name, "reads a tensor's value") for name in ("item", "tolist", "__bool__", "__float__")),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, what in contexts:
                stack.enter_context(_replaced(owner, name, refusing(owner, name, what)))
            stack.enter_context(_replaced(torch.autograd.Function, "apply", classmethod(apply)))
            stack.enter_context(_replaced(SyncBatchNorm, "forward", normalize))
            yield


class _TraceState:
    """The state of a tracer before it traces a submodule, to which it returns if that fails."""

    def __init__(self, tracer: _Tracer) -> None:
        self._tracer = tracer
        self._last = self._last_node()
        self._stack = dict(self._module_stack())
        self._calls = dict(getattr(tracer, "num_calls", {}))
        self.swallowed = len(tracer.swallowed)

    def restore(self) -> None:
        """Erases the nodes, module stack, call counts and reasons that were added since."""
        tracer = self._tracer
        node = self._last_node()
        while node is not None and node is not self._last:
            tracer.graph.erase_node(node)
            node = self._last_node()
        stack = self._module_stack()
        stack.clear()
        stack.update(self._stack)
        if hasattr(tracer, "num_calls"):
            tracer.num_calls = self._calls
        del tracer.swallowed[self.swallowed :]

    def _last_node(self) -> Optional[fx.Node]:
        return next(iter(reversed(self._tracer.graph.nodes)), None)

    def _module_stack(self) -> Dict[str, Any]:
        stack: Dict[str, Any] = self._tracer.__dict__.setdefault("module_stack", OrderedDict())
        return stack


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)  # it was inherited
        else:
            setattr(owner, name, own)
