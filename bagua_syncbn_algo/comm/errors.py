"""Errors of collectives, and the positions that failing ranks publish in the key-value store for each other."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence

__all__ = [
    "Positions",
    "SyncBatchNormError",
    "await_readers",
    "describe_failure",
    "exchange_positions",
    "explaining",
    "first_line",
]

# A rank ends at most 3 seconds after the timeout of a collective; the times below are parts of these seconds.
_DESCRIBE_SECONDS = 1.8  # how long a failing rank waits until the other ranks have published their positions
_READ_SECONDS = 0.6  # how long a failing rank waits until the other ranks have read its position
_STORE_SECONDS = 0.8  # how much longer than the first it waits for a store that does not answer


class SyncBatchNormError(RuntimeError):
    """An exchange of statistics failed. The message names the layer and the rank."""


class Positions(NamedTuple):
    """What the ranks have published about one failure. Ranks are global ranks."""

    known: Dict[int, str]  # by rank, in words
    earlier: Dict[int, str]  # the positions of earlier failures, of ranks that have published nothing for this one
    unreachable: str  # why the store does not answer; empty if it does


def exchange_positions(
    where: str, rank: int, ranks: Sequence[int], label: str, sequence: int, store: Optional[Any]
) -> Positions:
    """Publishes this rank's position, and waits a few seconds for those of the other ranks.

    Args:
        where: the position of this rank, in words.
        rank: the global rank of this process.
        ranks: the global ranks of the group.
        label: the prefix of the group's keys in the store.
        sequence: the number of the collective that failed, equal on all ranks. An earlier failure has other keys.
        store: the key-value store; ``None`` without one.
    """
    found = Positions({rank: where}, {}, "")
    if store is None:
        return found
    reasons: List[str] = []
    has_answered = threading.Event()

    def ask() -> None:
        try:
            store.set(f"{label}/latest/{rank}", f"{sequence}\n{where}")
            store.set(f"{label}/{sequence}/{rank}", where)
            keys = {other: f"{label}/{sequence}/{other}" for other in ranks if other != rank}
            with contextlib.suppress(RuntimeError):  # a rank has not published in time, or the store does not answer
                store.wait(list(keys.values()), timedelta(seconds=_DESCRIBE_SECONDS))
            for other, key in keys.items():
                latest = f"{label}/latest/{other}"
                if store.check([key]):  # raises an error if the store does not answer
                    found.known[other] = store.get(key).decode()
                elif store.check([latest]):
                    number, text = store.get(latest).decode().split("\n", 1)
                    (found.known if int(number) > sequence else found.earlier)[other] = text
            has_answered.set()
            await_readers(store, f"{label}/{sequence}", rank, found.known)
        except Exception as error:  # it must not replace the error of the collective
            reasons.append(f"{type(error).__name__}: {first_line(error)}")

    # In a thread: a store whose process is stopped never answers.
    thread = threading.Thread(target=ask, name="syncbn-positions", daemon=True)
    thread.start()
    thread.join(_DESCRIBE_SECONDS + _STORE_SECONDS)
    if not has_answered.is_set() and not reasons:
        reasons.append("no answer")
    # Copies: the thread may go on.
    return Positions(dict(found.known), dict(found.earlier), reasons[0] if reasons else "")


def await_readers(store: Any, prefix: str, rank: int, others: Iterable[int], seconds: Optional[float] = None) -> None:
    """Waits, for a short time, until other ranks have read what this rank has published.

    The store may end with the process of this rank, which is about to raise an error.

    Args:
        store: the key-value store.
        prefix: the prefix of the keys that mark a rank as a reader.
        rank: the global rank of this process.
        others: the global ranks that read; this rank is ignored.
        seconds: how long to wait; ``None`` for the time after a failed collective.
    """
    limit = timedelta(seconds=_READ_SECONDS if seconds is None else seconds)
    store.set(f"{prefix}/read/{rank}", "")
    with contextlib.suppress(RuntimeError):
        store.wait([f"{prefix}/read/{other}" for other in others if other != rank], limit)


def describe_failure(
    where: str,
    error: BaseException,
    rank: int,
    ranks: Sequence[int],
    label: str,
    sequence: int,
    store: Optional[Any],
    purpose: str = "exchange statistics",
) -> str:
    """Returns the error message of a failed collective, with the position of each rank that has published it.

    Args:
        where: the position of this rank, in words.
        error: the error of the collective.
        rank: the global rank of this process.
        ranks: the global ranks of the group.
        label: the prefix of the group's keys in the store.
        sequence: the number of the collective in the group.
        store: the key-value store in which the ranks publish their positions; ``None`` without one.
        purpose: what the ranks do in the collective.
    """
    positions = exchange_positions(where, rank, ranks, label, sequence, store)
    known = ", ".join(f"rank {other} at {position}" for other, position in sorted(positions.known.items()))
    missing = [other for other in ranks if other not in positions.known]
    absent = ""
    if positions.unreachable:
        absent = (
            f"; the positions of the other ranks are unknown, because the key-value store cannot be reached "
            f"({positions.unreachable}): its process, usually that of rank 0, has terminated or is stopped"
        )
    elif missing and store is None:
        absent = f"; the positions of rank {_listed(missing)} are unknown, because the group has no key-value store"
    elif missing:
        earlier = [f"rank {other} failed before at {text}" for other, text in sorted(positions.earlier.items())]
        told = f" ({', '.join(earlier)})" if earlier else ""
        absent = f"; rank {_listed(missing)} did not arrive: it terminated or runs other code{told}"
    which = f"rank {_listed(missing)}" if missing and not positions.unreachable and store is not None else "each rank"
    return (
        f"expected all {len(ranks)} ranks to {purpose} at {where} (got {known}{absent}); "
        f"read the output of {which} first. Error of the collective on rank {rank}: {error}"
    )


@contextlib.contextmanager
def explaining(
    where: str, purpose: str, rank: int, ranks: Sequence[int], label: str, sequence: int, store: Optional[Any]
) -> Iterator[None]:
    """Raises the errors of collectives in the block again, with the place, the ranks and their positions.

    Args:
        where: the position of this rank, in words.
        purpose: what the ranks do in the block.
        rank: the global rank of this process.
        ranks: the global ranks of the group.
        label: the prefix of the group's keys in the store.
        sequence: the number of the collective in the group.
        store: the key-value store; ``None`` without one.

    Raises:
        SyncBatchNormError: for every ``RuntimeError`` of the block that is not one already.
    """
    start = time.monotonic()
    try:
        yield
    except SyncBatchNormError:
        raise
    except RuntimeError as error:
        waited = time.monotonic() - start
        text = describe_failure(where, error, rank, ranks, label, sequence, store, purpose)
        raise SyncBatchNormError(f"{text} (after {waited:.1f} s)") from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text: those of PyTorch's native code continue with a stack trace."""
    lines = str(error).splitlines()
    return lines[0] if lines else ""


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
