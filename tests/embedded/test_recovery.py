"""Tests of caught exceptions in a step: every rank loses the step, the ranks agree, and training continues."""

from __future__ import annotations

import copy
from typing import Any, List

import pytest
import torch
import torch.fx
from ranks import run_processes
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm, sync_batchnorm_layers

WORLD = 4


PLACES = [
    *("between two layers", "after the layers", "early in backward", "late in backward"),
    *("in normalization", "in the input gradient"),
]
_broken: List[str] = []  # the place in this process that raises an exception; empty for none


def break_at(place: str, h: Tensor) -> Tensor:
    """Raises an exception, here or in the backward of ``h``, if the chosen place is at this call."""

    def explode(_: Any = None) -> None:
        raise ZeroDivisionError(f"made up, {place}")

    if place in _broken:
        explode()
    if place == "between two layers" and "late in backward" in _broken:
        h.register_hook(explode)
    if place == "before the last layer" and "early in backward" in _broken:
        h.register_hook(explode)
    return h


torch.fx.wrap("break_at")  # traced as one call: a read of `_broken` would be traced as a constant


class Breaks(nn.Module):
    """A model that raises an exception at a chosen place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6)
        self.second, self.last = nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = break_at("between two layers", self.norm(self.first(x)).tanh())
        h = break_at("before the last layer", self.second(h))
        return break_at("after the layers", self.last(h))


def shard(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2, 2, 7, 7, generator=generator).double() * (1 + rank)


def _train(rank: int, place: str, mode: Any, coalesce: bool) -> Any:
    bagua.init_process_group()
    from bagua_syncbn_algo.comm import channel
    from bagua_syncbn_algo.ops import exact, functional

    channel._NOTICE_SECONDS = 0.3  # type: ignore[attr-defined]
    torch.manual_seed(0)
    model: Any = convert_sync_batchnorm(Breaks().double(), coalesce=coalesce)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.with_bagua([optimizer], SyncBatchNormAlgorithm(normalize_over=mode))
    errors: List[str] = []
    normalize, input_gradient = functional.normalize, exact.input_gradient
    for step in range(4):
        breaks = step == 1 and rank == 1
        _broken[:] = [place] if breaks else []

        def broken(*arguments: Any, breaks: bool = breaks) -> Tensor:
            if breaks and arguments[0].shape[1] == 4:
                raise ZeroDivisionError("made up, in normalization")
            return normalize(*arguments)

        def broken_gradient(*arguments: Any, breaks: bool = breaks) -> Tensor:
            if breaks and arguments[1].shape[1] == 4:
                raise ZeroDivisionError("made up, in the input gradient")
            return input_gradient(*arguments)

        functional.normalize = broken if place == "in normalization" else normalize
        exact.input_gradient = broken_gradient if place == "in the input gradient" else input_gradient
        try:
            optimizer.zero_grad()
            model(shard(step, rank)).pow(3).mean().backward()
            optimizer.step()
        except (RuntimeError, ZeroDivisionError) as error:
            errors.append(f"{step} {type(error).__name__}: {error}")
    functional.normalize, exact.input_gradient = normalize, input_gradient
    state = [value.detach().clone() for value in model.state_dict().values()]
    return errors, state, [layer.num_batches_tracked.item() for layer in sync_batchnorm_layers(model)]


def _reference(steps: List[int]) -> Any:
    """Trains the same model on ``steps`` in one process, on the batches of all ranks."""
    torch.manual_seed(0)
    model = Breaks().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in steps:
        optimizer.zero_grad()
        model(torch.cat([shard(step, rank) for rank in range(WORLD)])).pow(3).mean().backward()
        optimizer.step()
    return model


@pytest.mark.multirank
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("mode", ["world", 2, "rank"])
@pytest.mark.parametrize("coalesce", [True, False])
def test_training_goes_on_after_an_exception(place: str, mode: Any, coalesce: bool) -> None:
    """Catches a sum over buckets of different steps, parameters that differ, a batch counted on one rank only."""
    if place in ("in normalization", "in the input gradient") and mode == "rank":
        return  # PyTorch's own kernel normalizes in this mode
    results = run_processes(WORLD, _train, place, mode, coalesce)
    errors, states, counts = zip(*results)
    assert all(
        [error.split()[0] for error in own] == ["1"] for own in errors
    )  # one step is lost, the same on all ranks
    assert "ZeroDivisionError: made up" in errors[1][0]
    assert all("rank 1" in own[0] for rank, own in enumerate(errors) if rank == 0 or (mode != 2 and rank != 1))
    for state in states[1:]:
        for ours, theirs in zip(state, states[0]):
            assert torch.equal(ours, theirs)
    assert len({tuple(count) for count in counts}) == 1
    if mode == "world":
        for (name, theirs), ours in zip(_reference([0, 2, 3]).state_dict().items(), states[0]):
            if "running" not in name and "tracked" not in name:
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def _step_after_caught(rank: int) -> Any:
    """Catches an exception on rank 1 and calls optimizer.step nevertheless."""
    bagua.init_process_group()
    torch.manual_seed(0)
    model: Any = convert_sync_batchnorm(Breaks())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.with_bagua([optimizer], SyncBatchNormAlgorithm(normalize_over="rank"))
    before = [p.detach().clone() for p in model.parameters()]
    _broken[:] = ["late in backward"] if rank == 1 else []
    with pytest.raises((RuntimeError, ZeroDivisionError)) as caught:
        model(shard(0, rank).float()).sum().backward()
    refused = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        refused = str(error)
    if rank == 1:
        _broken.clear()
        with torch.no_grad():
            model.eval()(shard(0, rank).float())  # any forward reports the exception to the other ranks
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    return str(caught.value), refused


@pytest.mark.multirank
def test_no_rank_steps_on_incomplete_gradients() -> None:
    """Catches an optimizer step with the incomplete gradients of a backward that an exception broke off."""
    (other, nothing), (own, refused) = run_processes(2, _step_after_caught)
    assert "expected backward to end on every rank (got an exception in the step of rank 1)" in other
    assert own.startswith("made up") and nothing == ""
    assert "expected a complete backward pass before optimizer.step" in refused


def _error_of_a_step(model: Any, optimizer: Any, step: int, rank: int) -> str:
    """Runs a training step; returns the text of its error, and an empty text without one."""
    try:
        optimizer.zero_grad()
        model(shard(step, rank).float()).sum().backward()
        optimizer.step()
    except (RuntimeError, ZeroDivisionError) as error:
        return str(error)
    return ""


def _error_after_the_step(rank: int) -> List[str]:
    """Raises an error in rank 1's own code at the very end of its backward, after the other rank has continued."""
    bagua.init_process_group()
    torch.manual_seed(0)
    model: Any = Breaks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.with_bagua([optimizer], bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm())
    implementation, errors = model.bagua_algorithm, []
    hook_of = implementation.init_post_backward_hook

    def failing(ddp: Any) -> Any:
        wait = hook_of(ddp)

        def hook() -> None:
            wait()
            raise ZeroDivisionError("made up")

        return hook

    for step in range(4):
        implementation.init_post_backward_hook = failing if step == 1 and rank == 1 else hook_of
        if step == 3:
            model.with_bagua([optimizer], bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm())
        errors.append(_error_of_a_step(model, optimizer, step, rank))
    return errors


