"""Other ways to exchange the same statistics, by the project's own kernels: so that only the rounds differ."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm, sync_batchnorm_layers
from bagua_syncbn_algo.channel import FORWARD, Channel, SyncPoint, sync_point

__all__ = ["OriginalScheme", "TorchScheme", "build_variant", "VARIANTS"]

VARIANTS = ("local", "original", "torch", "per layer", "coalesced")


class _Scheme(Channel):
    """Bare collectives without headers or checks: as fast as the scheme can be."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._group, self.rank, self.world_size = group, group.rank(), group.size()

    def _gather(self, part: Tensor) -> Tensor:
        self.rounds += 1
        gathered = part.new_empty((self.world_size, *part.shape))
        self._group.allgather([list(gathered.unbind(0))], [part]).wait()
        return gathered

    def _reduce(self, part: Tensor) -> Tensor:
        self.rounds += 1
        total = part.clone()
        self._group.allreduce([total]).wait()
        return total.unsqueeze(0)

    def fail(self, point: SyncPoint, phase: int, error: BaseException) -> None:
        raise error


class OriginalScheme(_Scheme):
    """As Bagua's contrib SyncBatchNorm: all-gathers of count, mean and variance, all-reduces of both gradient sums."""

    def exchange(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        if phase == FORWARD:
            count, moments = parts
            return [self._gather(count), torch.cat([self._gather(part) for part in moments.chunk(2)], 1)]
        return [torch.cat([self._reduce(part) for part in parts[0].chunk(2)], 1)]


class TorchScheme(_Scheme):
    """As torch.nn.SyncBatchNorm: one all-gather of count, mean and variance, one all-reduce of the gradient sums."""

    def exchange(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        if phase == FORWARD:
            count, moments = parts
            gathered = self._gather(torch.cat([count.to(moments.dtype), moments]))
            return [gathered[:, :1].to(count.dtype), gathered[:, 1:]]
        return [self._reduce(parts[0])]


def build_variant(name: str, model: nn.Module) -> Any:
    """Returns ``model`` in ``with_bagua``, with its statistics exchanged by one of :data:`VARIANTS`."""
    inner = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    wrapped: Any = model
    if name == "local":
        return wrapped.with_bagua([], inner)
    wrapped = convert_sync_batchnorm(model, coalesce=name == "coalesced")
    if name in ("per layer", "coalesced"):
        return wrapped.with_bagua([], SyncBatchNormAlgorithm(inner))
    wrapped.with_bagua([], inner)
    schemes: Dict[str, Any] = {"original": OriginalScheme, "torch": TorchScheme}
    channel = schemes[name](dist.new_group()._get_backend(torch.device("cpu")))
    for layer in sync_batchnorm_layers(wrapped):
        layer.bind(channel, sync_point(layer.sync_name))
    return wrapped
