"""The comparison of message versions between ranks, before the first message of a channel.

Two versions of the package may send messages of other lengths or in another order. Other lengths end the process inside
gloo, without an error that Python could report. Therefore the ranks compare an integer through the key-value store.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any, Dict, List, Sequence

from .errors import SyncBatchNormError, await_readers, first_line
from .wire import MESSAGE_VERSION

__all__ = ["VersionCheck"]

_READ_SECONDS = 2.0  # how long a rank that raises an error waits until the other ranks have read its version


class VersionCheck:
    """The message versions of the ranks of one channel.

    The constructor publishes that of this rank.

    Args:
        store: the key-value store of the world.
        label: the prefix of the channel's keys, equal on all ranks.
        rank: the global rank of this process.
        ranks: the global ranks of the channel.
        seconds: how long to wait for the other ranks' versions.
    """

    def __init__(self, store: Any, label: str, rank: int, ranks: Sequence[int], seconds: float) -> None:
        self._store, self._prefix, self._rank, self._ranks = store, f"{label}/version", rank, list(ranks)
        self._seconds, self._version = seconds, MESSAGE_VERSION
        with contextlib.suppress(RuntimeError):  # `compare` raises the error of a store that does not answer
            store.set(f"{self._prefix}/{rank}", str(self._version))

    def compare(self) -> None:
        """Waits for the versions of all ranks, and compares them.

        Raises:
            SyncBatchNormError: if the versions differ, if a rank publishes none in time, or if the store does not
                answer.

        Collectives:
            None, but every rank must have created its channel.
        """
        keys = {rank: f"{self._prefix}/{rank}" for rank in self._ranks}
        versions: Dict[int, str] = {}
        missing: List[int] = []
        try:
            with contextlib.suppress(RuntimeError):  # a timeout: `check` finds the ranks without a version
                self._store.wait(list(keys.values()), timedelta(seconds=self._seconds))
            for rank, key in keys.items():
                if self._store.check([key]):
                    versions[rank] = self._store.get(key).decode(errors="replace")
                else:
                    missing.append(rank)
            if any(version != str(self._version) for version in versions.values()):
                await_readers(self._store, self._prefix, self._rank, versions, _READ_SECONDS)
        except RuntimeError as error:
            raise SyncBatchNormError(
                f"expected the message versions of all ranks in the key-value store (got {first_line(error)} on rank "
                f"{self._rank}); read the output of the rank that hosts the store first, usually rank 0"
            ) from error
        if any(version != str(self._version) for version in versions.values()):
            found = ", ".join(f"{version} on rank {rank}" for rank, version in sorted(versions.items()))
            raise SyncBatchNormError(
                f"expected one message version of bagua_syncbn_algo on all ranks (got {found}); install the same "
                "version of the package on all ranks"
            )
        if missing:
            raise SyncBatchNormError(
                f"expected the message version {self._version} from all ranks (got none from rank "
                f"{', '.join(map(str, missing))} in {self._seconds:.0f} s); install the same version of "
                "bagua_syncbn_algo on all ranks, if that rank runs one without message versions, or read its output"
            )
