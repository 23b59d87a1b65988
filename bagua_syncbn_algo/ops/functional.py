"""Synchronized batch normalization as a function of tensors and a statistics channel.

Several layers that do not depend on each other share one round: their statistics travel in one message.
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
    """One application of a layer in a round."""

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
    update: Optional[Callable[[List[LocalMoments], GlobalMoments], None]] = None,
) -> Tuple[Tensor, ...]:
    """Normalizes the inputs of independent layers, each over the elements of all ranks of ``channel``.

    Args:
        members: the layers and their inputs; of the same channels on every rank, on one device.
        channel: the ranks to normalize over.
        point: names this round to the other ranks.
        cache: the round's, through which a recomputed forward finds the statistics of the first one.
        overlap_with: gradients that backward can compute while its all-gather is in flight; it is given its deferred
            gradients where backward will have a round.
        update: takes this rank's moments and the merged ones, once they are known on every rank and before anything is
            normalized: an error in normalization then leaves the same running statistics on all ranks. Not called for
            a recomputation.

    Returns:
        The outputs, each in its input's dtype and memory format. An output that no rank uses gives no gradient to its
        layer.

    Raises:
        ValueError: if the whole group holds at most one value per channel of a layer.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive.

    Collectives:
        Forward: one all-gather of ``8 + 2C·itemsize`` payload bytes for each member; none for a recomputation.
        Backward: one all-gather of ``(1 + 2C)·itemsize`` bytes for each, if any input requires a gradient. Every rank
        must call.
    """
    inputs = [dense(member.input.detach()) for member in members]
    tensors = [tensor for member in members for tensor in (member.input, member.weight, member.bias)]
    # The gradients of a layer's own parameters need no other rank where this rank uses its output.
    early: List[Optional[Tensor]] = tensors[1:] if len(members) == 1 else []
    communicates = torch.is_grad_enabled() and any(member.input.requires_grad for member in members)
    owners = [] if cache is None else recomputation_owners()

    def defer(recomputed: bool) -> Optional[DeferredGrad]:
        if overlap_with is None or not communicates:
            return None
        if not recomputed:
            yield_core()  # the statistics in flight need a moment of the core to go on; this takes longer than that
        late = [tensors[0], None, None] if early else tensors
        return overlap_with.defer(late, inputs[0].device, point.name)

    # None of these tensors requires a gradient: the inputs are detached.
    with reporting_errors(channel, point, FORWARD):
        # An error before the exchange must reach the ranks that already wait in it.
        local = [_local(input) for input in inputs]
        saved = None if cache is None else cache.match(local)
    if saved is None:
        merged, finish = _exchange(local, members, channel, point, lambda: defer(False))
        if owners:
            saved = SavedStatistics(local, merged)
        if update is not None:
            # In the caller's gradient mode, which decides whether running statistics are pooled.
            with reporting_errors(channel, point, FORWARD):
                update(local, merged)
        # An error from here on reaches the others in the next exchange that they come to.
        reporting: ContextManager[None] = reporting_errors(channel, point, FORWARD)
    else:
        merged, finish = saved.merged, defer(True)
        reporting = contextlib.nullcontext()  # checkpointing ends a recomputation early by an exception from inside
    if cache is not None and saved is not None:
        cache.save(saved, owners)
    call = _Call(local, merged, [member.eps for member in members], channel, point, saved)
    with reporting:
        outputs: Tuple[Tensor, ...]
        if finish is None:
            outputs = _SyncBatchNorm.apply(call, *tensors)  # type: ignore[no-untyped-call]
        else:
            outputs = _LaunchingBatchNorm.apply(call, finish, finish.token, tensors, *early)  # type: ignore[no-untyped-call]
        return outputs


def _exchange(
    local: Sequence[LocalMoments],
    members: Sequence[Member],
    channel: Channel,
    point: SyncPoint,
    defer: Callable[[], Optional[DeferredGrad]],
) -> Tuple[GlobalMoments, Optional[DeferredGrad]]:
    """Merges the moments of all ranks; runs ``defer``, which needs none of them, while they travel."""
    with reporting_errors(channel, point, FORWARD):
        arrived = launch_moments(local, channel, point, [member.name for member in members])
        finish = defer()
    return arrived(), finish


class _Call(NamedTuple):
    local: List[LocalMoments]
    merged: GlobalMoments
    eps: List[float]
    channel: Channel
    point: SyncPoint
    saved: Optional[SavedStatistics]  # held by the graph in which checkpointing may recompute this forward


class _SyncBatchNorm(Function):
    """A round whose backward waits for the statistics that it sends."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Optional[Tensor]) -> Tuple[Tensor, ...]:
        return _normalize(ctx, call, tensors, ctx.needs_input_grad[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        needs = ctx.needs_input_grad[1:]
        return (None, *_BackwardRound(ctx, grads, needs).wait(needs))


class _LaunchingBatchNorm(Function):
    """A round whose backward starts the all-gather; a deferred gradient waits for it and computes the gradients.

    But for those in ``early``, which are known when it sends.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        finish: DeferredGrad,
        token: Tensor,
        tensors: Sequence[Optional[Tensor]],
        *early: Optional[Tensor],
    ) -> Tuple[Tensor, ...]:
        # In one argument, in which autograd does not look for inputs: the tensors' gradients are deferred.
        ctx.finish, ctx.needs = finish, [tensor is not None and tensor.requires_grad for tensor in tensors]
        return _normalize(ctx, call, tensors, ctx.needs)

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.call.point.name)
        finish: DeferredGrad = ctx.finish
        round_ = _BackwardRound(ctx, grads, ctx.needs)
        needs = ctx.needs_input_grad[4:]
        if needs and grads[0] is None:
            # Only the other ranks know whether this layer takes part: its parameters cannot have gradients early.
            gradients = round_.wait(ctx.needs)
            finish.provide(lambda _: [gradients[0], None, None])
            return (None, None, None, None, *gradients[1:])
        if not finish.provide(round_.wait):
            round_.wait([False] * len(ctx.needs))  # a backward for the parameters alone: the round has to end
        yield_core()  # as in forward: what comes now may be long
        return (None, None, None, None, *(round_.parameter_gradients(0, needs) if needs else ()))


def _normalize(ctx: Any, call: _Call, tensors: Sequence[Optional[Tensor]], needs: Sequence[bool]) -> Tuple[Tensor, ...]:
    """The forward: input, weight and bias of each layer to its output."""
    inputs = [dense(tensor) for tensor in tensors[::3] if tensor is not None]
    weights, biases = tensors[1::3], tensors[2::3]
    merged = call.merged
    invstd = (merged.variance + _eps_of(call, merged.variance)).rsqrt_()
    ctx.save_for_backward(merged.mean, invstd, merged.elements, *inputs, *weights)
    ctx.call = call._replace(local=[])  # their scratch tensors become the outputs
    ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
    ctx.set_materialize_grads(False)
    if call.saved is not None:
        call.saved.belongs_to(ctx, has_graph=any(needs))
    outputs = []
    for input, weight, bias, local, mean_, invstd_ in zip(
        inputs, weights, biases, call.local, _per_layer(merged.mean, inputs), _per_layer(invstd, inputs)
    ):
        if input.numel() == 0:
            outputs.append(torch.empty_like(input))
        else:
            outputs.append(normalize(input, local, mean_, invstd_, weight, bias))
    # A layer without gradients beside one with them gives what it would give by itself.
    ctx.mark_non_differentiable(*(y for i, y in enumerate(outputs) if not any(needs[3 * i : 3 * i + 3])))
    return tuple(outputs)


class _BackwardRound:
    """The backward of one round: local sums and their all-gather, from the launch to the gradients.

    Args:
        ctx: of the forward.
        grads: of the outputs; ``None`` for one that this rank does not use.
        needs: for each input, weight and bias whether it requires a gradient.
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
        self._arrived: Optional[Callable[[], List[Tensor]]] = None
        if any(needs[::3]):
            parts = [cast(sum_, mean.dtype) for half in zip(*self._sums) for sum_ in half]
            # Which outputs this rank uses: a rank that does not use one still has the others' part of its gradient.
            parts.append(_constant(tuple(grad is not None for grad in self._grads), mean.dtype, mean.device))
            self._arrived = channel.launch(point, BACKWARD, [torch.cat(parts)])

    def _local_sums(self, i: int) -> Tuple[Tensor, Tensor]:
        grad, input, mean = self._grads[i], self._inputs[i], self._means[i]
        if grad is None or input.numel() == 0:
            return torch.zeros_like(mean), torch.zeros_like(mean)
        return gradient_sums(grad, input, mean, self._invstds[i])

    def parameter_gradients(self, i: int, needs: Sequence[bool]) -> List[Optional[Tensor]]:
        """Returns the gradients of weight and bias of layer ``i``, whose output is used; needs no other rank."""
        sum_dy, sum_dy_xhat = self._sums[i]
        weight = cast(sum_dy_xhat, self._weights[i].dtype) if needs[0] else None
        return [weight, cast(sum_dy, self._bias_dtypes[i]) if needs[1] else None]

    def wait(self, needs: Sequence[bool]) -> List[Optional[Tensor]]:
        """Waits for the sums of all ranks; returns the gradients of each input, weight and bias.

        Args:
            needs: for each of them whether its gradient is wanted.
        """
        used = [grad is not None for grad in self._grads]
        gradients: List[Optional[Tensor]] = [None] * (3 * self._count)
        if self._arrived is not None:
            (gathered,) = self._arrived()
            # In rank order and in float64, as in the forward: the same bits on every rank.
            layer_of = self._call.merged.layer_of
            elements = self._elements if layer_of is None else self._elements[layer_of]
            total = gathered.double().sum(0)
            means_of_all = total[: -self._count].view(2, -1).div_(elements).to(gathered.dtype)
            mean_dy, mean_dy_xhat = (_per_layer(half, self._inputs) for half in means_of_all.unbind(0))
            if not all(used):  # only then does the host have to know
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
    """Returns for each layer whether any rank uses its output, from the number of ranks that do, shape ``(L,)``."""
    return [count > 0 for count in ranks.tolist()]


def _local(input: Tensor) -> LocalMoments:
    if input.numel() > 0:
        return local_moments(input)
    zeros = torch.zeros(input.shape[1], dtype=statistics_dtype(input.dtype), device=input.device)
    return LocalMoments(0, zeros, zeros)


def launch_moments(
    local: Sequence[LocalMoments], channel: Channel, point: SyncPoint, names: Sequence[str]
) -> Callable[[], GlobalMoments]:
    """Sends local moments on their way, to be merged over all ranks of ``channel``.

    Args:
        local: of each layer in the round.
        channel: the ranks.
        point: the round.
        names: of the layers, for errors.

    Returns:
        What waits for them, and returns the layers' moments one after the other, in the widest of their dtypes.

    Raises:
        ValueError: from waiting: if the whole group holds at most one value per channel.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive.

    Collectives:
        One all-gather of ``8 + 2C·itemsize`` payload bytes for each layer. Every rank must call.
    """
    device = local[0].mean.device
    dtype = torch.float64 if any(part.mean.dtype == torch.float64 for part in local) else torch.float32
    count = _constant(tuple(part.elements for part in local), torch.int64, device)
    payload = torch.cat([*(cast(part.mean, dtype) for part in local), *(cast(part.variance, dtype) for part in local)])
    arrived = channel.launch(point, FORWARD, [count, payload])

    def merged() -> GlobalMoments:
        counts, moments = arrived()
        # Where this rank alone holds two values per channel, the world does too: no need to look at the others' counts.
        for index, part in enumerate(local):
            if part.elements < 2 and int(counts[:, index].sum()) < 2:
                raise ValueError(
                    f"expected more than 1 value per channel in the whole group when training (got {part.elements} "
                    f"here, {int(counts[:, index].sum())} on all {channel.world_size} ranks, at {names[index]}); use a "
                    "larger batch or eval()"
                )
        means, variances = moments.chunk(2, dim=1)
        if len(local) == 1:
            return merge_moments(counts, means, variances)
        return merge_moments(counts, means, variances, _layer_of(tuple(part.mean.numel() for part in local), device))

    return merged


@lru_cache(maxsize=1024)
def _constant(values: Tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of Python numbers, never to be written to; on CUDA making one is a wait."""
    with torch.inference_mode(False):  # it outlives the block that may be running
        return torch.tensor(values, dtype=dtype).to(device)


@lru_cache(maxsize=1024)
def _layer_of(features: Tuple[int, ...], device: torch.device) -> Tensor:
    """Returns of which layer each channel is, ``(ΣC,)``: turns a value per layer into one per channel."""
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.tensor(features)).to(device)


def _eps_of(call: _Call, like: Tensor) -> Any:
    if len(set(call.eps)) == 1:
        return call.eps[0]
    layer_of = call.merged.layer_of
    assert layer_of is not None
    return _constant(tuple(call.eps), like.dtype, like.device)[layer_of]


def _per_layer(vector: Tensor, inputs: Sequence[Tensor]) -> List[Tensor]:
    """Splits a vector of shape ``(ΣC,)`` into one of shape ``(C,)`` a layer, in the dtype of the layer's statistics."""
    pieces = split_channels(vector, [input.shape[1] for input in inputs])
    return [cast(piece, statistics_dtype(input.dtype)) for piece, input in zip(pieces, inputs)]
