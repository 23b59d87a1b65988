"""Process groups of one's own, made by their members alone.

``torch.distributed.new_group`` names a group by a counter: ranks that have made different groups before, or make
different ones at the same time, then meet under the wrong name and hang, or are wired to each other's peers. Here the
name is made of the ranks and of how many groups these ranks have made together.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections import Counter
from datetime import timedelta
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist

__all__ = ["default_group", "default_store", "is_nccl", "member_group", "timeout_of", "yield_core"]

_made: Counter[Tuple[int, ...]] = Counter()
# Held until exit, and let go before the interpreter ends: a gloo group that is destroyed after it aborts the process.
_alive: List[Any] = []
_world: Optional[weakref.ref[Any]] = None
atexit.register(_alive.clear)


def default_group() -> Any:
    """Returns the world's process group, or ``None`` without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_group()


def default_store() -> Any:
    """Returns the key-value store of the world's process group, or ``None`` without one."""
    return None if default_group() is None else dist.distributed_c10d._get_default_store()


def member_group(ranks: Sequence[int], timeout: Optional[timedelta] = None, on_host: bool = False) -> Any:
    """Makes a communicator over ``ranks``, on NCCL where the world is on CUDA, else on gloo.

    Args:
        ranks: global ranks, this one among them.
        timeout: of its collectives; ``None`` for that of the world's group.
        on_host: whether it carries CPU tensors in every case.

    Returns:
        A bare backend with the methods of a process group. Hold it weakly; it lives until the program ends or another
        world is initialised.

    Collectives:
        Every rank of ``ranks`` must call, and no other.
    """
    global _world
    world = default_group()
    if _world is None or _world() is not world:
        _world = weakref.ref(world)
        _made.clear()
        _alive.clear()
    members = tuple(sorted(ranks))
    _made[members] += 1
    name = f"bagua_syncbn/{'_'.join(map(str, members))}/{_made[members]}"
    store = dist.distributed_c10d.PrefixStore(name, default_store())
    limit = timeout_of(world) if timeout is None else timeout
    rank = members.index(dist.get_rank())
    group: Any
    if is_nccl(world) and not on_host:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        group = dist.ProcessGroupNCCL(store, rank, len(members), options)
    else:
        with _yielding_threads():
            group = dist.ProcessGroupGloo(store, rank, len(members), limit)
    _alive.append(group)
    return group


@contextlib.contextmanager
def _yielding_threads() -> Iterator[None]:
    """Lets the threads that start in the block yield: none preempts another thread when it wakes.

    While one thread sends, gloo's own thread, woken by what the peer has sent, finds the connection locked, tries again
    at once and goes on trying. With no more cores than ranks it has often interrupted the very sender, which gets to
    unlock at the scheduler's next tick: a third of all rounds took 2 to 5 ms in place of 0.3 ms (seen).
    """
    # Of the calling thread, whose policy those that it starts inherit; on Linux only.
    policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    if policy is None or policy != os.SCHED_OTHER:  # whoever chose another one has a reason
        yield
        return
    with contextlib.suppress(OSError):  # a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(0))


# Lets threads go first that wait for this core, and would not take it: those above.
yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: None)


def is_nccl(group: Any) -> bool:
    """Whether a group communicates CUDA tensors by itself; one for both kinds of device is named neither way."""
    if not torch.cuda.is_available():
        return False
    try:
        return str(dist.get_backend(group)) != "gloo"
    except (RuntimeError, ValueError, AssertionError, TypeError, KeyError):
        return str(group.name()) != "gloo"  # a bare backend, unknown to torch.distributed


def timeout_of(group: Any) -> timedelta:
    """Returns how long a group's collectives wait: what it says, else PyTorch's default."""
    for device in ("cuda", "cpu"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
            return timeout
        except (AttributeError, RuntimeError):
            continue
    return dist.default_pg_timeout if hasattr(dist, "default_pg_timeout") else timedelta(minutes=30)
