"""Added latency for benchmarks on one machine: rounds that take longer than messages between local processes."""

from __future__ import annotations

import contextlib
import statistics
import time
from typing import Any, Callable, Dict, Tuple

import torch
from torch import Tensor

from ..comm.channel import Channel
from ..comm.wire import FORWARD, sync_point
from .schemes import BareScheme

__all__ = ["add_latency"]

_PROBE, _PROBES = sync_point("measurement of the latency"), 51
_STAMP_BYTES = 8  # an int64: the time at which a rank has sent its message, in nanoseconds

AllGather = Callable[[Tensor], Tuple[Tensor, Any]]


def add_latency(channel: Channel, seconds: float) -> None:
    """Makes every round of ``channel`` last its duration between idle ranks plus ``seconds``.

    As on a network, the time counts from the moment at which the last rank has sent, whether or not a core is free. For
    a :class:`~.schemes.BareScheme`, it counts from the moment at which this rank sends.

    Args:
        channel: the channel; its ranks must be idle.
        seconds: the added latency; 0 removes an earlier one.

    Collectives:
        51 rounds if ``seconds`` is not 0, to measure the duration. Every rank must call.
    """
    # Replaces the all-gather of the instance: a subclass is not possible, because the algorithm creates the channel.
    channel.__dict__.pop("_all_gather", None)
    if isinstance(channel, BareScheme):
        channel.latency = 0.0
    if not seconds or type(channel) is Channel:  # a model without rounds
        return
    durations = []
    for _ in range(_PROBES):
        start = time.perf_counter()
        if isinstance(channel, BareScheme):
            channel.gather(torch.zeros(8))
        else:
            channel.exchange(_PROBE, FORWARD, [torch.zeros(8)])
        durations.append(time.perf_counter() - start)
    latency = statistics.median(durations) + seconds
    if isinstance(channel, BareScheme):
        channel.latency = latency
    else:
        channel._all_gather = _DelayedAllGather(channel._all_gather, latency)  # type: ignore[method-assign]


class _DelayedAllGather:
    """An all-gather that completes ``latency`` seconds after the last rank has sent, or later.

    Args:
        all_gather: the method of the channel.
        latency: the least time from the last rank's message to completion, in seconds.
    """

    def __init__(self, all_gather: AllGather, latency: float) -> None:
        self._all_gather, self.latency = all_gather, latency
        self._stamped: Dict[int, Tensor] = {}

    def __call__(self, message: Tensor) -> Tuple[Tensor, Any]:
        length = message.numel()
        if length not in self._stamped:
            self._stamped[length] = message.new_empty(length + _STAMP_BYTES)
        stamped = self._stamped[length]
        stamped[:length] = message
        stamped[length:].view(torch.int64).fill_(time.perf_counter_ns())
        gathered, work = self._all_gather(stamped)
        return gathered[:, :length], _DelayedWork(work, gathered[:, length:], self.latency)


class _DelayedWork:
    """The ``Work`` of a delayed all-gather.

    Args:
        work: the ``Work`` of the all-gather itself.
        stamps: the times at which the ranks have sent, as bytes.
        latency: as in :class:`_DelayedAllGather`.

    Attributes:
        arrival: the time at which all messages have arrived, in seconds of ``time.perf_counter``; infinite before
            :meth:`wait`.
    """

    def __init__(self, work: Any, stamps: Tensor, latency: float) -> None:
        self._work, self._stamps, self._latency = work, stamps, latency
        self.arrival = self._received = float("inf")
        with contextlib.suppress(AttributeError, RuntimeError):  # some backends have no futures
            work.get_future().add_done_callback(self._note_received)

    def _note_received(self, _: Any) -> None:
        self._received = time.perf_counter()

    def wait(self) -> None:
        self._work.wait()
        received = min(self._received, time.perf_counter())
        self.arrival = max(received, self._stamps.view(torch.int64).max().item() / 1e9 + self._latency)
        time.sleep(max(0.0, self.arrival - time.perf_counter()))

    def is_completed(self) -> bool:
        return bool(self._work.is_completed())

    def get_future(self) -> Any:
        return self._work.get_future()
