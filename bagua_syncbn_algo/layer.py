"""The SyncBatchNorm layer: modes, buffers, errors."""

from __future__ import annotations

import weakref
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .comm.channel import Channel
from .comm.local import SINGLE_PROCESS
from .comm.transport import channel_of, source_group
from .comm.wire import FORWARD, Roster, SyncPoint, sync_point
from .compat import uncompiled
from .ops.deferred import OverlapCandidates
from .ops.functional import Member, sync_batch_norm
from .ops.moments import GlobalMoments, LocalMoments, split_channels, statistics_dtype
from .ops.recompute import RecomputeCache, inside_backward
from .ops.running_stats import RunningPool, Slot

__all__ = ["SyncBatchNorm", "SyncTag", "batch_norm_coalesced"]

_NO_ROSTER = Roster()  # of layers that were never tagged: they agree on nothing but a message length


class SyncTag(NamedTuple):
    """How a layer is known to the algorithm and to the other ranks."""

    name: str  # qualified name in the model
    order: int  # position among the model's synchronized layers
    group: Optional[Tuple[int, ...]]  # global ranks that it normalizes over; None: all of them
    roster: Roster  # all layers tagged together


class SyncBatchNorm(_BatchNorm):
    r"""Batch normalization over the batches of all ranks together.

    In training, mean and variance are those of the concatenation of all ranks' inputs (exactly, not an average of
    per-rank statistics; ranks may hold different numbers of samples, some none). In evaluation it is
    ``torch.nn.BatchNorm*d`` and never communicates. The output keeps the input's dtype and memory format.

    Works on CPU and CUDA, by itself under any data parallelism (``DistributedDataParallel`` included) or bound to Bagua
    communication by :class:`~bagua_syncbn_algo.SyncBatchNormAlgorithm`. With one rank, or without an initialised
    process group, it is a plain BatchNorm.

    Args:
        num_features: channels ``C`` of the input ``(N, C, ...)``, 2-D or more.
        eps: added to the variance.
        momentum: weight of the new value in the running statistics; ``None`` for the cumulative average.
        affine: whether to have ``weight`` and ``bias``.
        track_running_stats: whether to keep running statistics. Without them evaluation normalizes with the statistics
            of this rank's batch.
        process_group: the ranks to normalize over; ``None`` for all.
        device, dtype: of the parameters and buffers.

    Raises:
        ValueError: at a forward whose input has fewer than 2 dimensions, another channel count or no floating dtype, or
            where the whole group holds at most one value per channel.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive.

    Layers of a model that was not converted, and is not given to the algorithm, are known to other ranks by the order
    of their first use; :func:`~bagua_syncbn_algo.tag_sync_batchnorm` gives them their names.

    Collectives:
        In training, one all-gather in forward (``8 + 2C·itemsize`` payload bytes a rank; itemsize 4, for float64 input
        8) and one in backward (``(1 + 2C)·itemsize``). The first training forward also creates the statistics group.
        Every rank of the group must call.
    """

    process_group: Optional[Any]
    tag: Optional[SyncTag]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Optional[Any] = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._adopt(process_group)

    def _adopt(self, process_group: Optional[Any]) -> None:
        """Sets what this class has beyond BatchNorm; also how the converter turns a BatchNorm's state into this."""
        self.process_group = process_group
        self.tag = None
        self._go_unbound()

    def _go_unbound(self) -> None:
        self._channel: Optional[Channel] = None
        self._channel_source: Optional[weakref.ref[Any]] = None
        self._point: SyncPoint = sync_point("")
        self._recompute_cache = RecomputeCache()
        self._running: Optional[RunningPool] = None
        self._empty_shards = False

    # -- binding --------------------------------------------------------------------------------------------------

    @property
    def sync_name(self) -> str:
        """The name of this layer in errors and tables."""
        return self._point.name if self.tag is None else self.tag.name

    @property
    def device(self) -> Optional[torch.device]:
        """The device of the parameters or buffers; ``None`` for a layer without any."""
        own = next((t for t in (self.weight, self.running_mean) if t is not None), None)
        return None if own is None else own.device

    @property
    def itemsize(self) -> int:
        """Bytes of one of this layer's statistics, by the dtype of its parameters now."""
        doubles = any(t is not None and t.dtype == torch.float64 for t in (self.weight, self.running_mean))
        return 8 if doubles else 4

    def bind(
        self,
        channel: Channel,
        point: SyncPoint,
        running: Optional[RunningPool] = None,
        empty_shards: bool = False,
    ) -> None:
        """Makes this layer exchange its statistics at ``point`` of ``channel``; the algorithm calls it.

        Args:
            channel: the ranks to normalize over.
            point: this layer.
            running: takes its moments for the running statistics, if ``channel`` is less than the world.
            empty_shards: whether this rank may have no samples although it normalizes alone: other ranks have some.
        """
        self._running, self._empty_shards = running, empty_shards
        source = source_group(self.process_group)
        self._channel, self._point = channel, point
        self._channel_source = None if source is None else weakref.ref(source)
        channel.register(point)

    def _bound_channel(self, device: Optional[torch.device] = None) -> Channel:
        """Returns the ranks to normalize over; binds the layer at its first use.

        Args:
            device: of the statistics; ``None`` for the parameters'.
        """
        source = source_group(self.process_group)
        if source is None:
            return SINGLE_PROCESS
        if self._channel is None or self._channel_source is None or self._channel_source() is not source:
            channel = channel_of(self.process_group)
            device = device or self.device
            if device is not None:
                channel.use_device(device)
            if self.tag is None:
                channel.join(_NO_ROSTER)
                point = sync_point(channel.anonymous_name(self.num_features))
            else:
                point = sync_point(self.tag.name, channel.join(self.tag.roster, self.itemsize))
            self.bind(channel, point)
        assert self._channel is not None
        return self._channel

    # -- forward --------------------------------------------------------------------------------------------------

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(
                f"expected at least 2D input (N, C, ...) at {self.sync_name or 'SyncBatchNorm'} (got {input.dim()}D "
                f"input of shape {tuple(input.shape)}); add the missing dimensions"
            )

    def _check_input(self, input: Tensor) -> None:
        self._check_input_dim(input)
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"expected {self.num_features} channels in dimension 1 at {self.sync_name or 'SyncBatchNorm'} "
                f"(got input of shape {tuple(input.shape)}); make num_features and the input agree"
            )
        if not input.is_floating_point():
            raise ValueError(
                f"expected floating-point input at {self.sync_name or 'SyncBatchNorm'} (got {input.dtype}); "
                "convert it, e.g. input.float()"
            )

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            self._check_input(input)
            return self._local_batch_norm(input, self.running_mean is None and self.running_var is None)
        return batch_norm_coalesced([self], [input])[0]

    def _normalize_single_rank(self, input: Tensor) -> Tensor:
        """A training forward of this rank only."""
        # A forward inside a backward recomputes an earlier one, which has updated the statistics.
        if self._running is not None and self.track_running_stats:
            return self._pooling_batch_norm(input, self._running, update=not inside_backward())
        if self._empty_shards and input.numel() == 0:
            return input.clone()
        return self._local_batch_norm(input, True, update=not inside_backward())

    def _local_batch_norm(self, input: Tensor, batch_statistics: bool, update: bool = False) -> Tensor:
        """Normalizes with this rank's batch or the running statistics, by PyTorch's own kernels."""
        if batch_statistics and input.numel() <= input.shape[1]:
            raise ValueError(
                f"expected more than 1 value per channel at {self.sync_name or 'SyncBatchNorm'} (got input of shape "
                f"{tuple(input.shape)} on one rank); use a larger batch or eval()"
            )
        momentum = 0.0
        tracks = self.track_running_stats or not self.training
        running_mean, running_var = (self.running_mean, self.running_var) if tracks else (None, None)
        if self.training and running_mean is not None and running_var is not None:
            assert self.num_batches_tracked is not None
            if update:
                self.num_batches_tracked.add_(1)
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            else:
                # Copies, not None: checkpointing counts the tensors that a recomputation saves.
                running_mean, running_var = running_mean.clone(), running_var.clone()
        return F.batch_norm(
            input, running_mean, running_var, self.weight, self.bias, batch_statistics, momentum, self.eps
        )

    def _pooling_batch_norm(self, input: Tensor, running: RunningPool, update: bool) -> Tensor:
        """Normalizes over this rank by PyTorch's own kernels, and leaves the moments to the pool."""
        count = input.numel() // input.shape[1]
        if count == 1:
            return self._local_batch_norm(input, True)  # raises
        dtype = statistics_dtype(input.dtype)
        pooled = update and running.collects
        slot = running.place(self, dtype) if pooled else Slot.of(self, dtype, input.device)
        if count == 0:  # must not reach a native kernel
            output = input.clone()
        else:
            # With a momentum of 1 the kernel leaves the batch's own statistics in the buffers that it is given.
            weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
            output = F.batch_norm(input, slot.mean, slot.variance, weight, bias, True, 1.0, self.eps)
        if pooled:
            running.add(slot, count)
        elif update:  # an empty shard has left zeros
            local = LocalMoments(count, slot.mean, slot.variance * ((count - 1) / max(count, 1)))
            running.merge(self, self._point, local)
        return output

    @torch.no_grad()
    def update_running_statistics(self, merged: GlobalMoments) -> None:
        """Moves the running statistics towards ``merged``, the moments of the whole world's batch; counts a batch."""
        _update_running_statistics([self], merged)

    def extra_repr(self) -> str:
        group = "" if self.process_group is None else f", process_group={self.process_group}"
        return f"{super().extra_repr()}{group}"  # type: ignore[no-untyped-call]

    # -- copies ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> Dict[str, Any]:
        state = self.__dict__.copy()
        for live in ("_channel", "_channel_source", "_point", "_recompute_cache", "_running", "_empty_shards"):
            state.pop(live, None)
        if self.process_group is not None:
            state["process_group"] = _GroupReference(self.process_group, self.sync_name)
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.process_group, _GroupReference):
            self.process_group = self.process_group.group
        self._go_unbound()

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Optional[Any] = None) -> torch.nn.Module:
        """Converts ``module``'s BatchNorm layers; see :func:`bagua_syncbn_algo.convert_sync_batchnorm`."""
        from .convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)


