"""A round of synchronized batch normalization as tensor operations, for ``torch.compile``.

The arithmetic is that of :mod:`.exact`, written as operations that a compiler fuses, around the operators `launch` and
`wait`. Messages and the order of rounds are those of an eager step.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.autograd import Function

from ..comm.wire import BACKWARD, FORWARD
from .moments import statistics_dtype
from .operators import operators_for

__all__ = ["InGraphRound", "in_graph_round", "move_running_statistics_in_graph"]


class InGraphRound(NamedTuple):
    """The result of a round."""

    outputs: Tuple[Tensor, ...]
    means: Sequence[Tensor]  # of all ranks, (C,) for each layer
    variances: Sequence[Tensor]  # unbiased
    counted: Tensor  # 1, or 0 in a recomputation, which does not move the running statistics


def in_graph_round(
    key: str,
    ranks: int,
    inputs: Sequence[Tensor],
    weights: Sequence[Optional[Tensor]],
    biases: Sequence[Optional[Tensor]],
    eps: Sequence[float],
) -> InGraphRound:
    """Normalizes the inputs of independent layers over all ranks. The backward has a round of its own.

    Args:
        key: the key of the site.
        ranks: the number of ranks.
        inputs: shape ``(N, C, ...)``; ``N`` may be 0.
        weights: ``(C,)`` or ``None``.
        biases: ``(C,)`` or ``None``.
        eps: of each layer.

    Collectives:
        Forward and backward: one all-gather each, as in eager mode, see :func:`.functional.sync_batch_norm`.
    """
    features = [input.shape[1] for input in inputs]
    dtypes = [statistics_dtype(input.dtype) for input in inputs]
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    with torch.no_grad():
        local = [_local_moments(input.detach(), dtype) for input, dtype in zip(inputs, dtypes)]
        elements = [input.numel() // input.shape[1] for input in inputs]
        payload = torch.cat([*(each[0].to(widest) for each in local), *(each[1].to(widest) for each in local)])
        launch, wait = operators_for(elements)
        handle = launch(payload, elements, [], key, FORWARD)
        counted, moments = wait(handle, [], ranks, len(inputs), 2 * sum(features), key, FORWARD)
        counts, counted = counted[:-1], counted[-1, 0]
        mean, variance, per_channel = _merge(counts, moments, features)
        unbiased = variance * (per_channel / (per_channel - 1)).to(widest)
        totals = counts.sum(0).double()
        means, variances, unbiased_parts = (each.split(features) for each in (mean, variance, unbiased))
        merged_means = [each.to(dtype) for each, dtype in zip(means, dtypes)]
        invstds = [(each + added).rsqrt().to(dtype) for each, added, dtype in zip(variances, eps, dtypes)]
    tensors = _distinct([tensor for row in zip(inputs, weights, biases) for tensor in row])
    outputs = _Normalize.apply(key, ranks, widest, totals, *tensors, *merged_means, *invstds)  # type: ignore[no-untyped-call]
    # As in eager mode, an output without a gradient does not lead to further rounds in backward.
    outputs = tuple(
        output if any(each is not None and each.requires_grad for each in row) else output.detach()
        for output, *row in zip(outputs, inputs, weights, biases)
    )
    return InGraphRound(outputs, means, unbiased_parts, counted)


def _distinct(tensors: Sequence[Optional[Tensor]]) -> List[Optional[Tensor]]:
    """Returns the tensors, and a view in place of a repeated one: Dynamo refuses a Function of one tensor twice."""
    found: List[Optional[Tensor]] = []
    for index, tensor in enumerate(tensors):
        repeated = tensor is not None and any(tensor is earlier for earlier in tensors[:index])
        found.append(tensor.view_as(tensor) if repeated and tensor is not None else tensor)
    return found


def _local_moments(input: Tensor, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """Returns mean and biased variance of this rank's elements; zeros for an empty shard."""
    if input.numel() == 0:
        zeros = torch.zeros(input.shape[1], dtype=dtype, device=input.device)
        return zeros, zeros
    dimensions = [d for d in range(input.dim()) if d != 1]
    input = input.to(dtype)
    shift = input.mean(dimensions)
    centred = input - _per_channel(shift, input)
    error = centred.mean(dimensions)  # the rounding error of `shift`
    variance = centred.square().mean(dimensions) - error * error
    return shift + error, variance.clamp(min=0)


def _merge(counts: Tensor, moments: Tensor, features: Sequence[int]) -> Tuple[Tensor, Tensor, Tensor]:
    """Merges the moments of all ranks in float64, as :func:`.moments.merge_moments`.

    Returns:
        Mean and biased variance, shape ``(ΣC,)``, and the elements of all ranks, ``(ΣC,)`` in float64.
    """
    ranks = len(moments)
    parts = [counts[:, i : i + 1].expand(ranks, size) for i, size in enumerate(features)]
    own = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).double()
    total = own.sum(0)
    if ranks == 1:
        mean, variance = moments[0].chunk(2)
        return mean, variance, total
    means, variances = moments.double().chunk(2, dim=1)
    shares = own / total
    mean = (means * shares).sum(0)
    deviations = means - mean
    variance = ((variances + deviations * deviations) * shares).sum(0)
    return mean.to(moments.dtype), variance.to(moments.dtype), total


def _per_channel(vector: Tensor, input: Tensor) -> Tensor:
    return vector.view([1, -1] + [1] * (input.dim() - 2))


