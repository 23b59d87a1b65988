"""The SyncBatchNorm layer: modes and buffers."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, Dict, Optional, Sequence, Tuple, Type, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import checks
from .capture import fx_node, normalize_captured
from .comm.channel import Channel
from .comm.groups import GroupReference, group_of
from .comm.local import SINGLE_PROCESS
from .comm.transport import channel_of, source_group
from .comm.wire import FORWARD, Roster, SyncPoint, SyncTag, sync_point
from .compat import is_tracing, uncompiled, without_modes
from .ops.deferred import OverlapCandidates
from .ops.functional import Member, sync_batch_norm
from .ops.moments import GlobalMoments, LocalMoments, has_fused_kernels, statistics_dtype
from .ops.recompute import RecomputeCache, inside_backward
from .ops.running_stats import RunningPool, Slot, fusible_buffers, move_running_statistics, record_moments

__all__ = ["PROCESS_LOCAL", "SyncBatchNorm", "SyncTag", "batch_norm_coalesced"]

_M = TypeVar("_M", bound=nn.Module)

# The attributes of a binding, which copies do not get.
PROCESS_LOCAL = ("_channel", "_channel_source", "_point", "_recompute_cache", "_running", "_empty_shards", "_sites")

_NO_ROSTER = Roster()  # for untagged layers, for which the ranks agree only on the length of messages


class SyncBatchNorm(_BatchNorm):
    r"""Applies Batch Normalization over the mini-batches of all ranks of a process group.

    .. math::

        y = \frac{x - \mathrm{E}[x]}{\sqrt{\mathrm{Var}[x] + \epsilon}} * \gamma + \beta

    In training, the mean and the biased variance are computed per channel over the concatenated mini-batches of all
    ranks. They are exact, not averages of per-rank statistics. Ranks may have different numbers of samples, and some
    ranks may have none. In evaluation, the layer equals ``torch.nn.BatchNorm*d`` and does not communicate. With one
    rank, or without an initialized process group, it also equals ``torch.nn.BatchNorm*d`` in training.

    The layer runs on CPU and CUDA, and with any form of data parallelism, including ``DistributedDataParallel``. With
    :class:`~bagua_syncbn_algo.SyncBatchNormAlgorithm`, it exchanges its statistics over Bagua. Second derivatives are
    exact over the ranks. They need a forward whose rounds do not overlap, see
    :func:`~bagua_syncbn_algo.convert_sync_batchnorm`.

    Args:
        num_features: the number of channels :math:`C` of the input.
        eps: a value added to the variance for numerical stability. Default: ``1e-5``
        momentum: the weight of the new value in the running statistics; ``None`` for the cumulative average.
            Default: ``0.1``
        affine: whether the layer has the learnable parameters ``weight`` (:math:`\gamma`, initially 1) and ``bias``
            (:math:`\beta`, initially 0). Default: ``True``
        track_running_stats: whether the layer has running statistics. Without them, evaluation normalizes with the
            statistics of this rank's batch. Default: ``True``
        process_group: the process group whose ranks normalize together, or a ``DeviceMesh`` of one dimension;
            ``None`` for all ranks. Default: ``None``
        device, dtype: the device and the dtype of the parameters and buffers.

    Shape:
        - Input: :math:`(N, C, *)`, where :math:`*` is any number of dimensions; of a floating point dtype
        - Output: :math:`(N, C, *)` (same shape, dtype and memory format as the input)

    Raises:
        TypeError: if ``process_group`` is no process group, such as a list of ranks.
        ValueError: if ``process_group`` is a ``DeviceMesh`` of several dimensions. In forward, if the input has fewer
            than 2 dimensions, a number of channels other than ``num_features``, or a dtype that is not floating point;
            or if there is at most one value per channel to normalize.
        RuntimeError: from ``torch.jit.script``; in a training forward over several ranks inside a transform of
            ``torch.func``; in a third derivative.
        SyncBatchNormError: if another rank failed, is at another layer, or did not arrive before the timeout.

    Collectives:
        Training forward: one all-gather of ``8 + 2C·itemsize`` payload bytes per rank; none in a recomputation by
        activation checkpointing. Backward: one all-gather of ``(1 + 2C)·itemsize`` payload bytes, if the input requires
        a gradient. Second derivative: one all-gather of ``8 + 56C`` payload bytes. ``itemsize`` is 4, or 8 for float64
        inputs. The first training forward also creates the statistics group, unless an algorithm has bound the layer.
        Every rank of the process group must call.

    .. note::
        Ranks identify a layer by its tag, and an untagged layer by the order of its first use.
        :func:`~bagua_syncbn_algo.convert_sync_batchnorm`, :func:`~bagua_syncbn_algo.tag_sync_batchnorm` and
        :class:`~bagua_syncbn_algo.SyncBatchNormAlgorithm` tag all layers of a model.

    Example::

        layer = SyncBatchNorm(100)
        output = layer(torch.randn(20, 100, 35, 45))
    """

    process_group: Optional[Any]
    tag: Optional[SyncTag]
    # The class that this one synchronizes, and the numbers of dimensions that it accepts; None for 2 and more. The
    # converter sets `_dimensions` to None on a layer whose original class has a check of its own.
    _plain: Type[_BatchNorm] = _BatchNorm
    _dimensions: Optional[Tuple[int, ...]] = None
    _overlap: Optional[bool] = None  # whether compiled backward rounds overlap; None for BAGUA_SYNCBN_OVERLAP

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
        self._init_sync(process_group)

    def _init_sync(self, process_group: Optional[Any]) -> None:
        """Sets the attributes that BatchNorm does not have. The converter also calls this method."""
        self.process_group, self.tag = group_of(process_group), None
        self._unbind()

    def _unbind(self) -> None:
        """Removes the binding to a channel; the next training forward binds the layer again."""
        self._channel: Optional[Channel] = None
        self._channel_source: Optional[weakref.ref[Any]] = None
        self._point: SyncPoint = sync_point("")
        self._recompute_cache = RecomputeCache()
        self._running: Optional[RunningPool] = None
        self._empty_shards = False
        self._sites: Dict[Any, Any] = {}  # of the rounds that graphs of torch.compile refer to

    # -- binding --------------------------------------------------------------------------------------------------

    @property
    def sync_name(self) -> str:
        """The name of this layer in errors and tables; empty before an untagged layer is bound."""
        return self._point.name if self.tag is None else self.tag.name

    @property
    def _shown_name(self) -> str:
        """The name of this layer in errors, which also an untagged layer has."""
        return self.sync_name or type(self).__name__

    @property
    def observed_calls(self) -> int:
        """How often this layer took part in a round of the latest training step; 0 before the first step."""
        return 0 if self.tag is None else self.tag.roster.observer.calls_of(self.tag.name)

    @property
    def device(self) -> Optional[torch.device]:
        """The device of the parameters or buffers; ``None`` if the layer has neither."""
        tensor = next((t for t in (self.weight, self.running_mean) if t is not None), None)
        return None if tensor is None else tensor.device

    @property
    def itemsize(self) -> int:
        """The bytes per statistic for the current dtype of the parameters: 4, or 8 for float64."""
        doubles = any(t is not None and t.dtype == torch.float64 for t in (self.weight, self.running_mean))
        return 8 if doubles else 4

    def bind(
        self, channel: Channel, point: SyncPoint, running: Optional[RunningPool] = None, empty_shards: bool = False
    ) -> None:
        """Binds this layer to the channel on which it exchanges its statistics. The algorithm calls this method.

        Args:
            channel: the channel of the ranks to normalize over.
            point: the sync point of this layer.
            running: the pool of moments for the running statistics, if ``channel`` has fewer ranks than the world.
            empty_shards: whether a training input may be empty on a channel of one rank, as other ranks have samples.
        """
        self._channel, self._point, self._running, self._empty_shards = channel, point, running, empty_shards
        source = source_group(self.process_group)
        self._channel_source = None if source is None else weakref.ref(source)
        channel.register(point)

    def _bound_channel(self, device: Optional[torch.device] = None) -> Channel:
        """Returns the channel of the ranks to normalize over. The first call binds the layer.

        Args:
            device: the device of the statistics; ``None`` for the device of the parameters.

        Collectives:
            The first call: those of :func:`channel_of` and :meth:`Channel.join`.
        """
        source = source_group(self.process_group)
        if source is None or getattr(device or self.device, "type", "") == "meta":  # without values: nothing to send
            return SINGLE_PROCESS
        if self._channel is None or self._channel_source is None or self._channel_source() is not source:
            with without_modes():
                self._bind_to_group(device or self.device)
        assert self._channel is not None
        return self._channel

    def _bind_to_group(self, device: Optional[torch.device]) -> None:
        channel = channel_of(self.process_group, device)
        if device is not None:
            channel.use_device(device)
        if self.tag is None:
            channel.join(_NO_ROSTER)
            point = sync_point(channel.anonymous_name(self.num_features))
        else:
            roster, state = self.tag.roster, partial(self.tag.roster.state, self.process_group)
            point = sync_point(self.tag.name, channel.join(roster, self.itemsize, state))
        self.bind(channel, point)

    # -- forward --------------------------------------------------------------------------------------------------

    def _check_input_dim(self, input: Tensor) -> None:
        checks.check_dimensions(self._shown_name, input, self._dimensions)

    def _check_input(self, input: Tensor) -> None:
        self._check_input_dim(input)
        checks.check_channels(self._shown_name, input, self.num_features)

    def forward(self, input: Tensor) -> Tensor:
        if issubclass(type(input), fx.Proxy):
            return fx_node(self, input, SyncBatchNorm.forward)  # type: ignore[no-any-return]
        if not self.training:
            self._check_input(input)
            return self._local_batch_norm(input, self.running_mean is None and self.running_var is None)
        return batch_norm_coalesced([self], [input])[0]

    def _normalize_single_rank(self, input: Tensor) -> Tensor:
        """Runs a training forward with the statistics of this rank only."""
        # A forward inside backward is a recomputation: the first forward has updated the running statistics.
        if self._running is not None and self.track_running_stats:
            return self._pooled_batch_norm(input, self._running, update=not inside_backward())
        if self._empty_shards and input.numel() == 0:
            return input.clone()
        return self._local_batch_norm(input, True, update=not inside_backward())

    def _local_batch_norm(self, input: Tensor, batch_statistics: bool, update: bool = False) -> Tensor:
        """Normalizes with PyTorch's kernels, by the statistics of this rank's batch or the running statistics."""
        is_empty = not self.training and input.numel() == 0  # which nn.BatchNorm accepts, too
        if batch_statistics and input.numel() <= input.shape[1] and not is_empty:
            raise ValueError(
                f"expected more than 1 value per channel at {self._shown_name} (got input of shape "
                f"{tuple(input.shape)} on one rank); use a larger batch or call eval()"
            )
        momentum = 0.0
        uses_buffers = self.track_running_stats or not self.training
        running_mean, running_var = (self.running_mean, self.running_var) if uses_buffers else (None, None)
        if self.training and running_mean is not None and running_var is not None:
            assert self.num_batches_tracked is not None
            with without_modes():
                if update:
                    self.num_batches_tracked.add_(1)
                    momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                else:
                    # Copies, not None: activation checkpointing compares the number of saved tensors.
                    running_mean, running_var = running_mean.clone(), running_var.clone()
        return F.batch_norm(
            input, running_mean, running_var, self.weight, self.bias, batch_statistics, momentum, self.eps
        )

    def _pooled_batch_norm(self, input: Tensor, running: RunningPool, update: bool) -> Tensor:
        """Normalizes over this rank with PyTorch's kernels. ``running`` receives the moments if ``update`` is set."""
        count = input.numel() // input.shape[1]
        if count == 1:
            return self._local_batch_norm(input, True)  # raises ValueError
        dtype = statistics_dtype(input.dtype)
        pooled = update and running.collects
        with without_modes():  # a recomputation runs other operators
            slot = running.slot(self, dtype) if pooled else Slot.of(self, dtype, input.device)
        if count == 0:  # native kernels must not be called on an empty shard
            output = input.clone()
        else:
            # With momentum 1, the kernel writes the statistics of the batch to the given buffers.
            weight, bias = (None if p is None else p.to(dtype) for p in (self.weight, self.bias))
            output = F.batch_norm(input, slot.mean, slot.variance, weight, bias, True, 1.0, self.eps)
        with without_modes():
            if pooled:
                running.add(slot, count)
            elif update:  # the slot of an empty shard contains zeros
                local = LocalMoments(count, slot.mean, slot.variance * ((count - 1) / max(count, 1)))
                running.merge(self, self._point, local)
        return output

    @torch.no_grad()
    def update_running_statistics(self, merged: GlobalMoments) -> None:
        """Updates the running statistics with ``merged``, the moments of all ranks, and counts one batch."""
        move_running_statistics([self], merged.mean, merged.unbiased_variance())

    def extra_repr(self) -> str:
        group = "" if self.process_group is None else f", process_group={self.process_group}"
        return f"{super().extra_repr()}{group}"  # type: ignore[no-untyped-call]

    # -- copies ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> Dict[str, Any]:
        state = self.__dict__.copy()
        for attribute in PROCESS_LOCAL:
            state.pop(attribute, None)
        if self.process_group is not None:
            state["process_group"] = GroupReference(self.process_group, self.sync_name)
        return state

    def __setstate__(self, state: Dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if isinstance(self.process_group, GroupReference):
            self.process_group = self.process_group.group
        self._unbind()

    def __prepare_scriptable__(self) -> SyncBatchNorm:
        raise checks.scripting_error(self._shown_name)  # torch.jit.script calls this method of every submodule first

    @classmethod
    def convert_sync_batchnorm(cls, module: _M, process_group: Optional[Any] = None) -> _M:
        """Converts the BatchNorm layers of ``module``; see :func:`bagua_syncbn_algo.convert_sync_batchnorm`."""
        from .convert import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)


