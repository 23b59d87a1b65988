"""Process groups that only their members create.

``torch.distributed.new_group`` names a group by a counter. If ranks have created different groups before, or create
different groups at the same time, their names do not match: the ranks hang, or connect to the wrong peers. Here the
name consists of the ranks of the group and the number of groups that these ranks have created together.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import weakref
from collections import Counter
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
import torch.distributed as dist

from .errors import SyncBatchNormError, first_line
from .names import MissingRanksError, agree_on_name

__all__ = [
    "GroupReference",
    "default_group",
    "default_store",
    "group_of",
    "is_destroyed",
    "is_nccl",
    "label_of",
    "member_group",
    "release_group",
    "timeout_of",
    "yield_core",
]

_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # of the groups of `member_group`
_counts: weakref.WeakKeyDictionary[Any, Counter[str]] = weakref.WeakKeyDictionary()  # of other groups, by the world
# Keeps the groups of the current world alive until exit and releases them before the interpreter shuts down: gloo
# aborts the process if a group is destroyed later. Each world has its own list: a destroyed world may be freed after
# the next one has created groups, for example because a DistributedDataParallel still refers to it.
_live_groups: List[Any] = []
_world: Optional[weakref.ref[Any]] = None


class _NoWorld:
    """The key of groups without a world."""


@atexit.register
def _release_all() -> None:
    _live_groups.clear()  # without shutdown, which may wait for ranks that have terminated


def default_group() -> Any:
    """Returns the world's process group, or ``None`` without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_group()


def default_store() -> Any:
    """Returns the key-value store of the world's process group, or ``None`` without one."""
    return None if default_group() is None else dist.distributed_c10d._get_default_store()


def group_of(process_group: Optional[Any]) -> Optional[Any]:
    """Returns the process group of a ``DeviceMesh`` of one dimension; any other argument unchanged.

    Raises:
        TypeError: if the argument is no group, such as a list of ranks.
        ValueError: if the mesh has several dimensions.
    """
    # Looked up, not imported: before torch 2.2 there is no such module, and an object of the class has imported it.
    mesh_class = getattr(sys.modules.get("torch.distributed.device_mesh"), "DeviceMesh", None)
    if mesh_class is None or not isinstance(process_group, mesh_class):
        # A rank that is not in a group has a value of another type, which the first forward refuses.
        others = (None, getattr(getattr(dist, "GroupMember", None), "NON_GROUP_MEMBER", None))
        is_group = all(hasattr(process_group, method) for method in ("rank", "size"))
        if not is_group and not any(process_group is other for other in others):
            raise TypeError(
                f"expected a process group or None as process_group (got {process_group!r}); pass e.g. the result of "
                "torch.distributed.new_group(ranks), which all ranks must call"
            )
        return process_group
    mesh: Any = process_group
    if mesh.ndim != 1:
        names = mesh.mesh_dim_names
        shown = "" if names is None else f" named {', '.join(names)}"
        example = "process_group=mesh.get_group(0)" if names is None else f'process_group=mesh["{names[0]}"]'
        raise ValueError(
            f"expected a DeviceMesh of one dimension as process_group (got {mesh.ndim} dimensions{shown}); pass the "
            f"dimension to normalize over, e.g. {example}"
        )
    return mesh.get_group()


def label_of(group: Any, ranks: Sequence[int], purpose: str) -> str:
    """Returns a prefix for keys in the key-value store: equal on all ranks of a group, different between groups.

    Args:
        group: the group. If it is not one of :func:`member_group`, the calls in this world are counted instead: all
            ranks must make the same ones.
        ranks: the global ranks of the group.
        purpose: distinguishes the keys of different callers for one group.
    """
    name = None if group is None else _names.get(group)
    if name is not None:
        return f"{name}/{purpose}"
    label, world = f"bagua_syncbn/{'_'.join(map(str, ranks))}/{purpose}", default_group()
    counts = _counts.setdefault(_NoWorld if world is None else world, Counter())
    counts[label] += 1
    return f"{label}/{counts[label]}"


def member_group(ranks: Sequence[int], timeout: Optional[timedelta] = None, on_host: bool = False) -> Any:
    """Creates a communicator over ``ranks``: NCCL if the world's group communicates CUDA tensors, else gloo.

    Args:
        ranks: the global ranks of the group, including this rank.
        timeout: the timeout of the collectives; ``None`` for the timeout of the world's group.
        on_host: whether the communicator is for CPU tensors even if the world's group communicates CUDA tensors.

    Returns:
        A bare backend with the methods of a process group. It lives until the world is destroyed or the program ends.
        Keep a weak reference only.

    Raises:
        SyncBatchNormError: if a rank does not arrive before the timeout. The message names it.

    Collectives:
        Every rank of ``ranks`` must call, and no other.
    """
    global _world, _live_groups
    world = default_group()
    if _world is None or _world() is not world:
        _close_groups(_live_groups)
        _world, _live_groups = weakref.ref(world), []
        weakref.finalize(world, _close_groups, _live_groups).atexit = False  # at exit, atexit does it
    members, rank = sorted(ranks), dist.get_rank()
    prefix, limit = f"bagua_syncbn/{'_'.join(map(str, members))}", timeout_of(world) if timeout is None else timeout
    number = members.index(rank)
    group: Any
    try:
        name = agree_on_name(default_store(), prefix, rank, members, limit.total_seconds())
        store = dist.distributed_c10d.PrefixStore(name, default_store())
        if is_nccl(world) and not on_host:
            group = dist.ProcessGroupNCCL(store, number, len(members), _nccl_options(limit, name, members))
        else:
            with _yielding_threads():
                group = dist.ProcessGroupGloo(store, number, len(members), limit)
    except RuntimeError as error:
        raise SyncBatchNormError(_creation_error(members, rank, limit, error)) from error
    _names[group] = name
    _live_groups.append(group)
    return group


