"""A lock that refuses a second thread instead of letting it wait, and a forked process.

A channel may be used by several threads one after the other: on CUDA, autograd runs backward in a thread of its own.
Two threads at once would send the rounds in an order that differs between ranks, so a lock that waits would not help.

A forked process, such as a worker of a ``DataLoader``, has the connections of its parent, but not the threads that
receive from them. It would wait for ever, and disturb the messages of its parent.
"""

from __future__ import annotations

import os
import threading
from typing import Any

from .wire import SyncBatchNormError

__all__ = ["Turns"]


class Turns:
    """A context manager for code that only one thread of this process may run at a time; one thread may nest it."""

    __slots__ = ("_acquire", "_holder", "_process", "_release")

    def __init__(self) -> None:
        lock = threading.RLock()
        self._acquire, self._release, self._holder, self._process = lock.acquire, lock.release, 0, os.getpid()

    def __enter__(self) -> None:
        if os.getpid() != self._process:
            raise SyncBatchNormError(
                f"expected statistics to be exchanged by the process of the rank (got one that was forked from process "
                f"{self._process}, such as a worker of a DataLoader); call eval() on models in forked processes"
            )
        if not self._acquire(False):
            names = {thread.ident: thread.name for thread in threading.enumerate()}
            raise SyncBatchNormError(
                f"expected one thread at a time to exchange statistics (got {threading.current_thread().name} while "
                f"{names.get(self._holder, 'another thread')} waits for a round); run forward and backward of models "
                "that share a process group one after the other, or pass another process_group for each thread"
            )
        self._holder = _get_ident()

    def __exit__(self, *unused: Any) -> None:
        self._release()


_get_ident = threading.get_ident
