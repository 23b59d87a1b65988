"""Error reports of failed exchanges, to the other ranks and in the error message of this rank."""

from __future__ import annotations

import contextlib
import time
from datetime import timedelta
from typing import Any, List, Optional

__all__ = ["describe_failure", "first_difference", "reporting_errors"]

_DESCRIBE_SECONDS = 3.0  # how long a failing rank waits until the other ranks have published their positions


class reporting_errors:  # noqa: N801  # a contextlib generator would cost 1 µs more, four times per layer
    """A context manager that reports an exception in its block to the other ranks. The exception propagates.

    Args:
        channel: the :class:`~.channel.Channel` of the ranks that receive the report.
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
    """Returns the error message of a failed collective, with the position of each rank that has published it.

    Args:
        where: the position of this rank, in words.
        error: the error of the collective.
        rank: the number of this rank in the channel.
        world_size: the number of ranks in the channel.
        label: the prefix of the channel's keys in the store.
        store: the key-value store in which the ranks publish their positions; ``None`` without one.
    """
    positions = {rank: where}
    # An error of the store must not replace the error of the collective: the store's process may have terminated.
    with contextlib.suppress(Exception):
        if store is not None:
            store.set(f"{label}/{rank}", where)
            deadline = time.monotonic() + _DESCRIBE_SECONDS
            for other in set(range(world_size)) - {rank}:
                key = f"{label}/{other}"
                with contextlib.suppress(RuntimeError):  # the other rank has not published in time
                    store.wait([key], timedelta(seconds=max(0.05, deadline - time.monotonic())))
                    positions[other] = store.get(key).decode()
    known = ", ".join(f"rank {other} at {position}" for other, position in sorted(positions.items()))
    missing = [str(other) for other in range(world_size) if other not in positions]
    absent = f"; rank {', '.join(missing)} did not arrive: it terminated or runs other code" if missing else ""
    return (
        f"expected all {world_size} ranks to exchange statistics at {where} (got {known}{absent}); "
        f"read the output of that rank first. Error of the collective: {error}"
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