class _GroupReference:
    """Lets a layer with a process group be deep-copied, and refuses to pickle a live group."""

    def __init__(self, group: Any, name: str) -> None:
        self.group, self._name = group, name

    def __deepcopy__(self, memo: Dict[int, Any]) -> _GroupReference:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            f"expected a layer over all ranks to pickle (got {self._name or 'SyncBatchNorm'} with a process group, "
            "which lives in this process only); save state_dict(), or set process_group = None first"
        )


@uncompiled
def batch_norm_coalesced(
    layers: Sequence[SyncBatchNorm],
    inputs: Sequence[Tensor],
    name: Optional[str] = None,
    cache: Optional[RecomputeCache] = None,
    overlap_with: Optional[OverlapCandidates] = None,
) -> Tuple[Tensor, ...]:
    """Runs training forwards that do not depend on each other, in one round of statistics.

    Args:
        layers: in program order; one may be there several times.
        inputs: one for each.
        name: of the round; ``None`` for a layer by itself.
        cache: the round's, for recomputed forwards; ``None`` for the layer's own.
        overlap_with: gradients that backward can compute while the all-gather is in flight.

    Returns:
        The outputs. Layers that cannot share a message, on different devices say, have run one after the other.

    Raises:
        ValueError: for an input that does not fit its layer.
        SyncBatchNormError: if another rank failed, is elsewhere or did not arrive.

    Collectives:
        One all-gather forward, one in backward. Every rank must call.
    """
    first = layers[0]
    channel = first._bound_channel(inputs[0].device)
    if len(layers) > 1 and not _can_share(layers, inputs, channel):
        # Not by calling them: hooks and what a subclass does beyond normalizing are the caller's.
        return tuple(SyncBatchNorm.forward(layer, input) for layer, input in zip(layers, inputs))
    point = first._point
    if name is not None:
        point = sync_point(name, point.ordinal, tuple(layer.sync_name for layer in layers))
    try:
        for layer, input in zip(layers, inputs):
            layer._check_input(input)
    except ValueError as error:
        channel.fail(point, FORWARD, error)
        raise
    if channel.local:
        return tuple(layer._normalize_single_rank(input) for layer, input in zip(layers, inputs))
    if name is not None:
        channel.register(point)
    members = [
        Member(input, layer.weight, layer.bias, layer.eps, layer.sync_name) for layer, input in zip(layers, inputs)
    ]

    def update(local: List[LocalMoments], merged: GlobalMoments) -> None:
        _leave_running_statistics(layers, local, merged)

    own = first._recompute_cache if cache is None else cache
    return sync_batch_norm(members, channel, point, None if channel.trial else own, overlap_with, update)


