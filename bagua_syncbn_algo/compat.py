"""Compatibility with versions of PyTorch, and all private functions of PyTorch that this package calls.

Each description states the first version that has the function, or the result in versions without it.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from typing import Any, Callable, ContextManager, List, Optional, TypeVar

import torch
import torch.utils._python_dispatch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "ALLGATHER_ON_CURRENT_STREAM",
    "CAPTURES_ROUNDS",
    "any_autocast",
    "aten_op_draws",
    "autocast_dtype",
    "batch_norm_into",
    "current_node",
    "current_trace",
    "graph_task",
    "hand_over_divisor",
    "inside_compiled",
    "inside_fake_mode",
    "inside_transform",
    "is_tracing",
    "keep_operator",
    "lerp_each_",
    "later_in_join",
    "lone_join",
    "number_of_groups",
    "own_client",
    "saved_tensors_hooks",
    "sequence_of",
    "trace_time",
    "traced_as_constant",
    "uncompiled",
    "will_run",
    "without_modes",
]

_F = TypeVar("_F", bound=Callable[..., Any])

#: Returns the id of the backward pass that this thread runs; -1 outside of a backward pass, and before torch 2.0.
graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

#: Returns the autograd node that this thread runs; ``None`` outside of a node, and in versions without the function.
current_node: Callable[[], Any] = getattr(torch._C, "_current_autograd_node", lambda: None)

#: Returns whether the current backward pass will run a node; always ``True`` before torch 2.0.
will_run: Callable[[Any], bool] = getattr(torch._C, "_will_engine_execute_node", lambda node: True)

#: Returns whether autocast is enabled for any device. Always ``True`` before torch 2.4: use :func:`autocast_dtype`.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _top_transform() -> Optional[Any]:
    functorch: Any = getattr(torch._C, "_functorch", None)
    return None if functorch is None else getattr(functorch, "peek_interpreter_stack", None)


_transform_stack = _top_transform()


def inside_transform() -> bool:
    """Returns whether a transform of ``torch.func`` is active; always ``False`` before torch 2.0."""
    return _transform_stack is not None and _transform_stack() is not None


def _on_current_stream() -> Optional[Any]:
    backend = getattr(torch._C, "_distributed_c10d", None)
    options: Any = getattr(backend, "AllgatherOptions", lambda: None)()
    if not hasattr(options, "asyncOp"):
        return None
    options.asyncOp = False
    return options


#: Options with which NCCL's all-gather runs on the current stream and returns ``None``; ``None`` before torch 2.8.
ALLGATHER_ON_CURRENT_STREAM: Optional[Any] = _on_current_stream()

_top_hooks: Optional[Callable[[bool], Any]] = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def saved_tensors_hooks() -> Optional[Any]:
    """Returns the current hooks for saved tensors; ``None`` without hooks, and in versions without the function."""
    return None if _top_hooks is None else _top_hooks(True)


def without_modes() -> ContextManager[Any]:
    """Returns a context in which dispatch modes see no operators; one without an effect before torch 2.0.

    Selective activation checkpointing (torch 2.4) is such a mode. It expects the operators of the recomputation in the
    first forward, in the same order. Operators on fake tensors need their mode.
    """
    number = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    disabled = getattr(torch.utils._python_dispatch, "_disable_current_modes", contextlib.nullcontext)
    return contextlib.nullcontext() if number() == 0 or inside_fake_mode() else disabled()


def sequence_of(node: Any) -> int:
    """Returns the position of an autograd node in program order; 0 in versions without the method."""
    number: Optional[Callable[[], int]] = getattr(node, "_sequence_nr", None)
    return 0 if number is None else number()


@functools.lru_cache(maxsize=1024)
def aten_op_draws(name: str) -> Optional[bool]:
    """Returns whether an ATen operator draws random numbers; ``None`` if there is no operator of this name.

    Never ``True`` before torch 1.13, the first version that tags operators.
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
    """Returns the autocast dtype of a device type; ``None`` if autocast is disabled for this type."""
    try:
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    except (AttributeError, TypeError):  # before torch 2.4
        if device == "cuda":
            return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


#: Whether a round of statistics can be part of a graph of ``torch.compile``: from torch 2.6 on.
CAPTURES_ROUNDS: bool = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)

#: Returns whether Dynamo follows the caller, for which it is a constant; always ``False`` before torch 2.6.
is_tracing: Callable[[], bool] = torch.compiler.is_dynamo_compiling if CAPTURES_ROUNDS else lambda: False


