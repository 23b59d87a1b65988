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
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..comm.channel import Channel
from ..comm.wire import FORWARD, FUSED, SyncPoint
from .exact import GradientSums, require_two_values, to_device
from .moments import LayerStatistics, cast, has_fused_kernels, split_channels, statistics_dtype

__all__ = ["Buffers", "FusedLocal", "FusedStatistics", "can_fuse", "launch_fused", "local_statistics"]

_ALMOST_NOTHING = 1e-30
# Of inputs. The kernels also take float64, which gets the exact merge.
FUSED_DTYPES: Tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)


class Buffers(NamedTuple):
    """The running statistics that a merge updates."""

    running_mean: Tensor  # (C,) float32
    running_var: Tensor
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


def local_statistics(input: Tensor, eps: float) -> FusedLocal:
    """Computes the statistics of this rank's elements.

    Args:
        input: shape ``(N, C, ...)``, dense; ``N`` may be 0.
        eps: the layer's.
    """
    channels = input.shape[1]
    if input.numel() == 0:
        zeros = torch.zeros(channels, dtype=statistics_dtype(input.dtype), device=input.device)
        return FusedLocal(0, zeros, zeros + 1, eps)
    return FusedLocal(input.numel() // channels, *torch.batch_norm_stats(input, eps), eps)


def launch_fused(
    local: Sequence[FusedLocal],
    channel: Channel,
    point: SyncPoint,
    names: Sequence[str],
    buffers: Sequence[Optional[Buffers]],
) -> Callable[[], FusedStatistics]:
    """Starts the exchange of local statistics.

    Args:
        local: the statistics of each layer in the round.
        channel: the ranks to merge over.
        point: the round.
        names: the names of the layers, for errors.
        buffers: for each layer the running statistics to update, or ``None``.

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
    weights, counts = _counts(elements, local[0].mean.dtype, device)
    payload = [*(part.mean for part in local), *(part.invstd for part in local), weights]
    arrived = channel.launch(point, FORWARD, [payload, counts], FUSED)

    def merged() -> FusedStatistics:
        gathered, counts = arrived()
        require_two_values(elements, counts, names)
        features = [part.mean.numel() for part in local]
        means, invstds, shares = gathered.split_with_sizes([sum(features), sum(features), len(local)], dim=1)
        rows = zip(
            shares.unbind(1), means.split_with_sizes(features, 1), invstds.split_with_sizes(features, 1), local, buffers
        )
        layers = []
        for share, mean, invstd, part, running in rows:
            mean_buffer, var_buffer, momentum = running or (None, None, 0.0)
            # The first argument decides the dtype of the counts: not the input, which may be half precision.
            mean, invstd = torch.batch_norm_gather_stats_with_counts(
                mean, mean, invstd, mean_buffer, var_buffer, momentum, part.eps, share
            )
            layers.append(LayerStatistics(mean, None, invstd, part.eps))
        return FusedStatistics(layers, counts.t().contiguous())

    return merged


@lru_cache(maxsize=65536)  # never evicted in practice: a captured graph reads it
def _counts(elements: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tuple[Tensor, Tensor]:
    """Returns the counts for the merge, in ``dtype``, and for backward, in int32. One copy moves both to the device."""
    with torch.inference_mode(False):  # the tensors outlive an inference_mode block that may be active
        weights = torch.tensor([float(n) or _ALMOST_NOTHING for n in elements], dtype=dtype)
        both = torch.cat([weights.view(torch.uint8), torch.tensor(elements, dtype=torch.int32).view(torch.uint8)])
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
