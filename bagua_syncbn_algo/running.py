"""World-wide running statistics for layers that normalize over less than the world, at no exposed cost.

Each layer leaves its local moments in a pool. When backward begins, the pool of all layers travels as one tensor, by
two sums over all ranks, while gradients are computed and sent; when backward is done, every rank applies the same
update.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .channel import Channel, SyncPoint
from .functional import exchange_moments
from .moments import LocalMoments, merge_moments

__all__ = ["RunningPool"]


class _Flight(NamedTuple):
    """What the second sum needs of the first, per layer ``(L,)`` or per channel ``(ΣC,)``."""

    counts: Tensor  # (ΣC,): this rank's elements
    means: Tensor  # (ΣC,)
    variances: Tensor  # (ΣC,)


class RunningPool:
    """Moments of all layers since the last update, and the tensor in which they travel.

    A plain sum cannot merge variances, so two follow each other: first ``(n, n·m)``, which gives every rank the world's
    ``N`` and ``M``, then ``n[v + (m − M)²]`` (Chan, Golub, LeVeque 1979, in two passes). The bytes do not grow with the
    number of ranks.

    Args:
        layers: SyncBatchNorm layers that keep running statistics; the same on all ranks.
        channel: over the whole world, for forwards that no backward follows.
    """

    def __init__(self, layers: Sequence[Any], channel: Channel) -> None:
        self.layers, self._channel = list(layers), channel
        features = [layer.num_features for layer in self.layers]
        first: Tensor = self.layers[0].running_mean
        doubles = any(layer.running_mean.dtype == torch.float64 for layer in self.layers)
        self._dtype, self._device = (torch.float64 if doubles else torch.float32), first.device
        self._features = features
        # Of which layer each channel is: turns a value per layer into one per channel.
        self._layer_of = torch.repeat_interleave(torch.tensor(features)).to(self._device)
        #: What is communicated: ``(n, n·m)``, later zeros and ``n[v + (m − M)²]``; shape ``(L + ΣC,)``.
        self.payload = torch.zeros(len(features) + sum(features), dtype=self._dtype, device=self._device)
        self._index = {id(layer): index for index, layer in enumerate(self.layers)}
        self._moments: Dict[int, LocalMoments] = {}
        self._flight: Optional[_Flight] = None
        self._world: Optional[Tensor] = None
        self._zeros = [torch.zeros(count, dtype=self._dtype, device=self._device) for count in features]

    def add(self, layer: Any, local: LocalMoments) -> None:
        """Takes the local moments of one training forward of ``layer``; several before a launch are pooled."""
        index = self._index[id(layer)]
        earlier = self._moments.get(index)
        self._moments[index] = local if earlier is None else _pooled(earlier, local)

    def merge(self, layer: Any, point: SyncPoint, local: LocalMoments) -> None:
        """Updates ``layer`` at once by the moments of one training forward of all ranks.

        Collectives:
            One all-gather of ``8 + 2C·itemsize`` payload bytes. Every rank must call.
        """
        layer.update_running_statistics(exchange_moments(local, self._channel, point))

    @torch.no_grad()
    def load(self) -> None:
        """Moves what was pooled into the payload, for the first sum; forwards from now on are pooled anew."""
        moments, self._moments = self._moments, {}
        counts, means, variances = [], [], []
        for index, zeros in enumerate(self._zeros):
            local = moments.get(index)
            counts.append(0 if local is None else local.elements)
            means.append(zeros if local is None else local.mean.to(self._dtype))
            variances.append(zeros if local is None else local.variance.to(self._dtype))
        counts_per_layer = torch.tensor(counts, dtype=self._dtype).to(self._device)
        flight = _Flight(counts_per_layer[self._layer_of], torch.cat(means), torch.cat(variances))
        torch.cat([counts_per_layer, flight.counts * flight.means], out=self.payload)
        self._flight = flight

    @torch.no_grad()
    def between(self, *unused: Any) -> None:
        """Between the two sums: takes ``N`` and ``M`` out of the payload and puts the second summand in."""
        flight = self._flight
        assert flight is not None
        layers = len(self._features)
        self._world = self.payload.clone()
        mean = self._world[layers:] / self._world[:layers].clamp(min=1)[self._layer_of]
        self._world[layers:] = mean
        self.payload[:layers] = 0
        self.payload[layers:] = flight.counts * (flight.variances + (flight.means - mean).square())

    @torch.no_grad()
    def apply(self) -> None:
        """After the second sum: updates every layer that any rank has run since the last update."""
        assert self._world is not None
        layers = len(self._features)
        counts, means = self._world[:layers], self._world[layers:]
        self._flight = self._world = None
        # All layers at once: twenty small operations for each would cost more than the statistics' communication.
        ran = counts > 0
        tracked = [layer.num_batches_tracked for layer in self.layers]
        torch._foreach_add_(tracked, list(ran.to(tracked[0].dtype).unbind(0)))
        momenta = [-1.0 if layer.momentum is None else layer.momentum for layer in self.layers]
        weights = torch.tensor(momenta, dtype=self._dtype).to(self._device)
        if min(momenta) < 0:  # the cumulative average
            weights = torch.where(weights < 0, torch.stack(tracked).clamp(min=1).reciprocal().to(self._dtype), weights)
        # Where nobody ran the layer all of these are zeros, and so is the weight.
        weights = (weights * ran)[self._layer_of]
        unbiased = self.payload[layers:] / (counts - 1).clamp(min=1)[self._layer_of]
        for name, values in (("running_mean", means), ("running_var", unbiased)):
            buffers = [getattr(layer, name) for layer in self.layers]
            moved = torch.cat([buffer.to(self._dtype) for buffer in buffers]).lerp_(values, weights)
            for buffer, value in zip(buffers, moved.split(self._features)):
                buffer.copy_(value)

    @property
    def in_flight(self) -> bool:
        """Whether the payload is loaded and not yet applied."""
        return self._flight is not None

    @property
    def names(self) -> List[str]:
        """The layers' names."""
        return [layer.sync_name for layer in self.layers]


def _pooled(first: LocalMoments, second: LocalMoments) -> LocalMoments:
    if first.elements == 0:
        return second
    if second.elements == 0:
        return first
    counts = torch.tensor([[first.elements], [second.elements]], device=first.mean.device)
    merged = merge_moments(
        counts, torch.stack([first.mean, second.mean]), torch.stack([first.variance, second.variance])
    )
    return LocalMoments(first.elements + second.elements, merged.mean, merged.variance)
