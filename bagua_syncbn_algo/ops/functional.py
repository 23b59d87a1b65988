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
from functools import lru_cache
from typing import Any, Callable, ContextManager, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..comm.channel import Channel
from ..comm.groups import yield_core
from ..comm.report import reporting_errors
from ..comm.wire import BACKWARD, FORWARD, SyncPoint
from .deferred import DeferredGrad, OverlapCandidates, refuse_second_derivative
from .moments import (
    GlobalMoments,
    LocalMoments,
    cast,
    dense,
    gradient_sums,
    input_gradient,
    local_moments,
    memory_format,
    merge_moments,
    normalize,
    split_channels,
    statistics_dtype,
)
from .recompute import RecomputeCache, SavedStatistics, recomputation_owners

__all__ = ["Member", "launch_moments", "sync_batch_norm"]


class Member(NamedTuple):
    """One call of a layer in a round."""

    input: Tensor  # (N, C, ...), floating point; N may be 0 on some ranks
    weight: Optional[Tensor]  # (C,)
    bias: Optional[Tensor]  # (C,)
    eps: float
    name: str  # the layer's name, for errors


def sync_batch_norm(
    members: Sequence[Member],
    channel: Channel,
    point: SyncPoint,
    cache: Optional[RecomputeCache] = None,
    overlap_with: Optional[OverlapCandidates] = None,
    update: Optional[Callable[[List[LocalMoments], GlobalMoments], None]] = None,
) -> Tuple[Tensor, ...]:
    """Normalizes the inputs of independent layers, each over the elements of all ranks of ``channel``.

    Args:
        members: the layers and their inputs, all on one device. The channel counts are the same on every rank.
        channel: the channel of the ranks to normalize over.
        point: the sync point that identifies this round on all ranks.
        cache: the saved statistics of the round, for recomputed forwards; ``None`` to save none.
        overlap_with: gradients that backward can compute during its all-gather; gets its deferred nodes here.
        update: takes this rank's moments and the merged ones, and updates the running statistics; not called in a
            recomputation. It runs before the normalization: an error there leaves them the same on all ranks.

    Returns:
        The outputs, each of its input's shape, dtype and memory format. An output that no rank uses gives no gradients.

    Raises:
        ValueError: if the whole group has at most one value per channel of a layer.
        SyncBatchNormError: if another rank failed, is at another sync point or did not arrive.

    Collectives:
        Forward: one all-gather with ``8 + 2C·itemsize`` payload bytes for each member; none in a recomputation.
        Backward: one all-gather with ``(1 + 2C)·itemsize`` payload bytes for each member, if any input requires a
        gradient. Every rank must call.
    """
    inputs = [dense(member.input.detach()) for member in members]
    tensors = [tensor for member in members for tensor in (member.input, member.weight, member.bias)]
    # Parameters whose gradients are not deferred: those of a single layer need no other rank if its output is used.
    immediate: List[Optional[Tensor]] = tensors[1:] if len(members) == 1 else []
    communicates = torch.is_grad_enabled() and any(member.input.requires_grad for member in members)
    owners = [] if cache is None else recomputation_owners()

    def defer(recomputed: bool) -> Optional[DeferredGrad]:
        if overlap_with is None or not communicates:
            return None
        if not recomputed:
            yield_core()  # lets the transport's thread continue the all-gather before the nodes are created
        deferred = [tensors[0], None, None] if immediate else tensors
        return overlap_with.defer(deferred, inputs[0].device, point.name)

    # The inputs are detached: autograd records none of these operations. Other ranks may already wait in the exchange.
    with reporting_errors(channel, point, FORWARD):
        local = [_local(input) for input in inputs]
        saved = None if cache is None else cache.match(local)
    if saved is None:
        merged, finish = _exchange(local, members, channel, point, lambda: defer(False))
        if owners:
            saved = SavedStatistics(local, merged)
        if update is not None:
            # The caller's gradient mode decides whether the moments are pooled.
            with reporting_errors(channel, point, FORWARD):
                update(local, merged)
        # The other ranks receive an error from here on in their next exchange.
        reporting: ContextManager[None] = reporting_errors(channel, point, FORWARD)
    else:
        merged, finish = saved.merged, defer(True)
        reporting = contextlib.nullcontext()  # checkpointing stops a recomputation early by an exception
    if cache is not None and saved is not None:
        cache.save(saved, owners)
    call = _Call(local, merged, [member.eps for member in members], channel, point, saved)
    with reporting:
        outputs: Tuple[Tensor, ...]
        if finish is None:
            outputs = _SyncBatchNorm.apply(call, *tensors)  # type: ignore[no-untyped-call]
        else:
            outputs = _OverlappedSyncBatchNorm.apply(call, finish, finish.token, tensors, *immediate)  # type: ignore[no-untyped-call]
        return outputs


