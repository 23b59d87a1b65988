"""Tests of the thread that reports late rounds, with a stand-in for the collective and with real gloo ranks."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_threads

from bagua_syncbn_algo.comm.monitor import RoundMonitor


class FakeWork:
    """A collective that completes when the test says so."""

    def __init__(self, completed: bool = False) -> None:
        self.completed = completed

    def is_completed(self) -> bool:
        return self.completed


def monitors(store: Any, timeout: float = 0.02) -> list[RoundMonitor]:
    found = [RoundMonitor("test", rank, [4, 6], store, timeout, interval=1e9) for rank in range(2)]
    for monitor in found:
        monitor._thread = threading.current_thread()  # no thread of its own: the test calls `look`
    return found


def test_a_late_round_is_reported_with_every_position(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a report that does not name the layer, the phase or the global rank, and one that is repeated."""
    first, second = monitors(dist.HashStore())
    first.watch("Net.bn1 (backward)", FakeWork())
    second.watch("Net.bn2 (forward)", FakeWork(completed=True))
    time.sleep(0.05)
    for _ in range(3):
        first.look()
        second.look()
    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelno == logging.ERROR
    assert "expected all 2 ranks to exchange statistics at Net.bn1 (backward) (got nothing for" in message
    assert "rank 4 at Net.bn1 (backward): it waits there" in message
    assert "rank 6 at Net.bn2 (forward): it has sent its statistics there and runs other code" in message


def test_a_rank_that_does_not_answer_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a report that waits for a rank that has terminated."""
    first, _ = monitors(dist.HashStore())
    first.watch("Net.bn1 (forward)", FakeWork())
    time.sleep(0.05)
    first.look()
    first.look()
    assert "; rank 6 does not answer: it terminated or is stopped" in caplog.text


def test_an_earlier_answer_of_a_terminated_rank_is_not_its_position(caplog: pytest.LogCaptureFixture) -> None:
    """Catches an answer that the rank gave to an earlier question."""
    first, second = monitors(dist.HashStore())
    for where in ("Net.bn1 (forward)", "Net.bn2 (forward)"):
        caplog.clear()
        first.watch(where, FakeWork())
        time.sleep(0.05)
        for _ in range(3):
            first.look()
            if where.startswith("Net.bn1"):
                second.look()
    assert "at Net.bn2 (forward) (got nothing" in caplog.text and "; rank 6 does not answer" in caplog.text


def test_the_error_of_another_rank_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a report without the cause: the failing rank's message stays on the device of a rank that waits."""
    first, second = monitors(dist.HashStore())
    first.watch("Net.bn1 (forward)", FakeWork())
    second.publish_error("Net.bn1 (forward): ValueError: made up")
    time.sleep(0.05)
    for _ in range(3):
        first.look()
    assert "; an error of rank 6 at Net.bn1 (forward): ValueError: made up" in caplog.text


def test_rounds_in_time_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Catches a report of a round that has ended, or that is younger than its share of the timeout."""
    store = dist.HashStore()
    first, _ = monitors(store)
    first.watch("Net.bn1 (forward)", FakeWork(completed=True))
    time.sleep(0.05)
    first.look()
    slow, _ = monitors(store, timeout=100.0)
    slow.watch("Net.bn1 (forward)", FakeWork())
    slow.look()
    assert not caplog.records and not store.check(["test/late/asked"])


def test_the_thread_ends_with_the_monitor() -> None:
    """Catches a thread for each channel that has ever lived."""
    monitor = RoundMonitor("test", 0, [0, 1], dist.HashStore(), 100.0, interval=0.01)
    monitor.watch("Net.bn1 (forward)", FakeWork())
    thread = monitor._thread
    assert thread is not None and thread.is_alive()
    del monitor
    thread.join(5)
    assert not thread.is_alive()


def test_a_rank_has_time_to_answer(caplog: pytest.LogCaptureFixture) -> None:
    """Catches "does not answer" about a rank whose thread is merely late: the report waits for 0.75 of the timeout."""
    first, second = monitors(dist.HashStore(), timeout=1e3)
    first._late = 0.01
    first.watch("Net.bn1 (forward)", FakeWork())
    time.sleep(0.05)
    for _ in range(5):
        first.look()
    assert not caplog.records
    second.look()
    first.look()
    assert "rank 6 at the start: it has sent its statistics there" in caplog.text
    assert "rank 6 does not answer" not in caplog.text


@pytest.mark.multirank
def test_ranks_report_each_other_over_gloo(caplog: pytest.LogCaptureFixture) -> None:
    """Catches keys that differ between ranks: rank 0 waits in a real collective that rank 1 enters late."""
    store = dist.HashStore()

    def body(rank: int, group: Any) -> None:
        import torch

        monitor = RoundMonitor("gloo", rank, [0, 1], store, 1e3, interval=0.05)
        monitor._late = 0.1
        tensors = [torch.zeros(2) for _ in range(2)]
        if rank == 1:
            monitor.watch("Net.bn0 (forward)", FakeWork(completed=True))
            deadline = time.monotonic() + 20
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.05)
        work = group.allgather([tensors], [torch.ones(2)])
        monitor.watch("Net.bn1 (forward)", work)
        work.wait()
        monitor.stop()

    run_threads(2, body)
    assert "rank 0 at Net.bn1 (forward): it waits there" in caplog.text
    assert "rank 1 at Net.bn0 (forward): it has sent its statistics there" in caplog.text