@pytest.mark.multirank
def test_ranks_that_disagree_on_a_step_are_refused_until_wrapped_again() -> None:
    """Catches ranks that continue with different parameters after an error on only one of them."""
    for rank, errors in enumerate(run_processes(2, _error_after_the_step)):
        assert errors[0] == "" and errors[3] == ""
        assert errors[1] == ("made up" if rank else "")
        assert "expected the same number of steps without an error on every rank (got 2 on rank 0, 1 on" in errors[2]


def _error_in_the_optimizer(rank: int) -> List[str]:
    """Raises an exception in rank 1's optimizer.step, catches it and continues; wraps again before the last step."""
    bagua.init_process_group()
    torch.manual_seed(0)
    model: Any = Breaks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    model.with_bagua([optimizer], algorithm)
    fails = optimizer.register_step_pre_hook(lambda *unused: 1 / 0) if rank == 1 else None
    errors = []
    for step in range(3):
        if step == 1 and fails is not None:
            fails.remove()
        if step == 2:
            model.with_bagua([optimizer], algorithm)
        errors.append(_error_of_a_step(model, optimizer, step, rank))
    return errors


@pytest.mark.multirank
def test_ranks_with_different_optimizer_steps_are_refused_until_wrapped_again() -> None:
    """Catches silently different parameters after an exception in optimizer.step that one rank has caught."""
    for rank, errors in enumerate(run_processes(2, _error_in_the_optimizer)):
        assert errors[0] == ("division by zero" if rank else "") and errors[2] == ""
        assert "expected the same number of optimizer steps on every rank (got 1 on rank 0, 0 on rank 1" in errors[1]


