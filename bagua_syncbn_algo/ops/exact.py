"""A round's statistics, merged in float64: on every device, for every dtype, and for empty shards."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Callable, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..comm.channel import Channel
from ..comm.wire import FORWARD, SyncPoint
from .moments import (
    GlobalMoments,
    LayerStatistics,
    LocalMoments,
    cast,
    gradient_sums,
    input_gradient,
    layer_index,
    local_moments,
    merge_moments,
    split_channels,
    statistics_dtype,
)
from .nonfinite import require_finite

__all__ = [
    "ExactStatistics",
    "GradientSums",
    "constant",
    "launch_exact",
    "launch_moments",
    "local_or_empty",
    "require_two_values",
    "to_device",
]


class GradientSums(NamedTuple):
    """Sums over the elements of one rank, each of shape ``(C,)``."""

    dy: Tensor
    weighted: Tensor  # Σ dy·x̂, or Σ dy·(x − mean), as the input gradient needs it
    weight: Optional[Tensor]  # the gradient of the weight; None if it is not needed
    bias: Optional[Tensor]


class ExactStatistics:
    """The statistics that the layers of a round normalize with, and the sums that their backward exchanges.

    Args:
        merged: the moments of all ranks.
        eps: of each layer.
        dtypes: of each layer's statistics.
    """

    def __init__(self, merged: GlobalMoments, eps: Sequence[float], dtypes: Sequence[torch.dtype]) -> None:
        self.merged, self._dtypes = merged, dtypes
        added = eps[0] if len(set(eps)) == 1 else _eps_per_channel(tuple(eps), merged)
        self._invstd = (merged.variance + added).rsqrt_()
        parts = [self._split(vector) for vector in (merged.mean, merged.variance, self._invstd)]
        self.layers = [LayerStatistics(*each) for each in zip(*parts, eps)]

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        parts = split_channels(vector, self.merged.features)
        if all(dtype == vector.dtype for dtype in self._dtypes):
            return parts
        return [part.to(dtype) for part, dtype in zip(parts, self._dtypes)]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sums that backward exchanges."""
        return self.merged.mean.dtype

    def pack(self, sums: Sequence[Tensor]) -> Any:
        """Returns the sums as a part of a message."""
        return torch.cat([cast(each, self.dtype) for each in sums])

    def gradient_sums(
        self, i: int, grad: Tensor, input: Tensor, weight: Optional[Tensor], needs: Sequence[bool]
    ) -> GradientSums:
        """Returns the sums of layer ``i`` over this rank, from the gradient of its output."""
        dy, dy_xhat = gradient_sums(grad, input, self.layers[i])
        return GradientSums(dy, dy_xhat, dy_xhat if needs[0] else None, dy if needs[1] else None)

    def total_gradients(self, gathered: Tensor) -> Sequence[Any]:
        """Returns the arguments of :meth:`input_gradient` for each layer.

        Args:
            gathered: the sums of all ranks, shape ``(W, 2ΣC)``.
        """
        total = gathered.sum(0, dtype=torch.float64)  # as in forward: in rank order, the same bits on every rank
        means = total.view(2, -1).div_(self.merged.weights.elements).to(self.dtype)
        mean_dy, mean_dy_xhat = means.unbind(0)
        return list(zip(self._split(mean_dy), self._split(mean_dy_xhat.mul_(self._invstd))))

    def input_gradient(self, i: int, grad: Tensor, input: Tensor, weight: Optional[Tensor], totals: Any) -> Tensor:
        """Returns the gradient of the input of layer ``i``."""
        return input_gradient(grad, input, self.layers[i], weight, *totals)


def local_or_empty(input: Tensor) -> LocalMoments:
    """Returns the moments of this rank's elements; zeros for an empty shard."""
    if input.numel() > 0:
        return local_moments(input)
    zeros = torch.zeros(input.shape[1], dtype=statistics_dtype(input.dtype), device=input.device)
    return LocalMoments(0, zeros, zeros)


def launch_moments(
    local: Sequence[LocalMoments], channel: Channel, point: SyncPoint, names: Sequence[str]
) -> Callable[[], GlobalMoments]:
    """Starts the exchange of local moments.

    Args:
        local: the moments of each layer in the round.
        channel: the ranks to merge over.
        point: the round.
        names: the names of the layers, for errors.

    Returns:
        A function that waits for the exchange and returns the merged moments, in the widest dtype of the layers.

    Raises:
        ValueError: from waiting: if the whole group holds at most one value per channel.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive; if the channel checks for it, if a
            mean or variance of any rank is not finite.

    Collectives:
        One all-gather of ``8 + 2C·itemsize`` payload bytes for each layer. Every rank must call.
    """
    device = local[0].mean.device
    dtype = torch.float64 if any(part.mean.dtype == torch.float64 for part in local) else torch.float32
    count = constant(tuple(part.elements for part in local), torch.int64, device)
    payload = torch.cat([*(cast(part.mean, dtype) for part in local), *(cast(part.variance, dtype) for part in local)])
    arrived = channel.launch(point, FORWARD, [count, payload])

    def merged() -> GlobalMoments:
        counts, moments = arrived()
        if channel.checks_finite:
            require_finite(moments, channel, FORWARD, names, [part.mean.numel() for part in local])
        require_two_values([part.elements for part in local], counts, names)
        return merge_moments(counts, moments, tuple(part.mean.numel() for part in local))

    return merged


def require_two_values(elements: Sequence[int], counts: Tensor, names: Sequence[str]) -> None:
    """Checks that the ranks together have at least two values per channel.

    A rank that has two values itself does not need the other ranks' counts. Otherwise the host waits for them.

    Args:
        elements: this rank's elements per channel, for each layer.
        counts: the elements of all ranks, shape ``(W, L)``.
        names: the names of the layers, for errors.

    Raises:
        ValueError: if they have fewer.
    """
    for index, own in enumerate(elements):
        total = 2 if own >= 2 else int(counts[:, index].sum())
        if total < 2:
            raise ValueError(
                f"expected more than 1 value per channel in the whole group when training (got {own} on this rank, "
                f"{total} on all {len(counts)} ranks, at {names[index]}); use a larger batch or eval()"
            )


def launch_exact(
    local: Sequence[LocalMoments], channel: Channel, point: SyncPoint, names: Sequence[str], eps: Sequence[float]
) -> Callable[[], ExactStatistics]:
    """As :func:`launch_moments`; returns a function that returns the statistics to normalize with."""
    arrived = launch_moments(local, channel, point, names)
    return lambda: ExactStatistics(arrived(), eps, [part.mean.dtype for part in local])


@lru_cache(maxsize=65536)  # a captured graph reads it, so none of few batch sizes may be evicted
def constant(values: Tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor of Python numbers, which must not be written to."""
    with torch.inference_mode(False):  # the tensor outlives an inference_mode block that may be active
        return to_device(torch.tensor(values, dtype=dtype, device="cpu"), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor from the CPU without blocking the host: from pinned memory, not from pageable memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _eps_per_channel(eps: Tuple[float, ...], merged: GlobalMoments) -> Tensor:
    device = merged.variance.device
    return constant(eps, merged.variance.dtype, device)[layer_index(merged.features, device)]
