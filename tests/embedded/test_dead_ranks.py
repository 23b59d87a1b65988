"""Tests of errors of collectives outside of rounds: every error has a place and names the rank that is missing."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from typing import Any, List, Optional

import pytest
import torch
import torch.distributed as dist
from ranks import run_processes
from torch import nn

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormAlgorithm, SyncBatchNormError, bagua, convert_sync_batchnorm


def model_of() -> Any:
    torch.manual_seed(0)
    return convert_sync_batchnorm(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))


def _exit_after(backend: Any) -> None:
    """Ends the process once the other rank has its gradients."""
    backend.wait_pending_comm_ops()
    time.sleep(1.0)
    os._exit(3)


def _dies(rank: int, place: str) -> Optional[str]:
    """Ends rank 1 at a place; returns the error of rank 0."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=4))
    torch.manual_seed(0)
    with pytest.raises(SyncBatchNormError) as caught:
        if place == "group":
            if rank == 1:
                os._exit(3)
            SyncBatchNorm(3)(torch.randn(2, 3, 4))
        bagua.init_process_group()
        if rank == 1 and place == "parameters":
            from bagua_syncbn_algo.embedded.bagua_distributed import BaguaDistributedDataParallel

            owner: Any = BaguaDistributedDataParallel
            owner._check_same_parameters = lambda _: os._exit(3)
        if rank == 1 and place == "buffers":
            from bagua_syncbn_algo import algorithm

            algorithm.broadcast_buffers = lambda *unused: os._exit(3)  # type: ignore[attr-defined]
        model = model_of()
        mode = "rank" if place == "running statistics" else "world"
        model.with_bagua([], SyncBatchNormAlgorithm(normalize_over=mode))
        if rank == 1 and place == "running statistics":
            model.bagua_algorithm._launch_running = lambda: None
            model.bagua_ddp._finish_step = lambda reports: os._exit(3)
        if rank == 1 and place == "gradients":
            model[0].weight.register_hook(lambda gradient: os._exit(3))
        if rank == 1 and place == "end":
            model.bagua_ddp._report = lambda **unused: _exit_after(model.bagua_ddp._bagua_backend)
        model(torch.randn(2, 2, 4, 4)).pow(3).sum().backward()
    return str(caught.value)


EXPECTED = {
    "group": r"expected ranks 0, 1 to create a communicator together \(got rank 1 did not arrive in 4 s\); read the",
    "parameters": r"to compare parameters at the comparison of parameters \(got rank 0 .*; rank 1 did not arrive",
    "buffers": r"to broadcast buffers at Sequential.1.running_mean \(got rank 0 .*; rank 1 did not arrive",
    "running statistics": r"to sum the running statistics of Sequential.1 after backward \(got on rank 0: .*rank 1 did",
    "gradients": r"to sum gradients or statistics at bucket 0 of .*0.weight.*.*rank 1 did not arrive",
    "end": r"to end the step at the end of step 1 of Sequential_\d+ \(got rank 0 .*; rank 1 did not arrive",
}


@pytest.mark.multirank
@pytest.mark.parametrize("place", EXPECTED)
def test_a_rank_that_dies_is_named_with_the_place(place: str, tmp_path: Any) -> None:
    """Catches a bare error of gloo or of the store, which names neither a layer nor a rank."""
    path = tmp_path / "rank0.txt"
    failure = run_processes(2, _dies_and_writes, place, str(path), errors=True)[0]
    text = path.read_text() if path.exists() else ""
    assert re.search(EXPECTED[place], text), (text, failure)


def _dies_and_writes(rank: int, place: str, path: str) -> None:
    text = _dies(rank, place)
    with open(path, "w") as file:
        file.write(str(text))


def _late(rank: int) -> List[str]:
    """Rank 1 waits alone for rank 0, times out, and rank 0 arrives afterwards."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=2))
    store: Any = dist.distributed_c10d._get_default_store()
    bagua.init_process_group()
    model = model_of()
    model.with_bagua([], SyncBatchNormAlgorithm())
    if rank == 0:
        model[0].weight.register_hook(lambda gradient: time.sleep(7))
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(2, 2, 4, 4)).pow(3).sum().backward()
    store.set(f"done/{rank}", "")
    store.wait(["done/0", "done/1"], timedelta(seconds=20))
    return [type(caught.value).__name__, str(caught.value)]


@pytest.mark.multirank
def test_a_rank_that_timed_out_alone_is_quoted() -> None:
    """Catches "Connection closed by peer" on the late rank, without the rank that closed it and its position."""
    first, second = run_processes(2, _late)
    assert (first[0], second[0]) == ("SyncBatchNormError",) * 2
    assert "rank 0 at bucket 0" in first[1] and "rank 1 at bucket 0" in first[1] and "on rank 0:" in first[1]
    assert "rank 1 at bucket 0" in second[1] and "rank 0 did not arrive" in second[1] and "on rank 1:" in second[1]


def _differing(rank: int, what: str) -> str:
    """Returns the error of a rank whose model or algorithm differs."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=4))
    bagua.init_process_group()
    model = model_of()
    if what == "frozen" and rank == 1:
        model[0].weight.requires_grad_(False)
    mode = "rank" if what == "normalize_over" and rank == 1 else "world"
    algorithm = SyncBatchNormAlgorithm(normalize_over=mode)
    if what == "no algorithm" and rank == 1:
        algorithm = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    with pytest.raises(RuntimeError) as caught:
        model.with_bagua([], algorithm)
        model(torch.randn(2, 2, 4, 4)).pow(3).sum().backward()
    return str(caught.value)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("what", "expected"),
    [
        # gloo ended the process without an error: the buckets had different lengths.
        ("frozen", r"expected the same parameters on every rank .*0.weight.* on rank 0, .*0.weight.* frozen on rank 1"),
        # Each rank waited for the other one to create a different group.
        ("normalize_over", r"expected one number of ranks that normalize together .*\(got 2 on rank 0, 1 on rank 1\)"),
        # A bare error of gloo.
        ("no algorithm", r"to agree on process groups for statistics .*\(got rank 0 at .*; rank 1 did not arrive"),
    ],
)
def test_a_rank_that_differs_is_named(what: str, expected: str) -> None:
    """Catches ranks that end inside gloo, that wait until the timeout, or that say neither place nor rank."""
    found = run_processes(2, _differing, what)
    assert re.search(expected, found[0]), found[0]
    assert what == "no algorithm" or found[0] == found[1]
