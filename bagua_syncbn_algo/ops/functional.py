"""Synchronized batch normalization as a function of tensors and a statistics channel.

Several layers that do not depend on each other share one round: one message carries their statistics.

Without overlap, the node `_SyncBatchNorm` starts the backward all-gather and waits for it. With overlap, two nodes do
this. Example: a single layer, followed by a convolution with a deferred weight gradient. Backward runs (a) to (e)::

    _Split, the convolution                      (a) computes its input gradient
      +--- token ---> _Deferred, per candidate   (d) computes the weight gradient, while the all-gather is in flight
      v
    _OverlappedSyncBatchNorm                     (b) computes the gradient sums, starts the all-gather
      +---> AccumulateGrad, weight and bias      (c) accumulates the layer's own gradients, which (b) has computed
      | token
      v
    _Deferred, `finish`                          (e) waits for the all-gather, computes the input gradient
      v
    nodes of earlier layers

If several layers share the round, `finish` also computes the gradients of their weights and biases: (c) follows (e).
:mod:`.deferred` explains the order in which the engine runs the nodes.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, ContextManager, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.autograd import Function

from ..comm.channel import Channel
from ..comm.groups import yield_core
from ..comm.report import reporting_errors
from ..comm.wire import BACKWARD, FORWARD, SyncPoint
from ..compat import without_modes
from .deferred import DeferredGrad, OverlapCandidates, refuse_second_derivative
from .exact import ExactStatistics, GradientSums, constant, launch_exact, local_or_empty
from .fused import Buffers, FusedLocal, FusedStatistics, can_fuse, launch_fused, local_statistics
from .moments import LocalMoments, cast, dense, memory_format, normalize
from .nonfinite import require_finite
from .recompute import RecomputeCache, SavedStatistics, recomputation_owners
from .second_derivative import LayerBackward, second_derivatives

__all__ = ["Member", "Statistics", "sync_batch_norm"]

Statistics = Union[ExactStatistics, FusedStatistics]
Local = Union[LocalMoments, FusedLocal]


class Member(NamedTuple):
    """The call of one layer in a round."""

    input: Tensor  # (N, C, ...), floating point; N may be 0 on some ranks
    weight: Optional[Tensor]  # (C,)
    bias: Optional[Tensor]  # (C,)
    eps: float
    name: str  # of the layer, for errors


def sync_batch_norm(
    members: Sequence[Member],
    channel: Channel,
    point: SyncPoint,
    cache: Optional[RecomputeCache] = None,
    overlap_with: Optional[OverlapCandidates] = None,
    update: Optional[Callable[[Sequence[Local], ExactStatistics], None]] = None,
    buffers: Optional[Sequence[Optional[Buffers]]] = None,
) -> Tuple[Tensor, ...]:
    """Normalizes the inputs of independent layers, each over the elements of all ranks of ``channel``.

    Args:
        members: the layers and their inputs, on one device; every rank passes the same numbers of channels.
        channel: the ranks to normalize over.
        point: identifies this round to the other ranks.
        cache: the cache of the round, in which a recomputed forward finds the statistics of the original forward.
        overlap_with: gradients that backward can compute while the all-gather is in flight. They are deferred if
            backward has a round.
        update: called with this rank's statistics and the merged ones, once all ranks know them and before an output is
            computed: an error in the normalization then leaves the same running statistics on all ranks. Not called for
            a recomputation, nor if a fused kernel has updated ``buffers``.
        buffers: for each layer the running statistics that a fused kernel updates during the merge, or ``None`` for a
            layer without them. Without ``buffers`` the statistics are merged in float64.

    Returns:
        The outputs, each in the dtype and memory format of its input. An output that no rank uses gives no gradient to
        its layer.

    Raises:
        ValueError: if the whole group holds at most one value per channel of a layer.
        SyncBatchNormError: if another rank failed, is at another layer or did not arrive.

    Collectives:
        Forward: one all-gather of ``8 + 2C·itemsize`` payload bytes for each member; none for a recomputation.
        Backward: one all-gather of ``(1 + 2C)·itemsize`` bytes for each, if any input requires a gradient. Backward of
        a backward with ``create_graph=True``: one all-gather of ``8 + 56C`` bytes for each. Every rank must call.
    """
    # A dense copy is part of the graph: a second derivative needs the graph of the tensor that backward keeps.
    tensors = [tensor for member in members for tensor in (dense(member.input), member.weight, member.bias)]
    inputs = [tensor.detach() for tensor in tensors[::3] if tensor is not None]
    # Parameters whose gradients are not deferred: those of a single layer need no other rank if its output is used.
    immediate: List[Optional[Tensor]] = tensors[1:] if len(members) == 1 else []
    communicates = torch.is_grad_enabled() and any(member.input.requires_grad for member in members)
    owners = [] if cache is None else recomputation_owners()
    eps = [member.eps for member in members]
    # A rank whose data have ended sends zeros, which the fused kernels would not take as an empty shard.
    may_fuse = buffers is not None and not channel.trial and not channel.joining
    fuses = may_fuse and can_fuse(inputs, eps, channel.world_size)

    def defer(recomputed: bool) -> Optional[DeferredGrad]:
        if overlap_with is None or not communicates:
            return None
        if not recomputed:
            yield_core()  # the threads that send need the core for a moment; creating the nodes takes longer
        deferred = [tensors[0], None, None] if immediate else tensors
        return overlap_with.defer(deferred, inputs[0].device, point.name)

    # None of these tensors requires a gradient: the inputs are detached.
    local: Any
    with reporting_errors(channel, point, FORWARD):
        # An error before the exchange must reach the ranks that already wait in it.
        if fuses:
            local = [local_statistics(input, each) for input, each in zip(inputs, eps)]
        else:
            local = [local_or_empty(input) for input in inputs]
        saved = None if cache is None else cache.match(local)
    if saved is None:
        names = [member.name for member in members]
        with reporting_errors(channel, point, FORWARD):
            wait: Callable[[], Statistics]
            with without_modes():
                if fuses and buffers is not None:
                    wait = launch_fused(local, channel, point, names, eps, buffers)
                else:
                    wait = launch_exact(local, channel, point, names, eps)
            finish = defer(False)
        with without_modes():
            statistics = wait()
            if owners:
                saved = SavedStatistics(local, statistics)
            if update is not None and isinstance(statistics, ExactStatistics):
                # In the caller's gradient mode, which decides whether running statistics are pooled.
                with reporting_errors(channel, point, FORWARD):
                    update(local, statistics)
        # An error from here on reaches the other ranks in the next exchange.
        reporting: ContextManager[None] = reporting_errors(channel, point, FORWARD)
    else:
        statistics, finish = saved.statistics, defer(True)
        reporting = contextlib.nullcontext()  # checkpointing ends a recomputation early by an exception
    if cache is not None and saved is not None:
        cache.save(saved, owners)
    call = _Call(local, statistics, channel, point, saved)
    with reporting:
        outputs: Tuple[Tensor, ...]
        if finish is None:
            outputs = _SyncBatchNorm.apply(call, *tensors)  # type: ignore[no-untyped-call]
        else:
            outputs = _OverlappedSyncBatchNorm.apply(call, finish, finish.token, tensors, *immediate)  # type: ignore[no-untyped-call]
        return outputs


class _Call(NamedTuple):
    local: Sequence[Local]
    statistics: Statistics
    channel: Channel
    point: SyncPoint
    saved: Optional[SavedStatistics]  # held by the graph in which checkpointing may recompute this forward


class _SyncBatchNorm(Function):
    """A round whose backward starts the all-gather and waits for it."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Optional[Tensor]) -> Tuple[Tensor, ...]:
        return _normalize(ctx, call, tensors, ctx.needs_input_grad[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        needs = ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return (None, *_BackwardRound(ctx, grads, needs).wait(needs))
        saved = ctx.saved_tensors  # with their graphs; read once, because activation checkpointing allows no more
        gradients = _DifferentiableBackward.apply(ctx.call, ctx.bias_dtypes, needs, *grads, *saved)  # type: ignore[no-untyped-call]
        return (None, *gradients)


class _SavedRound(NamedTuple):
    """What :class:`_BackwardRound` reads of the context of a forward."""

    call: _Call
    saved_tensors: Sequence[Optional[Tensor]]
    bias_dtypes: Sequence[Optional[torch.dtype]]


class _DifferentiableBackward(Function):
    """The backward of :class:`_SyncBatchNorm` with ``create_graph=True``: the same round, and its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        bias_dtypes: Sequence[Optional[torch.dtype]],
        needs: Sequence[bool],
        *tensors: Optional[Tensor],
    ) -> Tuple[Optional[Tensor], ...]:
        count = len(bias_dtypes)
        grads, saved = tensors[:count], tensors[count:]
        ctx.save_for_backward(*tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        gradients = _BackwardRound(_SavedRound(call, saved, bias_dtypes), grads, needs).wait(needs)
        # Autograd needs distinct tensors; those of a layer without elements on this rank are one tensor of zeros.
        is_first = [all(each is not earlier for earlier in gradients[:i]) for i, each in enumerate(gradients)]
        return tuple(g if g is None or first else g.clone() for g, first in zip(gradients, is_first))

    @staticmethod
    def backward(ctx: Any, *of_gradients: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        call: _Call = ctx.call
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"expected at most second derivatives through {call.point.name} (got create_graph=True in the backward "
                "of a second derivative); compute the last derivative without create_graph, or in eval()"
            )
        count = len(call.statistics.layers)
        tensors = ctx.saved_tensors
        rows = zip(tensors[count : 2 * count], tensors[2 * count :], tensors[:count], call.statistics.layers)
        layers = [LayerBackward(*row, *of_gradients[3 * i : 3 * i + 3]) for i, row in enumerate(rows)]
        columns = zip(*second_derivatives(layers, call.channel, call.point))
        found = [gradient for column in columns for gradient in column]
        needs = ctx.needs_input_grad[3:]
        return (None, None, None, *(each if need else None for each, need in zip(found, needs)))


class _OverlappedSyncBatchNorm(Function):
    """A round whose backward starts the all-gather and computes the gradients of ``immediate``.

    The deferred node ``finish`` waits for the all-gather and computes the other gradients of ``tensors``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        finish: DeferredGrad,
        token: Tensor,
        tensors: Sequence[Optional[Tensor]],
        *immediate: Optional[Tensor],
    ) -> Tuple[Tensor, ...]:
        # Autograd does not search a list for differentiable inputs: the gradients of `tensors` are deferred.
        ctx.finish, ctx.needs = finish, [tensor is not None and tensor.requires_grad for tensor in tensors]
        return _normalize(ctx, call, tensors, ctx.needs)

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.call.point.name)
        finish: DeferredGrad = ctx.finish
        round_ = _BackwardRound(ctx, grads, ctx.needs)
        needs = ctx.needs_input_grad[4:]
        if needs and grads[0] is None:
            # Whether the parameters get gradients (zeros or None) depends on whether another rank uses the output.
            gradients = round_.wait(ctx.needs)
            finish.provide(lambda _: [gradients[0], None, None])
            return (None, None, None, None, *gradients[1:])
        if not finish.provide(round_.wait):
            round_.wait([False] * len(ctx.needs))  # a backward for the parameters only: the round must still end
        yield_core()  # as in forward, before the weight gradients
        with round_.reporting:
            return (None, None, None, None, *(round_.parameter_gradients(0, needs) if needs else ()))


