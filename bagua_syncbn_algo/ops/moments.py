"""Tensor functions of batch normalization: local moments, their merge, normalization, input gradient.

Symbols: ``N`` is the batch size, ``C`` the number of channels (dimension 1 of the input), ``L`` the number of layers,
``ΣC`` the channels of all layers, ``W`` the number of ranks. The functions do not communicate. Their input is *dense*
(see :func:`dense`) and not empty: some native kernels divide by the size of an empty shard and end the process.

On CUDA the functions call the fused kernels of ``torch.nn.SyncBatchNorm``, which take half-precision input with float32
statistics. On other devices they call ATen operators. Elementwise steps work in place on one new tensor, because the
page faults of a second allocation cost more than a pass over memory. No step folds the input's mean into an additive
term (x·a − mean·a), because that loses about log₁₀(|mean| / standard deviation) digits: the input is centred first.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..compat import batch_norm_into

__all__ = [
    "GlobalMoments",
    "LayerStatistics",
    "LocalMoments",
    "cast",
    "dense",
    "gradient_sums",
    "has_fused_kernels",
    "layer_index",
    "input_gradient",
    "local_moments",
    "memory_format",
    "merge_moments",
    "normalize",
    "split_channels",
    "statistics_dtype",
]


# Elements of an input up to which one scalar pass is faster than several vectorized passes. Measured on one core: 5
# against 25 µs at 2,304 elements, 12 against 25 µs at 9,216, 36 against 32 µs at 32,768.
SMALL = 24576

# The overload, not the packet: overload resolution at every call costs as much as the arithmetic of a small layer.
_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default


class LocalMoments(NamedTuple):
    """Moments of the elements of one rank."""

    elements: int  # per channel
    mean: Tensor  # (C,)
    variance: Tensor  # (C,) biased: the centred sum of squares divided by the elements
    centred: Optional[Tensor] = None  # scratch of the input's shape: input − shift; `normalize` overwrites it
    shift: Optional[Tensor] = None  # (C,) subtracted from the input in `centred`

    def unbiased_variance(self) -> Tensor:
        """Returns the variance over ``elements − 1``; 0 for a single element."""
        return self.variance * (self.elements / max(self.elements - 1, 1))


class GlobalMoments(NamedTuple):
    """Moments of the elements of all ranks, of one layer or of several layers one after the other."""

    weights: Weights
    mean: Tensor  # (C,) or (ΣC,)
    variance: Tensor  # the same shape; biased, as normalization uses it
    features: Tuple[int, ...]  # channels of each layer

    def unbiased_variance(self) -> Tensor:
        """Returns the variance over ``elements − 1``, as running_var uses it."""
        return self.variance * cast(self.weights.bessel, self.variance.dtype)


class Weights(NamedTuple):
    """The share of each rank in the moments of a round, and what follows from the number of elements."""

    elements: Tensor  # float64, exact to 2⁵³: a scalar or (ΣC,)
    shares: Tensor  # float64, (W, 1) or (W, ΣC): the elements of a rank divided by those of all ranks
    bessel: Tensor  # elements / (elements − 1), of the same shape


class LayerStatistics(NamedTuple):
    """The statistics that one layer normalizes with, each of shape ``(C,)`` in the statistics' dtype."""

    mean: Tensor
    variance: Optional[Tensor]  # biased; None from the fused kernels, which need it no more
    invstd: Tensor  # 1 / √(variance + eps)
    eps: float


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the statistics of an input of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(input: Tensor) -> torch.memory_format:
    """Returns the memory format of the output for ``input``: channels-last if the input is, else contiguous."""
    if not input.is_contiguous():
        if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if input.dim() == 5 and input.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    return torch.contiguous_format


def dense(input: Tensor) -> Tensor:
    """Returns ``input`` itself if it is contiguous or channels-last, else a contiguous copy."""
    return input.contiguous(memory_format=memory_format(input))


def has_fused_kernels(input: Tensor) -> bool:
    """Returns whether PyTorch has fused batch normalization kernels for the input's device."""
    return input.is_cuda