def _plain_autograd(rank: int) -> None:
    """Raises an exception in an unrelated torch.autograd.grad on rank 1, then trains on both ranks."""
    bagua.init_process_group()
    model: Any = Breaks().double()
    model.with_bagua([], bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm())
    x = shard(0, rank).requires_grad_()
    y = model(x)
    if rank == 1:
        y.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            torch.autograd.grad(y.sum(), x)
    model(shard(1, rank)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.multirank
def test_an_exception_in_an_unrelated_gradient_costs_nothing() -> None:
    """Catches a report on a backward that exists on one rank only: the other ranks would lose their step."""
    run_processes(2, _plain_autograd)


def _another_model_first(rank: int) -> Any:
    """Continues with another model of the same group after an exception on rank 1."""
    bagua.init_process_group()
    torch.manual_seed(0)
    one: Any = Breaks()
    two: Any = copy.deepcopy(one)
    algorithm = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    one.with_bagua([], algorithm)
    two.with_bagua([], algorithm)
    _broken[:] = ["late in backward"] if rank == 1 else []
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        one(shard(0, rank).float()).sum().backward()
    _broken.clear()
    two(shard(0, rank).float()).sum().backward()
    return [p.grad for p in two.parameters()], [p.grad for p in one.parameters()]


@pytest.mark.multirank
def test_another_model_of_the_group_does_not_meet_the_lost_step() -> None:
    """Catches a sum over the buckets of two models after an exception."""
    (two, one), (two_1, one_1) = run_processes(2, _another_model_first)
    assert all(torch.equal(a, b) for a, b in zip(two, two_1))
    assert all(gradient is None for gradient in one + one_1)


def _one_rank(rank: int, place: str) -> None:
    bagua.init_process_group()
    model: Any = convert_sync_batchnorm(Breaks().double())
    model.with_bagua([], SyncBatchNormAlgorithm())
    for step in range(3):
        _broken[:] = [place] if step == 0 else []
        try:
            model(shard(step, rank)).sum().backward()
        except ZeroDivisionError:
            assert step == 0
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.multirank
@pytest.mark.parametrize("place", ["between two layers", "late in backward"])
def test_one_rank_goes_on_as_well(place: str) -> None:
    """Catches a recovery that expects reports of other ranks where there is one rank only."""
    run_processes(1, _one_rank, place)


def _lost_steps(rank: int, broken_step: int, twice: bool) -> int:
    """Returns how many of four steps this rank loses when an exception late in backward breaks off one on rank 1."""
    bagua.init_process_group()
    torch.manual_seed(0)
    model: Any = convert_sync_batchnorm(Breaks().double())
    model.with_bagua([], SyncBatchNormAlgorithm())
    lost = 0
    for step in range(4):
        _broken[:] = ["late in backward"] if step == broken_step and rank == 1 else []
        try:
            model.zero_grad()
            y = model(shard(step, rank))
            if twice:
                y.sum().backward(retain_graph=True)
            y.pow(3).sum().backward()
        except (RuntimeError, ZeroDivisionError):
            lost += 1
    return lost


@pytest.mark.multirank
def test_recovery_where_graphs_are_walked_twice() -> None:
    """Catches a failing rank that counts no open rounds and sends no report: the other ranks would wait for it."""
    assert run_processes(2, _lost_steps, 2, True) == [1, 1]


def _late_checks(rank: int) -> int:
    """Ends header checks in the post-backward hook, as on CUDA where the host is ahead of the device."""
    from bagua_syncbn_algo.comm import channel

    channel.Channel.checks_late = True
    return _lost_steps(rank, 1, False)


@pytest.mark.multirank
def test_recovery_where_header_checks_come_late() -> None:
    """Catches an error found after this rank's report, after which nothing reads the failing rank's report."""
    assert run_processes(2, _late_checks) == [1, 1]
