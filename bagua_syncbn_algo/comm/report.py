"""What a rank reports when an exchange fails: to the other ranks, and in its own error message."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import Any, List, Optional

__all__ = ["describe_failure", "first_difference", "reporting_errors"]

_DESCRIBE_SECONDS = 3.0  # how long a failing rank waits for the others to publish their positions


class reporting_errors:  # noqa: N801  # a context manager; contextlib's costs a microsecond, four times a layer
    """Reports an exception in the block to the other ranks before this rank raises it.

    Args:
        channel: the :class:`~.channel.Channel` whose ranks are told.
        point: the sync point of the block.
        phase: ``FORWARD`` or ``BACKWARD``.
    """

    __slots__ = ("_channel", "_phase", "_point")

    def __init__(self, channel: Any, point: Any, phase: int) -> None:
        self._channel, self._point, self._phase = channel, point, phase

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Optional[BaseException], trace: Any) -> None:
        if isinstance(error, Exception):
            self._channel.fail(self._point, self._phase, error)


def describe_failure(
    where: str, error: BaseException, rank: int, world_size: int, label: str, store: Optional[Any]
) -> str:
    """Returns the message of a failed collective: the position of each rank, as far as the ranks can tell.

    Args:
        where: the position of this rank, in words.
        error: the error of the collective.
        rank: of this process in the channel.
        world_size: ranks of the channel.
        label: names the channel in the store.
        store: key-value store through which the ranks publish their positions; ``None`` without one.
    """
    last = {rank: where}
    # No error in here may replace the collective's own error: the store may belong to the process that ended.
    with contextlib.suppress(Exception):
        if store is not None:
            store.set(f"{label}/{rank}", where)
            deadline = time.monotonic() + _DESCRIBE_SECONDS
            for other in set(range(world_size)) - {rank}:
                key = f"{label}/{other}"
                with contextlib.suppress(RuntimeError):  # the other rank has not published in time
                    store.wait([key], timedelta(seconds=max(0.05, deadline - time.monotonic())))
                    last[other] = store.get(key).decode()
    known = ", ".join(f"rank {other} at {place}" for other, place in sorted(last.items()))
    silent = [str(other) for other in range(world_size) if other not in last]
    absent = f"; rank {', '.join(silent)} never arrived: it died or runs other code" if silent else ""
    return (
        f"expected all {world_size} ranks to exchange statistics at {where} (got {known}{absent}); "
        f"look at that rank's own output first. The collective said: {error}"
    )


def first_difference(texts: List[str]) -> str:
    """Returns an error message that names the first line in which the ranks' texts differ."""
    reference = texts[0].splitlines()
    for rank, text in enumerate(texts):
        lines = text.splitlines()
        for index in range(max(len(reference), len(lines))):
            ours = reference[index] if index < len(reference) else "nothing"
            theirs = lines[index] if index < len(lines) else "nothing"
            if ours != theirs:
                return (
                    f"expected the same synchronized layers and rounds on every rank (got {len(reference)} on rank "
                    f"0, {len(lines)} on rank {rank}; the first difference is number {index}: {ours} on rank 0, "
                    f"{theirs} on rank {rank}); build and convert the same model on every rank, with the same options"
                )
    raise AssertionError("digests differ but texts do not")