class _Normalize(Function):
    """The normalization of all layers of a round, whose backward exchanges the gradient sums."""

    @staticmethod
    def forward(
        ctx: Any, key: str, ranks: int, widest: torch.dtype, totals: Tensor, *tensors: Any
    ) -> Tuple[Tensor, ...]:
        count = len(tensors) // 5
        inputs, weights, biases = tensors[: 3 * count : 3], tensors[1 : 3 * count : 3], tensors[2 : 3 * count : 3]
        means, invstds = tensors[3 * count : 4 * count], tensors[4 * count :]
        ctx.save_for_backward(totals, *inputs, *weights, *means, *invstds)
        ctx.key, ctx.ranks, ctx.widest = key, ranks, widest
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        outputs = []
        for input, weight, bias, mean, invstd in zip(inputs, weights, biases, means, invstds):
            output = (input.to(mean.dtype) - _per_channel(mean, input)) * _per_channel(invstd, input)
            if weight is not None:
                output = output * _per_channel(weight.to(mean.dtype), input)
            if bias is not None:
                output = output + _per_channel(bias.to(mean.dtype), input)
            outputs.append(output.to(input.dtype))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tuple[Optional[Tensor], ...]:
        totals, *saved = ctx.saved_tensors
        count = len(saved) // 4
        inputs, weights = saved[:count], saved[count : 2 * count]
        means, invstds = saved[2 * count : 3 * count], saved[3 * count :]
        needs = ctx.needs_input_grad[4 : 4 + 3 * count]
        sums = [_gradient_sums(*row) for row in zip(grads, inputs, means, invstds)]
        gradients: List[Optional[Tensor]] = [None] * (3 * count)
        for i, (dy, dy_xhat) in enumerate(sums):
            if weights[i] is not None and needs[3 * i + 1]:
                gradients[3 * i + 1] = dy_xhat.to(weights[i].dtype)
            if ctx.bias_dtypes[i] is not None and needs[3 * i + 2]:
                gradients[3 * i + 2] = dy.to(ctx.bias_dtypes[i])
        if any(needs[::3]):
            used = torch.tensor([1.0], dtype=ctx.widest, device=totals.device).expand(count)
            parts = [*(each[0] for each in sums), *(each[1] for each in sums)]
            payload = torch.cat([*(part.to(ctx.widest) for part in parts), used])
            features = [mean.numel() for mean in means]
            launch, wait = operators_for([input.numel() // input.shape[1] for input in inputs])
            handle = launch(payload, [], [], ctx.key, BACKWARD)
            _, gathered = wait(handle, [], ctx.ranks, count, payload.numel(), ctx.key, BACKWARD)
            total = gathered[:, :-count].sum(0, dtype=torch.float64)
            all_dy, all_dy_xhat = (each.split(features) for each in total.chunk(2))
            for i, (grad, input) in enumerate(zip(grads, inputs)):
                if needs[3 * i]:
                    averages = ((each[i] / totals[i]).to(means[i].dtype) for each in (all_dy, all_dy_xhat))
                    gradients[3 * i] = _input_gradient(grad, input, weights[i], means[i], invstds[i], *averages)
        return (None, None, None, None, *gradients, *([None] * (2 * count)))


def _gradient_sums(grad: Tensor, input: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
    """Returns ``Σ dy`` and ``Σ dy·x̂`` over the elements of this rank."""
    # Also for an empty shard, whose sums are zeros. Constants would not depend on the gradient, and the compiler would
    # launch the backward round in the forward graph.
    dimensions = [d for d in range(input.dim()) if d != 1]
    dy = grad.to(mean.dtype)
    centred = input.to(mean.dtype) - _per_channel(mean, input)
    return dy.sum(dimensions), (dy * centred).sum(dimensions) * invstd


def _input_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Optional[Tensor],
    mean: Tensor,
    invstd: Tensor,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
) -> Tensor:
    """Returns the gradient of an input, as :func:`.moments.input_gradient`."""
    scale = invstd if weight is None else invstd * weight.to(mean.dtype)
    centred = input.to(mean.dtype) - _per_channel(mean, input)
    slope = _per_channel(invstd * mean_dy_xhat, input)
    gradient = grad.to(mean.dtype) - _per_channel(mean_dy, input) - centred * slope
    return (gradient * _per_channel(scale, input)).to(input.dtype)


@torch.no_grad()
def move_running_statistics_in_graph(layer: Any, mean: Tensor, variance: Tensor, counted: Tensor) -> None:
    """Moves the running statistics of a layer, as :func:`.running_stats.move_running_statistics`.

    Args:
        layer: the layer.
        mean: the mean of all ranks, shape ``(C,)``.
        variance: the unbiased variance.
        counted: 1, or 0 to leave everything as it is.
    """
    if not layer.track_running_stats or layer.running_mean is None:
        return
    layer.num_batches_tracked.add_(counted)
    momentum = 1 / layer.num_batches_tracked.to(mean.dtype) if layer.momentum is None else layer.momentum
    weight = counted.to(mean.dtype) * momentum
    for buffer, value in ((layer.running_mean, mean), (layer.running_var, variance)):
        # The arithmetic has the dtype of the statistics; a half-precision buffer is rounded once.
        buffer.copy_(torch.lerp(buffer.to(value.dtype), value, weight))
