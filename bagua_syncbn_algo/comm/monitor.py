"""A thread that reports late rounds of CUDA channels before NCCL's watchdog ends the process.

On NCCL, waiting for a round does not block the host, and the watchdog ends the process after the timeout without the
name of a layer. This thread looks at the latest round of each channel once a second. If the round is late, the thread
asks all ranks for their positions through the key-value store, and logs which rank is where. Each rank's thread answers
for its rank, also if that rank is not late.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import weakref
from typing import Any, Dict, List, Optional

from ..compat import own_client

__all__ = ["RoundMonitor"]

logger = logging.getLogger(__name__)

_INTERVAL = 1.0  # seconds between two looks at the latest round
_LATE_SHARE = 0.5  # of the timeout, after which a round is late
_ANSWER_SHARE = 0.75  # of the timeout, after which a late round is reported without the ranks that have not answered


_monitors: weakref.WeakSet[RoundMonitor] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for monitor in list(_monitors):
        monitor.stop()


class RoundMonitor:
    """Watches the rounds of one channel.

    Args:
        label: the prefix of the channel's keys in the store; the same on all ranks.
        rank: the number of this rank in the channel.
        ranks: the global ranks of the channel.
        store: the key-value store of the world.
        timeout: seconds after which the backend ends the process.
        interval: seconds between two looks at the latest round.
    """

    def __init__(
        self, label: str, rank: int, ranks: List[int], store: Any, timeout: float, interval: float = _INTERVAL
    ) -> None:
        self._prefix, self._rank, self._ranks, self._store = f"{label}/late", rank, ranks, own_client(store)
        self._late, self._last, self._interval = timeout * _LATE_SHARE, timeout * _ANSWER_SHARE, interval
        self._where, self._since = "the start", time.monotonic()
        self._work: Any = None
        self._rounds = self._asked = self._reported = 0
        self._answered = ""
        self._stopped = threading.Event()
        _monitors.add(self)
        self._thread: Optional[threading.Thread] = None

    def watch(self, where: str, work: Any) -> None:
        """Records the latest round; the thread starts with the first one.

        Args:
            where: the layer and the phase, in words.
            work: the collective: an object with ``is_completed()``; ``None`` for a round that is not watched.
        """
        self._where, self._work, self._since = where, work, time.monotonic()
        self._rounds += 1
        if self._thread is None:
            # A weak reference: the thread ends with the monitor.
            arguments = (weakref.ref(self), self._stopped, self._interval)
            self._thread = threading.Thread(target=_run, args=arguments, name="syncbn-monitor", daemon=True)
            self._thread.start()

    def publish_error(self, text: str) -> None:
        """Publishes an error of this rank: the other ranks may wait for the device before they read its message."""
        with contextlib.suppress(Exception):  # the store ends with its process
            self._store.set(f"{self._prefix}/error", f"rank {self._ranks[self._rank]} at {text}")

    def stop(self) -> None:
        """Ends the thread."""
        self._stopped.set()

    def __del__(self) -> None:
        self._stopped.set()

    def look(self) -> None:
        """Looks at the latest round once; the thread calls this method.

        Collectives:
            None.
        """
        round_, work, waited = self._rounds, self._work, time.monotonic() - self._since
        late = work is not None and waited > self._late and not _is_completed(work)
        if late and self._asked != round_:
            self._asked = round_
            self._store.set(f"{self._prefix}/asked", f"{self._rank}.{round_}")
        question = self._question()
        if question != self._answered:
            state = "waits there" if late else "has sent its statistics there and runs other code"
            self._store.set(
                f"{self._prefix}/{self._rank}", f"{question}\n{self._where}: it {state}, {waited:.0f} s ago"
            )
            self._answered = question
        elif late and self._reported != round_:
            positions = self._positions(question)
            # A rank of a busy machine answers late: "does not answer" needs more than one interval.
            if len(positions) == len(self._ranks) or waited > self._last:
                self._reported = round_
                self._log(positions, waited)

    def _question(self) -> str:
        """Returns the latest question of any rank; an answer to an earlier one may be that of a terminated rank."""
        key = f"{self._prefix}/asked"
        return self._store.get(key).decode() if self._store.check([key]) else ""

    def _positions(self, question: str) -> Dict[int, str]:
        """Returns the position of each global rank that has answered the question."""
        positions: Dict[int, str] = {}
        for index, rank in enumerate(self._ranks):
            key = f"{self._prefix}/{index}"
            if self._store.check([key]):
                answered, position = self._store.get(key).decode().split("\n")
                if answered == question:
                    positions[rank] = position
        return positions

    def _log(self, positions: Dict[int, str], waited: float) -> None:
        known = "; ".join(f"rank {rank} at {where}" for rank, where in sorted(positions.items()))
        missing = [str(rank) for rank in self._ranks if rank not in positions]
        key = f"{self._prefix}/error"
        error = f"; an error of {self._store.get(key).decode()}" if self._store.check([key]) else ""
        absent = f"; rank {', '.join(missing)} does not answer: it terminated or is stopped" if missing else ""
        logger.error(
            "expected all %d ranks to exchange statistics at %s (got nothing for %.0f s; %s%s%s); read the output of "
            "the rank that is elsewhere or does not answer: the backend will end this process after its timeout",
            len(self._ranks),
            self._where,
            waited,
            known,
            absent,
            error,
        )


def _is_completed(work: Any) -> bool:
    try:
        return bool(work.is_completed())
    except RuntimeError:  # the collective has failed; its own error is reported elsewhere
        return True


def _run(reference: weakref.ref[RoundMonitor], stopped: threading.Event, interval: float) -> None:
    while not stopped.wait(interval):
        monitor = reference()
        if monitor is None:
            return
        try:
            monitor.look()
        except Exception:  # the store has ended with its process; a monitor must not end the training
            return
        del monitor
