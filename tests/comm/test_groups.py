"""Tests of the package's own process groups and the threads that they start."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch.distributed as dist
from ranks import run_processes

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