def _normalize(ctx: Any, call: _Call, tensors: Sequence[Optional[Tensor]], needs: Sequence[bool]) -> Tuple[Tensor, ...]:
    """The forward: input, weight and bias of each layer to its output."""
    inputs = [tensor for tensor in tensors[::3] if tensor is not None]
    weights, biases = tensors[1::3], tensors[2::3]
    ctx.save_for_backward(*inputs, *weights)
    ctx.call = call._replace(local=[])  # their scratch tensors become the outputs
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
    ctx.set_materialize_grads(False)
    if call.saved is not None:
        call.saved.set_node(ctx, has_graph=any(needs))
    outputs = []
    for input, weight, bias, local, layer in zip(inputs, weights, biases, call.local, call.statistics.layers):
        if input.numel() == 0:
            outputs.append(torch.empty_like(input))
        else:
            scratch = local if isinstance(local, LocalMoments) else None
            outputs.append(normalize(input, scratch, layer, weight, bias))
    # A layer without gradients beside one with them gives what it would give in a round of its own.
    without = [y for i, y in enumerate(outputs) if not any(needs[3 * i : 3 * i + 3])]
    if without:
        ctx.mark_non_differentiable(*without)
    return tuple(outputs)


class _BackwardRound:
    """The backward of one round: local sums and their all-gather, from the launch to the gradients.

    Args:
        ctx: the context of the forward.
        grads: the gradients of the outputs; ``None`` for an output that this rank does not use.
        needs: for each input, weight and bias whether it requires a gradient.
    """

    def __init__(self, ctx: Any, grads: Sequence[Optional[Tensor]], needs: Sequence[bool]) -> None:
        self._call: _Call = ctx.call
        call = self._call
        self._statistics: Statistics = call.statistics
        statistics = self._statistics
        saved = ctx.saved_tensors
        self._count = count = len(saved) // 2
        self._inputs, self._weights, self._bias_dtypes = saved[:count], saved[count:], ctx.bias_dtypes
        self._grads = [
            None if grad is None else grad.contiguous(memory_format=memory_format(input))
            for grad, input in zip(grads, self._inputs)
        ]
        # An error after the all-gather reaches the other ranks in the next exchange.
        self.reporting = reporting_errors(call.channel, call.point, BACKWARD)
        with self.reporting:
            self._sums = [self._local_sums(i, needs[3 * i + 1 : 3 * i + 3]) for i in range(count)]
        self._wait: Optional[Callable[[], List[Tensor]]] = None
        if any(needs[::3]):
            parts = [sums.dy for sums in self._sums] + [sums.weighted for sums in self._sums]
            # A rank that does not use an output still has the other ranks' part of its input gradient.
            used = tuple(grad is not None for grad in self._grads)
            parts.append(constant(used, statistics.dtype, parts[0].device))
            self._wait = call.channel.launch(call.point, BACKWARD, [statistics.pack(parts)])

    def _local_sums(self, i: int, needs: Sequence[bool]) -> GradientSums:
        grad, input = self._grads[i], self._inputs[i]
        if grad is None or input.numel() == 0:
            zeros = torch.zeros_like(self._statistics.layers[i].mean)
            return GradientSums(zeros, zeros, zeros if needs[0] else None, zeros if needs[1] else None)
        return self._statistics.gradient_sums(i, grad, input, self._weights[i], needs)

    def parameter_gradients(self, i: int, needs: Sequence[bool]) -> List[Optional[Tensor]]:
        """Returns the gradients of weight and bias of layer ``i``, whose output is used; needs no other rank."""
        sums = self._sums[i]
        weight = cast(sums.weight, self._weights[i].dtype) if needs[0] and sums.weight is not None else None
        bias = cast(sums.bias, self._bias_dtypes[i]) if needs[1] and sums.bias is not None else None
        return [weight, bias]

    def wait(self, needs: Sequence[bool]) -> List[Optional[Tensor]]:
        """Waits for the sums of all ranks; returns the gradients of each input, weight and bias.

        Args:
            needs: for each of them whether its gradient is wanted.
        """
        used = [grad is not None for grad in self._grads]
        gradients: List[Optional[Tensor]] = [None] * (3 * self._count)
        if self._wait is not None:
            (gathered,) = self._wait()
            if self._call.channel.checks_finite:
                names = self._call.point.layers or (self._call.point.name,)
                features = [layer.mean.numel() for layer in self._statistics.layers]
                sums = gathered[:, : -self._count]
                require_finite(sums, self._call.channel, BACKWARD, names, features)
            with self.reporting:
                if not all(used):  # only then does the host have to know
                    used = _used_by_any(gathered[:, -self._count :].sum(0))
                totals = self._statistics.total_gradients(gathered[:, : -self._count])
                for i in range(self._count):
                    if used[i] and needs[3 * i]:
                        gradients[3 * i] = self._input_gradient(i, totals[i])
        with self.reporting:
            for i in range(self._count):
                if used[i]:
                    gradients[3 * i + 1 : 3 * i + 3] = self.parameter_gradients(i, needs[3 * i + 1 : 3 * i + 3])
        return gradients

    def _input_gradient(self, i: int, totals: Any) -> Tensor:
        input, grad = self._inputs[i], self._grads[i]
        if input.numel() == 0:
            return torch.empty_like(input)
        grad = torch.zeros_like(input) if grad is None else grad
        return self._statistics.input_gradient(i, grad, input, self._weights[i], totals)


def _used_by_any(ranks: Tensor) -> List[bool]:
    """Returns for each layer whether any rank uses its output, from the number of ranks that do, shape ``(L,)``."""
    return [count > 0 for count in ranks.tolist()]
