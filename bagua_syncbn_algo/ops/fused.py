"""A round's statistics by PyTorch's fused CUDA kernels: few launches, and no wait of the host.

The kernels are those under ``torch.nn.SyncBatchNorm`` (aten/src/ATen/native/cuda/Normalization.cuh):

====================================  ================================================================================
``batch_norm_stats``                  mean and ``1/√(variance + eps)`` of this rank, with biased variance
``batch_norm_gather_stats_with_counts``  merges these over ranks, and updates running_mean and running_var
``batch_norm_backward_reduce``        ``Σ dy``, ``Σ dy·(x − mean)``, and the gradients of weight and bias
``batch_norm_backward_elemt``         the input gradient, from both sums over all ranks and the elements of each rank
====================================  ================================================================================

The merge is float32. It divides by the number of elements merged so far, so that a leading count of 0 would give NaN.
An empty shard sends a count of 1e-30 instead, which has no effect on a float32 sum with an ordinary count.

Where Triton is installed, one kernel of :mod:`.merge_kernel` merges all layers of a round instead, in float64. Its
messages contain variances and integer counts, as those of :mod:`.exact` do.
"""

from __future__ import annotations

import warnings
from functools import cache, lru_cache
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ..comm.channel import Channel
from ..comm.wire import FORWARD, FUSED, TRITON, SyncPoint
from ..config import SyncBatchNormConfig
from .exact import GradientSums, constant, local_or_empty, require_two_values, to_device
from .moments import LayerStatistics, LocalMoments, cast, has_fused_kernels, split_channels, statistics_dtype
from .nonfinite import require_finite

__all__ = [
    "Buffers",
    "FusedLocal",
    "FusedStatistics",
    "can_fuse",
    "launch_fused",
    "load_merge_kernel",
    "local_statistics",
]

_ALMOST_NOTHING = 1e-30
# Of inputs. The kernels also take float64, which gets the exact merge.
FUSED_DTYPES: Tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


class Buffers(NamedTuple):
    """The running statistics that a merge updates."""

    mean: Tensor  # (C,) float32
    variance: Tensor  # (C,) float32
    counter: Tensor  # num_batches_tracked
    momentum: float


class FusedLocal(NamedTuple):
    """Statistics of this rank's elements of one layer."""

    elements: int  # per channel
    mean: Tensor  # (C,) float32
    invstd: Tensor  # (C,) float32
    eps: float

    @property
    def variance(self) -> Tensor:
        """The biased variance, by which a recomputation is recognized."""
        return self.invstd.pow(-2) - self.eps


def can_fuse(inputs: Sequence[Tensor], eps: Sequence[float], world_size: int) -> bool:
    """Returns whether the kernels can run a round: on CUDA, in at most float32, with a positive ``eps``.

    Without ``eps`` the inverse standard deviation of a constant channel does not determine its variance. The merge
    counts the elements of all ranks in int32.
    """
    return min(eps) > 0 and all(
        has_fused_kernels(x) and x.dtype in FUSED_DTYPES and x.numel() // x.shape[1] * world_size < 2**31
        for x in inputs
    )


@cache
def load_merge_kernel(device: torch.device) -> Optional[Callable[..., Any]]:
    """Returns the Triton kernel that merges a round; ``None`` if it is switched off, or does not work on ``device``.

    The first call for a device compiles the kernel and compares its result with that of ATen operators.
    """
    if not SyncBatchNormConfig.from_env().triton:
        return None
    try:
        from . import merge_kernel
    except ImportError:
        return None
    try:
        merge_kernel.check(device)
    except Exception as error:  # compilers and drivers raise errors of any type
        warnings.warn(
            f"expected the Triton kernel that merges statistics to work on {device} (got {type(error).__name__}: "
            f"{error}); ATen's kernels merge them, with one launch per layer. Set BAGUA_SYNCBN_TRITON=0 on all ranks "
            "to choose them without this warning",
            stacklevel=2,
        )
        return None
    return merge_kernel.merge


