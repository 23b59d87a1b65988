"""Tests of the received messages whose headers are compared a step later, on CPU tensors."""

from __future__ import annotations

from typing import Any, List

import pytest
import torch

from bagua_syncbn_algo.comm import ring as ring_module
from bagua_syncbn_algo.comm.ring import HeaderRing
from bagua_syncbn_algo.comm.wire import FORWARD, sync_point

POINTS = [sync_point(f"layer {index}") for index in range(4)]


class FoundError(Exception):
    """The check has found a difference."""


def ring_of(capacity: int = 64) -> HeaderRing:
    def check(rows: List[List[int]], words: List[int], point: Any, phase: int, gathered: Any) -> None:
        if any(row != words for row in rows):
            raise FoundError(point.name, bytes(gathered[1, 32:36].tolist()))

    return HeaderRing(2, capacity, torch.device("cpu"), lambda: check)


def receive(ring: HeaderRing, index: int, other: int = 0, text: bytes = b"good") -> None:
    """Runs one round; the header of rank 1 is that of the layer ``index + other``."""
    words = [POINTS[index].key, FORWARD, 0, 8]
    slot = ring.take(words, POINTS[index], FORWARD)
    theirs = [POINTS[index + other].key, *words[1:]]
    for row, header in zip(slot, (words, theirs)):
        row[:32] = torch.tensor(header).view(torch.uint8)
        row[32:36] = torch.tensor(list(text), dtype=torch.uint8)


def test_a_difference_is_found_one_step_later() -> None:
    """Catches a comparison that is left out, and one with the messages of a later step."""
    ring = ring_of()
    receive(ring, 0)
    receive(ring, 1, other=1, text=b"evil")
    receive(ring, 0)  # the next step starts: the headers of the first one are copied
    receive(ring, 1)
    with pytest.raises(FoundError) as caught:
        receive(ring, 0)
    assert caught.value.args == ("layer 1", b"evil")


def test_arrived_headers_are_compared_at_the_end_of_a_step() -> None:
    """Catches an error that is found only when the step after the next one starts."""
    ring = ring_of()
    receive(ring, 0, other=1)
    ring.compare_arrived()  # not copied yet
    receive(ring, 0)
    with pytest.raises(FoundError):
        ring.compare_arrived()
    ring.compare_arrived()  # once


def test_a_step_of_more_rounds_than_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a slot that is used twice before its header has been copied."""
    monkeypatch.setattr(ring_module, "_MOST_SLOTS", 2)
    ring = ring_of()
    receive(ring, 0)
    receive(ring, 1, other=2, text=b"evil")
    for index in (2, 3):
        receive(ring, index)
    with pytest.raises(FoundError) as caught:
        receive(ring, 1)
    assert caught.value.args == ("layer 1", b"evil")


def test_nothing_is_compared_after_a_reset() -> None:
    """Catches an error of a round from before the recovery."""
    ring = ring_of()
    receive(ring, 0, other=1)
    ring.clear()
    for _ in range(3):
        receive(ring, 0)
        ring.compare_arrived()


def test_the_event_is_recorded_on_the_device_of_the_messages(mocker: Any) -> None:
    """Catches an event on the current device's stream, which does not follow a copy on another device."""
    stream, event = object(), mocker.Mock()
    mocker.patch.object(torch.cuda, "current_stream", lambda device: {torch.device("cuda", 1): stream}[device])
    mocker.patch.object(torch.cuda, "Event", lambda: event)
    assert ring_module.event_on(torch.device("cuda", 1)) is event
    event.record.assert_called_once_with(stream)
