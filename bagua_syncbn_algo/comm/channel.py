"""The statistics channel: pack a sync point's statistics, exchange them in one all-gather, unpack and check.

A channel owns one communicator that carries nothing else. All its messages have **one length** (gloo ends the process
when lengths differ, NCCL hangs or corrupts), and each starts with a header that says where its rank is, so that ranks
that have drifted apart get an error that names their layers instead of a hang or silently wrong statistics.
"""

from __future__ import annotations

import collections
import contextlib
import time
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .recorder import RoundRecord, active
from .report import describe_failure, first_difference
from .wire import (
    FAULT,
    FRAME_SHIFT,
    HEADER_BYTES,
    JOIN,
    PHASES,
    Header,
    HeaderCheck,
    Roster,
    SyncBatchNormError,
    SyncPoint,
    digest,
    sync_point,
)

__all__ = ["Channel"]

_FIRST_CAPACITY = 64  # bytes of the very first message, which agrees on the length of all others: header, 3 numbers
_NOTICE_SECONDS = 10.0  # how long a failing rank waits for the others to receive its error


class Channel:
    """A group of ranks that exchange statistics.

    Subclasses supply the collective; framing, headers, checks and failure reports live here.
    """

    rank: int = 0
    world_size: int = 1
    local: bool = False  # nothing to exchange: layers use PyTorch's own kernels
    trial: bool = False  # statistics are made up: nothing may be kept for a recomputation
    label: str = "bagua_syncbn"  # names the channel in the store; the same on all its ranks

    def __init__(self) -> None:
        self.rounds = 0  # all-gathers of statistics so far
        self.frames = 0  # messages sent so far, of every kind: the same on all ranks that are in step
        self.capacity = 0  # bytes a message; fixed by `join`
        self.failed = False  # whether the last exchange ended in an error
        self._anonymous = 0
        self._names: Dict[int, str] = {}
        self._rosters: Dict[Roster, int] = {}
        self._headers: Dict[Tuple[Any, ...], Header] = {}
        self._checks: Deque[HeaderCheck] = collections.deque()
        self._in_flight: Optional[_PendingGather] = None

    # -- the collective -------------------------------------------------------------------------------------------

    def _message(self, point: SyncPoint, device: torch.device) -> Tensor:
        """Returns the uint8 tensor of ``capacity`` bytes that carries this point's statistics."""
        raise NotImplementedError

    def _all_gather(self, message: Tensor) -> Tuple[Tensor, Any]:
        """Sets off the gathering of every rank's ``message``; the message stays as it is until that is done.

        Returns:
            The result ``(W, *message.shape)``, in rank order, valid until the next call; and a
            ``torch.distributed.Work``, or what else has its ``wait``, after which it is there.
        """
        raise NotImplementedError

    def _store(self) -> Optional[Any]:
        """Returns the key-value store through which failing ranks tell each other where they are, if there is one."""
        return None

    @property
    def device(self) -> torch.device:
        """Where small control messages must lie for this communicator."""
        return torch.device("cpu")

    # -- public ---------------------------------------------------------------------------------------------------

    def use_device(self, device: torch.device) -> None:
        """Tells where the layers' statistics lie: small control messages of a CUDA communicator go there, too."""

    def join(self, roster: Roster, itemsize: int = 4) -> int:
        """Agrees with all ranks on the layers that use this channel, and on the message length.

        Args:
            roster: this rank's layers.
            itemsize: bytes of one statistic: 8 for float64.

        Returns:
            The roster's number in this channel, the same on all ranks; part of its layers' sync points.

        Raises:
            SyncBatchNormError: if the ranks' layers differ; names the first difference. All ranks raise.

        Collectives:
            One all-gather at the first call for a roster (more only to say what differs). Every rank must call.
        """
        if roster in self._rosters:
            return self._rosters[roster]
        # In a message like any other: a rank that is elsewhere is told so, and lengths never differ.
        self.capacity = max(self.capacity, _FIRST_CAPACITY)
        rows = self.agree("the first use of a model's layers", roster.text().decode(), roster.capacity(itemsize))
        self.capacity = max([self.capacity, *rows])
        ordinal = self._rosters[roster] = len(self._rosters)
        for name, _ in roster.layers:
            self.register(sync_point(name, ordinal))
        return ordinal

    def agree(self, occasion: str, text: str, value: int) -> List[int]:
        """Compares lines of text over all ranks, and gathers a number.

        Args:
            occasion: what the ranks agree on: names the message.
            text: must be the same on all ranks.
            value: this rank's number.

        Returns:
            The numbers of all ranks.

        Raises:
            SyncBatchNormError: if the texts differ; names the first difference. All ranks raise.

        Collectives:
            One all-gather (more only to say what differs). Every rank must call.
        """
        lines, own_digest = text.encode(), digest(text)
        mine = torch.tensor([own_digest, len(lines), value], device=self.device)
        point = sync_point(occasion)
        self.register(point)
        rows = self.exchange(point, JOIN, [mine])[0].tolist()
        if any(row[0] != own_digest for row in rows):
            longest = max(row[1] for row in rows)
            padded = torch.frombuffer(bytearray(lines.ljust(longest + 1)), dtype=torch.uint8).to(self.device)
            texts = self.exchange(point, JOIN, [padded])[0].cpu()
            raise SyncBatchNormError(
                first_difference([bytes(t[: row[1]].tolist()).decode() for t, row in zip(texts, rows)])
            )
        return [row[2] for row in rows]

    def register(self, point: SyncPoint) -> None:
        """Makes the name of ``point`` known, so that an error on this rank can quote it."""
        self._names[point.key] = point.name

    def anonymous_name(self, features: int) -> str:
        """Returns a name for a layer without a tag: by the order of first use, which is the same on every rank."""
        self._anonymous += 1
        return f"SyncBatchNorm({features}) number {self._anonymous}"

    def exchange(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        """Exchanges the statistics of one sync point: :meth:`launch`, and waits for the result."""
        return self.launch(point, phase, parts)()

    def launch(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> Callable[[], List[Tensor]]:
        """Sends the statistics of one sync point on their way.

        One round is in flight at a time: launching another one first waits for it, which keeps its result.

        Args:
            point: where this rank is.
            phase: ``FORWARD`` or ``BACKWARD``.
            parts: 1-D tensors, the ones with the largest elements first (for alignment); same lengths on all ranks.

        Returns:
            What waits for the round, and returns for each part of length ``L`` a tensor ``(W, L)`` of its dtype, ranks
            in order.

        Raises:
            SyncBatchNormError: here or from waiting: if another rank is elsewhere, sent another length, failed, or did
                not arrive.

        Collectives:
            One all-gather of ``capacity`` bytes a rank (one for every ``capacity − 32`` bytes of payload, should the
            payload be longer). Every rank must call.
        """
        bodies = self._send(point, phase, 0, [part.contiguous().view(torch.uint8) for part in parts])

        def result() -> List[Tensor]:
            body = bodies()
            found, offset = [], 0
            for part in parts:
                length = part.numel() * part.element_size()
                found.append(body[:, offset : offset + length].view(part.dtype))
                offset += length
            return found

        return result

    def fail(self, point: SyncPoint, phase: int, error: BaseException, wait: bool = True) -> None:
        """Tells the other ranks, who wait at ``point``, that this rank cannot take part because of ``error``.

        Args:
            point: where this rank is.
            phase: ``FORWARD`` or ``BACKWARD``.
            error: what happened here.
            wait: whether to give the other ranks a few seconds to receive it.

        Collectives:
            One all-gather of ``capacity`` bytes a rank, in place of :meth:`exchange`. It need not have ended at return.
        """
        text = f"{type(error).__name__}: {error}".encode()[: self.capacity - HEADER_BYTES]
        payload = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        with contextlib.suppress(SyncBatchNormError):  # this rank's own error is the one to raise
            self._send(point, phase, FAULT, [payload])
            if wait and self._in_flight is not None:
                self._in_flight.deliver(_NOTICE_SECONDS)
        self.failed = True  # also where a round that was in flight before has ended well

    def recover(self, frames: int) -> None:
        """Brings this rank back into step after an error: sends empty messages, until there are ``frames``.

        Collectives:
            One all-gather for each message that this rank has sent less than others.
        """
        point = sync_point("recovery")
        nothing = torch.zeros(1, dtype=torch.uint8, device=self.device)
        while self.frames < frames:
            with contextlib.suppress(SyncBatchNormError):  # of the round in flight, which ends by it
                self._send(point, JOIN, FAULT, [nothing])
        with contextlib.suppress(SyncBatchNormError):
            self.flush()
        self._checks.clear()
        self.failed = False

    def flush(self) -> None:
        """Waits for what is in flight, and raises what header checks have found; on CUDA these lag a few rounds."""
        if self._in_flight is not None:
            self._in_flight.wait()
        try:
            while self._checks:
                self._checks.popleft().finish(self.rank, self._names)
        except SyncBatchNormError:
            self.failed = True
            raise

    # -- frames ---------------------------------------------------------------------------------------------------

    def _send(self, point: SyncPoint, phase: int, flags: int, parts: Sequence[Tensor]) -> Callable[[], Tensor]:
        length, room = sum(part.numel() for part in parts), self.capacity - HEADER_BYTES
        if length <= room:
            return self._start(parts, length, point, phase, flags, length).wait
        frames = [
            self._start([chunk], chunk.numel(), point, phase, flags | index << FRAME_SHIFT, length)
            for index, chunk in enumerate(torch.cat(list(parts)).split(room))
        ]
        return lambda: torch.cat([frame.wait() for frame in frames], dim=1)

    def _start(
        self, parts: Sequence[Tensor], size: int, point: SyncPoint, phase: int, flags: int, length: int
    ) -> _PendingGather:
        if self._in_flight is not None:
            self._in_flight.wait(keep=True)  # its message and what was received are written to again
        device = parts[0].device
        header = self._header(point, phase, flags, length, device)
        message = self._message(point, device)
        torch.cat([header.bytes, *parts], out=message[: HEADER_BYTES + size])
        self.rounds += phase != JOIN
        self.frames += 1
        record = None if phase == JOIN else active()
        entry = None
        if record is not None:
            entry = record.launch(point.layers or (point.name,), PHASES[phase], message.numel())
        self._in_flight = flight = _PendingGather(self, header, point, phase, entry)
        flight.start(message)
        return flight

    def _header(self, point: SyncPoint, phase: int, flags: int, length: int, device: torch.device) -> Header:
        # Kept per device: building one from Python numbers on CUDA is a copy from pageable memory, i.e. a wait.
        key = (point.key, phase, flags, length, device)
        header = self._headers.get(key)
        if header is None:
            with torch.inference_mode(False):  # it outlives the block that may be running
                words = [point.key, phase, flags, length]
                header = Header(words, torch.tensor(words).view(torch.uint8).to(device))
            if not flags & FAULT:
                self._headers[key] = header
        return header

    def _check(self, gathered: Tensor, header: Header, point: SyncPoint, phase: int) -> None:
        check = HeaderCheck(gathered, header.words, point, phase)
        if not gathered.is_cuda:
            check.finish(self.rank, self._names)
            return
        # Reading headers on the host now would make it wait for the device at every layer, which is what makes
        # other implementations slow. A mismatch is an error in any case: it may surface a few rounds later.
        self._checks.append(check)
        while self._checks and self._checks[0].ready():
            self._checks.popleft().finish(self.rank, self._names)


class _PendingGather:
    """One frame on its way to all ranks."""

    def __init__(
        self, channel: Channel, header: Header, point: SyncPoint, phase: int, entry: Optional[RoundRecord]
    ) -> None:
        self._channel, self._header, self._point, self._phase, self._entry = channel, header, point, phase, entry
        self._gathered: Optional[Tensor] = None
        self._work: Any = None
        self._arrival: Optional[float] = None
        self._done = False
        self._error: Optional[BaseException] = None

    def start(self, message: Tensor) -> None:
        """Starts the all-gather; :meth:`wait` raises its errors."""
        try:
            self._gathered, self._work = self._channel._all_gather(message)
        except RuntimeError as error:
            self._error = error
        if self._entry is not None and self._gathered is not None and not self._gathered.is_cuda:
            with contextlib.suppress(AttributeError, RuntimeError):  # not every backend can tell
                self._work.get_future().add_done_callback(self._note_arrival)

    def _note_arrival(self, _: Any) -> None:
        self._arrival = time.perf_counter()

    def wait(self, keep: bool = False) -> Tensor:
        """Waits, checks the headers and returns the payloads ``(W, capacity − 32)``.

        Args:
            keep: the next flight is about to use the memory of this one.

        Raises:
            SyncBatchNormError: the same at every call.
        """
        channel = self._channel
        if not self._done:
            self._done = True
            if channel._in_flight is self:
                channel._in_flight = None
            try:
                self._await()
                assert self._gathered is not None
                if not self._header.words[2] & FAULT:  # a failing rank has an error of its own to raise
                    channel._check(self._gathered, self._header, self._point, self._phase)
                    channel.failed = False
            except SyncBatchNormError as error:
                self._error, channel.failed = error, True
        if self._error is not None:
            raise self._error
        assert self._gathered is not None
        if keep:
            self._gathered = self._gathered.clone()
        return self._gathered[:, HEADER_BYTES:]

    def deliver(self, seconds: float) -> None:
        """Waits up to ``seconds`` until all ranks have this frame; raises nothing."""
        is_completed = getattr(self._work, "is_completed", None)
        deadline = time.monotonic() + seconds
        while is_completed is not None and not is_completed() and time.monotonic() < deadline:
            time.sleep(0.001)

    def _await(self) -> None:
        start = time.perf_counter()
        try:
            if self._error is not None:
                raise self._error
            self._work.wait()
        except RuntimeError as error:
            where, channel = f"{self._point.name} ({PHASES[self._phase]})", self._channel
            message = describe_failure(where, error, channel.rank, channel.world_size, channel.label, channel._store())
            raise SyncBatchNormError(message) from error
        if self._entry is not None:
            finish = time.perf_counter() if self._arrival is None else self._arrival
            # A benchmark's Work, which models a network, says when the messages have arrived.
            self._entry.wait, self._entry.finish = start, getattr(self._work, "arrival", finish)
