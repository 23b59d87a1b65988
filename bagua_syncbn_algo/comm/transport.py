"""Channels over ``torch.distributed`` groups and Bagua communicators, and the table with one channel for each group."""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..compat import ALLGATHER_ON_CURRENT_STREAM, inside_fake_mode
from ..config import SyncBatchNormConfig
from .channel import Channel
from .groups import (
    default_group,
    default_store,
    is_destroyed,
    is_nccl,
    label_of,
    member_group,
    release_group,
    timeout_of,
)
from .local import SINGLE_PROCESS
from .pending import OnStream
from .wire import SyncPoint

__all__ = ["BaguaChannel", "TorchChannel", "bagua_channel", "channel_of", "state_of_channels", "source_group"]


_VERSION_SECONDS = 60.0  # how long a rank waits for the others' message versions, after they have created the group


class TorchChannel(Channel):
    """A channel over a ``torch.distributed`` process group.

    Args:
        group: the communicator: a group from ``torch.distributed.new_group`` or a bare backend such as
            ``ProcessGroupGloo``. Only this channel may use it.
        store: the key-value store in which a failing rank publishes its position; ``None`` without one.
        ranks: the global ranks of the group, for errors; ``None`` if they are those of the world.
    """

    def __init__(self, group: Any, store: Optional[Any] = None, ranks: Optional[Sequence[int]] = None) -> None:
        super().__init__()
        self.rank, self.world_size = group.rank(), group.size()
        self.ranks = range(self.world_size) if ranks is None else list(ranks)
        # Weak references: a group that outlives destroy_process_group aborts the process at exit. A store that outlives
        # it keeps its server, and the next world on the same port would find the keys of this one.
        self._group, self._key_value_store = weakref.ref(group), _weak(store)
        self._messages: Dict[torch.device, Tensor] = {}
        self._all_messages: List[Tensor] = []  # also shorter ones: a captured graph may use their memory
        self._is_nccl = is_nccl(group)
        self._device: Optional[torch.device] = None

    @property
    def device(self) -> torch.device:
        if not self._is_nccl:
            return torch.device("cpu")
        # NCCL binds a communicator to the device of its first message. Another device is a "duplicate GPU" error.
        return torch.device("cuda", torch.cuda.current_device()) if self._device is None else self._device

    def use_device(self, device: torch.device) -> None:
        if self._device is None and device.type == "cuda":
            self._device = device

    def _message(self, point: SyncPoint, device: torch.device) -> Tensor:
        message = self._messages.get(device)
        if message is None or message.numel() < self.capacity:
            with torch.inference_mode(False):
                message = self._messages[device] = torch.zeros(self.capacity, dtype=torch.uint8, device=device)
            if message.is_cuda:
                self._all_messages.append(message)
        return message

    def _all_gather(self, message: Tensor) -> Tuple[Tensor, Any]:
        with torch.inference_mode(False):  # gloo writes to it from a thread outside of inference_mode
            gathered = self._receive_buffer(message)
        # Methods of the group: the functional API rejects bare backends and costs 40 µs more per call. gloo has no
        # flat all-gather before torch 2.4. On NCCL, an all-gather into a list adds a copy for each rank.
        group: Any = self._group()
        if is_destroyed(group):
            raise RuntimeError(
                "expected the process group of the layers to exist (got a destroyed one); set process_group of each of "
                "sync_batchnorm_layers(model) to a group of the current world, and call tag_sync_batchnorm(model)"
            )
        if self._is_nccl:
            on_current_stream = ALLGATHER_ON_CURRENT_STREAM if self._waits_at_once else None
            options = [] if on_current_stream is None else [on_current_stream]
            work = group._allgather_base(gathered.view(-1), message.view(-1), *options)
            return gathered, OnStream(message.device) if work is None else work
        return gathered, group.allgather([list(gathered.unbind(0))], [message])

    def _store(self) -> Optional[Any]:
        return self._key_value_store()


