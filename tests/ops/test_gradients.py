"""Tests of gradients across ranks, by finite differences and in a training loop with a gradient scaler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_processes, run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNorm, convert_sync_batchnorm


@pytest.mark.multirank
def test_finite_differences_of_the_loss_over_all_ranks() -> None:
    """Catches gradients that omit the effect of one rank's input on another rank's output.

    The test shifts one element of one rank at a time and sums the loss over ranks. Central differences with a step of
    1e-6 in float64 are accurate to about 1e-9.
    """
    x = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    coefficients = torch.randn(2, 2, 2, 3, dtype=torch.float64)
    step = 1e-6

    def loss(layer: Any, x: Tensor, rank: int) -> Tensor:
        y: Tensor = layer(x)
        return (y.pow(2) * coefficients[rank] + y.sin()).sum()

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(2, process_group=group).double()
        leaf = x[rank].clone().requires_grad_()
        loss(layer, leaf, rank).backward()
        losses = []
        for owner in range(2):
            for index in range(x[owner].numel()):
                for sign in (1, -1):
                    shifted = x[rank].clone()
                    if owner == rank:
                        shifted.view(-1)[index] += sign * step
                    with torch.no_grad():
                        losses.append(loss(layer, shifted, rank).item())
        return leaf.grad, torch.tensor(losses, dtype=torch.float64)

    (g0, losses0), (g1, losses1) = run_threads(2, body)
    differences = (losses0 + losses1).view(2, -1, 2)
    numeric = (differences[..., 0] - differences[..., 1]) / (2 * step)
    torch.testing.assert_close(torch.stack([g0, g1]).view(2, -1), numeric, rtol=1e-6, atol=1e-7)


def _grad_scaler_loop(rank: int) -> Any:
    from bagua_syncbn_algo import bagua

    bagua.init_process_group()
    torch.manual_seed(0)
    model: Any = convert_sync_batchnorm(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model = nn.parallel.DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    history = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        x = torch.randn(4, 4, generator=generator)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().mean()
        if step == 2 and rank == 1:
            loss = loss * float("inf")  # this rank's gradients overflow
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        updated = any(not torch.equal(a, b) for a, b in zip(before, model.parameters()))
        history.append((updated, scaler.get_scale()))
    parameters = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return history, parameters, model.module[1].running_var.isfinite().all().item()


@pytest.mark.multirank
def test_grad_scaler_when_one_rank_overflows() -> None:
    """Catches ranks that disagree on skipping a step: their parameters and scales would diverge permanently."""
    (history0, p0, finite0), (history1, p1, finite1) = run_processes(2, _grad_scaler_loop)
    assert history0 == history1
    assert [updated for updated, _ in history0] == [True, True, False, True]
    assert [scale for _, scale in history0] == [1024.0, 1024.0, 512.0, 512.0]
    assert torch.equal(p0, p1) and p0.isfinite().all()
    assert finite0 and finite1