def _can_share(layers: Sequence[SyncBatchNorm], inputs: Sequence[Tensor], channel: Channel) -> bool:
    device = inputs[0].device
    return all(layer.training and layer._bound_channel() is channel for layer in layers) and all(
        input.device == device for input in inputs
    )


def _leave_running_statistics(
    layers: Sequence[SyncBatchNorm], local: Sequence[LocalMoments], merged: GlobalMoments
) -> None:
    pools = [layer._running if layer.track_running_stats else None for layer in layers]
    if all(pool is None for pool in pools) and len(set(map(id, layers))) == len(layers):
        _update_running_statistics(layers, merged)
        return
    for layer, pool, own, world in zip(layers, pools, local, merged.split([x.num_features for x in layers])):
        if pool is None:
            _update_running_statistics([layer], world)
        elif pool.collects:
            pool.add(Slot(layer, own.mean, own.unbiased_variance()), own.elements)
        else:
            pool.merge(layer, layer._point, own)


@torch.no_grad()
def _update_running_statistics(layers: Sequence[SyncBatchNorm], merged: GlobalMoments) -> None:
    """Moves the running statistics of layers, each there once, towards the moments of the whole world's batch."""
    features = [layer.num_features for layer in layers]
    unbiased = merged.unbiased_variance()
    pairs = list(zip(layers, split_channels(merged.mean, features), split_channels(unbiased, features)))
    kept = [pair for pair in pairs if pair[0].track_running_stats and pair[0].running_mean is not None]
    if not kept:
        return
    counts: List[Tensor] = [layer._buffers["num_batches_tracked"] for layer, _, _ in kept]  # type: ignore[misc]
    torch._foreach_add_(counts, 1)
    for count, (layer, mean, variance) in zip(counts, kept):
        weight: Any = layer.momentum
        if weight is None:  # the cumulative average; stays on the device
            weight = count.to(mean.dtype).reciprocal()
        for buffer, value in ((layer.running_mean, mean), (layer.running_var, variance)):
            assert buffer is not None
            if buffer.dtype == value.dtype:
                buffer.lerp_(value, weight)
            else:
                # The arithmetic is the statistics', the storage the buffer's own: half precision is rounded once.
                buffer.copy_(torch.lerp(buffer.to(value.dtype), value, weight))