class BaguaChannel(Channel):
    """A channel over a Bagua communicator. The message of a sync point is the registered tensor of a Bagua bucket.

    Args:
        communicator: ``group.get_global_communicator()`` of a Bagua process group that is only for statistics.
        streams: the stream operations of the host (see ``host.streams``).
        device: the device of the messages.
        store: the key-value store in which a failing rank publishes its position; ``None`` without one.
        ranks: the global ranks of the group, for errors; ``None`` if they are those of the world.
    """

    def __init__(
        self,
        communicator: Any,
        streams: Any,
        device: torch.device,
        store: Optional[Any] = None,
        ranks: Optional[Sequence[int]] = None,
    ) -> None:
        super().__init__()
        self.rank, self.world_size = communicator.rank(), communicator.nranks()
        self.ranks = range(self.world_size) if ranks is None else list(ranks)
        self.communicator, self._streams, self._device = communicator, streams, device
        self._key_value_store = _weak(store)
        # Weak: the channel is that of all models. The algorithm of a model holds the buckets.
        self._buckets: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._unregistered: Optional[Tensor] = None  # for sync points without a bucket, as in `RunningPool.merge`
        self._receive: Dict[Tuple[int, int], Any] = {}  # registered, by size, and by address in the ring
        # Upstream's allgather returns after it is enqueued. The embedded host's blocks, but has begin_allgather.
        self._start_allgather = getattr(communicator, "begin_allgather", communicator.allgather)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def buckets(self) -> List[Any]:
        """The Bagua buckets of the sync points."""
        return list(self._buckets.values())

    def add_bucket(self, point: SyncPoint, bucket: Any) -> Any:
        """Sets the message of ``point`` to the only tensor of ``bucket`` (uint8, ``capacity`` bytes).

        Returns:
            ``bucket``, to which the channel has a weak reference only.
        """
        self._buckets[point.key] = bucket
        return bucket

    def _message(self, point: SyncPoint, device: torch.device) -> Tensor:
        bucket = self._buckets.get(point.key)
        if bucket is not None:
            message: Tensor = bucket.tensors[0]
            if message.numel() == self.capacity:
                return message
        # Of rounds that were not planned, and of all rounds after the messages have grown.
        if self._unregistered is None or self._unregistered.numel() < self.capacity:
            with torch.inference_mode(False):
                message_: Any = torch.zeros(self.capacity, dtype=torch.uint8, device=device)
                self._unregistered = message_.to_bagua_tensor()  # once: upstream never frees such a tensor
        assert self._unregistered is not None
        return self._unregistered

    def _all_gather(self, message: Tensor) -> Tuple[Tensor, Any]:
        send: Any = message
        if not send.is_bagua_tensor():
            send = send.to_bagua_tensor()
        slot = self._slot
        key = (message.numel(), 0 if slot is None else slot.data_ptr())
        if key not in self._receive:
            self._forget_other_sizes(message.numel())
            with torch.inference_mode(False):
                buffer: Any = self._receive_buffer(message)
                self._receive[key] = buffer.to_bagua_tensor()
        self._slot = None
        receive = self._receive[key]
        stream = self.communicator.cuda_stream
        with self._streams.after(stream, [self._streams.record_event()]):
            work = self._start_allgather(send.bagua_backend_tensor(), receive.bagua_backend_tensor())
        return receive, _StreamWork(work, self._streams, self._streams.record_event_on(stream))

    def _forget_other_sizes(self, size: int) -> None:
        for key in [key for key in self._receive if key[0] != size]:
            del self._receive[key]

    def _store(self) -> Optional[Any]:
        return self._key_value_store()


_bagua_channels: weakref.WeakKeyDictionary[Any, Dict[torch.device, BaguaChannel]] = weakref.WeakKeyDictionary()


def _weak(store: Optional[Any]) -> Callable[[], Optional[Any]]:
    """Returns a weak reference to a store; a function that returns ``None`` without one."""
    return (lambda: None) if store is None else weakref.ref(store)


def bagua_channel(
    group: Any, streams: Any, device: torch.device, timeout: Optional[float] = None, check: str = "none"
) -> BaguaChannel:
    """Returns the channel over a Bagua process group that is only for statistics; the same one for all models.

    Args:
        group: the process group.
        streams: the stream operations of the host.
        device: the device of the messages. On CUDA, a monitor reports late rounds.
        timeout: the timeout of the group in seconds; ``None`` for that of the default group.
        check: ``"nonfinite"`` to refuse statistics that are not finite.
    """
    channels = _bagua_channels.setdefault(group, {})
    if device in channels:
        channels[device].checks_finite = check == "nonfinite"
        return channels[device]
    channel = BaguaChannel(group.get_global_communicator(), streams, device, default_store(), group.ranks)
    channels[device] = channel
    channel.checks_finite = check == "nonfinite"
    channel.label = label_of(getattr(channel.communicator, "torch_group", None), group.ranks, "channel")
    seconds = timeout_of(default_group()).total_seconds() if timeout is None else timeout
    if channel.world_size > 1:
        channel.check_versions(min(seconds, _VERSION_SECONDS))
    if device.type == "cuda":
        channel.watch(seconds)
    return channel