def local_moments(input: Tensor) -> LocalMoments:
    """Computes count, mean and biased variance per channel.

    The variance is not ``E[x²] − E[x]²``. In float32, at a mean of 1000 standard deviations, that is off by a fifth.

    Args:
        input: shape ``(N, C, ...)``, dense, at least one element.

    Returns:
        Moments in :func:`statistics_dtype` of the input's dtype.
    """
    if has_fused_kernels(input):
        # Not batch_norm_stats, whose invstd is 0 instead of infinite if variance and eps are 0 (a constant channel).
        mean, variance = torch.batch_norm_update_stats(input, None, None, 0.0)
        return LocalMoments(input.numel() // input.shape[1], mean, variance)
    channels = input.shape[1]
    count = input.numel() // channels
    input = cast(input, statistics_dtype(input.dtype))
    if input.numel() <= SMALL or memory_format(input) != torch.contiguous_format:
        mean, variance = torch.batch_norm_update_stats(input, None, None, 0.0)
        return LocalMoments(count, mean, variance)
    shift = input.mean([d for d in range(input.dim()) if d != 1])
    centred = torch.sub(input, _per_channel(shift, input))
    # ATen has no vectorized sum of squares per channel. With the centred input as gradient and as input, and a mean of
    # zero, the backward kernel returns Σc² and Σc in one pass, summed in double precision.
    _, squares, residual = _BATCH_NORM_BACKWARD(
        centred,
        centred,
        None,
        None,
        None,
        _filled(0.0, channels, input.dtype, input.device),
        _filled(1.0, channels, input.dtype, input.device),
        True,
        0.0,
        [False, True, True],
    )
    error = residual / count  # the rounding error of the float32 mean
    variance = (squares / count).addcmul_(error, error, value=-1).clamp_(min=0)
    return LocalMoments(count, shift + error, variance, centred, shift)


_LARGEST_CACHED = 4096  # weights of a round in the cache, of at most 64 KiB: 1,024 rounds of other shapes fill it


def weights_of(counts: Tensor, features: Tuple[int, ...]) -> Weights:
    """Returns the weights of the ranks' moments. On the CPU the latest results are cached: most steps repeat them.

    Args:
        counts: elements per channel, shape ``(W, L)``, int64.
        features: channels of each of the L layers.
    """
    if counts.is_cuda or counts.shape[0] * sum(features) > _LARGEST_CACHED:
        return _weights(counts, features)
    return _cached_weights(tuple(map(tuple, counts.tolist())), features)


@lru_cache(maxsize=1024)
def _cached_weights(counts: Tuple[Tuple[int, ...], ...], features: Tuple[int, ...]) -> Weights:
    with torch.inference_mode(False):  # the tensors outlive an inference_mode block that may be active
        return _weights(torch.tensor(counts, device="cpu"), features)


def _weights(counts: Tensor, features: Tuple[int, ...]) -> Weights:
    counts = counts.double()
    elements = counts.sum(0)
    shares = counts / elements
    if len(features) > 1:
        index = layer_index(features, counts.device)
        elements, shares = elements[index], shares[:, index]
    else:
        elements = elements.squeeze(0)
    return Weights(elements, shares, elements / (elements - 1))


@lru_cache(maxsize=65536)  # never evicted in practice: a captured graph reads it
def layer_index(features: Tuple[int, ...], device: torch.device) -> Tensor:
    """Returns the index of the layer of each channel, shape ``(ΣC,)``: expands a value per layer to one per channel."""
    with torch.inference_mode(False):
        return torch.repeat_interleave(torch.tensor(features, device="cpu")).to(device)


def merge_moments(counts: Tensor, moments: Tensor, features: Tuple[int, ...]) -> GlobalMoments:
    """Merges the moments of ``W`` ranks, in rank order, so that all ranks compute the same bits.

    ``N = Σ n_r``, ``M = Σ n_r m_r / N``, ``V = Σ n_r [v_r + (m_r − M)²] / N``: Chan, Golub, LeVeque, "Updating formulae
    and a pairwise algorithm for computing sample variances", 1979, with variances in place of sums of squares. The
    arithmetic is float64 for every dtype: the tensors are small.

    Args:
        counts: elements per channel, shape ``(W, L)`` for L layers, int64; the sum over ranks must be at least 2.
        moments: means of all layers, then biased variances of all layers, shape ``(W, 2ΣC)``.
        features: channels of each layer.

    Returns:
        Moments in the dtype of ``moments``.
    """
    weights = weights_of(counts, features)
    if moments.shape[0] == 1:
        mean, variance = moments[0].chunk(2)
        return GlobalMoments(weights, mean, variance, features)
    means, variances = moments.double().chunk(2, dim=1)
    mean = (means * weights.shares).sum(0)
    deviations = means - mean
    variance = torch.addcmul(variances, deviations, deviations).mul_(weights.shares).sum(0)
    return GlobalMoments(weights, mean.to(moments.dtype), variance.to(moments.dtype), features)


def normalize(
    input: Tensor,
    local: Optional[LocalMoments],
    statistics: LayerStatistics,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
) -> Tensor:
    """Returns ``(input − mean) · invstd · weight + bias`` in the input's dtype and memory format.

    Args:
        input: shape ``(N, C, ...)``, dense.
        local: the result of :func:`local_moments` for this input, if there is one; its scratch tensor is overwritten.
        statistics: the statistics to normalize with.
        weight: shape ``(C,)`` or ``None``; any floating dtype.
        bias: shape ``(C,)`` or ``None``; any floating dtype.
    """
    mean, variance, invstd, eps = statistics
    dtype = mean.dtype
    weight = None if weight is None else cast(weight, dtype)
    bias = None if bias is None else cast(bias, dtype)
    if has_fused_kernels(input):
        return torch.batch_norm_elemt(input, weight, bias, mean, invstd, 0.0)
    assert variance is not None
    if local is None or local.centred is None or local.shift is None:
        centred, rest = torch.sub(input, _per_channel(mean, input)), _filled(0.0, mean.numel(), dtype, mean.device)
    else:
        centred, rest = local.centred, mean - local.shift
    if centred.is_contiguous():
        return cast(_normalize_(centred, rest, variance, weight, bias, eps), input.dtype)
    scale = _per_channel(invstd if weight is None else invstd * weight, input)
    if bias is None:
        return cast(centred.mul_(scale), input.dtype)
    return cast(torch.addcmul(_per_channel(bias, input), centred, scale, out=centred), input.dtype)


def gradient_sums(grad_output: Tensor, input: Tensor, statistics: LayerStatistics) -> Tuple[Tensor, Tensor]:
    """Returns the local sums ``Σ dy`` and ``Σ dy · x̂`` per channel, where ``x̂ = (x − mean) · invstd``.

    They are also the gradients of bias and weight on this rank.

    Args:
        grad_output: shape ``(N, C, ...)``, dense, in the memory format of ``input``.
        input: shape ``(N, C, ...)``, dense.
        statistics: the statistics of the forward pass.
    """
    mean, invstd = statistics.mean, statistics.invstd
    if has_fused_kernels(input):
        dy, dy_xmu, _, _ = torch.batch_norm_backward_reduce(grad_output, input, mean, invstd, None, True, False, False)
        return dy, dy_xmu * invstd
    _, dy_xhat, dy = _BATCH_NORM_BACKWARD(
        cast(grad_output, mean.dtype),
        cast(input, mean.dtype),
        None,
        None,
        None,
        mean,
        invstd,
        True,
        0.0,
        [False, True, True],
    )
    return dy, dy_xhat


def input_gradient(
    grad_output: Tensor,
    input: Tensor,
    statistics: LayerStatistics,
    weight: Optional[Tensor],
    mean_dy: Tensor,
    slope: Tensor,
) -> Tensor:
    """Returns ``dx = weight · invstd · (dy − mean(dy) − (x − mean) · slope)`` in the input's dtype.

    The derivative of :func:`normalize` with respect to its input through the global moments (Ioffe, Szegedy, "Batch
    Normalization", 2015, section 3, with means over all ranks), where ``slope = invstd · mean(dy · x̂)``.

    Args:
        grad_output: shape ``(N, C, ...)``, dense, in the memory format of ``input``.
        input: shape ``(N, C, ...)``, dense.
        statistics: the statistics of the forward pass.
        weight: shape ``(C,)`` or ``None``.
        mean_dy: shape ``(C,)``: the mean of ``dy`` over the elements of all ranks.
        slope: shape ``(C,)``.
    """
    mean, variance, invstd, eps = statistics
    weight = None if weight is None else cast(weight, mean.dtype)
    if has_fused_kernels(input):
        # The kernel multiplies the second sum by invstd², and divides both by a count in int32, which a large group
        # of ranks overflows. It gets means, and a count of 1.
        one = torch.ones(1, dtype=torch.int32, device=input.device)
        mean_dy_xmu = slope / invstd.square()
        return torch.batch_norm_backward_elemt(grad_output, input, mean, invstd, weight, mean_dy, mean_dy_xmu, one)
    assert variance is not None
    grad_output = cast(grad_output, mean.dtype)
    gradient = torch.sub(input, _per_channel(mean, input))
    if gradient.is_contiguous():
        torch.addcmul(grad_output, gradient, _per_channel(slope, input), value=-1, out=gradient)
        return cast(_normalize_(gradient, mean_dy, variance, weight, None, eps), input.dtype)
    scale = invstd if weight is None else invstd * weight
    offset = _per_channel(-scale * mean_dy, input)
    torch.addcmul(offset, gradient, _per_channel(scale * slope, input), value=-1, out=gradient)
    return cast(gradient.addcmul_(grad_output, _per_channel(scale, input)), input.dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As ``tensor.to(dtype)``, which takes a microsecond to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def split_channels(vector: Tensor, features: Sequence[int]) -> Sequence[Tensor]:
    """Returns the parts ``(C,)`` of each layer in a vector ``(ΣC,)``."""
    return (vector,) if len(features) == 1 else vector.split_with_sizes(features)


@lru_cache(maxsize=65536)  # never evicted in practice: a captured graph reads it
def _filled(value: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a constant vector, never to be written to."""
    with torch.inference_mode(False):  # it outlives the block that may be running
        return torch.full((size,), value, dtype=dtype, device=device)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Shapes a ``(C,)`` vector so that it broadcasts over an input ``(N, C, ...)``."""
    return vector.view((1, -1) + (1,) * (like.dim() - 2))


def _normalize_(
    tensor: Tensor, mean: Tensor, variance: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> Tensor:
    """Returns ``(tensor − mean) / √(variance + eps) · weight + bias`` for a contiguous tensor, which is overwritten.

    The kernel adds ``bias − mean · scale`` as one term. ``mean`` must be small in relation to the tensor's values.
    """
    arguments = (tensor, weight, bias, mean, variance, False, 0.0, eps)
    if tensor.numel() <= SMALL:  # the in-place form has more arguments to parse
        return torch.native_batch_norm(*arguments)[0]
    return batch_norm_into(tensor, *arguments)
