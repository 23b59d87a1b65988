"""A network for benchmarks on one machine: rounds that take longer than the messages between local processes."""

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

_PROBE, _PROBES = sync_point("a round that measures the latency"), 51
_STAMP_BYTES = 8  # when a rank has sent its message, in nanoseconds

AllGather = Callable[[Tensor], Tuple[Tensor, Any]]


def add_latency(channel: Channel, seconds: float) -> None:
    """Makes every round of ``channel`` take its duration between idle ranks, and ``seconds`` more.

    As on a wire, the duration counts from when the last rank has sent, whether or not a core is free meanwhile.

    Args:
        channel: whose rounds take longer; its ranks must be idle.
        seconds: 0 to take the latency away.

    Collectives:
        Some rounds. Every rank must call.
    """
    # The algorithm creates the channel, so a subclass is no choice: its all-gather is replaced.
    channel.__dict__.pop("_all_gather", None)
    if isinstance(channel, BareScheme):
        channel.latency = 0.0
    if not seconds or type(channel) is Channel:  # the channel of a model without rounds
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
    """An all-gather whose messages arrive ``latency`` seconds after the last rank has sent its own, or later."""

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
    """The ``Work`` of a delayed all-gather."""

    def __init__(self, work: Any, stamps: Tensor, latency: float) -> None:
        self._work, self._stamps, self._latency = work, stamps, latency
        #: When all messages had arrived, in seconds of ``time.perf_counter``; infinite before :meth:`wait`.
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
