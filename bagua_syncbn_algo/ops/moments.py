"""Pure tensor mathematics of batch normalization: local moments, their merge, normalization, input gradient.

Legend: ``N`` batch, ``C`` channels (dimension 1 of the input), ``W`` ranks. Nothing here communicates. Every function
takes a non-empty *dense* input (see :func:`dense`); an empty shard must never reach a native kernel, some of which
divide by its size and end the process.

On CUDA the functions call the fused kernels under ``torch.nn.SyncBatchNorm``, which take half-precision input with
float32 statistics. Everywhere else they call ATen's operators. Their elementwise steps work in place on one fresh
tensor: at these sizes the page faults of a second allocation cost more than a pass over memory. They never fold the
mean into an additive term (x·a − mean·a), which would lose as many digits as the mean has over the standard deviation.
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


# The overload itself: finding it by its arguments at every call costs as much as the arithmetic of a small layer.
_BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default


class LocalMoments(NamedTuple):
    """Moments of one rank's own elements."""

    elements: int  # per channel
    mean: Tensor  # (C,)
    variance: Tensor  # (C,) biased: the centred sum of squares over the elements
    centred: Optional[Tensor] = None  # scratch of the input's shape: input − shift; `normalize` writes its result there
    shift: Optional[Tensor] = None  # (C,) what was subtracted from the input to get `centred`

    def unbiased_variance(self) -> Tensor:
        """Returns the variance over ``elements − 1``; for a single element the variance itself, 0."""
        return self.variance * (self.elements / max(self.elements - 1, 1))

    def forget(self) -> LocalMoments:
        """Returns the moments without the scratch tensor, which is as large as the activation."""
        return self._replace(centred=None, shift=None)


class GlobalMoments(NamedTuple):
    """Moments of all ranks' elements together, of one layer or of several one after the other."""

    elements: Tensor  # float64 (exact to 2⁵³), per channel: a scalar, or (L,) for L layers
    mean: Tensor  # (C,), or (ΣC,)
    variance: Tensor  # the same shape; biased: what normalizes
    layer_of: Optional[Tensor] = None  # (ΣC,) of which layer each channel is; None for one layer

    def unbiased_variance(self) -> Tensor:
        """Returns the variance over ``elements − 1``, what running_var takes."""
        factor = self.elements / (self.elements - 1)  # float64
        factor = factor.to(self.variance.dtype)
        return self.variance * (factor if self.layer_of is None else factor[self.layer_of])

    def split(self, features: List[int]) -> List[GlobalMoments]:
        """Returns the moments of each layer by itself."""
        if self.layer_of is None:
            return [self]
        parts = zip(self.elements, self.mean.split(features), self.variance.split(features))
        return [GlobalMoments(elements, mean, variance) for elements, mean, variance in parts]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of the statistics of an input of ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def memory_format(input: Tensor) -> torch.memory_format:
    """Returns the memory format of the output for ``input``: channels-last where the input is, else contiguous."""
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
    """Whether PyTorch has fused batch normalization kernels for the input's device."""
    return input.is_cuda


def local_moments(input: Tensor) -> LocalMoments:
    """Computes count, mean and biased variance per channel.

    Never by ``E[x²] − E[x]²``, which at a mean of 1000 standard deviations is off by a fifth in float32.

    Args:
        input: shape ``(N, C, ...)``, dense, at least one element.

    Returns:
        Moments in :func:`statistics_dtype`.
    """
    if has_fused_kernels(input):
        # Not batch_norm_stats, whose invstd is 0, not infinite, where variance and eps are 0: a constant channel.
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
    # ATen has no vectorized sum of squares per channel; its backward kernel, given the centred input for both the
    # gradient and the input and a mean of zero, returns Σc² and Σc in one pass, summed in double precision.
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
    error = residual / count  # the float32 mean's own rounding error
    variance = (squares / count).addcmul_(error, error, value=-1).clamp_(min=0)
    return LocalMoments(count, shift + error, variance, centred, shift)


def merge_moments(counts: Tensor, means: Tensor, variances: Tensor, layer_of: Optional[Tensor] = None) -> GlobalMoments:
    """Merges the moments of ``W`` ranks, in rank order, so that every rank gets the same bits.

    ``N = Σ n_r``, ``M = Σ n_r m_r / N``, ``V = Σ n_r [v_r + (m_r − M)²] / N``: Chan, Golub, LeVeque, "Updating formulae
    and a pairwise algorithm for computing sample variances", 1979, with variances for sums of squares. Done in
    float64, whatever the statistics' dtype: the tensors are small and an int64 count stays exact to 2⁵³.

    Args:
        counts: shape ``(W, 1)``, or ``(W, L)`` for L layers; int64; the sum over ranks must be at least 2.
        means: shape ``(W, C)``; for several layers one after the other.
        variances: shape ``(W, C)``, biased.
        layer_of: shape ``(C,)``: of which layer each channel is; ``None`` for one layer.

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
        local: what :func:`local_moments` gave for this input; its scratch tensor is overwritten.
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

    They are also the gradients of bias and weight on this rank.

    Args:
        grad_output: shape ``(N, C, ...)``, dense, in the memory format of ``input``.
        input: shape ``(N, C, ...)``, dense.
        mean: shape ``(C,)``, statistics dtype.
        invstd: shape ``(C,)``, statistics dtype.
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

    The derivative of :func:`normalize` with respect to its input through the global moments (Ioffe, Szegedy, "Batch
    Normalization", 2015, section 3, with means over all ranks).

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
        # The kernel divides both sums by an int32 count, which a wide cluster overflows: it is given means and 1.
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
    """As ``tensor.to(dtype)``, which takes a microsecond to find that there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def split_channels(vector: Tensor, features: Sequence[int]) -> Sequence[Tensor]:
    """Returns the parts ``(C,)`` of each layer in a vector ``(ΣC,)``."""
    return (vector,) if len(features) == 1 else vector.split(features)


@lru_cache(maxsize=256)
def _filled(value: float, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a constant vector, never to be written to."""
    with torch.inference_mode(False):  # it outlives the block that may be running
        return torch.full((size,), value, dtype=dtype, device=device)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    """Shapes a ``(C,)`` vector so that it broadcasts over an input ``(N, C, ...)``."""
    return vector.view((1, -1) + (1,) * (like.dim() - 2))


def _scale_and_shift_(tensor: Tensor, scale: Tensor, offset: Optional[Tensor]) -> Tensor:
    """Computes ``tensor · scale + offset`` per channel, in place."""
    if offset is None:
        return tensor.mul_(_per_channel(scale, tensor))
    scale, offset = _per_channel(scale, tensor), _per_channel(offset, tensor)
    if tensor.is_contiguous():
        return tensor.mul_(scale).add_(offset)
    # One pass for two; channels-first the same operator is not vectorized, and slower than both above.
    return torch.addcmul(offset, tensor, scale, out=tensor)
