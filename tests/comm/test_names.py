"""Tests of the agreement on a name of a new group, on threads over one real store."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from typing import Any, Dict, List

import pytest
import torch.distributed as dist

from bagua_syncbn_algo.comm.names import MissingRanksError, agree_on_name

ALL = [2, 5, 6]


def agree(store: Any, ranks: List[int], seconds: float = 5.0, delay: float = 0.0) -> Dict[int, Any]:
    """Runs the agreement of ``ALL`` on ``ranks`` only; returns the name or the error of each."""
    found: Dict[int, Any] = {}

    def run(rank: int) -> None:
        time.sleep(delay * ALL.index(rank))
        client = dist.TCPStore("127.0.0.1", store.port, None, False, timedelta(seconds=20), wait_for_workers=False)
        try:
            found[rank] = agree_on_name(client, "test", rank, ALL, seconds)
        except RuntimeError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def new_store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20), wait_for_workers=False)


@pytest.mark.parametrize("delay", [0.0, 0.05, -0.05])
def test_names_are_equal_on_all_ranks_and_new(delay: float) -> None:
    """Catches a rank that takes the name of an earlier group, or an offer that another rank does not accept."""
    store, names = new_store(), set()
    for _ in range(4):
        found = agree(store, ALL, delay=abs(delay)) if delay >= 0 else late_leader(store)
        assert len(set(found.values())) == 1, found
        names.update(found.values())
    assert len(names) == 4


def late_leader(store: Any) -> Dict[int, Any]:
    """The rank that offers the name comes last."""
    found: Dict[int, Any] = {}
    others = threading.Thread(target=lambda: found.update(agree(store, [5, 6])), daemon=True)
    others.start()
    time.sleep(0.05)
    found.update(agree(store, [2]))
    others.join(30)
    return found


@pytest.mark.parametrize("present", [[2], [5], [2, 5], [5, 6]], ids=str)
def test_an_attempt_after_one_that_failed(present: List[int]) -> None:
    """Catches a count of groups in the store: ranks that were there would wait for another number than the others."""
    store = new_store()
    missing = [rank for rank in ALL if rank not in present]
    for error in agree(store, present, seconds=0.3).values():
        assert isinstance(error, MissingRanksError)
        assert set(error.ranks) <= set(missing) and str(error).endswith("did not arrive")
    found = agree(store, ALL)
    assert len(set(found.values())) == 1 and all(isinstance(name, str) for name in found.values()), found


def test_a_rank_alone() -> None:
    """Catches a rank that waits for itself, and a name that is not new."""
    store = new_store()
    assert agree_on_name(store, "test", 3, [3], 1.0) != agree_on_name(store, "test", 3, [3], 1.0)
