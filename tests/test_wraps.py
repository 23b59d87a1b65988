"""Tests of programs that wrap many models, or one model many times: their communicators are reused or closed."""

from __future__ import annotations

import gc
import os
from typing import List, Tuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bagua_syncbn_algo import SyncBatchNormAlgorithm, SyncBatchNormError, bagua, convert_sync_batchnorm
from bagua_syncbn_algo.comm.wire import put_bounded
from tests.ranks import run_processes


def fresh_model() -> nn.Module:
    torch.manual_seed(3)
    return convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)))


def step(model: nn.Module, rank: int) -> float:
    output = model(torch.arange(12.0).view(4, 3).sin() * (1 + rank))
    output.square().sum().backward()
    return float(output.detach().sum())


def resources() -> Tuple[int, int]:
    """Returns the numbers of descriptors and of threads of this process."""
    for _ in range(4):  # a parameter and its autograd node are freed one after the other
        gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def wrap_often(rank: int, wraps: int, new_models: bool, normalize_over: str) -> List[Tuple[int, int]]:
    bagua.init_process_group()
    found, outputs, model = [], [], fresh_model()
    kept = []
    for wrap in range(wraps):
        if new_models:
            model = fresh_model()
            if wrap % 7 == rank:
                kept.append(model)  # the ranks free their models at different times
            kept = kept[-2:]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        model.with_bagua([optimizer], SyncBatchNormAlgorithm(normalize_over=normalize_over))
        outputs.append(step(model, rank))
        optimizer.step()
        if wrap in (3, wraps - 1):
            found.append(resources())
    assert len(set(outputs)) == 1  # the statistics of a batch do not depend on earlier wraps
    return found


@pytest.mark.multirank
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts in /proc")
@pytest.mark.parametrize("new_models", [False, True])
@pytest.mark.parametrize("normalize_over", ["world", "rank"])
def test_wraps_keep_no_descriptors_and_threads(new_models: bool, normalize_over: str) -> None:
    """Catches communicators for each wrap, of which 200 reach the limit of 1,024 descriptors.

    Threads may differ by those of two models that are not freed yet.
    """
    for (first_files, first_threads), (files, threads) in run_processes(2, wrap_often, 60, new_models, normalize_over):
        assert files <= first_files + 2 and threads <= first_threads + 4


def wrap_after_an_error(rank: int) -> Tuple[str, float, float]:
    bagua.init_process_group()
    models = [fresh_model(), fresh_model()]
    algorithm = SyncBatchNormAlgorithm(timeout=3)
    for model in models:
        model.with_bagua([torch.optim.SGD(model.parameters(), lr=0.0)], algorithm)
    alone = [step(models[0], rank), step(models[1], rank)]
    message = ""
    if rank == 0:  # a rank that never arrives: gloo closes the connections
        try:
            models[0](torch.ones(4, 3))
        except SyncBatchNormError as error:
            message = str(error)
    dist.barrier()
    fresh = fresh_model()
    fresh.with_bagua([torch.optim.SGD(fresh.parameters(), lr=0.0)], algorithm)
    return message, alone[0], step(fresh, rank)


@pytest.mark.multirank
def test_a_broken_communicator_is_not_reused() -> None:
    """Catches a wrap after a timeout on one rank that continues with a communicator that gloo has closed."""
    for rank, (message, before, after) in enumerate(run_processes(2, wrap_after_an_error)):
        assert before == after
        assert rank or "rank 1" in message


def new_groups(rank: int) -> List[Tuple[int, int]]:
    dist.init_process_group("gloo")
    found = []
    for number in range(20):
        group = dist.new_group([0, 1])
        model = convert_sync_batchnorm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), process_group=group)
        ddp = DistributedDataParallel(model, process_group=group)
        step(ddp, rank)
        dist.barrier()
        dist.destroy_process_group(group)
        del model, ddp, group
        gc.collect()
        if number in (3, 19):
            found.append(resources())
    return found


@pytest.mark.multirank
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts in /proc")
def test_destroyed_groups_close_their_communicators() -> None:
    """Catches a communicator that outlives the process group whose layers have used it."""
    for (first_files, first_threads), (files, threads) in run_processes(2, new_groups):
        assert files <= first_files + 5 and threads <= first_threads + 6


def test_bounded_entries() -> None:
    """Catches tables of a channel that grow with the number of models, or that lose what a captured graph reads."""
    entries = {}
    for number in range(20000):
        put_bounded(entries, number, number)
    assert len(entries) == 16384 and 19999 in entries and 0 not in entries
    put_bounded(entries, -1, 0, keeps_all=True)
    assert len(entries) == 16385
