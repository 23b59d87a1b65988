"""Running statistics over the whole world for layers that normalize over fewer ranks.

A pool collects the local moments of all layers. From the first gradient of backward on, two all-reduces sum the pool
over all ranks, as one tensor. They overlap with the computation and the communication of gradients. After backward,
every rank applies the same update.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..comm.channel import Channel
from ..comm.wire import SyncPoint
from ..compat import lerp_each_
from .exact import ExactStatistics, constant, launch_moments, to_device
from .fused import Buffers
from .moments import LocalMoments, merge_moments, split_channels

__all__ = [
    "RunningPool",
    "Slot",
    "digest_of_statistics",
    "fusible_buffers",
    "move_running_statistics",
    "record_moments",
]


class _LocalSummands(NamedTuple):
    """This rank's moments, from the first all-reduce to the second. Each has shape ``(ΣC,)``."""

    counts: Tensor  # elements
    means: Tensor
    variances: Tensor  # biased


class Slot(NamedTuple):
    """Mean and unbiased variance of one training forward of a layer, each ``(C,)``, for :meth:`RunningPool.add`."""

    layer: Any
    mean: Tensor
    variance: Tensor
    in_pool: bool = False  # whether the tensors are views of the pool's memory

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype, device: torch.device) -> Slot:
        """Returns a slot of zeros outside of the pool's memory."""
        mean, variance = torch.zeros(2, layer.num_features, dtype=dtype, device=device).unbind(0)
        return cls(layer, mean, variance)


