"""Synchronized batch normalization as a function of tensors and a statistics channel."""

from __future__ import annotations

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .channel import BACKWARD, FORWARD, Channel, SyncPoint
from .moments import (
    GlobalMoments,
    LocalMoments,
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

__all__ = ["exchange_moments", "sync_batch_norm"]


def sync_batch_norm(
    input: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    channel: Channel,
    point: SyncPoint,
    records: Optional[Records] = None,
) -> Tuple[Tensor, Optional[Record]]:
    """Normalizes ``input`` over the elements of all ranks of ``channel``.

    Args:
        input: shape ``(N, C, ...)``, floating point; ``N`` may be 0 on some ranks.
        weight: shape ``(C,)``, or ``None``.
        bias: shape ``(C,)``, or ``None``.
        eps: added to the variance.
        channel: the ranks to normalize over.
        point: names this call to the other ranks.
        records: the layer's records, through which a forward recomputed in backward reuses the statistics.

    Returns:
        The output, in the input's dtype and memory format, and the record of this forward, with the local and the
        merged moments; ``None`` in place of the record where the forward was a recomputation.

    Raises:
        ValueError: if the whole group holds at most one value per channel.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive.

    Collectives:
        Forward: one all-gather of ``8 + 2C·itemsize`` payload bytes; none for a recomputation. Backward: one
        all-gather of ``2C·itemsize`` bytes, if the input requires a gradient. Every rank must call.
    """
    detached = dense(input.detach())
    with torch.no_grad():
        local = None
        record = None
        if records is not None:
            # A fault before the exchange must reach the ranks that already wait in it.
            record = _or_fail(channel, point, FORWARD, lambda: records.match(lambda: _local(detached)))
        merged = None if record is None else record.merged
        if merged is None:
            local = _or_fail(channel, point, FORWARD, lambda: _local(detached))
            merged = exchange_moments(local, channel, point)
            record = Record(local, merged)
            if records is not None:
                records.open(record)
            recomputed = False
        else:
            local = LocalMoments(detached.numel() // max(detached.shape[1], 1), merged.mean, merged.variance)
            recomputed = True
    call = _Call(local, merged, eps, channel, point, records, record)

    def apply() -> Tensor:
        output: Tensor = _SyncBatchNorm.apply(input, weight, bias, call)  # type: ignore[no-untyped-call]
        return output

    if recomputed:
        return apply(), None  # checkpointing ends a recomputation early by an exception from inside: no fault
    # A fault from here on reaches the others in the next exchange that they come to.
    return _or_fail(channel, point, FORWARD, apply), record


class _Call(NamedTuple):
    local: Optional[LocalMoments]
    merged: GlobalMoments
    eps: float
    channel: Channel
    point: SyncPoint
    records: Optional[Records]
    record: Optional[Record]


class _SyncBatchNorm(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], call: _Call) -> Tensor:
        input = dense(input)
        mean = call.merged.mean
        invstd = (call.merged.variance + call.eps).rsqrt_()
        ctx.save_for_backward(input, weight, mean, invstd, call.merged.elements)
        ctx.call = call._replace(local=None)  # its scratch tensor becomes the output
        ctx.bias_dtype = None if bias is None else bias.dtype
        if input.numel() == 0:
            return torch.empty_like(input)
        assert call.local is not None
        return normalize(input, call.local, mean, invstd, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> Tuple[Optional[Tensor], ...]:
        input, weight, mean, invstd, count = ctx.saved_tensors
        call: _Call = ctx.call

        def local_sums() -> Tuple[Tensor, Tensor]:
            nonlocal grad_output
            grad_output = grad_output.contiguous(memory_format=memory_format(input))
            if input.numel() == 0:
                return torch.zeros_like(mean), torch.zeros_like(mean)
            return gradient_sums(grad_output, input, mean, invstd)

        local_dy, local_dy_xhat = _or_fail(call.channel, call.point, BACKWARD, local_sums)
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            (gathered,) = call.channel.exchange(call.point, BACKWARD, [torch.cat([local_dy, local_dy_xhat])])
            # In rank order and in float64, as in the forward: the same bits on every rank.
            dy, dy_xhat = gathered.double().sum(0).to(mean.dtype).chunk(2)
            if input.numel() == 0:
                grad_input = torch.empty_like(input)
            else:
                grad_input = input_gradient(grad_output, input, mean, invstd, weight, dy, dy_xhat, count)
        if ctx.needs_input_grad[1]:
            grad_weight = local_dy_xhat.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = local_dy.to(ctx.bias_dtype)
        if call.records is not None and call.record is not None:
            call.records.close(call.record)
        return grad_input, grad_weight, grad_bias, None


def _local(input: Tensor) -> LocalMoments:
    if input.numel() > 0:
        return local_moments(input)
    zeros = torch.zeros(input.shape[1], dtype=statistics_dtype(input.dtype), device=input.device)
    return LocalMoments(0, zeros, zeros)


def exchange_moments(local: LocalMoments, channel: Channel, point: SyncPoint) -> GlobalMoments:
    """Merges the local moments of all ranks of ``channel``.

    Raises:
        ValueError: if the whole group holds at most one value per channel.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive.

    Collectives:
        One all-gather of ``8 + 2C·itemsize`` payload bytes. Every rank must call.
    """
    count = torch.full((1,), local.elements, dtype=torch.int64, device=local.mean.device)
    counts, moments = channel.exchange(point, FORWARD, [count, torch.cat([local.mean, local.variance])])
    # Where this rank alone holds two values per channel, the world does too: no need to wait for the others' counts.
    if local.elements < 2 and int(counts.sum()) < 2:
        raise ValueError(
            f"expected more than 1 value per channel in the whole group when training (got {local.elements} here, "
            f"{int(counts.sum())} on all {channel.world_size} ranks, at {point.name}); use a larger batch or eval()"
        )
    means, variances = moments.chunk(2, dim=1)
    return merge_moments(counts, means, variances)


def _or_fail(channel: Channel, point: SyncPoint, phase: int, compute: Any) -> Any:
    """Runs ``compute``; on an error the other ranks are told before it is raised here."""
    try:
        return compute()
    except Exception as error:
        channel.fail(point, phase, error)
        raise