def batch_norm_coalesced(
    layers: Sequence[SyncBatchNorm],
    inputs: Sequence[Tensor],
    name: Optional[str] = None,
    cache: Optional[RecomputeCache] = None,
    overlap_with: Optional[OverlapCandidates] = None,
) -> Tuple[Tensor, ...]:
    """Runs the training forwards of independent layers in one round of statistics.

    Args:
        layers: the layers, in program order. A layer may occur several times.
        inputs: the input of each layer.
        name: the name of the round; ``None`` for a single layer.
        cache: the statistics of this round's forwards, for recomputations; ``None`` for the cache of the layer.
        overlap_with: the gradients that backward can compute while the all-gather is in flight.

    Returns:
        The outputs. Layers that cannot share a message, such as layers on different devices, run one after the other.

    Raises:
        ValueError: if an input is invalid for its layer; see :class:`SyncBatchNorm`.
        SyncBatchNormError: if another rank failed, is at another layer, or did not arrive before the timeout.

    Collectives:
        Forward: one all-gather; none in a recomputation. Backward: one all-gather, if an input requires a gradient.
        Every rank must call.
    """
    if is_tracing():
        eager = partial(_batch_norm_eager, layers, inputs, name, None, None)
        return normalize_captured(layers, inputs, name, eager)  # type: ignore[no-any-return]
    return _batch_norm_eager(layers, inputs, name, cache, overlap_with)


