"""Received messages of a CUDA channel. Their headers are checked one step late, without a wait of the host.

Reading a header on the host directly after its round would make the host wait for the device at every layer. Therefore
the messages of a step stay in the slots of one tensor. At the end of the step, one kernel and one copy to pinned memory
collect all headers, and the host compares those of the step before. A mismatch is an error in any case.

The slots form two halves. A step fills one half, while the other half keeps the messages of the step before: the text
of a failed rank is still there when its header is compared.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .wire import HEADER_BYTES, SyncPoint

__all__ = ["HeaderRing", "HeaderRings", "event_on"]

_MOST_SLOTS = 64  # of a half
_MOST_BYTES = 32 << 20  # of a half


class _Expected(NamedTuple):
    """The header that every rank should send in a round, and where this rank is."""

    slot: int
    words: List[int]
    point: SyncPoint
    phase: int


class _Reached:
    """An event on the CPU, where a copy has ended when the call returns."""

    def query(self) -> bool:
        return True


def event_on(device: torch.device) -> Any:
    """Returns an event after the work that is queued on the current stream of ``device``, not of the current device."""
    if device.type != "cuda":
        return _Reached()
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


class _Half:
    """The messages of one step."""

    def __init__(self, slots: Tensor) -> None:
        self.slots = slots  # (K, W, capacity) uint8
        self.used = 0
        self.expected: List[_Expected] = []
        shape = (*slots.shape[:2], HEADER_BYTES)
        self._headers = torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=slots.is_cuda)
        self._copied: Any = None  # the event after the copy to `_headers`

    def copy(self) -> None:
        """Starts the copy of the headers to the host."""
        if self.expected:
            self._headers[: self.used].copy_(self.slots[: self.used, :, :HEADER_BYTES].contiguous(), non_blocking=True)
            self._copied = event_on(self.slots.device)

    @property
    def has_arrived(self) -> bool:
        """Whether a copy has been started and has ended."""
        return self._copied is not None and bool(self._copied.query())

    def compare(self, check: Optional[Callable[..., None]]) -> None:
        """Compares the copied headers, if any; the half is empty afterwards."""
        copied, expected, self._copied, self.expected, self.used = self._copied, self.expected, None, [], 0
        if copied is None or check is None:
            return
        if not copied.query():
            copied.synchronize()  # the host is more than a step ahead of the device
        found = self._headers.view(torch.int64)[[each.slot for each in expected]]
        wanted = torch.tensor([each.words for each in expected], device="cpu").unsqueeze(1)
        if torch.equal(found, wanted.expand_as(found)):
            return
        for each, rows in zip(expected, found.tolist()):
            check(rows, each.words, each.point, each.phase, self.slots[each.slot])


class HeaderRing:
    """The slots of a channel.

    Args:
        world_size: the number of ranks.
        capacity: bytes of a message.
        device: the device of the messages.
        check: a weak reference to a function of the headers of a round (a list of words for each rank), this rank's
            words, the sync point, the phase and the messages ``(W, capacity)``. It raises an error for other headers.
    """

    def __init__(self, world_size: int, capacity: int, device: torch.device, check: Callable[[], Any]) -> None:
        self._check = check
        slots = max(1, min(_MOST_SLOTS, _MOST_BYTES // (world_size * capacity)))
        with torch.inference_mode(False):  # the slots outlive an inference_mode block that may be active
            halves = torch.empty((2, slots, world_size, capacity), dtype=torch.uint8, device=device)
            self._current, self._earlier = _Half(halves[0]), _Half(halves[1])

    def take(self, words: Sequence[int], point: SyncPoint, phase: int) -> Tensor:
        """Returns the slot ``(W, capacity)`` for the messages of the next round.

        A round that repeats the first round of the half is the first round of the next step.

        Args:
            words: the header of this rank.
            point: the sync point of the round.
            phase: the phase of the round.

        Raises:
            SyncBatchNormError: if a header of an earlier step differs.
        """
        current = self._current
        first = current.expected[0] if current.expected else None
        repeats = first is not None and first.phase == phase and first.point.key == point.key
        if repeats or current.used == len(current.slots):
            self.rotate()
            current = self._current
        slot = current.used
        current.used += 1
        current.expected.append(_Expected(slot, list(words), point, phase))
        return current.slots[slot]

    def rotate(self) -> None:
        """Starts the copy of the current headers, compares those of the step before, and exchanges the halves.

        Raises:
            SyncBatchNormError: if a header of the step before differs.
        """
        self._current.copy()
        self._current, self._earlier = self._earlier, self._current
        self._current.compare(self._check())

    def compare_arrived(self) -> None:
        """Compares the headers of the step before if their copy has ended; does not wait.

        Raises:
            SyncBatchNormError: if a header differs.
        """
        if self._earlier.has_arrived:
            self._earlier.compare(self._check())

    def clear(self) -> None:
        """Removes all rounds without a comparison, after an error."""
        for half in (self._current, self._earlier):
            half.used, half.expected, half._copied = 0, [], None


class HeaderRings:
    """The rings of a channel, one for each device and length of messages.

    Args:
        check: as in :class:`HeaderRing`.
    """

    def __init__(self, check: Callable[[], Any]) -> None:
        self._check = check
        self._rings: Dict[Tuple[torch.device, int], HeaderRing] = {}

    def take(self, world_size: int, message: Tensor, words: Sequence[int], point: SyncPoint, phase: int) -> Tensor:
        """Returns the slot of the next round; see :meth:`HeaderRing.take`."""
        key = (message.device, message.numel())
        ring = self._rings.get(key)
        if ring is None:
            for other in self._rings.values():
                other.rotate()  # its last step is compared by `compare_arrived`
            ring = self._rings[key] = HeaderRing(world_size, message.numel(), message.device, self._check)
        return ring.take(words, point, phase)

    def compare_arrived(self) -> None:
        """Compares the headers that have been copied to the host; see :meth:`HeaderRing.compare_arrived`."""
        for ring in self._rings.values():
            ring.compare_arrived()

    def clear(self) -> None:
        """Removes all rounds without a comparison, after an error."""
        for ring in self._rings.values():
            ring.clear()