def traced_as_constant(function: _F) -> _F:
    """Makes Dynamo call a function while it traces, and take the result as a constant of the graph.

    This is ``torch.compiler.assume_constant_result``, which would import the compiler: that takes seconds.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def current_trace() -> Any:
    """Returns the context of the graph that Dynamo traces, one object for each graph; ``None`` outside of a trace."""
    return torch._guards.TracingContext.try_get()


def inside_fake_mode() -> bool:
    """Returns whether tensors have no values here, as in ``FakeTensorMode``; ``False`` while Dynamo traces."""
    number = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    if number() == 0 or current_trace() is not None:
        return False
    detect = getattr(torch._guards, "detect_fake_mode", lambda: None)
    return detect() is not None


def number_of_groups() -> int:
    """Returns the number of process groups. In a trace, it becomes a guard of the graph."""
    return len(torch.distributed.distributed_c10d._pg_map)


def inside_compiled(module: Any) -> Any:
    """Returns the model that ``torch.compile`` has wrapped; any other module unchanged."""
    wrapper = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return module._orig_mod if wrapper is not None and isinstance(module, wrapper) else module


def keep_operator(name: str) -> None:
    """Gives an operator of a library an effect: compilers neither remove nor repeat it, and keep the order."""
    from torch._higher_order_ops import effects

    kinds: Any = effects._EffectType
    effects._register_effectful_op(name, kinds.ORDERED)


def trace_time(callback: Callable[[Any], None], values: List[Any]) -> None:
    """Makes Dynamo call ``callback`` with a ``ComptimeContext`` while it traces the caller. Not for eager calls."""
    from torch._dynamo.comptime import comptime

    comptime(callback)


@traced_as_constant
def _is_compiled() -> bool:
    """Returns whether Dynamo follows the caller, or has set its callback for the frames of a compiled call."""
    callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)()
    context = torch._guards.TracingContext
    trace = getattr(context, "try_get", context.get)()  # torch 2.0 has no `try_get`
    return trace is not None or callback not in (None, False)


@traced_as_constant
@functools.lru_cache(maxsize=1)  # once
def _warn_of_version() -> None:
    warnings.warn(
        f"expected torch 2.6 or later for rounds of statistics in graphs of torch.compile (got {torch.__version__}); "
        "training forwards with SyncBatchNorm layers run eagerly, with graph breaks",
        stacklevel=3,
    )


def uncompiled(function: _F) -> _F:
    """Excludes a function from the graphs of ``torch.compile``, with a reason for Dynamo's messages."""
    reason = (
        "this call of a SyncBatchNorm layer cannot be part of a graph; a warning of bagua_syncbn_algo says why"
        if CAPTURES_ROUNDS
        else "a round of SyncBatchNorm can be part of a graph from torch 2.6 on"
    )
    disabled: Any = None

    @functools.wraps(function)
    def outer(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
            if disable is None:  # torch.compile is not in use; importing it would take seconds
                return function(*args, **kwargs)
            disabled = disable(function)
        if not CAPTURES_ROUNDS and _is_compiled():
            _warn_of_version()
        return disabled(*args, **kwargs)

    outer._torchdynamo_disable = True  # type: ignore[attr-defined]
    outer._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
    return outer  # type: ignore[return-value]


def lerp_each_(tensors: List[Tensor], ends: List[Tensor], weight: float) -> None:
    """Moves each of ``tensors`` towards its end by ``weight``, in place; one call from torch 2.0 on."""
    if hasattr(torch, "_foreach_lerp_"):
        torch._foreach_lerp_(tensors, ends, weight)
        return
    for tensor, end in zip(tensors, ends):
        tensor.lerp_(end, weight)


_BATCH_NORM_OUT: Any = torch.ops.aten.native_batch_norm.out if hasattr(torch, "_foreach_lerp_") else None
_NO_STATISTICS = {dtype: torch.empty(0, dtype=dtype, device="cpu") for dtype in (torch.float32, torch.float64)}


def batch_norm_into(out: Tensor, *arguments: Any) -> Tensor:
    """As ``torch.native_batch_norm`` in evaluation on the CPU, with the result written to ``out``; it may be the input.

    Before torch 2.0 the result is a new tensor: the operator's form with ``out`` is not used there.
    """
    if _BATCH_NORM_OUT is None:
        return torch.native_batch_norm(*arguments)[0]
    nothing = _NO_STATISTICS[out.dtype]
    _BATCH_NORM_OUT(*arguments, out=out, save_mean=nothing, save_invstd=nothing)
    return out


def hand_over_divisor(ddp: Any, work: Any) -> None:
    """Gives ``DistributedDataParallel`` the all-reduce that counts the ranks with data.

    Its reducer divides by the result if ``divide_by_initial_world_size`` is ``False``. It gets the all-reduce by itself
    only if it is the first joinable.

    Args:
        ddp: the ``DistributedDataParallel``.
        work: the all-reduce of ``Join.notify_join_context``.
    """
    ddp.reducer._set_forward_pass_work_handle(work, ddp._divide_by_initial_world_size)


def lone_join() -> bool:
    """Returns whether a forward of ``DistributedDataParallel`` runs inside of ``Join``, as the first joinable.

    ``False`` with ``throw_on_early_termination``, and before torch 2.0.
    """
    return _join_position(first=True)


def later_in_join() -> bool:
    """Returns whether a forward of ``DistributedDataParallel`` runs inside of ``Join``, not as the first joinable.

    ``False`` with ``throw_on_early_termination``, and before torch 2.0.
    """
    return _join_position(first=False)


def _join_position(first: bool) -> bool:
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    if ddp is None:
        return False
    config = ddp._join_config
    return bool(config.enable and config.is_first_joinable == first and not config.throw_on_early_termination)


def own_client(store: Any) -> Any:
    """Returns a client of a key-value store for another thread; the store itself in versions without ``clone``.

    A client serves one request at a time: a thread would wait while another thread waits for a key.
    """
    try:
        return store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):  # not all kinds of stores have the method
        return store