class RunningPool:
    """Moments of all layers since the last update, and the tensor that is summed over all ranks.

    One sum cannot merge variances. The first all-reduce sums ``(n, n·m)``, from which every rank computes the world's
    ``N`` and ``M``. The second one sums ``n[v + (m − M)²]`` (Chan, Golub, LeVeque 1979, in two passes). The size of the
    messages does not depend on the number of ranks.

    Args:
        layers: the SyncBatchNorm layers that keep running statistics; the same on all ranks.
        channel: a channel over the whole world, for forwards without a backward.

    Attributes:
        layers: the argument of the same name.
        payload: the tensor that is summed, shape ``(L + ΣC,)``: ``(n, n·m)``, then zeros and ``n[v + (m − M)²]``.
        trains: whether any parameter is trained, so that a backward can follow a forward with gradients.
    """

    def __init__(self, layers: Sequence[Any], channel: Channel) -> None:
        self.layers, self._channel = list(layers), channel
        features = [layer.num_features for layer in self.layers]
        first: Tensor = self.layers[0].running_mean
        doubles = any(layer.running_mean.dtype == torch.float64 for layer in self.layers)
        self._dtype, self._device = (torch.float64 if doubles else torch.float32), first.device
        self._features = features
        # The layer index of each channel. It expands a value per layer to one per channel.
        self._layer_of = torch.repeat_interleave(torch.tensor(features, device="cpu")).to(self._device)
        self.payload = torch.zeros(len(features) + sum(features), dtype=self._dtype, device=self._device)
        self._index = {id(layer): index for index, layer in enumerate(self.layers)}
        self._elements = [0] * len(features)
        # Mean and unbiased variance of each layer's forwards since the last launch. Kernels write to `_slots`, which
        # autograd saves. The pool writes to the same memory through `.data`, which autograd's version counter ignores.
        moments = torch.zeros(2, sum(features), dtype=self._dtype, device=self._device)
        self._moments = moments.data
        self._slots = list(zip(*(row.split(features) for row in moments)))
        self._views = list(zip(*(row.split(features) for row in self._moments)))
        self.trains = True
        self._summands: Optional[_LocalSummands] = None
        self._world_sums: Optional[Tensor] = None  # counts (L,) and means (ΣC,) of the world

    @property
    def collects(self) -> bool:
        """Whether :meth:`add` pools the moments of a forward until backward. If not, use :meth:`merge`."""
        return self.trains and torch.is_grad_enabled()

    def slot(self, layer: Any, dtype: torch.dtype) -> Slot:
        """Returns a slot of zeros to which a kernel may write. Pass the slot to :meth:`add` afterwards."""
        index = self._index[id(layer)]
        if self._elements[index] == 0 and dtype == self._dtype:
            mean, variance = self._slots[index]
            return Slot(layer, mean, variance, in_pool=True)
        return Slot.of(layer, dtype, self._device)

    @torch.no_grad()
    def add(self, slot: Slot, elements: int) -> None:
        """Adds the local moments of one training forward to the pool, which merges several forwards of a layer.

        Args:
            slot: the moments, with unbiased variance, as BatchNorm kernels compute it.
            elements: the elements per channel; 0 for an empty shard.
        """
        index = self._index[id(slot.layer)]
        earlier = self._elements[index]
        self._elements[index] += elements
        if elements == 0 or slot.in_pool:
            return
        mean, variance = slot.mean, slot.variance
        own_mean, own_variance = self._views[index]
        if earlier:
            counts = constant((earlier, elements), torch.int64, self._device).view(2, 1)
            biased = torch.stack([own_variance, variance.to(self._dtype)]) * (1 - 1 / counts.to(self._dtype))
            means = torch.stack([own_mean, mean.to(self._dtype)])
            merged = merge_moments(counts, torch.cat([means, biased], dim=1), (mean.numel(),))
            mean, variance = merged.mean, merged.unbiased_variance()
        own_mean.copy_(mean)
        own_variance.copy_(variance)

    def merge(self, layer: Any, point: SyncPoint, local: LocalMoments) -> None:
        """Updates the running statistics of ``layer`` at once, with the moments of one training forward on all ranks.

        Args:
            layer: the layer.
            point: the sync point of the layer.
            local: the moments of this rank.

        Raises:
            ValueError: if the world has at most one value per channel.
            SyncBatchNormError: if another rank failed, is at another sync point or did not arrive.

        Collectives:
            One all-gather of ``8 + 2C·itemsize`` payload bytes. Every rank must call.
        """
        layer.update_running_statistics(launch_moments([local], self._channel, point, [layer.sync_name])())

    @torch.no_grad()
    def load(self) -> None:
        """Moves the pooled moments into the payload for the first all-reduce. The pool is empty afterwards."""
        elements, self._elements = self._elements, [0] * len(self._elements)
        per_layer = _counts_and_factors(tuple(elements), self._dtype, self._device)
        counts, factors_of = per_layer[:, self._layer_of]
        means, variances = self._moments[0].clone(), self._moments[1] * factors_of
        self._moments.zero_()  # a kernel with a momentum of 1 computes 0 · old + new: an old NaN would remain
        self._summands = _LocalSummands(counts, means, variances)
        self.payload[: len(elements)] = per_layer[0]
        torch.mul(counts, means, out=self.payload[len(elements) :])

    @torch.no_grad()
    def second_reduction(self, *unused: Any) -> None:
        """Takes ``N`` and ``M`` from the payload after the first all-reduce and writes the summand of the second one.

        Args:
            *unused: the arguments that the host passes to an operation of a bucket.
        """
        local = self._summands
        assert local is not None
        layers = len(self._features)
        self._world_sums = self.payload.clone()
        mean = self._world_sums[layers:] / self._world_sums[:layers].clamp(min=1)[self._layer_of]
        self._world_sums[layers:] = mean
        self.payload[:layers] = 0
        self.payload[layers:] = local.counts * (local.variances + (local.means - mean).square())

    @torch.no_grad()
    def apply(self) -> None:
        """Updates, after the second all-reduce, every layer that any rank has run since the last update."""
        assert self._world_sums is not None
        layers = len(self._features)
        counts, means = self._world_sums[:layers], self._world_sums[layers:]
        self._summands = self._world_sums = None
        # All layers at once, because twenty small operations per layer would cost more than the communication.
        ran = counts > 0
        # Buffers of layers that no rank ran are not written: evaluation saves them for backward. On CUDA all are
        # written, because the host would have to wait for the counts.
        chosen = [True] * layers if counts.is_cuda else ran.tolist()
        if not any(chosen):
            return
        # Not through Module.__getattr__, which takes longer than some of the operations below.
        tracked = [layer._buffers["num_batches_tracked"] for layer in self.layers]
        torch._foreach_add_(_select(tracked, chosen), _select(ran.to(tracked[0].dtype).unbind(0), chosen))
        momenta = [-1.0 if layer.momentum is None else layer.momentum for layer in self.layers]
        weights = constant(tuple(momenta), self._dtype, self._device)
        if min(momenta) < 0:  # the cumulative average
            cumulative = torch.stack(tracked).clamp(min=1).to(self._dtype).reciprocal()
            weights = torch.where(weights < 0, cumulative, weights)
        # For a layer that no rank ran, the weight and the values are zero.
        per_layer = torch.stack([weights * ran, (counts - 1).clamp(min=1)])
        weights_of, divisors = per_layer[:, self._layer_of]
        values = torch.cat([means, self.payload[layers:] / divisors])
        buffers = [layer._buffers[name] for name in ("running_mean", "running_var") for layer in self.layers]
        moved = torch.cat([buffer.to(self._dtype) for buffer in buffers])
        moved.lerp_(values, weights_of.repeat(2))
        # The only rounding of a half-precision buffer.
        buffers = _select(buffers, chosen * 2)
        torch._foreach_zero_(buffers)
        torch._foreach_add_(buffers, _select(moved.split(self._features * 2), chosen * 2))

    @property
    def in_flight(self) -> bool:
        """Whether the payload is loaded and not yet applied."""
        return self._summands is not None

    @property
    def names(self) -> List[str]:
        """The names of the layers."""
        return [layer.sync_name for layer in self.layers]


def _select(values: Sequence[Tensor], chosen: Sequence[bool]) -> List[Tensor]:
    return [value for value, is_chosen in zip(values, chosen) if is_chosen]


