"""Synchronized batch normalization as a function of tensors and a statistics channel.

Several layers that do not depend on each other share one round: their statistics travel in one message.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .channel import BACKWARD, FORWARD, Channel, SyncPoint
from .deferred import Behind, Compute, Deferral, refuse_second_derivative
from .groups import yield_core
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
    statistics_dtype,
)
from .records import Record, Records

__all__ = ["Member", "launch_moments", "sync_batch_norm"]

_T = TypeVar("_T")


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
    records: Optional[Records] = None,
    behind: Optional[Behind] = None,
) -> Tuple[Tuple[Tensor, ...], Optional[Record]]:
    """Normalizes the inputs of independent layers, each over the elements of all ranks of ``channel``.

    Args:
        members: the layers and their inputs; of the same channels on every rank, on one device.
        channel: the ranks to normalize over.
        point: names this round to the other ranks.
        records: the round's records, through which a forward recomputed in backward reuses the statistics.
        behind: what the round of backward is to hide behind; is given its deferrals where there will be such a round.

    Returns:
        The outputs, each in its input's dtype and memory format, and the record of this forward, with the local and
        the merged moments; ``None`` in place of the record where the forward was a recomputation. An output that no
        rank uses gives no gradient to its layer.

    Raises:
        ValueError: if the whole group holds at most one value per channel of a layer.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive.

    Collectives:
        Forward: one all-gather of ``8 + 2C·itemsize`` payload bytes for each member; none for a recomputation.
        Backward: one all-gather of ``2C·itemsize`` bytes for each, and of one byte more where there are several, if
        any input requires a gradient. Every rank must call.
    """
    inputs = [dense(member.input.detach()) for member in members]
    tensors = [tensor for member in members for tensor in (member.input, member.weight, member.bias)]
    # The gradients of a layer's own parameters need no other rank, unless that is to say whether there are any.
    early: List[Optional[Tensor]] = tensors[1:] if len(members) == 1 else []
    communicates = torch.is_grad_enabled() and any(member.input.requires_grad for member in members)

    def moments() -> List[LocalMoments]:
        return [_local(input) for input in inputs]

    def defer() -> Optional[Deferral]:
        if behind is None or not communicates:
            return None
        if not recomputed:
            yield_core()  # the statistics in flight need a moment of the core to go on; this takes longer than that
        late = [tensors[0], None, None] if early else tensors
        return behind.defer(late, inputs[0].device, point.name)

    with torch.no_grad():
        record = None
        if records is not None:
            # A fault before the exchange must reach the ranks that already wait in it.
            record = _or_fail(channel, point, FORWARD, lambda: records.match(moments))
        recomputed = record is not None
        arrived = None
        if record is None:
            local = _or_fail(channel, point, FORWARD, moments)
            arrived = launch_moments(local, channel, point, [member.name for member in members])
        finish = _or_fail(channel, point, FORWARD, defer)  # while the statistics travel: it needs none of them
        if record is None:
            assert arrived is not None
            record = Record(local, arrived())
            if records is not None:
                records.open(record)
        else:
            local = record.local
    call = _Call(local, record.merged, [member.eps for member in members], channel, point, records, record)

    def apply() -> Tuple[Tensor, ...]:
        if finish is None:
            outputs: Tuple[Tensor, ...] = _SyncBatchNorm.apply(call, *tensors)  # type: ignore[no-untyped-call]
            return outputs
        outputs = _LaunchingBatchNorm.apply(call, finish, finish.token, tensors, *early)  # type: ignore[no-untyped-call]
        return outputs

    if recomputed:
        return apply(), None  # checkpointing ends a recomputation early by an exception from inside: no fault
    # A fault from here on reaches the others in the next exchange that they come to.
    return _or_fail(channel, point, FORWARD, apply), record


class _Call(NamedTuple):
    local: List[LocalMoments]
    merged: GlobalMoments
    eps: List[float]
    channel: Channel
    point: SyncPoint
    records: Optional[Records]
    record: Record


class _SyncBatchNorm(Function):
    """A round whose backward waits for the statistics that it sends."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Optional[Tensor]) -> Tuple[Tensor, ...]:
        return _normalize(ctx, call, tensors, ctx.needs_input_grad[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        _, wait = _launch(ctx, grads, ctx.needs_input_grad[1:])
        return (None, *wait(ctx.needs_input_grad[1:]))


class _LaunchingBatchNorm(Function):
    """A round whose backward sends statistics, and leaves waiting for them and the gradients to a deferral.

    But for those in ``early``, which are known when it sends.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        finish: Deferral,
        token: Tensor,
        tensors: Sequence[Optional[Tensor]],
        *early: Optional[Tensor],
    ) -> Tuple[Tensor, ...]:
        # In one argument, in which autograd does not look for inputs: the tensors' gradients are the deferral's.
        ctx.finish, ctx.needs = finish, [tensor is not None and tensor.requires_grad for tensor in tensors]
        return _normalize(ctx, call, tensors, ctx.needs)

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> Tuple[Optional[Tensor], ...]:
        refuse_second_derivative(ctx.call.point.name)
        finish: Deferral = ctx.finish
        of_parameters, wait = _launch(ctx, grads, ctx.needs)
        if not finish.leave(wait):
            wait([False] * len(ctx.needs))  # a backward for the parameters alone: the round has to end all the same
        yield_core()  # as in forward: what comes now may be long
        needs = ctx.needs_input_grad[4:]
        early = of_parameters(0, needs) if needs and grads[0] is not None else [None] * len(needs)
        return (None, None, None, None, *early)


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
    outputs = []
    for input, weight, bias, local, mean_, invstd_ in zip(
        inputs, weights, biases, call.local, _split(merged.mean, inputs), _split(invstd, inputs)
    ):
        if input.numel() == 0:
            outputs.append(torch.empty_like(input))
        else:
            outputs.append(normalize(input, local, mean_, invstd_, weight, bias))
    # A layer without gradients beside one with them gives what it would give by itself.
    ctx.mark_non_differentiable(*(y for i, y in enumerate(outputs) if not any(needs[3 * i : 3 * i + 3])))
    return tuple(outputs)


def _launch(
    ctx: Any, grads: Sequence[Optional[Tensor]], needs: Sequence[bool]
) -> Tuple[Callable[[int, Sequence[bool]], List[Optional[Tensor]]], Compute]:
    """The first half of backward: local sums, and their message on its way.

    Returns:
        What gives the gradients of a layer's weight and bias, from its index and which of both are wanted; and the
        second half of backward, which waits for the sums of all ranks, and gives all gradients.
    """
    call: _Call = ctx.call
    mean, invstd, elements, *rest = ctx.saved_tensors
    bias_dtypes = ctx.bias_dtypes
    count = len(rest) // 2
    inputs, weights = rest[:count], rest[count:]
    means, invstds = _split(mean, inputs), _split(invstd, inputs)
    outputs = [
        None if grad is None else grad.contiguous(memory_format=memory_format(input))
        for grad, input in zip(grads, inputs)
    ]

    def local_sums() -> Tuple[List[Tensor], List[Tensor]]:
        pairs = [
            (torch.zeros_like(mean_), torch.zeros_like(mean_))
            if output is None or input.numel() == 0
            else gradient_sums(output, input, mean_, invstd_)
            for output, input, mean_, invstd_ in zip(outputs, inputs, means, invstds)
        ]
        return [dy for dy, _ in pairs], [dy_xhat for _, dy_xhat in pairs]

    local_dy, local_dy_xhat = _or_fail(call.channel, call.point, BACKWARD, local_sums)
    arrived: Optional[Callable[[], List[Tensor]]] = None
    if any(needs[::3]):
        parts = [torch.cat([cast(part, mean.dtype) for part in (*local_dy, *local_dy_xhat)])]
        if count > 1:
            used = tuple(output is not None for output in outputs)
            parts.append(_constant(used, torch.uint8, mean.device))
        arrived = call.channel.launch(call.point, BACKWARD, parts)

    def of_parameters(i: int, needs: Sequence[bool]) -> List[Optional[Tensor]]:
        weight = cast(local_dy_xhat[i], weights[i].dtype) if needs[0] else None
        return [weight, cast(local_dy[i], bias_dtypes[i]) if needs[1] else None]

    def wait(needs: Sequence[bool]) -> List[Optional[Tensor]]:
        used = [output is not None for output in outputs]
        gradients: List[Optional[Tensor]] = [None] * (3 * count)
        if arrived is not None:
            gathered, *flags = arrived()
            # In rank order and in float64, as in the forward: the same bits on every rank.
            layer_of = call.merged.layer_of
            means_of_all = (
                gathered.double().sum(0).view(2, -1).div_(elements if layer_of is None else elements[layer_of])
            )
            dy, dy_xhat = (_split(half, inputs) for half in means_of_all.to(mean.dtype).unbind(0))
            if flags and not all(used):  # only then does the host have to know
                used = flags[0].any(0).tolist()
            for i, input in enumerate(inputs):
                if not (used[i] and needs[3 * i]):
                    continue
                if input.numel() == 0:
                    gradients[3 * i] = torch.empty_like(input)
                else:
                    output = outputs[i]
                    gradients[3 * i] = input_gradient(
                        torch.zeros_like(input) if output is None else output,
                        input,
                        means[i],
                        invstds[i],
                        weights[i],
                        dy[i],
                        dy_xhat[i],
                    )
        for i in range(count):
            if used[i]:
                gradients[3 * i + 1 : 3 * i + 3] = of_parameters(i, needs[3 * i + 1 : 3 * i + 3])
        if call.records is not None:
            call.records.close(call.record)
        return gradients

    return of_parameters, wait


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


def _split(vector: Tensor, inputs: Sequence[Tensor]) -> List[Tensor]:
    """Cuts one vector for all layers into the layers' own, each in its statistics' dtype."""
    if len(inputs) == 1:
        return [vector]
    pieces = vector.split([input.shape[1] for input in inputs])
    return [cast(piece, statistics_dtype(input.dtype)) for piece, input in zip(pieces, inputs)]


def _or_fail(channel: Channel, point: SyncPoint, phase: int, compute: Callable[[], _T]) -> _T:
    """Runs ``compute``; on an error the other ranks are told before it is raised here."""
    try:
        return compute()
    except Exception as error:
        channel.fail(point, phase, error)
        raise
