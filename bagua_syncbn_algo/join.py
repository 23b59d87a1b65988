"""Uneven data: a ``Joinable`` for PyTorch's context manager ``Join``."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join, Joinable, JoinHook
from torch.nn.parallel import DistributedDataParallel

from .comm.channel import Channel
from .comm.finished import END, STEP, FinishedRank, JoinedLayers, announce
from .comm.transport import source_group
from .comm.wire import sync_point
from .compat import hand_over_divisor, inside_compiled, uncompiled
from .convert import sync_batchnorm_layers
from .graph.module_state import FORWARD
from .layer import SyncBatchNorm
from .ops.exact import require_two_values
from .ops.moments import merge_moments
from .ops.running_stats import move_running_statistics

__all__ = ["sync_batch_norm_joinable"]

_ARRANGEMENT = "use Join([sync_batch_norm_joinable(model), ddp]), on every rank"


def sync_batch_norm_joinable(model: nn.Module) -> Joinable:
    """Returns the ``Joinable`` of a converted model, for ranks with different numbers of batches.

    Inside of ``torch.distributed.algorithms.join.Join``, a rank whose data have ended takes part in the remaining
    rounds of the other ranks with empty shards. The statistics are those of the ranks that still have data. The running
    statistics are updated on all ranks. A rank may have no batch at all.

    The joinable must be the first one, and the ``DistributedDataParallel`` of the model must be in the same list. The
    other ranks call each forward through it. Each forward has one more message, which announces it. On CUDA,
    statistics are merged without the fused kernels inside of the context.

    Args:
        model: a model of :func:`convert_sync_batchnorm`, or the ``DistributedDataParallel`` that contains it.

    Raises:
        ValueError: if ``model`` has no tagged layers. The constructor of ``Join`` raises it if the joinable is not the
            first one, if there is another one of this kind, if the model's ``DistributedDataParallel`` is not in the
            list, or after ``with_bagua``, whose gradients are not part of ``Join``. In training, the layers of another
            model in the list raise it.

    Collectives:
        None. The constructor of ``Join`` has those of the first training forward, which bind the layers. Inside of the
        context, each forward has one all-gather for each channel, and the end has one.

    Example::

        ddp = DistributedDataParallel(convert_sync_batchnorm(model), broadcast_buffers=False)
        with Join([sync_batch_norm_joinable(model), ddp]):
            for input, target in loader:
                optimizer.zero_grad()
                loss(ddp(input), target).backward()
                optimizer.step()
    """
    layers = sync_batchnorm_layers(model)
    if not layers:
        raise ValueError(
            f"expected a model with SyncBatchNorm layers (got {type(model).__name__} without any); convert it with "
            "convert_sync_batchnorm first, or use Join([ddp])"
        )
    untagged = [name for name, part in model.named_modules() if isinstance(part, SyncBatchNorm) and part.tag is None]
    if untagged:
        raise ValueError(
            f"expected tagged layers (got {len(untagged)} without a tag, the first is {untagged[0]!r}); call "
            "tag_sync_batchnorm(model) before the first forward"
        )
    joinable = _joinables.get(model)
    if joinable is None:
        joinable = _joinables[model] = _SyncBatchNormJoinable(model)
    return joinable


class _SyncBatchNormJoinable(Joinable):
    """See :func:`sync_batch_norm_joinable`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self._entering = False
        self._ddp: Optional[weakref.ref[Any]] = None
        self._wrappers: List[weakref.ref[Any]] = []
        self._hook: Any = None
        self._channels: List[Channel] = []

    # -- Joinable -------------------------------------------------------------------------------------------------

    def join_hook(self, **kwargs: Any) -> JoinHook:
        self.close()  # after an exception, which ends a context without the hooks
        model = self._model()
        assert model is not None
        if "bagua_ddp" in model.__dict__:
            raise ValueError(
                f"expected a model inside of DistributedDataParallel (got {type(model).__name__} after with_bagua, "
                "whose gradients are not part of Join); give all ranks the same number of batches"
            )
        self._wrappers = [weakref.ref(wrapper) for wrapper in _wrappers_of(model)]
        self._ddp = self._wrappers[-1] if self._wrappers else None
        for wrapper in self._wrappers:
            _disable(wrapper())  # the configuration of an earlier context
        self._entering = True
        return _Hook(self)

    @property
    def join_device(self) -> torch.device:
        ddp = None if self._ddp is None else self._ddp()
        if ddp is not None:
            return torch.device(ddp.join_device)
        return self._layers[0].device or torch.device("cpu")

    @property
    def join_process_group(self) -> Any:
        if self._entering:  # the constructor of Join reads the groups after it has configured all joinables
            self._entering = False
            if self._join_config.enable:
                self._enter()
        ddp = None if self._ddp is None else self._ddp()
        return source_group(self._layers[0].process_group) if ddp is None else ddp.join_process_group

    # -- the context ----------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> List[SyncBatchNorm]:
        model = self._model()
        assert model is not None
        return sync_batchnorm_layers(model)

    def _enter(self) -> None:
        for reference in self._wrappers:  # one of them; the others are former ones that have not been freed
            wrapper = reference()
            if wrapper is not None and wrapper._join_config.enable:
                self._ddp = reference
        ddp = None if self._ddp is None else self._ddp()
        # The configurations of all joinables are set before the first process group is read.
        others = [each for each in _joinables.values() if each._entering and each._join_config.enable]
        error = None
        if others:
            # PyTorch's Join has one order of collectives in an iteration: all of one model, then all of the next one.
            names = ", ".join(type(each._model()).__name__ for each in (self, *others))
            error = (
                f"expected one sync_batch_norm_joinable in Join (got those of {names}); put the models in one module, "
                "wrap it in one DistributedDataParallel, call it for every forward, and use its joinable"
            )
        elif not self._join_config.is_first_joinable:
            error = "another joinable before it"
        elif ddp is not None and not ddp._join_config.enable:
            error = "a list without the model's DistributedDataParallel"
        if error is not None:
            for each in (self, *others):
                each._leave()
            if not others:
                error = f"expected sync_batch_norm_joinable(model) as the first joinable (got {error}); {_ARRANGEMENT}"
            raise ValueError(error)
        # Now, not in the first forward, which a rank without data does not run.
        channels = {id(channel): channel for channel in (layer._bound_channel() for layer in self._layers)}
        self._channels = [channel for channel in channels.values() if not channel.local]
        for channel in self._channels:
            channel.joining = JoinedLayers(self._layers)
        called: Any = self._model() if ddp is None else ddp
        self._hook = called.register_forward_pre_hook(self._before_forward)

    def _leave(self) -> None:
        """Disables a context whose constructor raises an error."""
        self._entering = False
        for joinable in (self, None if self._ddp is None else self._ddp()):
            if joinable is not None:
                _disable(joinable)

    @uncompiled
    def _before_forward(self, module: nn.Module, arguments: Any) -> None:
        """Tells ranks whose data have ended that a forward begins, before any of its collectives."""
        work = Join.notify_join_context(self)
        ddp = None if self._ddp is None else self._ddp()
        if work is not None and ddp is not None:
            hand_over_divisor(ddp, work)
        elif work is not None:
            work.wait()
        for channel in self._channels:
            channel.joining.begun = True  # type: ignore[attr-defined]
            announce(channel, STEP)

    def close(self) -> None:
        """Ends the context on this rank."""
        _disable(self)
        if self._hook is not None:
            self._hook.remove()
        self._hook = None
        for channel in self._channels:
            channel.joining = ()
        self._channels = []

    def finished_rank(self, channel: Channel) -> FinishedRank:
        """Starts to answer the rounds of the other ranks."""
        table: Dict[int, List[SyncBatchNorm]] = {}

        def find(key: int) -> Callable[[Tensor], None]:
            if key not in table:
                table.update(self._rounds())
            if key not in table:
                raise RuntimeError(
                    f"expected a round of layers that this rank knows (got {channel._names.get(key, key)}, from graphs "
                    "for other shapes or arguments than those of this rank); run a batch of each kind on every rank, "
                    "or convert the model with coalesce=False"
                )
            return partial(_update, table[key])

        return FinishedRank(channel, {layer.tag.roster for layer in self._layers if layer.tag is not None}, find)

    def _rounds(self) -> Dict[int, List[SyncBatchNorm]]:
        """Returns the layers of each round of the model, by the key of its sync point."""
        model = self._model()
        assert model is not None
        found = {layer._point.key: [layer] for layer in self._layers}
        for part in model.modules():
            forward = part.__dict__.get(FORWARD)
            for planned, layers in () if forward is None else forward.rounds:
                found[sync_point(planned.name, layers[0]._point.ordinal).key] = layers
        return found


