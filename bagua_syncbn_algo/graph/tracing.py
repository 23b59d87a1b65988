"""Faithful tracing: the graph of a module's forward, or the reason why the forward cannot be traced.

``torch.fx`` silently drops contexts, attribute changes and hooks, makes random choices constant, and replaces in-place
operators. This module detects each of these. A submodule whose forward cannot be traced faithfully is one opaque step
of the graph, and is reported with the reason.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import inspect
import threading
import time
import weakref
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..compat import inside_fake_mode
from ..layer import SyncBatchNorm
from .call_pattern import CallPattern
from .module_state import (
    CONSTANT_TYPES,
    DRAWS_RANDOM_NUMBERS,
    MISSING,
    ModuleSnapshot,
    StateSnapshot,
    UntraceableError,
    attribute_of,
    clean_copy,
    has_own_forward,
    hooks_of,
    importing,
    plain_copy,
    preserved_random_states,
    replaced,
)
from .progress import TraceProgress
from .proxies import TracedValue, checking_types
from .shapes import UNKNOWN, FakeValues, is_evaluated, is_plain_number

__all__ = [
    "Trace",
    "may_need_shapes",
    "normalize_standalone",
    "trace",
]

_LOCK = threading.RLock()  # tracing patches classes and functions of torch for the whole process
_MAX_ATTEMPTS = 3  # if random numbers are drawn during tracing, perhaps by another thread
_DATA_BRANCH, _UNTRACED = "has a branch or loop that depends on data", "cannot be traced"
_VALUE_READERS = ("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
_CUSTOM_FUNCTION = "applies a custom autograd function"
# Attributes and methods that every module has, which the trace itself reads. Guards compare those that matter, and
# whether a forward is set on an instance.
_MODULE_ATTRIBUTES = frozenset((*nn.Module().__dict__, *dir(nn.Module)))
_is_grad_enabled = torch.is_grad_enabled  # tracing replaces the public function


def may_need_shapes(reason: str) -> bool:
    """Returns whether a forward that could not be traced for this reason may be traced with the shapes of a call."""
    return reason == _DATA_BRANCH or reason.startswith(_UNTRACED)


class Trace(NamedTuple):
    """The result of tracing a module."""

    graph: fx.Graph  # its inputs are the values of a call, its outputs the leaves of the output
    outputs: Any  # the TreeSpec of the output
    opaque: Dict[str, str]  # paths of submodules that are one step in the graph, with the reason
    uncoalesced: Dict[str, str]  # paths of SyncBatchNorm layers that cannot share a round, with the reason
    attributes: Dict[int, Dict[str, Any]]  # that the forward has read, by the index of the submodule; see `Guard`


def normalize_standalone(layer: SyncBatchNorm, input: Tensor) -> Tensor:
    """Returns the normalized input: the graph node for ``super().forward(input)`` of a subclass."""
    return SyncBatchNorm.forward(layer, input)


def trace(module: nn.Module, pattern: CallPattern, values: Optional[Sequence[Any]] = None) -> Trace:
    """Traces ``module.forward`` for calls of ``pattern``, in the current modes (training, evaluation) of its parts.

    Runs a replica of the module, never the module itself.

    Args:
        module: the module to trace.
        pattern: the pattern of the calls.
        values: the values of a call, whose shapes the graph may depend on; ``None`` for a graph for all shapes.

    Returns:
        The graph of the forward, and the submodules and layers that it does not cover.

    Raises:
        UntraceableError: if the module cannot be copied or its forward cannot be traced.

    Collectives:
        None.
    """
    if inside_fake_mode():  # the states of random generators are tensors, whose restoration would end the process
        raise UntraceableError("is traced inside of FakeTensorMode")
    for attempt in range(_MAX_ATTEMPTS):
        with contextlib.suppress(_RandomDrawError):
            return _trace(module, pattern, values, last=attempt == _MAX_ATTEMPTS - 1)
    raise AssertionError("unreachable: the last attempt returns or raises")


class _RandomDrawError(Exception):
    """Random numbers were drawn, by the forward or by another thread during tracing."""


def _trace(module: nn.Module, pattern: CallPattern, values: Optional[Sequence[Any]], last: bool) -> Trace:
    replica = clean_copy(module)
    pairs = list(zip(module.modules(), replica.modules()))
    tracer = _Tracer(pattern, pairs, None if values is None else FakeValues(values))
    try:
        return _graph_of(tracer, replica, last)
    finally:
        tracer.release()


def _graph_of(tracer: _Tracer, replica: nn.Module, last: bool) -> Trace:
    with _LOCK, preserved_random_states(), torch.enable_grad(), tracer.patched_torch():
        snapshots = [ModuleSnapshot(part) for part in replica.modules()]
        state = StateSnapshot(replica)
        try:
            graph = tracer.trace(replica)
        except Exception as error:
            raise UntraceableError(tracer.reason(error)) from error
        reason = state.difference() or next(filter(None, (snapshot.difference() for snapshot in snapshots)), None)
        if reason is None and tracer.refusals:
            reason = tracer.refusals[0]
        if reason is None and tracer.has_live_proxies():
            reason = "keeps a tensor of its forward pass in a global, a default argument or another object"
    if DRAWS_RANDOM_NUMBERS in (reason, *tracer.opaque.values()) and not last:
        raise _RandomDrawError
    if reason is not None:
        raise UntraceableError(reason)
    attributes: Dict[int, Dict[str, Any]] = {}
    for index, name, value in tracer.reads:
        attributes.setdefault(index, {}).setdefault(name, value)
    return Trace(graph, tracer.outputs, tracer.opaque, tracer.uncoalesced, attributes)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(
        self, pattern: CallPattern, pairs: Sequence[Tuple[nn.Module, nn.Module]], fakes: Optional[FakeValues]
    ) -> None:
        super().__init__()
        self._pattern, self._fakes = pattern, fakes
        # By the submodules of the replica, which has no hooks and no forwards on instances.
        self._hooks = {replica: hooks_of(part) for part, replica in pairs}
        self._overridden = {replica for part, replica in pairs if has_own_forward(part)}
        self._indices = {id(replica): index for index, (_, replica) in enumerate(pairs)}
        self._proxies: List[weakref.ref[Any]] = []
        self.outputs: Any = None
        self.opaque: Dict[str, str] = {}
        self.uncoalesced: Dict[str, str] = {}
        self._thread = threading.get_ident()  # calls in other threads are not traced
        self.refusals: List[str] = []  # also those whose exception the module's own code has caught
        self.reads: List[Tuple[int, str, Any]] = []  # attributes: index of the submodule, name, value

    # -- methods that fx calls ---------------------------------------------------------------------------------------

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Tuple[Any, List[Any]]:
        pattern = self._pattern
        values = [self.create_proxy("placeholder", f"value_{i}", (), {}) for i in range(len(pattern.kinds))]
        args, kwargs = pattern.fill(values)
        arguments = pytree.tree_flatten((args, kwargs))[0]

        def call() -> List[Any]:
            leaves, self.outputs = pytree.tree_flatten(root_fn(self.root, *args, **kwargs))
            current, structure = pytree.tree_flatten((args, kwargs))
            if structure != pattern.structure or any(a is not b for a, b in zip(current, arguments)):
                self.refuse("changes its arguments")
            for leaf in leaves:
                if not isinstance(leaf, (fx.Proxy, Tensor, *CONSTANT_TYPES)):
                    self.refuse(f"returns a {type(leaf).__name__}")
            return leaves

        return call, []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        if not _is_grad_enabled():  # only inside an autograd function, also if `apply` was captured
            self.refuse(_CUSTOM_FUNCTION)
        proxy = TracedValue(node, self)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> Any:
        proxy: Any = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        if self._fakes is not None:
            example = self._example(self._fakes, kind, target, args, kwargs)
            if kind in ("call_function", "call_method") and is_plain_number(example):
                self.graph.erase_node(proxy.node)
                return example
            proxy.example = example
        elif kind == "placeholder":
            proxy.is_tensor = self._pattern.kinds[_number_of(target)] is Tensor
        return proxy

    def _example(self, fakes: FakeValues, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        if kind == "placeholder":
            return fakes.inputs[_number_of(target)]
        if kind == "get_attr":
            return fakes.of(fakes.call(lambda: attribute_of(self.root, str(target)), (), {}))
        if kind == "call_method":
            return fakes.call(lambda self, *args, **kwargs: getattr(self, target)(*args, **kwargs), args, kwargs)
        if kind == "call_function":
            if target is normalize_standalone:
                return fakes.call(torch.empty_like, args[1:], {})
            return fakes.call(target, args, kwargs) if is_evaluated(target) else UNKNOWN
        layer = self.root.get_submodule(target)
        if isinstance(layer, SyncBatchNorm):
            return fakes.call(torch.empty_like, args, {})
        return UNKNOWN if target in self.opaque else fakes.call(layer.forward, args, kwargs)

    def has_live_proxies(self) -> bool:
        """Returns whether the forward has stored traced values, which are still referenced."""
        for pause in (0.0, 0.01, 0.1):
            if not any(proxy() is not None for proxy in self._proxies):
                return False
            time.sleep(pause)
            gc.collect()  # frees values in reference cycles; has no effect while another thread collects
        return any(proxy() is not None for proxy in self._proxies)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread or self._is_evaluating:
            return attr_val
        # Without the cache of fx, which would keep nodes of a submodule whose trace was erased.
        return super().getattr(attr, attr_val, {})

    def create_arg(self, a: Any) -> Any:
        unknown = isinstance(a, Tensor) and not isinstance(a, nn.Parameter) and a not in self.tensor_attrs
        if unknown and not any(a is buffer for buffer in self.root.buffers()):
            raise UntraceableError("uses a tensor that is no input, parameter, buffer or attribute")
        return super().create_arg(a)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        before, after, *backward = self._hooks.get(m, (False,) * 4)
        name = module_qualified_name
        if isinstance(m, SyncBatchNorm) and type(m).forward is SyncBatchNorm.forward:
            if before or any(backward):
                self.uncoalesced[name] = "has forward pre-hooks or backward hooks"
            return True
        if super().is_leaf_module(m, name):
            return True
        if before or after or any(backward):
            self.opaque[name] = "has hooks"
            return True
        if m in self._overridden or type(m).__call__ is not nn.Module.__call__:
            self.opaque[name] = "has a forward set on the instance, or its class overrides __call__"
            return True
        return False

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread or self._is_evaluating:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if path in self.opaque:
            return self.create_proxy("call_module", path, args, kwargs)
        progress = TraceProgress(self)
        state = StateSnapshot(m)
        try:
            result = super().call_module(m, forward, args, kwargs)
            reason = state.difference()
            if reason is None and len(self.refusals) > progress.refusals:
                reason = self.refusals[progress.refusals]
        except Exception as error:
            reason = self.reason(error)
        if reason is None:
            return result
        # A submodule whose forward cannot be traced is one node in the graph.
        state.restore()
        progress.restore()
        for inner in [name for name in self.opaque if name.startswith(f"{path}.")]:
            del self.opaque[inner]
        self.opaque[path] = reason
        return self.create_proxy("call_module", path, args, kwargs)

    @property
    def _is_evaluating(self) -> bool:
        fakes = self._fakes  # another thread may release it
        return fakes is not None and fakes.busy

    # -- reasons not to trace a forward ------------------------------------------------------------------------------

    def reason(self, error: BaseException) -> str:
        """Returns the reason for an exception in a traced forward, in words."""
        if isinstance(error, UntraceableError):
            return str(error)
        if isinstance(error, fx.proxy.TraceError):
            return _DATA_BRANCH
        return f"{_UNTRACED} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"

    def record_read(self, part: nn.Module, name: str, found: bool) -> None:
        """Records that the forward has read an attribute, if the attribute is plain data or does not exist."""
        index = self._indices.get(id(part))
        if index is None or name in _MODULE_ATTRIBUTES or name.startswith("__"):
            return
        own = object.__getattribute__(part, "__dict__")
        if name in own:
            plain = plain_copy(own[name])
            if plain is not None:
                self.reads.append((index, name, *plain))
        elif found:
            # A default or a method, which the instance may replace.
            if plain_copy(getattr(type(part), name, self)) is not None:
                self.reads.append((index, name, MISSING))
        elif not any(name in own[group] for group in ("_parameters", "_buffers", "_modules")):
            self.reads.append((index, name, MISSING))

    def release(self) -> None:
        """Frees the replica and the inputs, which fx keeps in a reference cycle with the tracer.

        Another thread may still be inside a patched function, which reads the attributes that remain.
        """
        self._fakes = None
        for name in [name for name in self.__dict__ if name not in ("_thread", "_fakes")]:
            del self.__dict__[name]

    def refuse(self, reason: str) -> None:
        """Records and raises the reason why the forward cannot be traced."""
        self.refusals.append(reason)
        raise UntraceableError(reason)

    @contextlib.contextmanager
    def patched_torch(self) -> Iterator[None]:
        """Patches torch during the block: refuses contexts and custom gradients, records a subclass's normalization."""

        def refusing(owner: Any, name: str, reason: str) -> Any:
            original = getattr(owner, name)

            def refuse(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() == self._thread and not self._is_evaluating:
                    return self.refuse(reason)
                return original(*args, **kwargs)

            return refuse

        def apply(function: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread and not self._is_evaluating:
                self.refuse(_CUSTOM_FUNCTION)
            return original_apply.__get__(None, function)(*args, **kwargs)

        def read(part: nn.Module, name: str) -> Any:
            traced = threading.get_ident() == self._thread
            try:
                value = object.__getattribute__(part, name)
            except AttributeError:
                if traced:
                    self.record_read(part, name, found=False)
                raise
            if traced:
                self.record_read(part, name, found=True)
            return value

        original_apply: Any = inspect.getattr_static(torch.autograd.Function, "apply")
        original_forward = SyncBatchNorm.forward

        def normalize(layer: SyncBatchNorm, input: Any) -> Any:
            if not isinstance(input, fx.Proxy):
                return original_forward(layer, input)
            path = self.create_proxy("get_attr", self.path_of_module(layer), (), {})
            return self.create_proxy("call_function", normalize_standalone, (path, input), {})

        hooks = torch.autograd.graph.saved_tensors_hooks
        contexts = [
            (torch.no_grad, "__enter__", "enters no_grad"),
            (torch.enable_grad, "__enter__", "enters enable_grad"),
            (torch.set_grad_enabled, "__init__", "sets the gradient mode"),
            (torch.inference_mode, "__enter__", "enters inference_mode"),
            (torch.autocast, "__enter__", "enters autocast"),
            (hooks, "__enter__", "enters saved_tensors_hooks, as activation checkpointing does"),
            (torch.utils.checkpoint, "checkpoint", "calls checkpoint"),
            (torch, "is_grad_enabled", "queries the gradient mode"),
            *((Tensor, name, "reads a tensor's value") for name in _VALUE_READERS),
        ]
        with contextlib.ExitStack() as stack:
            for owner, name, reason in contexts:
                stack.enter_context(replaced(owner, name, refusing(owner, name, reason)))
            stack.enter_context(replaced(torch.autograd.Function, "apply", classmethod(apply)))
            stack.enter_context(replaced(SyncBatchNorm, "forward", normalize))
            stack.enter_context(replaced(nn.Module, "__getattribute__", read))
            stack.enter_context(replaced(builtins, "__import__", importing(builtins.__import__, builtins.isinstance)))
            stack.enter_context(replaced(builtins, "isinstance", checking_types(builtins.isinstance)))
            yield


def _number_of(placeholder: Any) -> int:
    return int(str(placeholder).split("_")[-1])
