"""The statistics channel: packs the statistics of a sync point, exchanges them in one all-gather and checks them.

The communicator of a channel carries only statistics. All messages of a channel have **the same length**, because
different lengths terminate the process (gloo), or hang or corrupt data (NCCL). Each message starts with a header that
identifies the sync point of its rank. Ranks at different sync points raise an error that names their layers. Without
the header, they would hang or compute wrong statistics silently.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Callable, Collection, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .errors import exchange_positions
from .monitor import RoundMonitor
from .pending import PendingGather
from .recorder import active
from .report import FIRST_USE, Told, error_text, first_difference, header_error, require_one_state
from .ring import HeaderRings
from .turns import Turns
from .version import VersionCheck
from .wire import (
    BACKWARD,
    FAULT,
    FRAME_SHIFT,
    HEADER_BYTES,
    JOIN,
    JOINED,
    PHASES,
    Header,
    HeaderCache,
    Roster,
    SyncBatchNormError,
    SyncPoint,
    digest,
    is_capturing,
    put_bounded,
    sync_point,
)

__all__ = ["Channel"]

_FIRST_CAPACITY = 64  # bytes of the first message, with which the ranks agree on the length: a header and 3 numbers
_NOTICE_SECONDS = 10.0  # how long a failing rank waits until the other ranks have received its error


class Channel:
    """A group of ranks that exchange statistics.

    This class implements framing, headers, checks and error reports. Subclasses implement the collective.

    Attributes:
        rank: the number of this rank in the channel.
        world_size: the number of ranks in the channel.
        ranks: the global ranks of the channel, for errors.
        local: whether there is nothing to exchange, so that layers use PyTorch's kernels.
        trial: whether the channel invents the other ranks' statistics, which must not be saved for a recomputation.
        label: the prefix of the channel's keys in the store, equal on all ranks of the channel.
        rounds: the number of all-gathers of statistics so far.
        frames: the number of messages sent so far, of every kind. It is equal on all ranks, except after an error.
        capacity: the bytes per message, set by :meth:`join`.
        failed: whether the last exchange ended with an error.
        checks_finite: whether statistics that are not finite are an error; see :mod:`.nonfinite`.
        joining: the layers whose ranks may finish before the others, so that no round depends on an empty shard's kind.
    """

    rank: int = 0
    world_size: int = 1
    ranks: Sequence[int] = (0,)
    local: bool = False
    checks_late: bool = False  # whether headers are checked a step later on the CPU, too
    trial: bool = False
    label: str = "bagua_syncbn"

    def __init__(self) -> None:
        self.rounds = self.frames = self.capacity = self._anonymous = self._joins = 0
        self.failed = self.checks_finite = False
        self.joining: Collection[Any] = ()
        self._names: Dict[int, str] = {}
        self._rosters: weakref.WeakKeyDictionary[Roster, int] = weakref.WeakKeyDictionary()
        self._witnessed: weakref.WeakKeyDictionary[Roster, Any] = weakref.WeakKeyDictionary()  # see `FinishedRank`
        self._headers = HeaderCache()
        self._in_flight: Optional[PendingGather] = None
        self._latest: Optional[PendingGather] = None
        self._rings = HeaderRings(weakref.WeakMethod(self._compare))  # received messages that are checked later
        self._slot: Optional[Tensor] = None  # in the ring, of the round that starts
        self._waits_at_once = False  # whether the caller waits for the round that starts before anything else
        self._monitor: Optional[RoundMonitor] = None
        self._version_check: Optional[VersionCheck] = None  # before the first message
        self._turns = Turns()

    # -- the collective -------------------------------------------------------------------------------------------

    def _message(self, point: SyncPoint, device: torch.device) -> Tensor:
        """Returns the message of ``point``, a uint8 tensor of ``capacity`` bytes that is reused."""
        raise NotImplementedError

    def _all_gather(self, message: Tensor) -> Tuple[Tensor, Any]:
        """Starts the all-gather of ``message``, which does not change until the all-gather has ended.

        Returns:
            The result ``(W, *message.shape)`` in rank order, valid until the next call, and a
            ``torch.distributed.Work`` or an object with the same method ``wait``, after which the result is complete.
        """
        raise NotImplementedError

    def _store(self) -> Optional[Any]:
        """Returns the key-value store in which failing ranks publish their positions; ``None`` without one."""
        return None

    @property
    def device(self) -> torch.device:
        """The device of messages without statistics, such as the comparison of layers."""
        return torch.device("cpu")

    # -- public ---------------------------------------------------------------------------------------------------

    def use_device(self, device: torch.device) -> None:
        """Sets :attr:`device` of a CUDA communicator to ``device``, the device of the layers' statistics."""

    def join(self, roster: Roster, itemsize: int = 4, state: Callable[[], int] = int) -> int:
        """Compares the layers that use this channel over all ranks, and sets the length of messages.

        Args:
            roster: the layers of this rank.
            itemsize: the bytes per statistic: 4, or 8 for float64.
            state: returns the digest of the running statistics, which must be equal; 0 if they may differ.

        Returns:
            The number of the roster in this channel, equal on all ranks. It is part of the layers' sync points.

        Raises:
            SyncBatchNormError: on all ranks, if the layers or states differ. The message names the first difference.

        Collectives:
            The first call for a roster: one all-gather, more if the layers differ. Every rank must call.
        """
        if roster in self._rosters:
            return self._rosters[roster]
        self.capacity = max(self.capacity, _FIRST_CAPACITY)  # of the comparison, an ordinary message
        self._rosters[roster] = ordinal = self._joins  # before the comparison: its remarks explain a difference
        try:
            states = self.agree(FIRST_USE, roster.text().decode(), state(), roster.capacity(itemsize))
            require_one_state(states, self.ranks, roster.layers)
        except BaseException:
            del self._rosters[roster]
            raise
        self._joins += 1  # counted: the rosters that still exist differ between ranks
        for name, _ in roster.layers:
            self.register(sync_point(name, ordinal))
        return ordinal

    def agree(self, occasion: str, text: str, value: int = 0, capacity: int = 0, replays: Any = None) -> List[int]:
        """Compares a text over all ranks, gathers a number from each rank, and makes messages long enough.

        Args:
            occasion: the occasion of the comparison, which names the sync point in errors.
            text: lines that must be equal on all ranks.
            value: the number of this rank.
            capacity: the bytes that messages need from now on. The ranks use the largest value.
            replays: the roster whose agreement the other ranks may have reached after this rank's data had ended.

        Returns:
            The numbers of all ranks, in rank order. A rank whose data have ended counts as this rank.

        Raises:
            SyncBatchNormError: on all ranks, if the texts differ. The message names the first difference.

        Collectives:
            One all-gather, and further ones if the texts differ; none for a replay. Every rank must call.
        """
        if self.checks_finite:  # on all ranks or on none: one rank would leave the step alone
            text += "\nthe check for statistics that are not finite (BAGUA_SYNCBN_CHECK=nonfinite)"
        own, point = [digest(text), value, capacity], sync_point(occasion)
        self.register(point)
        rows = None if replays is None else self._witnessed.get(replays, {}).pop(point.key, None)
        if rows is None:
            rows = self.exchange(point, JOIN, [torch.tensor(own, device=self.device)])[0].tolist()
        rows = [row if row[0] else own for row in rows]  # zeros: a rank whose data have ended
        self.capacity = max(self.capacity, *(row[2] for row in rows))
        if any(row[0] != own[0] for row in rows):
            encoded = "\0".join([text, "\n".join(self._remarks())]).encode()
            length = torch.tensor([len(encoded)], device=self.device)
            lengths = self.exchange(point, JOIN, [length])[0].flatten().tolist()
            padded = torch.frombuffer(bytearray(encoded.ljust(max(lengths))), dtype=torch.uint8).to(self.device)
            texts = self.exchange(point, JOIN, [padded])[0].cpu()
            decoded = [bytes(t[:n].tolist()).decode().partition("\0") for t, n in zip(texts, lengths)]
            raise SyncBatchNormError(first_difference([d[0] for d in decoded], self.ranks, [d[2] for d in decoded]))
        return [row[1] for row in rows]

    def register(self, point: SyncPoint) -> None:
        """Registers the name of ``point`` for errors on this rank."""
        put_bounded(self._names, point.key, point.name)

    def anonymous_name(self, features: int) -> str:
        """Returns a new name for an untagged layer of ``features`` channels, numbered by the order of first use."""
        self._anonymous += 1
        return f"SyncBatchNorm({features}) number {self._anonymous}"

    def exchange(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> List[Tensor]:
        """Exchanges the statistics of one sync point. Equals ``launch(point, phase, parts)()``; see :meth:`launch`."""
        return self.launch(point, phase, parts)()

    def launch(
        self, point: SyncPoint, phase: int, parts: Sequence[Union[Tensor, Sequence[Tensor]]], flags: int = 0
    ) -> Callable[[], List[Tensor]]:
        """Starts the exchange of the statistics of one sync point.

        One round is in flight at a time. A second launch first waits for the pending round and keeps its result.

        Args:
            point: the sync point.
            phase: ``FORWARD``, ``BACKWARD`` or ``JOIN``.
            parts: 1-D tensors in descending order of element size (for alignment), of equal lengths on all ranks. A
                list of tensors of one dtype is one part.
            flags: further bits of the header, equal on all ranks.

        Returns:
            A function that waits for the round and returns a list. For each part of length ``L``, the list contains a
            tensor ``(W, L)`` of the same dtype, in rank order. The next launch may overwrite these tensors.

        Raises:
            SyncBatchNormError: if another rank failed, is at another sync point, sent another length, or did not arrive
                before the timeout. This method or the returned function raises it, on CUDA possibly in a later round.

        Collectives:
            One all-gather of ``capacity`` bytes per rank. A payload of more than ``capacity − 32`` bytes takes one
            all-gather for each ``capacity − 32`` bytes. Every rank must call.
        """
        groups = [[part] if isinstance(part, Tensor) else part for part in parts]
        pieces = [piece.contiguous().view(torch.uint8) for group in groups for piece in group]
        layout = [(sum(piece.numel() for piece in group) * group[0].element_size(), group[0].dtype) for group in groups]
        bodies = self._send(point, phase, flags, pieces)

        def result() -> List[Tensor]:
            body = bodies()
            gathered, offset = [], 0
            for length, dtype in layout:
                gathered.append(body[:, offset : offset + length].view(dtype))
                offset += length
            return gathered

        return result

    def fail(self, point: SyncPoint, phase: int, error: BaseException, wait: bool = True) -> None:
        """Sends ``error`` to the other ranks in place of this rank's statistics. The other ranks raise an error.

        Args:
            point: the sync point at which the other ranks wait.
            phase: ``FORWARD`` or ``BACKWARD``.
            error: the error of this rank.
            wait: whether to wait up to 10 seconds until the other ranks have received the error.

        Collectives:
            One all-gather of ``capacity`` bytes per rank, in place of :meth:`exchange`. It may be in flight on return.
        """
        text = error_text(error, self.capacity - HEADER_BYTES)
        payload = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(self.device)
        with contextlib.suppress(SyncBatchNormError):  # the caller raises this rank's own error
            self._send(point, phase, FAULT, [payload])
            if wait and self._in_flight is not None:
                self._in_flight.wait_until_completed(_NOTICE_SECONDS)
        if self._monitor is not None:
            self._monitor.publish_error(f"{point.name} ({PHASES[phase]}): {text.decode(errors='replace')}")
        self.failed = True  # also if the round that was in flight before has succeeded

    def recover(self, frames: int) -> None:
        """Sends empty messages after an error, until this rank has sent as many messages as the other ranks.

        Args:
            frames: the largest :attr:`frames` of all ranks.

        Collectives:
            One all-gather for each missing message. Every rank must call.
        """
        point = sync_point("recovery")
        empty = torch.zeros(1, dtype=torch.uint8, device=self.device)
        while self.frames < frames:
            with contextlib.suppress(SyncBatchNormError):  # errors of the round in flight, for which this call waits
                self._send(point, JOIN, FAULT, [empty])
        with contextlib.suppress(SyncBatchNormError):
            self.flush()
        self._rings.clear()
        self.failed = False

    def flush(self) -> None:
        """Waits for the round in flight. On CUDA this does not block the host, and header checks lag a step.

        Raises:
            SyncBatchNormError: if the round or a check failed.
        """
        if self._in_flight is not None:
            self._in_flight.wait()
        try:
            self._rings.compare_arrived()
        except SyncBatchNormError:
            self.failed = True
            raise

    # -- frames ---------------------------------------------------------------------------------------------------

    def _send(self, point: SyncPoint, phase: int, flags: int, parts: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Starts the all-gathers of a payload, and returns a function that waits for it."""
        length, room = sum(part.numel() for part in parts), self.capacity - HEADER_BYTES
        with self._turns:
            if self._version_check is not None:
                self._version_check.compare()
                self._version_check = None
            if length <= room:
                return self._start(parts, length, point, phase, flags, length).wait
            frames: List[PendingGather] = []
            for index, chunk in enumerate(torch.cat(list(parts)).split(room)):
                if frames and frames[-1].has_failed():  # on all ranks; the wait raises the error, as for one frame
                    break
                frames.append(self._start([chunk], chunk.numel(), point, phase, flags | index << FRAME_SHIFT, length))
        return lambda: torch.cat([frame.wait() for frame in frames], dim=1)

    def _start(
        self, parts: Sequence[Tensor], size: int, point: SyncPoint, phase: int, flags: int, length: int
    ) -> PendingGather:
        """Starts the all-gather of one frame, with ``size`` of the ``length`` bytes of a payload."""
        if self._in_flight is not None:
            self._in_flight.wait(keep=True)  # this frame overwrites its message and its result
        device = parts[0].device
        header = self._headers.get(point, phase, flags, length, device)
        message = self._message(point, device)
        self._headers.keeps_all = self._headers.keeps_all or is_capturing(message)
        if self._latest is not None and message.is_cuda:
            self._latest.order_current_stream(message.device)  # which may have sent the same memory on another stream
        torch.cat([header.bytes, *parts], out=message[: HEADER_BYTES + size])
        slot = self._take_slot(message, header, point, phase)  # may raise: before anything is counted
        self.rounds += phase != JOIN
        self.frames += 1
        record = None if phase == JOIN else active()
        entry = None if record is None else record.launch(point.layers or (point.name,), PHASES[phase], message.numel())
        self._slot, self._waits_at_once = slot, phase != BACKWARD
        self._in_flight = pending = PendingGather(self, header, point, phase, entry, slot is not None)
        if message.is_cuda:  # not on the CPU: gloo's Work keeps the saved-tensor hooks of its thread
            self._latest = pending
        pending.start(message)
        return pending

    def _take_slot(self, message: Tensor, header: Header, point: SyncPoint, phase: int) -> Optional[Tensor]:
        """Returns the memory for the messages of a round whose headers are checked later; ``None`` for other rounds.

        Those are rounds on the CPU, in a captured graph, of several messages, agreements, which the host reads in any
        case, and the report of an error.
        """
        _, _, flags, length = header.words
        if not (self.checks_late or message.is_cuda) or is_capturing(message):
            return None
        if phase == JOIN or flags & FAULT or length > self.capacity - HEADER_BYTES:
            return None
        try:
            return self._rings.take(self.world_size, message, header.words, point, phase)
        except SyncBatchNormError:
            self.failed = True
            raise

    def _receive_buffer(self, message: Tensor) -> Tensor:
        """Returns the tensor ``(W, capacity)`` that receives the messages of the round that starts."""
        slot, self._slot = self._slot, None
        return message.new_empty((self.world_size, *message.shape)) if slot is None else slot

    def _check(self, gathered: Tensor, header: Header, point: SyncPoint, phase: int) -> None:
        """Compares the headers of a round now, on the host."""
        rows = gathered[:, :HEADER_BYTES].view(torch.int64).tolist()
        self._compare(rows, header.words, point, phase, gathered)

    def _compare(self, rows: List[List[int]], words: List[int], point: SyncPoint, phase: int, gathered: Tensor) -> None:
        if words[2] & JOINED:
            return  # this rank does not know the round yet
        rows = [words if row[2] & JOINED else row for row in rows]
        if any(row != words for row in rows):
            raise header_error(rows, words, point, phase, gathered, self.rank, self._names, self.ranks, self._ask)

    def _ask(self, position: str) -> Dict[int, Told]:
        """Tells the other ranks the position of this rank and what is special about its models."""
        own = Told(position, "\n".join(self._remarks()))
        place = self.ranks[self.rank], self.ranks, f"{self.label}/told", self.frames
        found = exchange_positions(own.text(), *place, self._store())
        return {rank: Told.of(text) for rank, text in found.known.items()}

    def _remarks(self) -> List[str]:
        """Returns lines about the models on this rank, such as their hooks, which explain a difference to others."""
        return list(dict.fromkeys(line for roster in list(self._rosters) for line in roster.remarks()))

    def watch(self, timeout: float) -> None:
        """Starts to report late rounds in the log; see :mod:`.monitor`. The backend ends the process at ``timeout``."""
        if self._store() is not None:
            self._monitor = RoundMonitor(self.label, self.rank, list(self.ranks), self._store(), timeout)

    def check_versions(self, seconds: float) -> None:
        """Lets the first message wait up to ``seconds`` for the message versions of all ranks; see :mod:`.version`."""
        if self._store() is not None:
            self._version_check = VersionCheck(self._store(), self.label, self.ranks[self.rank], self.ranks, seconds)