def is_destroyed(group: Any) -> bool:
    """Returns whether a group has been freed, or is one of :func:`member_group` whose world has been destroyed.

    Such a group may exist until the next call of :func:`member_group`: other groups of that world keep the world alive.
    """
    return group is None or (_world is not None and _world() is not default_group() and group in _names)


def _creation_error(ranks: Sequence[int], own: int, limit: timedelta, error: BaseException) -> str:
    """Returns the error message for a communicator that could not be created."""
    found, which = "an error", "that of each rank"
    if isinstance(error, MissingRanksError):
        which = f"that of rank {', '.join(map(str, error.ranks))}"
        found = f"{error} in {limit.total_seconds():.0f} s"
    else:
        try:
            default_store().check([f"bagua_syncbn/{own}"])
        except RuntimeError as unreachable:
            found = f"no answer of the key-value store: {first_line(unreachable)}"
            which = "that of the rank that hosts the store, usually rank 0"
    return (
        f"expected ranks {', '.join(map(str, ranks))} to create a communicator together (got {found}); read the output "
        f"of the other ranks first, beginning with {which}. Error on rank {own}: {first_line(error)}"
    )


def release_group(group: Any) -> None:
    """Closes a gloo communicator of :func:`member_group` that no rank uses again; other ranks need not call.

    NCCL's communicators remain until the world is destroyed: their shutdown may wait for other ranks.
    """
    if isinstance(group, getattr(dist, "ProcessGroupGloo", ())):
        _live_groups[:] = [each for each in _live_groups if each is not group]


def _nccl_options(timeout: timedelta, name: str, ranks: Sequence[int]) -> Any:
    """Returns the options of a communicator for statistics.

    Its kernels run on a stream of high priority: they are short, and each layer waits for one. Name and ranks identify
    the communicator in the flight recorder of NCCL, in versions of PyTorch that have these options.
    """
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    for option, value in (
        ("is_high_priority_stream", True),
        ("group_name", name),
        ("global_ranks_in_group", list(ranks)),
    ):
        if hasattr(options, option):
            setattr(options, option, value)
    return options


def _close_groups(groups: List[Any]) -> None:
    """Closes the communicators of a world that has been destroyed, and empties their list."""
    closed = list(groups)
    groups.clear()
    for group in closed:
        if isinstance(group, getattr(dist, "ProcessGroupNCCL", ())) and hasattr(group, "shutdown"):
            with contextlib.suppress(RuntimeError):  # the communicator has failed before
                group.shutdown()


@contextlib.contextmanager
def _yielding_threads() -> Iterator[None]:
    """Makes threads that start in the block yield: a thread that becomes runnable does not preempt another thread.

    While one thread sends, a message of the peer makes gloo's own thread runnable. The connection is locked, so gloo's
    thread retries in a loop. With no more cores than ranks, it has often preempted the sender, which cannot release the
    lock before the scheduler's next tick. In a measurement, a third of all rounds took 2 to 5 ms instead of 0.3 ms.
    """
    # New threads inherit the policy of the calling thread. Linux only.
    policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    if policy is None or policy != os.SCHED_OTHER:  # keeps a policy that the program has set
        yield
        return
    with contextlib.suppress(OSError):  # a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, policy, os.sched_param(0))


# Yields the core to threads that wait for it and do not preempt this thread; see `_yielding_threads`.
yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: None)


def is_nccl(group: Any) -> bool:
    """Returns whether ``group`` communicates CUDA tensors: CUDA is available and the backend is not gloo."""
    if not torch.cuda.is_available():
        return False
    try:
        # Not `== "nccl"`: the backend of a group for CPU and CUDA tensors has another name.
        return str(dist.get_backend(group)) != "gloo"
    except (RuntimeError, ValueError, AssertionError, TypeError, KeyError):
        return str(group.name()) != "gloo"  # a bare backend, unknown to torch.distributed


def timeout_of(group: Any) -> timedelta:
    """Returns the timeout of a group's collectives; PyTorch's default if the group does not expose its timeout."""
    for device in ("cuda", "cpu"):
        try:
            timeout: timedelta = group._get_backend(torch.device(device)).options._timeout
            return timeout
        except (AttributeError, RuntimeError):
            continue
    return dist.default_pg_timeout if hasattr(dist, "default_pg_timeout") else timedelta(minutes=30)


class GroupReference:
    """The process group of a layer that is copied. ``deepcopy`` keeps the same group; ``pickle`` raises an error.

    Args:
        group: the process group.
        name: the name of the layer, for the error.
    """

    def __init__(self, group: Any, name: str) -> None:
        self.group, self._name = group, name

    def __deepcopy__(self, memo: Dict[int, Any]) -> GroupReference:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            f"expected a layer without a process group in pickle (got {self._name or 'SyncBatchNorm'} with a process "
            "group, which exists in this process only); save state_dict(), or set process_group = None first"
        )
