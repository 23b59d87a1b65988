"""Tests of gradients across ranks, by finite differences and in a training loop with a gradient scaler."""

from __future__ import annotations

import copy
from typing import Any, List, Optional

import cuda_kernels
import pytest
import torch
from ranks import run_processes, run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormError, convert_sync_batchnorm, plan_of


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


SHARDS = [2, 3, 0]


def penalty(found: List[Optional[Tensor]], coefficients: List[Tensor]) -> Tensor:
    """A loss of gradients, in which each gradient has another weight."""
    return torch.stack([(f.pow(2) * c + f * c).sum() for f, c in zip(found, coefficients) if f is not None]).sum()


@pytest.mark.multirank
@pytest.mark.parametrize(("strided", "fused"), [(False, False), (True, False), (False, True)])
def test_second_derivatives_equal_those_of_one_process(
    strided: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches second derivatives that omit the effect of one rank's input or penalty on another rank.

    The penalty contains the gradients of input, weight and bias; those of the parameters are of one rank, and their
    weights in the penalty differ between ranks. One rank has no samples. The tolerance is that of sums in float64.
    """
    if fused:
        cuda_kernels.install(monkeypatch, fuse=True)
    shapes = [(count, 4, 3) for count in SHARDS]
    xs = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    outer = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    weight, bias = torch.rand(3, dtype=torch.float64) + 0.5, torch.randn(3, dtype=torch.float64)
    coefficients = [[torch.randn(s, dtype=torch.float64) for s in (shape, (3,), (3,))] for shape in shapes]

    def loss(y: Tensor, rank: int) -> Tensor:  # y: channels last
        return (y.pow(3) * outer[rank] + y.sin()).sum()

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, process_group=group).double()
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        leaf = xs[rank].clone().requires_grad_()
        leaves = [leaf, layer.weight, layer.bias]
        x = leaf.transpose(1, 2)
        y = layer(x if strided else x.contiguous()).transpose(1, 2)
        first = torch.autograd.grad(loss(y, rank), leaves, create_graph=True)
        plain = torch.autograd.grad(loss(layer(x).transpose(1, 2), rank), leaves)
        for differentiable, expected in zip(first, plain):
            assert torch.equal(differentiable, expected)
        return [f.detach() for f in first], torch.autograd.grad(penalty(list(first), coefficients[rank]), leaves)

    results = run_threads(3, body)
    leaf = torch.cat(xs).requires_grad_()
    weights, biases = ([each.clone().requires_grad_() for _ in SHARDS] for each in (weight, bias))
    normalized = nn.functional.batch_norm(leaf.transpose(1, 2), None, None, training=True).transpose(1, 2)
    outputs = [n * w + b for n, w, b in zip(normalized.split(SHARDS), weights, biases)]
    total = torch.stack([loss(y, rank) for rank, y in enumerate(outputs)]).sum()
    of_input, *of_affine = torch.autograd.grad(total, [leaf, *weights, *biases], create_graph=True)
    rows = list(zip(of_input.split(SHARDS), of_affine[:3], of_affine[3:]))
    combined = torch.stack([penalty(list(row), c) for row, c in zip(rows, coefficients)]).sum()
    second = torch.autograd.grad(combined, [leaf, *weights, *biases])
    for (first, _), row in zip(results, rows):
        for found, expected in zip(first, row):
            torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
    seconds = list(zip(*(found for _, found in results)))
    torch.testing.assert_close(torch.cat(seconds[0]), second[0], rtol=1e-9, atol=1e-9)
    # One process has no weight per rank that affects the other ranks' statistics: only the sums are comparable.
    for found, parts in ((seconds[1], second[1:4]), (seconds[2], second[4:])):
        torch.testing.assert_close(torch.stack(found).sum(0), torch.stack(parts).sum(0), rtol=1e-9, atol=1e-9)


class Critic(nn.Module):
    """Two branches whose layers share a round, and a layer after them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)
        self.na, self.nb, self.nc = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.nc(self.na(self.a(x)).tanh() * self.nb(self.b(x)).sigmoid()))
        return y


def gradient_penalty(critic: nn.Module, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(critic(x).sin().sum(), x, create_graph=True)
    loss = (gradient.norm(dim=1) - 1).square().sum() + critic(x).sum()
    return loss


@pytest.mark.multirank
@pytest.mark.parametrize("coalesce", [True, False])
def test_a_gradient_penalty_trains_as_in_one_process(coalesce: bool) -> None:
    """Catches rounds that ranks run in different orders in the derivative of backward, and mixed-up shared layers."""
    plain = Critic().double()
    xs = torch.randn(2, 5, 3, dtype=torch.float64)

    def body(rank: int, group: Any) -> Any:
        critic = convert_sync_batchnorm(copy.deepcopy(plain), group, coalesce=coalesce, overlap=False)
        found = []
        for _ in range(2):  # coalesced from the second forward on
            critic.zero_grad()
            x = xs[rank].clone().requires_grad_()
            gradient_penalty(critic, x).backward()
            found.append([x.grad, *(p.grad.clone() for p in critic.parameters() if p.grad is not None)])
        rounds = [each.layers for each in plan_of(critic).rounds]
        return found, rounds

    (first, rounds), (second, _) = run_threads(2, body)
    assert len(rounds) == (2 if coalesce else 3)
    x = torch.cat(list(xs)).requires_grad_()
    gradient_penalty(plain, x).backward()
    expected = [p.grad for p in plain.parameters()]
    for ours, theirs in zip(first, second):
        torch.testing.assert_close(torch.cat([ours[0], theirs[0]]), x.grad, rtol=1e-9, atol=1e-9)
        for a, b, e in zip(ours[1:], theirs[1:], expected):
            torch.testing.assert_close(a + b, e, rtol=1e-9, atol=1e-9)


@pytest.mark.multirank
def test_a_second_derivative_on_one_rank_only_is_an_error() -> None:
    """Catches a hang, or a merge of unrelated sums, if only one rank differentiates its gradient penalty."""
    x = torch.randn(2, 4, 3, dtype=torch.float64)

    def body(rank: int, group: Any) -> None:
        layer = convert_sync_batchnorm(nn.BatchNorm1d(3).double(), group)
        leaf = x[rank].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf).pow(3).sum(), leaf, create_graph=True)
        if rank == 0:
            gradient.square().sum().backward()
        else:
            layer(leaf)

    for failure in run_threads(2, body, errors=True):
        assert isinstance(failure, SyncBatchNormError) and "rank 0 at SyncBatchNorm1d (backward)" in str(failure)


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
