"""Schemes of statistics exchange for comparison. All use this package's kernels, so that only the rounds differ."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..algorithm import SyncBatchNormAlgorithm
from ..comm.channel import Channel
from ..comm.wire import FORWARD, SyncPoint, sync_point
from ..convert import convert_sync_batchnorm, sync_batchnorm_layers
from ..host import bagua

__all__ = [
    "COLORS",
    "EAGER_VARIANTS",
    "VARIANTS",
    "BareScheme",
    "TorchScheme",
    "UpstreamScheme",
    "build_variant",
    "channel_of_model",
]

# Names and descriptions.
VARIANTS = {
    "local": "BatchNorm over the batch of each rank",
    "upstream": "3 all-gathers and 2 all-reduces a layer, as upstream Bagua's SyncBatchNorm",
    "torch": "1 all-gather and 1 all-reduce a layer, as torch.nn.SyncBatchNorm",
    "per layer": "1 round a layer forward, 1 backward",
    "coalesced": "1 round a level forward, 1 backward",
    "overlapped": "coalesced, the backward round overlapped with weight gradients",
    "compiled local": "local, under torch.compile",
    "compiled per layer": "per layer, under torch.compile",
    "compiled coalesced": "coalesced, under torch.compile",
    "compiled overlapped": "overlapped, under torch.compile",
}
_COMPILED = "compiled "  # prefix
#: The variants that need no compiler, whose first step may take minutes.
EAGER_VARIANTS = tuple(name for name in VARIANTS if not name.startswith(_COMPILED))

# The variants' colors in figures.
COLORS = {
    "local": "#A6A6A6",
    "upstream": "#D55E00",
    "torch": "#E69F00",
    "per layer": "#56B4E9",
    "coalesced": "#0072B2",
    "overlapped": "#009E73",
    "compiled local": "#D0D0D0",
    "compiled per layer": "#A8D8F0",
    "compiled coalesced": "#7FB8E0",
    "compiled overlapped": "#66C2A5",
}


class BareScheme(Channel):
    """Collectives without headers or checks: a lower bound of the scheme's cost.

    Args:
        group: the communicator, a backend of a process group.
    """

    def __init__(self, group: Any) -> None:
        super().__init__()
        self._group, self.rank, self.world_size = group, group.rank(), group.size()
        self.latency = 0.0  # least duration of a collective, in seconds

    def _exchange(self, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        raise NotImplementedError

    def launch(self, point: SyncPoint, phase: int, parts: Sequence[Any], flags: int = 0) -> Callable[[], List[Tensor]]:
        result = self._exchange(phase, parts)
        return lambda: result

    def gather(self, part: Tensor) -> Tensor:
        """Returns ``part`` of every rank, shape ``(W, *part.shape)``."""
        start, gathered = time.perf_counter(), part.new_empty((self.world_size, *part.shape))
        self._finish(start, self._group.allgather([list(gathered.unbind(0))], [part]))
        return gathered

    def reduce(self, part: Tensor) -> Tensor:
        """Returns the sum of ``part`` over all ranks, shape ``(1, *part.shape)``: the format of one rank."""
        start, total = time.perf_counter(), part.clone()
        self._finish(start, self._group.allreduce([total]))
        return total.unsqueeze(0)

    def _finish(self, start: float, work: Any) -> None:
        self.rounds += 1
        work.wait()
        if self.latency:  # from the time at which this rank sends, not the last one, which favors the scheme
            time.sleep(max(0.0, start + self.latency - time.perf_counter()))

    def fail(self, point: SyncPoint, phase: int, error: BaseException, wait: bool = True) -> None:
        raise error


class UpstreamScheme(BareScheme):
    """The scheme of upstream Bagua's SyncBatchNorm, of five collectives a layer.

    All-gathers of count, mean and variance, all-reduces of both gradient sums.
    """

    def _exchange(self, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        if phase == FORWARD:
            count, moments = parts
            return [self.gather(count), torch.cat([self.gather(part) for part in moments.chunk(2)], 1)]
        sums, used = parts[0][:-1], parts[0][-1:]
        return [torch.cat([*(self.reduce(part) for part in sums.chunk(2)), used.unsqueeze(0)], 1)]


class TorchScheme(BareScheme):
    """The scheme of torch.nn.SyncBatchNorm: an all-gather of count, mean and variance, an all-reduce of both sums."""

    def _exchange(self, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        if phase == FORWARD:
            count, moments = parts
            gathered = self.gather(torch.cat([count.to(moments.dtype), moments]))
            return [gathered[:, :1].to(count.dtype), gathered[:, 1:]]
        return [self.reduce(parts[0])]


def build_variant(
    name: str,
    model: nn.Module,
    inner: Any = None,
    group: Any = None,
    example_inputs: Optional[Tuple[Any, ...]] = None,
) -> Any:
    """Returns ``model`` wrapped by ``with_bagua``, with the statistics exchange of one of :data:`VARIANTS`.

    Args:
        name: the name of the variant.
        model: the model; changed in place.
        inner: the algorithm for the gradients; all-reduce by default.
        group: the communicator of upstream's or torch's scheme. By default a new group of ``torch.distributed``, the
            kind of group that both schemes use.
        example_inputs: the positional arguments of a training forward, for the conversion of a coalesced variant.

    Collectives:
        Those of ``with_bagua``, and of ``torch.distributed.new_group`` by default. Every rank must call.
    """
    if inner is None:
        inner = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    wrapped: Any = model
    compiled, name = name.startswith(_COMPILED), name[len(_COMPILED) :] if name.startswith(_COMPILED) else name
    # Before `with_bagua`, whose hooks then run outside of the graph.
    finish: Callable[[Any], Any] = torch.compile if compiled else lambda built: built
    if name == "local":
        return finish(wrapped).with_bagua([], inner)
    coalesce = name in ("coalesced", "overlapped")
    wrapped = convert_sync_batchnorm(
        model, coalesce=coalesce, overlap=name == "overlapped", example_inputs=example_inputs
    )
    if coalesce or name == "per layer":
        return finish(wrapped).with_bagua([], SyncBatchNormAlgorithm(inner))
    wrapped.with_bagua([], inner)
    schemes: Dict[str, Any] = {"upstream": UpstreamScheme, "torch": TorchScheme}
    channel = schemes[name](dist.new_group()._get_backend(torch.device("cpu")) if group is None else group)
    for layer in sync_batchnorm_layers(wrapped):
        layer.bind(channel, sync_point(layer.sync_name))
    return wrapped


def channel_of_model(model: nn.Module) -> Channel:
    """Returns the channel of the model's synchronized layers; without such layers, a channel without rounds."""
    for layer in sync_batchnorm_layers(model):
        if layer._channel is not None:
            return layer._channel
    return Channel()
