"""The messages of a rank whose data have ended, while the other ranks still train.

All ranks must take part in every round of statistics. A rank without data does not know which round comes next. It
sends a message whose header has the flag ``JOINED`` and whose payload is zero: an empty shard of any round. The headers
of the other ranks then tell which round it was.

The messages are sent on a thread of their own. In one iteration, the other ranks run the rounds of forward and backward
between the collectives of ``DistributedDataParallel``: buffers are broadcast before the first round, gradients are
reduced during the rounds of backward. The hooks of ``Join`` run one after the other. Any order of a hook that answers
the rounds and the hook of ``DistributedDataParallel`` would be a deadlock.

The thread only receives. The main thread updates the running statistics when it knows that a forward has begun, from
the message ``STEP``: after the update of one iteration and before the broadcast of the next one.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import weakref
from typing import Any, Callable, ContextManager, Iterable, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from .channel import Channel
from .report import header_error
from .wire import (
    FAULT,
    FORWARD,
    FUSED,
    HEADER_BYTES,
    JOIN,
    JOINED,
    TRITON,
    Roster,
    SyncBatchNormError,
    SyncPoint,
    sync_point,
)

__all__ = ["END", "STEP", "FinishedRank", "JoinedLayers", "announce"]

STEP, END = sync_point("the start of a forward inside of Join"), sync_point("the end of Join")
_EMPTY = sync_point("no layer: its data have ended")
_SUMMARY_BYTES = 24  # of the payload of `Channel.agree`


def announce(channel: Channel, point: SyncPoint) -> None:
    """Tells ranks whose data have ended that a forward begins (``STEP``), or that all ranks have ended (``END``).

    Collectives:
        One all-gather. Every rank whose data have not ended must call.
    """
    channel.register(point)
    channel.exchange(point, JOIN, [torch.zeros(1, dtype=torch.int64, device=channel.device)])


class JoinedLayers(weakref.WeakSet):  # type: ignore[type-arg]
    """The layers of a model inside of ``Join``, and whether the other ranks know of a forward.

    A rank whose data have ended learns from the first forward that others still train, and then answers all rounds.
    """

    begun = False


class _Update(NamedTuple):
    """A forward round of the other ranks."""

    apply: Callable[[Tensor], None]
    body: Tensor  # the payloads of all ranks, (W, length)


class FinishedRank:
    """Answers the rounds of the other ranks with empty shards, from the constructor on until the end of ``Join``.

    Args:
        channel: the channel. No other thread may use it until the end.
        rosters: those of the model that the other ranks train. Their agreements are noted for them: a model of the same
            name, which this rank trains later, must not replay them.
        find: returns, for the key of a sync point, the function that updates the running statistics with the payloads
            of its forward round. It raises an error for an unknown key. It is called on the thread of the messages.

    Collectives:
        One all-gather for each message of the other ranks.
    """

    def __init__(
        self, channel: Channel, rosters: Iterable[Roster], find: Callable[[int], Callable[[Tensor], None]]
    ) -> None:
        channel.flush()
        channel.register(_EMPTY)
        self._channel, self._rosters, self._find = channel, list(rosters), find
        self._events: queue.SimpleQueue[Union[_Update, SyncPoint, BaseException]] = queue.SimpleQueue()
        self._ended = False
        self._zeros = torch.empty(0, device="cpu")
        self._differing: Optional[int] = None  # the agreement whose texts the other ranks exchange next
        self._has_lengths = False  # whether their lengths have arrived
        threading.Thread(target=self._run, name="bagua_syncbn finished rank", daemon=True).start()

    def advance(self) -> None:
        """Updates the running statistics with the rounds before the next forward of the other ranks, or before the end.

        Raises:
            SyncBatchNormError: if a rank failed, or the other ranks were at different layers.
        """
        while not self._ended:
            event = self._events.get()
            if isinstance(event, BaseException):
                self._ended = True
                raise event
            if isinstance(event, _Update):
                event.apply(event.body)
            else:
                self._ended = event is END
                return

    def _run(self) -> None:
        device = self._channel.device
        # The default stream would wait for the rounds of the other ranks, and with it the reduction of gradients.
        on_stream: ContextManager[Any] = contextlib.nullcontext()
        if device.type == "cuda":
            on_stream = torch.cuda.stream(torch.cuda.Stream(device))
        try:
            with torch.no_grad(), on_stream:
                event = None
                while event is not END:
                    event = self._answer()
                    if event is not None:
                        self._events.put(event)
        except Exception as error:
            if not isinstance(error, SyncBatchNormError):  # the other ranks do not know this error
                self._channel.fail(_EMPTY, FORWARD, error)
            self._events.put(error)

    def _answer(self) -> Union[_Update, SyncPoint, None]:
        """Takes part in one round of the other ranks; returns what the main thread has to know."""
        words, body = self._receive()
        if not words:
            return END  # the data of all ranks of the channel have ended
        key, phase, flags, length = words
        frames = [body]
        while sum(frame.shape[1] for frame in frames) < length:
            frames.append(self._receive()[1])
        for announcement in (STEP, END):
            if key == announcement.key:
                return announcement
        if phase == JOIN:
            self._note_agreement(key, body)
        if phase != FORWARD:
            return None
        if flags & (FUSED | TRITON):
            raise RuntimeError(
                "expected the exact merge of statistics inside of Join (got a round of fused kernels); enter Join on "
                "all ranks"
            )
        body = torch.cat(frames, dim=1)[:, :length].contiguous()
        if body.is_cuda:
            torch.cuda.current_stream(body.device).synchronize()  # the main thread uses another stream
        return _Update(self._find(key), body)

    def _receive(self) -> Tuple[List[int], Tensor]:
        """Sends one message; returns the header of the other ranks, empty without any, and all payloads."""
        channel = self._channel
        size = channel.capacity - HEADER_BYTES
        if self._zeros.numel() != size:
            self._zeros = torch.zeros(size, dtype=torch.uint8, device=channel.device)
        pending = channel._start([self._zeros], size, _EMPTY, JOIN, JOINED, 0)
        body = pending.wait()
        gathered = pending._gathered
        assert gathered is not None
        rows = gathered[:, :HEADER_BYTES].view(torch.int64).tolist()
        others = [row for row in rows if not row[2] & JOINED]
        if not others:
            return [], body
        words = others[0]
        if any(row != words for row in others) or words[2] & FAULT:
            key, phase = words[:2]
            point = SyncPoint(key, channel._names.get(key, "a layer unknown on this rank"))
            rows = [[key, phase, 0, words[3]] if row[2] & JOINED else row for row in rows]
            place = point, phase, gathered, channel.rank, channel._names
            raise header_error(rows, words, *place, channel.ranks, channel._ask)
        return words, body

    def _note_agreement(self, key: int, body: Tensor) -> None:
        """Notes an agreement of the other ranks, as :meth:`Channel.agree` does."""
        if key == self._differing and not self._has_lengths:
            self._has_lengths = True  # of the texts, which follow
            return
        if key == self._differing:
            raise SyncBatchNormError(
                "expected the same synchronized layers and rounds on every rank (got different ones on ranks whose "
                "data have not ended); read the error on those ranks"
            )
        rows: List[List[int]] = body[:, :_SUMMARY_BYTES].contiguous().view(torch.int64).tolist()
        for roster in self._rosters:
            self._channel._witnessed.setdefault(roster, {})[key] = rows
        self._channel.capacity = max(self._channel.capacity, *(row[2] for row in rows))
        digests = {row[0] for row in rows if row[0]}
        self._differing, self._has_lengths = key if len(digests) > 1 else None, False