class _Hook(JoinHook):
    """Answers the rounds of the other ranks; see :mod:`.comm.finished` for the reasons of its thread."""

    def __init__(self, joinable: _SyncBatchNormJoinable) -> None:
        self._joinable = joinable
        self._finished: List[FinishedRank] = []

    def main_hook(self) -> None:
        if not self._finished:
            self._finished = [self._joinable.finished_rank(channel) for channel in self._joinable._channels]
        for each in self._finished:
            each.advance()

    def post_hook(self, is_last_joiner: bool) -> None:
        for each in self._finished:
            each.advance()
        if not self._finished:
            for channel in self._joinable._channels:
                announce(channel, END)
        self._joinable.close()


_joinables: weakref.WeakKeyDictionary[nn.Module, _SyncBatchNormJoinable] = weakref.WeakKeyDictionary()


def _wrappers_of(model: nn.Module) -> List[DistributedDataParallel]:
    """Returns the ``DistributedDataParallel`` objects of a model, compiled or not."""
    model = inside_compiled(model)
    if isinstance(model, DistributedDataParallel):
        return [model]
    # The model has no reference to them.
    wrappers = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    return [each for each in wrappers if inside_compiled(each._modules.get("module")) is model]


def _disable(joinable: Any) -> None:
    joinable._join_config = type(joinable._join_config).construct_disabled_join_config()


def _update(layers: Sequence[SyncBatchNorm], body: Tensor) -> None:
    """Updates the running statistics with a forward round of the other ranks.

    Args:
        layers: the layers of the round.
        body: the payloads of all ranks, shape ``(W, length)``, as :func:`launch_moments` sends them.
    """
    features, size = tuple(layer.num_features for layer in layers), 8 * len(layers)
    counts = body[:, :size].contiguous().view(torch.int64)
    dtype = torch.float64 if body.shape[1] - size == 16 * sum(features) else torch.float32
    require_two_values([0] * len(layers), counts, [layer.sync_name for layer in layers])
    merged = merge_moments(counts, body[:, size:].contiguous().view(dtype), features)
    mean, variance = merged.mean, merged.unbiased_variance()
    if len(set(map(id, layers))) == len(layers):
        move_running_statistics(layers, mean, variance)
        return
    for layer, own_mean, own_variance in zip(layers, mean.split(features), variance.split(features)):
        move_running_statistics([layer], own_mean, own_variance)
