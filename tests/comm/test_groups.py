"""Tests of the package's own process groups and the threads that they start."""

from __future__ import annotations

import gc
import os
import weakref
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes

from bagua_syncbn_algo import SyncBatchNorm
from bagua_syncbn_algo.comm import groups

linux = pytest.mark.skipif(not hasattr(os, "sched_getscheduler"), reason="the platform has no scheduling policies")


def _policies(rank: int, own_policy: int) -> Any:
    os.sched_setscheduler(0, own_policy, os.sched_param(0))
    dist.init_process_group("gloo")
    before = set(os.listdir("/proc/self/task"))
    group = groups.member_group(range(2))
    started = set(os.listdir("/proc/self/task")) - before
    policies = {os.sched_getscheduler(int(thread)) for thread in started}
    group.barrier().wait()
    after = os.sched_getscheduler(0)
    dist.destroy_process_group()
    return len(started) > 0, policies, after


@linux
@pytest.mark.multirank
def test_threads_of_a_group_give_way_and_ours_does_not() -> None:
    """Catches gloo threads that preempt the sending thread and then spin, and a caller that keeps their policy."""
    assert run_processes(2, _policies, os.SCHED_OTHER) == [(True, {os.SCHED_BATCH}, os.SCHED_OTHER)] * 2


@linux
@pytest.mark.multirank
def test_a_policy_of_the_users_own_stays() -> None:
    """Catches threads that do not inherit SCHED_IDLE from a program that the user runs with this policy."""
    assert run_processes(2, _policies, os.SCHED_IDLE) == [(True, {os.SCHED_IDLE}, os.SCHED_IDLE)] * 2


@linux
def test_a_group_is_made_where_policies_may_not_be_set(mocker: Any) -> None:
    """Catches an error in a container that forbids scheduling policies."""
    mocker.patch.object(groups.os, "sched_setscheduler", side_effect=PermissionError("not in this container"))
    with groups._yielding_threads():
        made = True
    assert made


def test_options_of_nccl_communicators(mocker: Any) -> None:
    """Catches a communicator without a name in the flight recorder, or one whose kernels wait behind convolutions."""
    options = SimpleNamespace(_timeout=None, is_high_priority_stream=False, group_name="", global_ranks_in_group=[])
    mocker.patch.object(dist, "ProcessGroupNCCL", SimpleNamespace(Options=lambda: options), create=True)
    groups._nccl_options(timedelta(seconds=5), "bagua_syncbn/0_2/1", (0, 2))
    assert options == SimpleNamespace(
        _timeout=timedelta(seconds=5),
        is_high_priority_stream=True,
        group_name="bagua_syncbn/0_2/1",
        global_ranks_in_group=[0, 2],
    )


def _closed_with_the_world(rank: int, path: str) -> Any:
    """Creates statistics groups in two worlds, and counts threads after each is destroyed."""
    counts = []
    for world in range(3):
        store = dist.FileStore(f"{path}-{world}", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        for _ in range(3):
            groups.member_group(range(2)).barrier().wait()
        dist.barrier()
        dist.destroy_process_group()
        gc.collect()
        counts.append((len(os.listdir("/proc/self/task")), len(groups._live_groups)))
    return counts


@linux
@pytest.mark.multirank
def test_groups_are_closed_with_their_world(tmp_path: Path) -> None:
    """Catches communicators that outlive their world, with their threads and connections."""
    for counts in run_processes(2, _closed_with_the_world, str(tmp_path / "store")):
        assert [live for _, live in counts] == [0, 0, 0]
        assert counts[2][0] <= counts[0][0]


def _frees_an_earlier_world(rank: int, path: str) -> Any:
    """Creates a group in a second world, frees the first one, and uses the group."""
    worlds = []
    for number in range(2):
        store = dist.FileStore(f"{path}-{number}", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        group = weakref.ref(groups.member_group(range(2)))
        worlds.append(groups.default_group())
        if number == 0:
            dist.barrier()
            dist.destroy_process_group()
    worlds.clear()
    gc.collect()
    alive = group() is not None
    dist.barrier()
    return alive


@pytest.mark.multirank
def test_an_earlier_world_closes_no_groups_of_the_current_one(tmp_path: Path) -> None:
    """Catches groups that are closed when an earlier world is freed, which a wrapper of a model has referenced."""
    assert run_processes(2, _frees_an_earlier_world, str(tmp_path / "store")) == [True, True]


def _host_channel(rank: int) -> Any:
    dist.init_process_group("gloo")
    from bagua_syncbn_algo.comm import transport

    created = []
    original = transport.member_group
    transport.member_group = lambda ranks, limit, on_host: created.append(on_host) or original(ranks, limit, on_host)
    transport.is_nccl = lambda group: not created  # the world communicates by NCCL, its own groups by gloo
    layer = SyncBatchNorm(3)
    output = layer(torch.full((2, 3), float(rank)))
    dist.destroy_process_group()
    return created, float(output.detach().sum())


@pytest.mark.multirank
def test_a_model_on_the_cpu_gets_a_communicator_for_the_cpu() -> None:
    """Catches NCCL for layers on the CPU of a machine with GPUs."""
    assert [created for created, _ in run_processes(2, _host_channel)] == [[True], [True]]
