"""Tensor functions of batch normalization: local moments, their merge, normalization, input gradient.

Symbols: ``N`` is the batch size, ``C`` the number of channels (dimension 1 of the input), ``L`` the number of layers,
``ΣC`` the channels of all layers, ``W`` the number of ranks. The functions do not communicate. Their input is *dense*
(see :func:`dense`) and not empty: some native kernels divide by the size of an empty shard and end the process.

On CUDA the functions call the fused kernels of ``torch.nn.SyncBatchNorm``, which take half-precision input with float32
statistics. On other devices they call ATen operators. Elementwise steps work in place on one new tensor, because the
page faults of a second allocation cost more than a pass over memory. No step folds the mean into an additive term
(x·a − mean·a), because that loses about log₁₀(|mean| / standard deviation) digits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

__all__ = [
    "GlobalMoments",
    "LocalMoments",
    "cast",
    "dense",
    "gradient_sums",
    "has_fused_kernels",
    "input_gradient",
    "local_moments",
    "memory_format",
    "merge_moments",
    "normalize",
    "split_channels",
    "statistics_dtype",
]


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

    def forget(self) -> LocalMoments:
        """Returns the moments without the scratch tensor, which is as large as the activation."""
        return self._replace(centred=None, shift=None)


class GlobalMoments(NamedTuple):
    """Moments of the elements of all ranks, of one layer or concatenated over several."""

    elements: Tensor  # float64 (exact to 2⁵³), per channel: a scalar, or (L,) for L layers
    mean: Tensor  # (C,), or (ΣC,)
    variance: Tensor  # the same shape; biased, for the normalization
    layer_of: Optional[Tensor] = None  # (ΣC,) the layer index of each channel; None for one layer

    def unbiased_variance(self) -> Tensor:
        """Returns the variance over ``elements − 1``, for ``running_var``."""
        factor = self.elements / (self.elements - 1)  # float64
        factor = factor.to(self.variance.dtype)
        return self.variance * (factor if self.layer_of is None else factor[self.layer_of])

    def split(self, features: List[int]) -> List[GlobalMoments]:
        """Returns the moments of each layer.

        Args:
            features: the channel count of each layer.
        """
        if self.layer_of is None:
            return [self]
        parts = zip(self.elements, self.mean.split(features), self.variance.split(features))
        return [GlobalMoments(elements, mean, variance) for elements, mean, variance in parts]


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
    if memory_format(input) != torch.contiguous_format:
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


def merge_moments(counts: Tensor, means: Tensor, variances: Tensor, layer_of: Optional[Tensor] = None) -> GlobalMoments:
    """Merges the moments of ``W`` ranks, in rank order, so that every rank gets bitwise the same result.

    ``N = Σ n_r``, ``M = Σ n_r m_r / N``, ``V = Σ n_r [v_r + (m_r − M)²] / N``: Chan, Golub, LeVeque, "Updating formulae
    and a pairwise algorithm for computing sample variances", 1979, with variances instead of sums of squares. The
    arithmetic is in float64 for every dtype: the tensors are small, and an int64 count is exact to 2⁵³.

    Args:
        counts: shape ``(W, 1)``, or ``(W, L)`` for ``L`` layers; int64; the sum over ranks is at least 2.
        means: shape ``(W, C)``; for several layers ``(W, ΣC)``.
        variances: the shape of ``means``; biased.
        layer_of: shape ``(ΣC,)``: the layer index of each channel; ``None`` for one layer.

    Returns:
        Moments in the dtype of ``means``.
    """
    counts = counts.double()
    total = counts.sum() if layer_of is None else counts.sum(0)
    if counts.shape[0] == 1:
        return GlobalMoments(total, means[0], variances[0], layer_of)
    shares = counts / total
    shares = shares if layer_of is None else shares[:, layer_of]
    doubles = means.double()
    mean = (shares * doubles).sum(0)
    squares = (doubles - mean).square_().add_(variances).mul_(shares)
    return GlobalMoments(total, mean.to(means.dtype), squares.sum(0).to(means.dtype), layer_of)


def normalize(
    input: Tensor,
    local: LocalMoments,
    mean: Tensor,
    invstd: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
) -> Tensor:
    """Returns ``(input − mean) · invstd · weight + bias`` in the input's dtype and memory format.

    Args:
        input: shape ``(N, C, ...)``, dense.
        local: the result of :func:`local_moments` for this input; its scratch tensor is overwritten.
        mean: shape ``(C,)``, statistics dtype.
        invstd: shape ``(C,)``, statistics dtype.
        weight: shape ``(C,)`` or ``None``; any floating dtype.
        bias: shape ``(C,)`` or ``None``; any floating dtype.
    """
    dtype = mean.dtype
    weight = None if weight is None else cast(weight, dtype)
    bias = None if bias is None else cast(bias, dtype)
    if has_fused_kernels(input):
        return torch.batch_norm_elemt(input, weight, bias, mean, invstd, 0.0)
    scale = invstd if weight is None else invstd * weight
    if local.centred is None or local.shift is None:
        output, offset = torch.sub(input, _per_channel(mean, input)), bias
    else:
        output, offset = local.centred, (local.shift - mean) * scale
        offset = offset if bias is None else offset + bias
    return cast(_scale_and_shift_(output, scale, offset), input.dtype)


def gradient_sums(grad_output: Tensor, input: Tensor, mean: Tensor, invstd: Tensor) -> Tuple[Tensor, Tensor]:
    """Returns the local sums ``Σ dy`` and ``Σ dy · x̂`` per channel, where ``x̂ = (x − mean) · invstd``.

    The sums are also the gradients of bias and weight on this rank.

    Args:
        grad_output: shape ``(N, C, ...)``, dense, in the memory format of ``input``.
        input: shape ``(N, C, ...)``, dense.
        mean: shape ``(C,)``, statistics dtype.
        invstd: shape ``(C,)``, statistics dtype.

    Returns:
        Two tensors of shape ``(C,)``.
    """
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
    mean: Tensor,
    invstd: Tensor,
    weight: Optional[Tensor],
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
) -> Tensor:
    """Returns ``dx = weight · invstd · (dy − mean(dy) − x̂ · mean(dy · x̂))`` in the input's dtype.

    This is the gradient of :func:`normalize` with respect to its input, including the dependence of the global moments
    on the input (Ioffe, Szegedy, "Batch Normalization", 2015, section 3, with means over all ranks).

    Args:
        grad_output: shape ``(N, C, ...)``, dense, in the memory format of ``input``.
        input: shape ``(N, C, ...)``, dense.
        mean: shape ``(C,)``, statistics dtype.
        invstd: shape ``(C,)``, statistics dtype.
        weight: shape ``(C,)`` or ``None``.
        mean_dy: shape ``(C,)``: the mean of ``dy`` over the elements of all ranks.
        mean_dy_xhat: shape ``(C,)``: the mean of ``dy · x̂`` over the elements of all ranks.
    """
    weight = None if weight is None else cast(weight, mean.dtype)
    if has_fused_kernels(input):
        # The kernel divides both sums by an int32 count, which could overflow on many ranks. It gets means and a 1.
        one = torch.ones(1, dtype=torch.int32, device=input.device)
        return torch.batch_norm_backward_elemt(
            grad_output, input, mean, invstd, weight, mean_dy, mean_dy_xhat / invstd, one
        )
    scale = invstd if weight is None else invstd * weight
    gradient = torch.sub(input, _per_channel(mean, input))
    minus = scale.neg()
    _scale_and_shift_(gradient, (minus * invstd).mul_(mean_dy_xhat), minus.mul_(mean_dy))
    gradient.addcmul_(cast(grad_output, mean.dtype), _per_channel(scale, input))
    return cast(gradient, input.dtype)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``tensor.to(dtype)``, without the microsecond which that call takes if the dtype is the same."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def split_channels(vector: Tensor, features: Sequence[int]) -> Sequence[Tensor]:
    """Splits a vector ``(ΣC,)`` into one vector ``(C,)`` per layer.

    Args:
        vector: shape ``(ΣC,)``.
        features: the channel count of each layer.
    """
    return (vector,) if len(features) == 1 else vector.split(features)


@lru_cache(maxsize=256)
def _filled(value: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a cached, read-only constant vector."""
    with torch.inference_mode(False):  # the cached tensor is also used outside of the caller's inference mode
        return torch.full((size,), value, dtype=dtype, device=device)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Returns a view of a ``(C,)`` vector that broadcasts over an input ``(N, C, ...)``."""
    return vector.view((1, -1) + (1,) * (like.dim() - 2))


def _scale_and_shift_(tensor: Tensor, scale: Tensor, offset: Optional[Tensor]) -> Tensor:
    """Computes ``tensor · scale + offset`` per channel, in place."""
    if offset is None:
        return tensor.mul_(_per_channel(scale, tensor))
    scale, offset = _per_channel(scale, tensor), _per_channel(offset, tensor)
    if tensor.is_contiguous():
        return tensor.mul_(scale).add_(offset)
    # One pass instead of two. For channels-first, this operator is not vectorized and slower than the two above.
    return torch.addcmul(offset, tensor, scale, out=tensor)