@torch.no_grad()
def move_running_statistics(layers: Sequence[Any], mean: Tensor, variance: Tensor) -> None:
    """Moves the running statistics of distinct layers towards the moments of the whole world's batch.

    Args:
        layers: the layers.
        mean: the means of all layers, shape ``(ΣC,)``.
        variance: the unbiased variances, of the same shape.
    """
    features = [layer.num_features for layer in layers]
    rows = zip(layers, split_channels(mean, features), split_channels(variance, features))
    kept = [row for row in rows if row[0].track_running_stats and row[0].running_mean is not None]
    if not kept:
        return
    counts = _count_batches([layer for layer, _, _ in kept])
    # From the dictionary: Module.__getattr__ costs more than a small operator.
    means: List[Tensor] = [layer._buffers["running_mean"] for layer, _, _ in kept]
    variances: List[Tensor] = [layer._buffers["running_var"] for layer, _, _ in kept]
    buffers, values = [*means, *variances], [*(row[1] for row in kept), *(row[2] for row in kept)]
    momenta = {layer.momentum for layer, _, _ in kept}
    if len(momenta) == 1 and None not in momenta and all(b.dtype == v.dtype for b, v in zip(buffers, values)):
        lerp_each_(buffers, values, momenta.pop())
        return
    weights: List[Any] = [
        count.to(mean.dtype).reciprocal() if layer.momentum is None else layer.momentum  # the cumulative average
        for count, (layer, _, _) in zip(counts, kept)
    ]
    for buffer, value, weight in zip(buffers, values, weights * 2):
        if buffer.dtype == value.dtype:
            buffer.lerp_(value, weight)
        else:
            # The arithmetic has the dtype of the statistics; a half-precision buffer is rounded once.
            buffer.copy_(torch.lerp(buffer.to(value.dtype), value, weight))


@functools.lru_cache(maxsize=256)  # an entry has all layers, and there may be as many as sizes of batches
def _counts_and_factors(elements: Tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the elements of each layer and the factor from unbiased to biased variances, shape ``(2, L)``."""
    factors = [(n - 1) / n if n else 0.0 for n in elements]
    with torch.inference_mode(False):  # the tensor outlives an inference_mode block that may be active
        return to_device(torch.tensor([elements, factors], dtype=dtype, device="cpu"), device)


@torch.no_grad()
def _count_batches(layers: Sequence[Any]) -> List[Tensor]:
    """Adds 1 to ``num_batches_tracked`` of each layer; returns the counters."""
    counts: List[Tensor] = [layer._buffers["num_batches_tracked"] for layer in layers]
    if counts:
        torch._foreach_add_(counts, 1)
    return counts


def fusible_buffers(layers: Sequence[Any]) -> Optional[List[Optional[Buffers]]]:
    """Returns the running statistics that a fused kernel can update; ``None`` if it cannot for any of the layers."""
    if len(set(map(id, layers))) < len(layers):
        return None  # the updates of a layer that occurs twice have an order
    found: List[Optional[Buffers]] = []
    for layer in layers:
        mean, variance = layer.running_mean, layer.running_var
        if not layer.track_running_stats or mean is None or variance is None:
            found.append(None)
        elif layer._running is not None or layer.momentum is None or mean.dtype != torch.float32:
            return None
        else:
            found.append(Buffers(mean, variance, layer.num_batches_tracked, layer.momentum))
    return found


def record_moments(layers: Sequence[Any], local: Sequence[Any], statistics: ExactStatistics) -> None:
    """Updates the running statistics of each layer, or adds the local moments to the layer's pool."""
    pools = [layer._running if layer.track_running_stats else None for layer in layers]
    distinct = len(set(map(id, layers))) == len(layers)
    merged = statistics.merged
    if distinct and all(pool is None for pool in pools):
        move_running_statistics(layers, merged.mean, merged.unbiased_variance())
        return
    features = [layer.num_features for layer in layers]
    means, variances = split_channels(merged.mean, features), split_channels(merged.unbiased_variance(), features)
    for layer, pool, own, mean, variance in zip(layers, pools, local, means, variances):
        if pool is None:
            move_running_statistics([layer], mean, variance)
        elif pool.collects:
            assert isinstance(own, LocalMoments)
            pool.add(Slot(layer, own.mean, own.unbiased_variance()), own.elements)
        else:
            assert isinstance(own, LocalMoments)
            pool.merge(layer, layer._point, own)


def digest_of_statistics(layers: Sequence[Any]) -> int:
    """Returns a 63-bit digest of the running statistics of all layers; 0 if there are none.

    It is 0 also for tensors without values or without all values in this process, such as fake tensors.
    """
    buffers = [buffer for layer in layers for buffer in layer._buffers.values() if buffer is not None]
    if not buffers or any(type(buffer) is not Tensor or buffer.is_meta for buffer in buffers):
        return 0
    hasher = hashlib.blake2b(digest_size=8)
    for buffer in buffers:
        values = buffer.detach().cpu().contiguous()
        hasher.update(ctypes.string_at(values.data_ptr(), values.numel() * values.element_size()))
    return int.from_bytes(hasher.digest(), "little") >> 1
