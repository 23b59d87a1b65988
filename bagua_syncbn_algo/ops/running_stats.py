"""World-wide running statistics for layers that normalize over less than the world, at no exposed cost.

Each layer leaves its local moments in a pool. When backward begins, the pool of all layers travels as one tensor, by
two sums over all ranks, while gradients are computed and sent; when backward is done, every rank applies the same
update.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ..comm.channel import Channel
from ..comm.wire import SyncPoint
from .functional import launch_moments
from .moments import LocalMoments, merge_moments

__all__ = ["RunningPool", "Slot"]


class _FirstSums(NamedTuple):
    """What the second sum needs of the first, per layer ``(L,)`` or per channel ``(ΣC,)``."""

    counts: Tensor  # (ΣC,): this rank's elements
    means: Tensor  # (ΣC,)
    variances: Tensor  # (ΣC,)


class Slot(NamedTuple):
    """Mean and unbiased variance of one training forward of a layer, each ``(C,)``, for :meth:`RunningPool.add`."""

    layer: Any
    mean: Tensor
    variance: Tensor
    in_pool: bool = False  # whether the tensors are the pool's own memory

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype, device: torch.device) -> Slot:
        """Returns a slot of zeros that belongs to no pool."""
        mean, variance = torch.zeros(2, layer.num_features, dtype=dtype, device=device).unbind(0)
        return cls(layer, mean, variance)


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
        self._elements = [0] * len(features)
        # Mean and unbiased variance of what each layer has run since the last launch. Kernels write to `_places`, and
        # autograd keeps these with them; the pool writes to the same memory past autograd's version counter.
        moments = torch.zeros(2, sum(features), dtype=self._dtype, device=self._device)
        self._moments = moments.data
        self._places = list(zip(*(row.split(features) for row in moments)))
        self._views = list(zip(*(row.split(features) for row in self._moments)))
        #: Whether a backward can follow a forward with gradients: whether any parameter is trained.
        self.trains = True
        self._flight: Optional[_FirstSums] = None
        self._world: Optional[Tensor] = None

    @property
    def collects(self) -> bool:
        """Whether moments of a forward wait for a backward, :meth:`add`; else :meth:`merge` takes them at once."""
        return self.trains and torch.is_grad_enabled()

    def place(self, layer: Any, dtype: torch.dtype) -> Slot:
        """Returns a slot of zeros to which a kernel may write; pass it to :meth:`add` afterwards."""
        index = self._index[id(layer)]
        if self._elements[index] == 0 and dtype == self._dtype:
            mean, variance = self._places[index]
            return Slot(layer, mean, variance, in_pool=True)
        return Slot.of(layer, dtype, self._device)

    @torch.no_grad()
    def add(self, slot: Slot, elements: int) -> None:
        """Takes the local moments of one training forward; several of a layer before a launch are pooled.

        Args:
            slot: the moments, variance unbiased, as BatchNorm kernels compute it.
            elements: per channel; 0 for an empty shard.
        """
        index = self._index[id(slot.layer)]
        earlier = self._elements[index]
        self._elements[index] += elements
        if elements == 0 or slot.in_pool:
            return
        mean, variance = slot.mean, slot.variance
        own_mean, own_variance = self._views[index]
        if earlier:
            counts = torch.tensor([[earlier], [elements]], device=self._device)
            biased = torch.stack([own_variance, variance.to(self._dtype)]) * (1 - 1 / counts.to(self._dtype))
            merged = merge_moments(counts, torch.stack([own_mean, mean.to(self._dtype)]), biased)
            mean, variance = merged.mean, merged.unbiased_variance()
        own_mean.copy_(mean)
        own_variance.copy_(variance)

    def merge(self, layer: Any, point: SyncPoint, local: LocalMoments) -> None:
        """Updates ``layer`` at once by the moments of one training forward of all ranks.

        Collectives:
            One all-gather of ``8 + 2C·itemsize`` payload bytes. Every rank must call.
        """
        layer.update_running_statistics(launch_moments([local], self._channel, point, [layer.sync_name])())

    @torch.no_grad()
    def load(self) -> None:
        """Moves what was pooled into the payload, for the first sum; forwards from now on are pooled anew."""
        elements, self._elements = self._elements, [0] * len(self._elements)
        # Variances are unbiased and here become biased.
        factors = [(n - 1) / n if n else 0.0 for n in elements]
        per_layer = torch.tensor([elements, factors], dtype=self._dtype).to(self._device)
        counts, factors_of = per_layer[:, self._layer_of]
        means, variances = self._moments[0].clone(), self._moments[1] * factors_of
        self._moments.zero_()  # a value that is no number would outlast even a momentum of 1
        self._flight = _FirstSums(counts, means, variances)
        self.payload[: len(elements)] = per_layer[0]
        torch.mul(counts, means, out=self.payload[len(elements) :])

    @torch.no_grad()
    def second_reduction(self, *unused: Any) -> None:
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
        # What nobody ran stays untouched: evaluation saves its buffers for backward. On CUDA the host does not know.
        chosen = [True] * layers if counts.is_cuda else ran.tolist()
        if not any(chosen):
            return
        # Past Module.__getattr__, which costs more than some of the operations below.
        tracked = [layer._buffers["num_batches_tracked"] for layer in self.layers]
        torch._foreach_add_(_those(tracked, chosen), _those(ran.to(tracked[0].dtype).unbind(0), chosen))
        momenta = [-1.0 if layer.momentum is None else layer.momentum for layer in self.layers]
        weights = torch.tensor(momenta, dtype=self._dtype).to(self._device)
        if min(momenta) < 0:  # the cumulative average
            cumulative = torch.stack(tracked).clamp(min=1).to(self._dtype).reciprocal()
            weights = torch.where(weights < 0, cumulative, weights)
        # Where nobody ran the layer all of these are zeros, and so is the weight.
        per_layer = torch.stack([weights * ran, (counts - 1).clamp(min=1)])
        weights_of, divisors = per_layer[:, self._layer_of]
        values = torch.cat([means, self.payload[layers:] / divisors])
        buffers = [layer._buffers[name] for name in ("running_mean", "running_var") for layer in self.layers]
        moved = torch.cat([buffer.to(self._dtype) for buffer in buffers])
        moved.lerp_(values, weights_of.repeat(2))
        # A half-precision buffer is rounded once.
        buffers = _those(buffers, chosen * 2)
        torch._foreach_zero_(buffers)
        torch._foreach_add_(buffers, _those(moved.split(self._features * 2), chosen * 2))

    @property
    def in_flight(self) -> bool:
        """Whether the payload is loaded and not yet applied."""
        return self._flight is not None

    @property
    def names(self) -> List[str]:
        """The layers' names."""
        return [layer.sync_name for layer in self.layers]


def _those(values: Sequence[Tensor], chosen: Sequence[bool]) -> List[Tensor]:
    return [value for value, is_chosen in zip(values, chosen) if is_chosen]
