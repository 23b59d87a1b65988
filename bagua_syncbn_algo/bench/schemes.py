"""Ways to exchange the same statistics, by the project's own kernels: so that only the rounds differ."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, List, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..algorithm import SyncBatchNormAlgorithm
from ..comm.channel import Channel
from ..comm.wire import FORWARD, SyncPoint, sync_point
from ..convert import convert_sync_batchnorm, sync_batchnorm_layers
from ..host import bagua

__all__ = ["COLORS", "BareScheme", "OriginalScheme", "TorchScheme", "VARIANTS", "build_variant", "channel_of_model"]

# By name, what a table says of it.
VARIANTS = {
    "local": "BatchNorm of each rank alone",
    "upstream": "3 all-gathers and 2 all-reduces a layer, as Bagua's own SyncBatchNorm",
    "torch": "1 all-gather and 1 all-reduce a layer, as torch.nn.SyncBatchNorm",
    "per layer": "1 round a layer forward, 1 backward",
    "coalesced": "1 round a level forward, 1 backward",
    "overlapped": "coalesced, the backward round overlapped with weight gradients",
}

# In pictures.
COLORS = {
    "local": "#A6A6A6",
    "upstream": "#D55E00",
    "torch": "#E69F00",
    "per layer": "#56B4E9",
    "coalesced": "#0072B2",
    "overlapped": "#009E73",
}


class BareScheme(Channel):
    """Bare collectives without headers or checks: as fast as the scheme can be."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._group, self.rank, self.world_size = group, group.rank(), group.size()
        self.latency = 0.0  # seconds before which no collective ends

    def _exchange(self, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        raise NotImplementedError

    def launch(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> Callable[[], List[Tensor]]:
        found = self._exchange(phase, parts)
        return lambda: found

    def gather(self, part: Tensor) -> Tensor:
        """Returns every rank's ``part``."""
        start, gathered = time.perf_counter(), part.new_empty((self.world_size, *part.shape))
        self._finish(start, self._group.allgather([list(gathered.unbind(0))], [part]))
        return gathered

    def reduce(self, part: Tensor) -> Tensor:
        """Returns the sum over all ranks, as if it were of one."""
        start, total = time.perf_counter(), part.clone()
        self._finish(start, self._group.allreduce([total]))
        return total.unsqueeze(0)

    def _finish(self, start: float, work: Any) -> None:
        self.rounds += 1
        work.wait()
        if self.latency:  # counted from when this rank sends, not the last one: in doubt in favour of the scheme
            time.sleep(max(0.0, start + self.latency - time.perf_counter()))

    def fail(self, point: SyncPoint, phase: int, error: BaseException, wait: bool = True) -> None:
        raise error


class OriginalScheme(BareScheme):
    """As Bagua's contrib SyncBatchNorm: all-gathers of count, mean and variance, all-reduces of both gradient sums."""

    def _exchange(self, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        if phase == FORWARD:
            count, moments = parts
            return [self.gather(count), torch.cat([self.gather(part) for part in moments.chunk(2)], 1)]
        sums, used = parts[0][:-1], parts[0][-1:]
        return [torch.cat([*(self.reduce(part) for part in sums.chunk(2)), used.unsqueeze(0)], 1)]


class TorchScheme(BareScheme):
    """As torch.nn.SyncBatchNorm: one all-gather of count, mean and variance, one all-reduce of the gradient sums."""

    def _exchange(self, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        if phase == FORWARD:
            count, moments = parts
            gathered = self.gather(torch.cat([count.to(moments.dtype), moments]))
            return [gathered[:, :1].to(count.dtype), gathered[:, 1:]]
        return [self.reduce(parts[0])]


def build_variant(name: str, model: nn.Module, inner: Any = None, group: Any = None) -> Any:
    """Returns ``model`` in ``with_bagua``, with its statistics exchanged by one of :data:`VARIANTS`.

    Args:
        name: of the variant.
        model: changed in place.
        inner: the algorithm for the gradients; all-reduce by default.
        group: what the original's or torch's scheme communicates over; one of ``torch.distributed`` by default, as
            these two have.

    Collectives:
        Every rank must call.
    """
    if inner is None:
        inner = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    wrapped: Any = model
    if name == "local":
        return wrapped.with_bagua([], inner)
    coalesce = name in ("coalesced", "overlapped")
    wrapped = convert_sync_batchnorm(model, coalesce=coalesce, overlap=name == "overlapped")
    if coalesce or name == "per layer":
        return wrapped.with_bagua([], SyncBatchNormAlgorithm(inner))
    wrapped.with_bagua([], inner)
    schemes: Dict[str, Any] = {"upstream": OriginalScheme, "torch": TorchScheme}
    channel = schemes[name](dist.new_group()._get_backend(torch.device("cpu")) if group is None else group)
    for layer in sync_batchnorm_layers(wrapped):
        layer.bind(channel, sync_point(layer.sync_name))
    return wrapped


def channel_of_model(model: nn.Module) -> Channel:
    """Returns the channel of the model's synchronized layers; of one without, a channel without rounds."""
    for layer in sync_batchnorm_layers(model):
        if layer._channel is not None:
            return layer._channel
    return Channel()