@uncompiled
def _batch_norm_eager(
    layers: Sequence[SyncBatchNorm],
    inputs: Sequence[Tensor],
    name: Optional[str],
    cache: Optional[RecomputeCache],
    overlap_with: Optional[OverlapCandidates],
) -> Tuple[Tensor, ...]:
    first = layers[0]
    checks.refuse_transform(first._shown_name, first.process_group, first._channel)
    checks.check_join(first._shown_name)
    channel = first._bound_channel(inputs[0].device)
    checks.check_begun(first, channel)
    if len(layers) > 1 and not checks.can_share(layers, inputs, channel):
        # Not `layer(input)`: the caller runs the hooks, and the operations that a subclass adds to the normalization.
        return tuple(SyncBatchNorm.forward(layer, input) for layer, input in zip(layers, inputs))
    point = first._point
    if name is not None:
        point = sync_point(name, point.ordinal, tuple(layer.sync_name for layer in layers))
    try:
        checks.check_joined(first, channel)
        for layer, input in zip(layers, inputs):
            layer._check_input(input)
    except ValueError as error:
        channel.fail(point, FORWARD, error)
        raise
    if channel.local:
        return tuple(layer._normalize_single_rank(input) for layer, input in zip(layers, inputs))
    if name is not None:
        channel.register(point)
    members = [Member(x, layer.weight, layer.bias, layer.eps, layer.sync_name) for layer, x in zip(layers, inputs)]
    cache = None if channel.trial else (first._recompute_cache if cache is None else cache)
    buffers = fusible_buffers(layers) if has_fused_kernels(inputs[0]) else None
    update = partial(record_moments, layers)
    before = channel.rounds
    outputs = sync_batch_norm(members, channel, point, cache, overlap_with, update, buffers)
    if first.tag is not None and channel.rounds > before:  # not a recomputation
        checks.observe(first.tag.roster, point, before, channel.rounds)
    return outputs