def local_statistics(input: Tensor, eps: float) -> Union[FusedLocal, LocalMoments]:
    """Computes the statistics of this rank's elements, as the kernel that merges them takes them.

    Args:
        input: shape ``(N, C, ...)``, dense; ``N`` may be 0.
        eps: the layer's.
    """
    if load_merge_kernel(input.device) is not None:
        return local_or_empty(input)
    channels = input.shape[1]
    if input.numel() == 0:
        zeros = torch.zeros(channels, dtype=statistics_dtype(input.dtype), device=input.device)
        return FusedLocal(0, zeros, zeros + 1, eps)
    return FusedLocal(input.numel() // channels, *torch.batch_norm_stats(input, eps), eps)


def launch_fused(
    local: Sequence[Union[FusedLocal, LocalMoments]],
    channel: Channel,
    point: SyncPoint,
    names: Sequence[str],
    eps: Sequence[float],
    buffers: Sequence[Optional[Buffers]],
) -> Callable[[], FusedStatistics]:
    """Starts the exchange of local statistics.

    Args:
        local: the statistics of each layer in the round.
        channel: the ranks to merge over.
        point: the round.
        names: the names of the layers, for errors.
        eps: of each layer.
        buffers: for each layer the running statistics to update, or ``None``. No two layers share them.

    Returns:
        A function that waits for the exchange, merges the statistics and updates the running statistics.

    Raises:
        ValueError: from waiting: if the whole group holds at most one value per channel.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive.

    Collectives:
        One all-gather of ``8 + 8C`` payload bytes for each layer. Every rank must call.
    """
    device = local[0].mean.device
    elements = tuple(part.elements for part in local)
    features = tuple(part.mean.numel() for part in local)
    means = [part.mean for part in local]
    merge = load_merge_kernel(device)

    def with_triton() -> FusedStatistics:
        counts, moments = arrived()
        require_finite(moments, channel, FORWARD, names, features)
        require_two_values(elements, counts, names)
        mean, invstd, per_layer = merge(counts, moments, features, eps, buffers)  # type: ignore[misc]
        rows = zip(split_channels(mean, features), split_channels(invstd, features), eps)
        return FusedStatistics([LayerStatistics(m, None, i, e) for m, i, e in rows], per_layer)

    def with_aten() -> FusedStatistics:
        gathered, counts = arrived()
        require_finite(gathered[:, : 2 * sum(features)], channel, FORWARD, names, features, inverse=True)
        require_two_values(elements, counts, names)
        return FusedStatistics(_merge_each(gathered, features, eps, buffers), counts.t().contiguous())

    if merge is not None:
        variances = [part.variance for part in local]
        payload: List[Any] = [constant(elements, torch.int64, device), [*means, *variances]]
        arrived = channel.launch(point, FORWARD, payload, TRITON)
        return with_triton
    weights, counts = _counts(elements, means[0].dtype, device)
    invstds = [part.invstd for part in local if isinstance(part, FusedLocal)]
    arrived = channel.launch(point, FORWARD, [[*means, *invstds, weights], counts], FUSED)
    return with_aten


def _merge_each(
    gathered: Tensor, features: Tuple[int, ...], eps: Sequence[float], buffers: Sequence[Optional[Buffers]]
) -> List[LayerStatistics]:
    """Merges the statistics of each layer with ATen's kernel, which updates the running statistics."""
    means, invstds, shares = gathered.split_with_sizes([sum(features), sum(features), len(features)], dim=1)
    rows = zip(shares.unbind(1), means.split_with_sizes(features, 1), invstds.split_with_sizes(features, 1), eps)
    layers = []
    for (share, mean, invstd, eps_), running in zip(rows, buffers):
        mean_buffer, var_buffer, _, momentum = running or (None, None, None, 0.0)
        # The first argument decides the dtype of the counts: not the input, which may be half precision.
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            mean, mean, invstd, mean_buffer, var_buffer, momentum, eps_, share
        )
        layers.append(LayerStatistics(mean, None, invstd, eps_))
    counters = [running.counter for running in buffers if running is not None]
    if counters:
        with torch.no_grad():
            torch._foreach_add_(counters, 1)
    return layers


@lru_cache(maxsize=65536)  # never evicted in practice: a captured graph reads it
def _counts(elements: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Returns the counts for the merge, in ``dtype``, and for backward, in int32. One copy moves both to the device."""
    with torch.inference_mode(False):  # the tensors outlive an inference_mode block that may be active
        weights = torch.tensor([float(n) or _ALMOST_NOTHING for n in elements], dtype=dtype, device="cpu")
        counts = torch.tensor(elements, dtype=torch.int32, device="cpu")
        both = torch.cat([weights.view(torch.uint8), counts.view(torch.uint8)])
        both = to_device(both, device)
        size = weights.numel() * weights.element_size()
        return both[:size].view(dtype), both[size:].view(torch.int32)


class FusedStatistics:
    """The statistics that the layers of a round normalize with, and the sums that their backward exchanges.

    Args:
        layers: the merged statistics.
        counts: elements per channel, int32, shape ``(L, W)``.
    """

    def __init__(self, layers: List[LayerStatistics], counts: Tensor) -> None:
        self.layers, self._counts = layers, counts

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sums that backward exchanges."""
        return self.layers[0].mean.dtype

    def pack(self, sums: Sequence[Tensor]) -> Any:
        """Returns the sums as a part of a message, which the launch of the message concatenates."""
        return list(sums)

    def gradient_sums(
        self, i: int, grad: Tensor, input: Tensor, weight: Optional[Tensor], needs: Sequence[bool]
    ) -> GradientSums:
        """Returns the sums of layer ``i`` over this rank, from the gradient of its output."""
        mean, _, invstd, _ = self.layers[i]
        weight = None if weight is None else cast(weight, mean.dtype)
        weight_wanted = weight is not None and needs[0]
        # Not the gradient of the bias, which is Σ dy: without a weight the kernel has no dtype for it.
        wanted = (True, weight_wanted, False)
        dy, dy_xmu, d_weight, _ = torch.batch_norm_backward_reduce(grad, input, mean, invstd, weight, *wanted)
        return GradientSums(dy, dy_xmu, d_weight if weight_wanted else None, dy if needs[1] else None)

    def total_gradients(self, gathered: Tensor) -> Sequence[Any]:
        """Returns the arguments of :meth:`input_gradient` for each layer.

        Args:
            gathered: the sums of all ranks, shape ``(W, 2ΣC)``.
        """
        features = [layer.mean.numel() for layer in self.layers]
        dy, dy_xmu = gathered.sum(0).chunk(2)
        return list(zip(split_channels(dy, features), split_channels(dy_xmu, features)))

    def input_gradient(self, i: int, grad: Tensor, input: Tensor, weight: Optional[Tensor], totals: Any) -> Tensor:
        """Returns the gradient of the input of layer ``i``."""
        mean, _, invstd, _ = self.layers[i]
        weight = None if weight is None else cast(weight, mean.dtype)
        dy, dy_xmu = totals
        return torch.batch_norm_backward_elemt(grad, input, mean, invstd, weight, dy, dy_xmu, self._counts[i])