def _exchange(
    local: Sequence[LocalMoments],
    members: Sequence[Member],
    channel: Channel,
    point: SyncPoint,
    defer: Callable[[], Optional[DeferredGrad]],
) -> Tuple[GlobalMoments, Optional[DeferredGrad]]:
    """Returns the merged moments of all ranks, and the result of ``defer``, which runs during the all-gather."""
    with reporting_errors(channel, point, FORWARD):
        wait = launch_moments(local, channel, point, [member.name for member in members])
        finish = defer()
    return wait(), finish


class _Call(NamedTuple):
    local: List[LocalMoments]
    merged: GlobalMoments
    eps: List[float]
    channel: Channel
    point: SyncPoint
    saved: Optional[SavedStatistics]  # the node keeps them alive while checkpointing may recompute this forward


class _SyncBatchNorm(Function):
    """A round whose backward starts the all-gather and waits for it."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Optional[Tensor]) -> Tuple[Tensor, ...]:
        return _normalize(ctx, call, tensors, ctx.needs_input_grad[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        needs = ctx.needs_input_grad[1:]
        return (None, *_BackwardRound(ctx, grads, needs).wait(needs))


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
        return (None, None, None, None, *(round_.parameter_gradients(0, needs) if needs else ()))


def _normalize(ctx: Any, call: _Call, tensors: Sequence[Optional[Tensor]], needs: Sequence[bool]) -> Tuple[Tensor, ...]:
    """Computes the outputs from the input, weight and bias of each layer; saves the tensors that backward needs."""
    inputs = [dense(tensor) for tensor in tensors[::3] if tensor is not None]
    weights, biases = tensors[1::3], tensors[2::3]
    merged = call.merged
    invstd = (merged.variance + _eps_of(call, merged.variance)).rsqrt_()
    ctx.save_for_backward(merged.mean, invstd, merged.elements, *inputs, *weights)
    ctx.call = call._replace(local=[])  # `normalize` writes the outputs to their scratch tensors
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
    ctx.set_materialize_grads(False)
    if call.saved is not None:
        call.saved.set_node(ctx, has_graph=any(needs))
    outputs = []
    for input, weight, bias, local, mean_, invstd_ in zip(
        inputs, weights, biases, call.local, _per_layer(merged.mean, inputs), _per_layer(invstd, inputs)
    ):
        if input.numel() == 0:
            outputs.append(torch.empty_like(input))
        else:
            outputs.append(normalize(input, local, mean_, invstd_, weight, bias))
    # As without coalescing, the output of a layer without trainable tensors requires no gradient.
    ctx.mark_non_differentiable(*(y for i, y in enumerate(outputs) if not any(needs[3 * i : 3 * i + 3])))
    return tuple(outputs)


class _BackwardRound:
    """The backward of one round. Construction computes the local gradient sums and starts their all-gather.

    Args:
        ctx: the context of the forward.
        grads: the gradients of the outputs; ``None`` for an output that this rank does not use.
        needs: for each input, weight and bias, whether it requires a gradient.
    """

    def __init__(self, ctx: Any, grads: Sequence[Optional[Tensor]], needs: Sequence[bool]) -> None:
        self._call: _Call = ctx.call
        mean, invstd, self._elements, *rest = ctx.saved_tensors
        self._count = count = len(rest) // 2
        self._inputs, self._weights, self._bias_dtypes = rest[:count], rest[count:], ctx.bias_dtypes
        self._means, self._invstds = _per_layer(mean, self._inputs), _per_layer(invstd, self._inputs)
        self._grads = [
            None if grad is None else grad.contiguous(memory_format=memory_format(input))
            for grad, input in zip(grads, self._inputs)
        ]
        channel, point = self._call.channel, self._call.point
        with reporting_errors(channel, point, BACKWARD):
            self._sums = [self._local_sums(i) for i in range(count)]
        self._wait: Optional[Callable[[], List[Tensor]]] = None
        if any(needs[::3]):
            parts = [cast(sum_, mean.dtype) for half in zip(*self._sums) for sum_ in half]
            # Which outputs this rank uses. An output that only other ranks use still gives its input a gradient.
            parts.append(_constant(tuple(grad is not None for grad in self._grads), mean.dtype, mean.device))
            self._wait = channel.launch(point, BACKWARD, [torch.cat(parts)])

    def _local_sums(self, i: int) -> Tuple[Tensor, Tensor]:
        grad, input, mean = self._grads[i], self._inputs[i], self._means[i]
        if grad is None or input.numel() == 0:
            return torch.zeros_like(mean), torch.zeros_like(mean)
        return gradient_sums(grad, input, mean, self._invstds[i])

    def parameter_gradients(self, i: int, needs: Sequence[bool]) -> List[Optional[Tensor]]:
        """Returns the gradients of weight and bias of layer ``i``, whose output is used: local sums of this rank."""
        sum_dy, sum_dy_xhat = self._sums[i]
        weight = cast(sum_dy_xhat, self._weights[i].dtype) if needs[0] else None
        return [weight, cast(sum_dy, self._bias_dtypes[i]) if needs[1] else None]

    def wait(self, needs: Sequence[bool]) -> List[Optional[Tensor]]:
        """Waits for the gradient sums of all ranks and returns the gradients of each input, weight and bias.

        Args:
            needs: for each of them, whether its gradient is needed.
        """
        used = [grad is not None for grad in self._grads]
        gradients: List[Optional[Tensor]] = [None] * (3 * self._count)
        if self._wait is not None:
            (gathered,) = self._wait()
            # Summed in rank order and in float64, as in forward: bitwise the same result on every rank.
            layer_of = self._call.merged.layer_of
            elements = self._elements if layer_of is None else self._elements[layer_of]
            total = gathered.double().sum(0)
            means_of_all = total[: -self._count].view(2, -1).div_(elements).to(gathered.dtype)
            mean_dy, mean_dy_xhat = (_per_layer(half, self._inputs) for half in means_of_all.unbind(0))
            if not all(used):  # only then, because the read makes the host wait for the device
                used = _used_by_any(total[-self._count :])
            for i in range(self._count):
                if used[i] and needs[3 * i]:
                    gradients[3 * i] = self._input_gradient(i, mean_dy[i], mean_dy_xhat[i])
        for i in range(self._count):
            if used[i]:
                gradients[3 * i + 1 : 3 * i + 3] = self.parameter_gradients(i, needs[3 * i + 1 : 3 * i + 3])
        return gradients

    def _input_gradient(self, i: int, mean_dy: Tensor, mean_dy_xhat: Tensor) -> Tensor:
        input, grad = self._inputs[i], self._grads[i]
        if input.numel() == 0:
            return torch.empty_like(input)
        grad = torch.zeros_like(input) if grad is None else grad
        mean, invstd, weight = self._means[i], self._invstds[i], self._weights[i]
        return input_gradient(grad, input, mean, invstd, weight, mean_dy, mean_dy_xhat)


def _used_by_any(ranks: Tensor) -> List[bool]:
    """Returns for each layer whether any rank uses its output; ``ranks`` are the numbers of ranks that do, ``(L,)``."""
    return [count > 0 for count in ranks.tolist()]


def _local(input: Tensor) -> LocalMoments:
    if input.numel() > 0:
        return local_moments(input)
    zeros = torch.zeros(input.shape[1], dtype=statistics_dtype(input.dtype), device=input.device)
    return LocalMoments(0, zeros, zeros)


def launch_moments(
    local: Sequence[LocalMoments], channel: Channel, point: SyncPoint, names: Sequence[str]
) -> Callable[[], GlobalMoments]:
    """Starts the all-gather of local moments.

    Args:
        local: the moments of each layer in the round.
        channel: the channel of the ranks to merge over.
        point: the sync point of the round.
        names: the names of the layers, for errors.

    Returns:
        A function that waits and returns the merged moments, concatenated over the layers, in their widest dtype.

    Raises:
        ValueError: from the returned function: if the whole group has at most one value per channel.
        SyncBatchNormError: from either function: if another rank failed, is at another sync point or did not arrive.

    Collectives:
        One all-gather with ``8 + 2C·itemsize`` payload bytes for each layer. Every rank must call.
    """
    device = local[0].mean.device
    dtype = torch.float64 if any(part.mean.dtype == torch.float64 for part in local) else torch.float32
    count = _constant(tuple(part.elements for part in local), torch.int64, device)
    payload = torch.cat([*(cast(part.mean, dtype) for part in local), *(cast(part.variance, dtype) for part in local)])
    wait = channel.launch(point, FORWARD, [count, payload])

    def wait_and_merge() -> GlobalMoments:
        counts, moments = wait()
        # If this rank has two values per channel, the check reads no counts from the device.
        for index, part in enumerate(local):
            if part.elements < 2 and int(counts[:, index].sum()) < 2:
                raise ValueError(
                    f"expected more than 1 value per channel in the whole group when training (got {part.elements} "
                    f"on this rank, {int(counts[:, index].sum())} on all {channel.world_size} ranks, at "
                    f"{names[index]}); use a larger batch or eval()"
                )
        means, variances = moments.chunk(2, dim=1)
        if len(local) == 1:
            return merge_moments(counts, means, variances)
        return merge_moments(counts, means, variances, _layer_of(tuple(part.mean.numel() for part in local), device))

    return wait_and_merge


@lru_cache(maxsize=1024)
def _constant(values: Tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a read-only tensor of Python numbers. It is cached: on CUDA its creation makes the host wait."""
    with torch.inference_mode(False):  # the cached tensor is also used outside of the caller's inference mode
        return torch.tensor(values, dtype=dtype).to(device)


@lru_cache(maxsize=1024)
def _layer_of(features: Tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the layer index of each channel, shape ``(ΣC,)``. It expands a value per layer to one per channel."""
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.tensor(features)).to(device)


def _eps_of(call: _Call, like: Tensor) -> Any:
    """Returns eps: a number if all layers have the same, else a tensor ``(ΣC,)`` in the dtype of ``like``."""
    if len(set(call.eps)) == 1:
        return call.eps[0]
    layer_of = call.merged.layer_of
    assert layer_of is not None
    return _constant(tuple(call.eps), like.dtype, like.device)[layer_of]


def _per_layer(vector: Tensor, inputs: Sequence[Tensor]) -> List[Tensor]:
    """Splits a vector ``(ΣC,)`` into one vector ``(C,)`` per layer, in the dtype of the layer's statistics."""
    pieces = split_channels(vector, [input.shape[1] for input in inputs])
    return [cast(piece, statistics_dtype(input.dtype)) for piece, input in zip(pieces, inputs)]
