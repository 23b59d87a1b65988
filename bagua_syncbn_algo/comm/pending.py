"""The all-gather of one message, from its start to the checked result."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Optional, Set

import torch
from torch import Tensor

from .errors import describe_failure
from .recorder import RoundRecord
from .ring import event_on
from .wire import FAULT, HEADER_BYTES, PHASES, Header, SyncBatchNormError, SyncPoint, is_capturing

__all__ = ["OnStream", "PendingGather"]


class OnStream:
    """The ``Work`` of a collective that runs on the current CUDA stream, as a kernel does.

    It is cheaper than a collective on the communicator's own stream, which takes an event and a wait in each direction.

    Args:
        device: the device of the stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._event = device, event_on(device)

    def wait(self) -> None:
        """Makes the current stream wait for the collective."""
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def is_completed(self) -> bool:
        """Returns whether the collective has ended."""
        return bool(self._event.query())


class PendingGather:
    """The all-gather of one frame, from its start to the checked result."""

    def __init__(
        self,
        channel: Any,
        header: Header,
        point: SyncPoint,
        phase: int,
        entry: Optional[RoundRecord],
        checked_later: bool,
    ) -> None:
        self._channel: Any = channel
        self._header, self._point, self._phase, self._entry = header, point, phase, entry
        self._checked_later = checked_later
        self._sequence = channel.frames  # the number of this message in the channel
        self._streams: Set[int] = set()  # the CUDA streams that wait for the all-gather
        self._gathered: Optional[Tensor] = None
        self._work: Any = None
        self._finish_time: Optional[float] = None
        self._done = False
        self._error: Optional[BaseException] = None

    def start(self, message: Tensor) -> None:
        """Starts the all-gather; :meth:`wait` raises its errors."""
        try:
            self._gathered, self._work = self._channel._all_gather(message)
        except RuntimeError as error:
            self._error = error
        if self._channel._monitor is not None and self._work is not None:
            # No other thread may query an event while a graph is captured.
            work = None if is_capturing(message) else self._work
            self._channel._monitor.watch(f"{self._point.name} ({PHASES[self._phase]})", work)
        if self._entry is not None and self._gathered is not None and not self._gathered.is_cuda:
            with contextlib.suppress(AttributeError, RuntimeError):  # some backends have no futures
                self._work.get_future().add_done_callback(self._note_finish)

    def _note_finish(self, _: Any) -> None:
        self._finish_time = time.perf_counter()

    def wait(self, keep: bool = False) -> Tensor:
        """Waits for the all-gather, checks the headers and returns the payloads ``(W, capacity − 32)``.

        Args:
            keep: whether to copy the result, because the next all-gather may overwrite it.

        Raises:
            SyncBatchNormError: if the all-gather or the check failed. Every call raises the same error.
        """
        channel = self._channel
        if channel is not None:
            with channel._turns:
                self._end(channel)
        if self._error is not None:
            raise self._error
        assert self._gathered is not None
        if self._gathered.is_cuda:
            self.order_current_stream(self._gathered.device)
        if keep:
            self._gathered = self._gathered.clone()
        return self._gathered[:, HEADER_BYTES:]

    def has_failed(self) -> bool:
        """Waits for the all-gather, keeps its result, and returns whether :meth:`wait` raises an error."""
        with contextlib.suppress(SyncBatchNormError):
            self.wait(keep=True)
        return self._error is not None

    def _end(self, channel: Any) -> None:
        """Waits for the all-gather and checks the headers, once."""
        if self._done:
            return
        self._done = True
        if channel._in_flight is self:
            channel._in_flight = None
        try:
            self._wait_for_work()
            assert self._gathered is not None
            if not self._header.words[2] & FAULT:  # a failing rank raises its own error
                if not self._checked_later and not is_capturing(self._gathered):
                    channel._check(self._gathered, self._header, self._point, self._phase)
                channel.failed = False
        except SyncBatchNormError as error:
            self._error, channel.failed = error, True
        self._channel = None  # the channel keeps its latest round: a reference cycle

    def order_current_stream(self, device: torch.device) -> None:
        """Makes the current stream wait for the all-gather, if only other streams have done so."""
        stream = torch.cuda.current_stream(device).cuda_stream
        if self._streams and stream not in self._streams and self._work is not None:
            self._work.wait()
        self._streams.add(stream)

    def wait_until_completed(self, seconds: float) -> None:
        """Waits up to ``seconds`` until the all-gather has completed. Raises nothing."""
        is_completed = getattr(self._work, "is_completed", None)
        deadline = time.monotonic() + seconds
        while is_completed is not None and not is_completed() and time.monotonic() < deadline:
            time.sleep(0.001)

    def _wait_for_work(self) -> None:
        start = time.perf_counter()
        try:
            if self._error is not None:
                raise self._error
            self._work.wait()
        except RuntimeError as error:
            where, channel = f"{self._point.name} ({PHASES[self._phase]})", self._channel
            members = channel.ranks[channel.rank], channel.ranks
            message = describe_failure(where, error, *members, channel.label, self._sequence, channel._store())
            raise SyncBatchNormError(message) from error
        if self._entry is not None:
            finish = time.perf_counter() if self._finish_time is None else self._finish_time
            # A benchmark's Work that models a network records the arrival of the messages.
            self._entry.wait, self._entry.finish = start, getattr(self._work, "arrival", finish)