def state_of_channels(group: Any) -> Tuple[bool, int]:
    """Returns whether a channel over a Bagua process group has failed, and the number of its messages so far."""
    channels = _bagua_channels.get(group, {}).values()
    return any(channel.failed for channel in channels), sum(channel.frames for channel in channels)


class _StreamWork:
    """The ``Work`` of a collective on the communicator's stream; ``work`` is ``None`` if the host returns none."""

    def __init__(self, work: Any, streams: Any, event: Any) -> None:
        self._work, self._streams, self._event = work, streams, event

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._streams.wait(self._event)

    def is_completed(self) -> bool:
        return bool((self._event.query if self._work is None else self._work.is_completed)())

    def get_future(self) -> Any:
        return self._work.get_future()


# By the id of the group and whether the channel is on the host, for the lifetime of the group. All ranks create and
# find a channel in the same calls, independent of the models that a rank still references.
_channels: Dict[Tuple[int, bool], Tuple[weakref.ref[Any], Channel]] = {}


def source_group(process_group: Optional[Any]) -> Optional[Any]:
    """Returns ``process_group``, or the current group of the world for ``None``; ``None`` without a world.

    Inside of ``FakeTensorMode`` it is ``None``, too, unless PyTorch simulates the group. Tensors without values cannot
    be sent, and the other ranks need not run such a forward.
    """
    group = default_group() if process_group is None else process_group
    return None if group is not None and inside_fake_mode() and dist.get_backend(group) != "fake" else group


def channel_of(process_group: Optional[Any], device: Optional[torch.device] = None) -> Channel:
    """Returns the channel for statistics over the ranks of ``process_group``, created by the first call.

    Args:
        process_group: a ``torch.distributed`` group, a bare backend, or ``None`` for the world.
        device: the device of the layers; ``None`` for that of the group. Layers on the CPU get a gloo communicator,
            also if the group communicates by NCCL.

    Returns:
        The channel; :data:`SINGLE_PROCESS` for one rank or without an initialized group.

    Raises:
        ValueError: if this rank is not a member of the group.

    Collectives:
        The first call for a group creates a communicator over the same ranks. Its timeout is ``BAGUA_SYNCBN_TIMEOUT``,
        else that of ``process_group``. Every rank of ``process_group`` must call.
    """
    source = source_group(process_group)
    if source is None:
        return SINGLE_PROCESS
    if source is getattr(dist.GroupMember, "NON_GROUP_MEMBER", None) or not hasattr(source, "size"):
        raise ValueError(
            f"expected a process group that this rank belongs to (got {source!r}); "
            "pass the group of this rank, or None for all ranks"
        )
    if source.size() == 1:
        return SINGLE_PROCESS
    for key in [key for key, (held, _) in list(_channels.items()) if held() is None]:
        # Without the other ranks: a group is freed after destroy_process_group, and no layer can use it any more.
        _, channel = _channels.pop(key, (None, None))
        if isinstance(channel, TorchChannel):
            release_group(channel._group())
    on_host = device is not None and device.type != "cuda" and is_nccl(source)
    key = (id(source), on_host)
    if key not in _channels:
        _channels[key] = weakref.ref(source), _channel_over(source, on_host)
    return _channels[key][1]


def _channel_over(source: Any, on_host: bool) -> TorchChannel:
    """Returns a channel with a communicator of its own over the ranks of ``source``."""
    try:
        ranks = dist.get_process_group_ranks(source)
    except AttributeError:  # before torch 2.0
        ranks = list(dist.distributed_c10d._pg_group_ranks.get(source, {}))
    except (RuntimeError, ValueError, KeyError):
        ranks = []
    config = SyncBatchNormConfig.from_env()
    if not ranks:  # a bare backend without global ranks, which the user provides for statistics
        channel = TorchChannel(source)
        channel.checks_finite = config.check == "nonfinite"
        return channel
    seconds = config.timeout
    limit = timeout_of(source) if seconds is None else timedelta(seconds=seconds)
    group = member_group(ranks, limit, on_host)
    channel = TorchChannel(group, default_store(), sorted(ranks))
    channel.label, channel.checks_finite = label_of(group, ranks, "channel"), config.check == "nonfinite"
    # The constructor of a gloo group has waited for all ranks. That of an NCCL group has not: the first message does.
    seconds = limit.total_seconds()
    channel.check_versions(seconds if is_nccl(group) else min(seconds, _VERSION_SECONDS))
    if is_nccl(group):
        channel.watch(seconds)
    return channel
