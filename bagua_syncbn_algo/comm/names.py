"""The agreement of the members of a new group on a name that no other group has.

The key-value store may be older than the world. ``torchrun`` may use one store for all attempts of a job, and then keys
of processes that have ended are still there. A number of the group is not enough: in an attempt that failed, the ranks
have created different numbers of groups. A process that joins ranks of a former world has created none.
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any, Dict, List, Sequence

__all__ = ["MissingRanksError", "agree_on_name"]

_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02  # seconds between two looks at the store


class MissingRanksError(RuntimeError):
    """Ranks did not take part in an agreement in time.

    Attributes:
        ranks: these ranks.
    """

    def __init__(self, ranks: List[int]) -> None:
        super().__init__(f"rank {', '.join(map(str, ranks))} did not arrive")
        self.ranks = ranks


def agree_on_name(store: Any, prefix: str, rank: int, ranks: Sequence[int], seconds: float) -> str:
    """Returns the same new name on all ranks.

    Each rank publishes a random token. The lowest rank offers a name together with the tokens that it has read. A rank
    accepts the offer with its own token; a token of a process that has ended is never accepted. The name is valid when
    all ranks have accepted it.

    Args:
        store: the key-value store; it may contain keys of former calls, also of calls that failed.
        prefix: the beginning of the name.
        rank: this rank.
        ranks: all ranks, ascending.
        seconds: how long to wait for the other ranks.

    Raises:
        MissingRanksError: if a rank did not call in time.
        RuntimeError: if the store does not answer.

    Collectives:
        None over a process group. Every rank of ``ranks`` must call.
    """
    token = uuid.uuid4().hex
    if len(ranks) == 1:
        return f"{prefix}/{token}"
    deadline = time.monotonic() + seconds
    store.set(f"{prefix}/token/{rank}", token)
    if rank == ranks[0]:
        return _offer(store, prefix, ranks, deadline)
    return _accept(store, prefix, rank, ranks, token, deadline)


def _offer(store: Any, prefix: str, ranks: Sequence[int], deadline: float) -> str:
    keys = {str(other): f"{prefix}/token/{other}" for other in ranks[1:]}
    tokens: Dict[str, str] = {}
    name, pause = "", _SHORTEST_PAUSE
    while True:
        found = {other: store.get(key).decode() for other, key in keys.items() if store.check([key])}
        if found != tokens or not name:
            tokens, name = found, f"{prefix}/{uuid.uuid4().hex}"
            store.set(f"{prefix}/offer", json.dumps([name, tokens]))
        if store.check([f"{name}/accepted/{other}" for other in ranks[1:]]):
            store.set(f"{name}/valid", "")
            return name
        if time.monotonic() > deadline:
            raise MissingRanksError(_without(store, name, ranks[1:]))
        pause = _wait(pause)


def _accept(store: Any, prefix: str, rank: int, ranks: Sequence[int], token: str, deadline: float) -> str:
    name, pause = "", _SHORTEST_PAUSE
    while True:
        if store.check([f"{prefix}/offer"]):
            offered, tokens = json.loads(store.get(f"{prefix}/offer"))
            if tokens.get(str(rank)) == token and offered != name:
                name = offered
                store.set(f"{name}/accepted/{rank}", "")
        if name and store.check([f"{name}/valid"]):
            return name
        if time.monotonic() > deadline:
            missing = _without(store, name, ranks[1:]) if name else list(ranks[:1])
            raise MissingRanksError(missing or list(ranks[:1]))
        pause = _wait(pause)


def _without(store: Any, name: str, ranks: Sequence[int]) -> List[int]:
    """Returns the ranks that have not accepted ``name``."""
    return [other for other in ranks if not store.check([f"{name}/accepted/{other}"])]


def _wait(pause: float) -> float:
    time.sleep(pause)
    return min(2 * pause, _LONGEST_PAUSE)
