"""Tests of world-wide running statistics with normalization per rank or group, and of the record of rounds."""

from __future__ import annotations

from typing import Any, Dict, List

import pytest
import torch
from ranks import run_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import (
    SyncBatchNorm,
    SyncBatchNormAlgorithm,
    SyncBatchNormConfig,
    bagua,
    convert_sync_batchnorm,
    enable_sync_batchnorm,
    record_rounds,
    sync_batchnorm_layers,
)
from bagua_syncbn_algo.ops.exact import constant

ALL_MODES = ["world", "node", 2, "rank"]


class Probe(nn.Module):
    """Normalization layers whose inputs do not depend on any parameter, so that their statistics are known."""

    def __init__(self, momentum: Any = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, momentum=momentum)
        self.other = nn.BatchNorm2d(2, momentum=momentum)
        self.frozen = nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        y: Tensor = self.linear(self.norm(x)) + self.frozen(x).sum()
        if not skip:
            y = y + self.other(x.view(-1, 1, 3, 1).repeat(1, 2, 1, 1) * 2 - 1).sum()
        return y


def shard(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(2 + rank, 3, generator=generator) * (1 + rank) + 2 * rank


class Expected:
    """The expected running statistics: moving averages over the batches of all ranks, in float64."""

    def __init__(self, world: int, momentum: Any = 0.1) -> None:
        self.world, self.momentum = world, momentum
        self.layer = nn.BatchNorm1d(3, momentum=momentum).double()

    def step(self, *steps: int) -> None:
        """Updates the averages once, with the batches of the given steps on all ranks."""
        self.layer(torch.cat([shard(step, rank) for step in steps for rank in range(self.world)]).double())

    def check(self, layer: Any) -> None:
        torch.testing.assert_close(layer.running_mean.double(), self.layer.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), self.layer.running_var, rtol=1e-6, atol=1e-6)
        assert layer.num_batches_tracked == self.layer.num_batches_tracked


def wrapped(mode: Any, momentum: Any = 0.1, optimizers: Any = ()) -> Any:
    model: Any = convert_sync_batchnorm(Probe(momentum))
    model.frozen.eval()
    model.with_bagua(list(optimizers), SyncBatchNormAlgorithm(normalize_over=mode))
    return model


# -- running statistics -----------------------------------------------------------------------------------------------


def _plain_steps(rank: int, world: int, mode: Any, momentum: Any) -> None:
    bagua.init_process_group()
    model, expected = wrapped(mode, momentum), Expected(world, momentum)
    for step in range(3):
        model(shard(step, rank)).sum().backward()
        expected.step(step)
        expected.check(model.norm)  # right after the step, when a user may save a checkpoint
    saved = model.state_dict()
    assert saved["frozen.num_batches_tracked"] == 0 and saved["other.num_batches_tracked"] == 3
    flat = torch.cat([value.double().reshape(-1) for name, value in saved.items() if "running" in name])
    gathered = torch.empty(world * flat.numel(), dtype=torch.float64)
    bagua.allgather(flat, gathered)
    assert (gathered.view(world, -1) == flat).all()  # bitwise equal on every rank


@pytest.mark.multirank
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_the_worlds(mode: Any, momentum: Any) -> None:
    """Catches statistics of one rank or node, averages of averages, and a frozen layer that hangs or is updated."""
    run_processes(4, _plain_steps, 4, mode, momentum, env={"LOCAL_WORLD_SIZE": "2"})


def _odd_steps(rank: int, mode: Any) -> None:
    bagua.init_process_group()
    model, expected = wrapped(mode), Expected(2)
    pools = mode != "world"

    def update(*steps: int) -> None:
        if pools:
            expected.step(*steps)
        else:
            for step in steps:
                expected.step(step)

    # several forwards for one backward
    (model(shard(0, rank)).sum() + model(shard(1, rank)).sum()).backward()
    update(0, 1)
    expected.check(model.norm)
    # a forward without backward: its batch is pooled into the next update
    model(shard(2, rank))
    model(shard(3, rank)).sum().backward()
    update(2, 3)
    expected.check(model.norm)
    # a training forward under no_grad merges at once, as swa_utils.update_bn needs
    with torch.no_grad():
        model(shard(4, rank))
    expected.step(4)
    expected.check(model.norm)
    # evaluation in between, on one rank only
    if rank == 0:
        model.eval()(shard(5, rank))
        model.train()
        model.frozen.eval()
    # one rank skips a layer (only if the layer has no forward round), then both ranks skip it
    before = model.other.num_batches_tracked.item()
    model(shard(6, rank), skip=pools and rank == 1).sum().backward()
    update(6)
    expected.check(model.norm)
    assert model.other.num_batches_tracked.item() == before + 1
    model(shard(7, rank), skip=True).sum().backward()
    update(7)
    expected.check(model.norm)
    assert model.other.num_batches_tracked.item() == before + 1
    # a second with_bagua
    model.with_bagua([], SyncBatchNormAlgorithm(normalize_over=mode))
    model(shard(8, rank)).sum().backward()
    update(8)
    expected.check(model.norm)
    # accumulation without communication is pooled until the next synchronized backward
    model.bagua_ddp.require_backward_grad_sync = False
    model(shard(9, rank)).sum().backward()
    model.bagua_ddp.require_backward_grad_sync = True
    model(shard(10, rank)).sum().backward()
    update(9, 10)
    expected.check(model.norm)


@pytest.mark.multirank
@pytest.mark.parametrize("mode", ["world", "rank"])
def test_running_statistics_under_odd_schedules(mode: Any) -> None:
    """Catches an update that is lost, doubled or different between ranks in an unusual training loop."""
    run_processes(2, _odd_steps, mode)


def _update_bn(rank: int, mode: Any) -> None:
    bagua.init_process_group()
    model = wrapped(mode, momentum=0.3)
    averaged: Any = torch.optim.swa_utils.AveragedModel(model)
    torch.optim.swa_utils.update_bn([shard(step, rank) for step in range(3)], averaged)
    cumulative = Expected(2, None)
    for step in range(3):
        cumulative.step(step)
    cumulative.check(averaged.module.norm)
    torch.optim.swa_utils.update_bn([shard(step, rank) for step in range(3)], model)
    cumulative.check(model.norm)


@pytest.mark.multirank
@pytest.mark.parametrize("mode", ["world", "rank"])
def test_update_bn(mode: Any) -> None:
    """Catches statistics of a single rank after update_bn, which runs training forwards under no_grad."""
    run_processes(2, _update_bn, mode)


def _checkpointed(rank: int, reentrant: bool) -> None:
    bagua.init_process_group()
    expected = Expected(2)
    holder: Any = convert_sync_batchnorm(nn.ModuleList([nn.BatchNorm1d(3)]))
    inner = holder[0]
    holder.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant).pow(3).sum()
    holder.with_bagua([], SyncBatchNormAlgorithm(normalize_over="rank"))
    for step in range(2):
        holder(shard(step, rank).requires_grad_()).backward()
        expected.step(step)
        expected.check(inner)


@pytest.mark.multirank
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_not_counted_again(reentrant: bool) -> None:
    """Catches a checkpointed layer whose moments enter the running statistics twice."""
    run_processes(2, _checkpointed, reentrant)


def _empty_shard(rank: int) -> None:
    bagua.init_process_group()
    model = wrapped("rank")
    expected = nn.BatchNorm1d(3).double()
    x = shard(0, 1) if rank == 1 else torch.empty(0, 3)
    model(x, skip=True).sum().backward()
    expected(shard(0, 1).double())
    torch.testing.assert_close(model.norm.running_var.double(), expected.running_var, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"expected more than 1 value per channel at Probe\.norm"):
        model(torch.randn(1, 3))


@pytest.mark.multirank
def test_an_empty_shard_contributes_nothing() -> None:
    """Catches an empty shard that reaches a native kernel, or that moves the statistics towards zero."""
    run_processes(2, _empty_shard)


class Untracked(nn.Module):
    """Three layers of one round, the first of which tracks no running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3, track_running_stats=False)
        self.norm, self.stopped = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.linear = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.first(x) + self.norm(x) + self.stopped(x))
        return y


def _untracked(rank: int, mode: Any, coalesce: bool) -> None:
    bagua.init_process_group()
    expected, model = Expected(4), convert_sync_batchnorm(Untracked(), coalesce=coalesce)
    model.with_bagua([], SyncBatchNormAlgorithm(normalize_over=mode))
    model.stopped.track_running_stats = False
    for step in range(2):
        (model(shard(step, rank)).sum() + model(shard(step + 5, rank)).sum()).backward()
        for steps in [(step, step + 5)] if mode != "world" else [(step,), (step + 5,)]:
            expected.step(*steps)
        expected.check(model.norm)
    assert model.first.running_mean is None
    assert torch.equal(model.stopped.running_var, torch.ones(3)) and model.stopped.num_batches_tracked == 0


@pytest.mark.multirank
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("coalesce", [True, False])
def test_a_round_whose_first_layer_is_untracked(mode: Any, coalesce: bool) -> None:
    """Catches running statistics of the group instead of the world if the first layer of a round tracks none."""
    run_processes(4, _untracked, mode, coalesce, env={"LOCAL_WORLD_SIZE": "2"})


def _frozen_model(rank: int, mode: Any, input_gradient: bool) -> None:
    bagua.init_process_group()
    model, expected = wrapped(mode), Expected(4)
    model(shard(0, rank)).sum().backward()
    expected.step(0)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for step in range(1, 4):
        y = model(shard(step, rank).requires_grad_(input_gradient))
        if input_gradient:
            y.sum().backward()
        expected.step(step)
        expected.check(model.norm)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model(shard(4, rank)).sum().backward()
    expected.step(4)
    expected.check(model.norm)


@pytest.mark.multirank
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("input_gradient", [False, True])
def test_a_frozen_model_keeps_its_running_statistics_up_to_date(mode: Any, input_gradient: bool) -> None:
    """Catches moments that wait for the gradient of a parameter although no parameter is trained."""
    run_processes(4, _frozen_model, mode, input_gradient, env={"LOCAL_WORLD_SIZE": "2"})


# -- normalization ----------------------------------------------------------------------------------------------------


def _groups(rank: int, mode: Any) -> Any:
    bagua.init_process_group()
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3))).double()
    model.with_bagua([], SyncBatchNormAlgorithm(normalize_over=mode))
    x = shard(0, rank).double().requires_grad_()
    y = model(x)
    y.pow(3).sum().backward()
    return y.detach(), x.grad, model[0]._channel.world_size, model.bagua_algorithm.running is not None


@pytest.mark.multirank
@pytest.mark.parametrize(("mode", "size"), [("world", 4), ("node", 2), (2, 2), (4, 4), (1, 1), ("rank", 1)])
def test_normalizes_exactly_within_the_group(mode: Any, size: int) -> None:
    """Catches groups of the wrong ranks, and gradients without the terms of other ranks in the group."""
    results = run_processes(4, _groups, mode, env={"LOCAL_WORLD_SIZE": "2"})
    for start in range(0, 4, size):
        members = range(start, start + size)
        x = torch.cat([shard(0, rank) for rank in members]).double().requires_grad_()
        y = nn.BatchNorm1d(3).double()(x)
        y.pow(3).sum().backward()
        torch.testing.assert_close(
            torch.cat([results[rank][0] for rank in members]), y.detach(), rtol=1e-11, atol=1e-12
        )
        torch.testing.assert_close(torch.cat([results[rank][1] for rank in members]), x.grad, rtol=1e-9, atol=1e-11)
    assert {(world, pooled) for _, _, world, pooled in results} == {(size, size < 4)}


def _bad_group(rank: int, mode: Any) -> str:
    bagua.init_process_group()
    with pytest.raises(ValueError, match="expected normalize_over to divide the 2 ranks") as caught:
        nn.Linear(1, 1).with_bagua([], SyncBatchNormAlgorithm(normalize_over=mode))
    return str(caught.value)


@pytest.mark.multirank
@pytest.mark.parametrize(("mode", "text"), [(3, "(got 3)"), ("node", "(got 3 (the ranks of a node")])
def test_a_group_that_does_not_divide_the_world(mode: Any, text: str) -> None:
    """Catches a last group that is silently smaller than the other groups."""
    for message in run_processes(2, _bad_group, mode, env={"LOCAL_WORLD_SIZE": "3"}):
        assert text in message


def test_unknown_mode() -> None:
    """Catches an invalid mode that is accepted."""
    with pytest.raises(ValueError, match="expected normalize_over to be one of world, node, rank or a number"):
        SyncBatchNormAlgorithm(normalize_over="ranks")
    with pytest.raises(ValueError, match="expected normalize_over to be one of"):
        SyncBatchNormAlgorithm(normalize_over=0)


def test_asynchronous_averaging_is_refused() -> None:
    """Catches an asynchronous inner algorithm, whose ranks would send statistics of different steps."""

    class AsyncModelAverageAlgorithm(bagua.algorithms.Algorithm):  # type: ignore[misc, name-defined]
        pass

    registry = bagua.algorithms.GlobalAlgorithmRegistry
    registry.register("async", AsyncModelAverageAlgorithm)
    try:
        for mode in ALL_MODES:
            with pytest.raises(ValueError, match=r"a synchronous inner algorithm \(got AsyncModelAverageAlgorithm"):
                SyncBatchNormAlgorithm(AsyncModelAverageAlgorithm(), normalize_over=mode)
    finally:
        del registry["async"]


def _by_environment(rank: int) -> Any:
    bagua.init_process_group()
    inner = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    model, algorithm = enable_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), inner)
    model.with_bagua([], algorithm)
    return model[0]._channel.world_size, isinstance(model[0], SyncBatchNorm), algorithm.normalize_over


@pytest.mark.multirank
def test_the_environment_chooses_the_ranks() -> None:
    """Catches a variable that is read but not passed to the algorithm."""
    env = {"BAGUA_SYNCBN": "1", "BAGUA_SYNCBN_NORMALIZE_OVER": "node", "LOCAL_WORLD_SIZE": "1"}
    assert run_processes(2, _by_environment, env=env) == [(1, True, "node")] * 2


def test_configuration_reaches_the_algorithm() -> None:
    """Catches a field of the configuration that `enable_sync_batchnorm` ignores."""
    _, algorithm = enable_sync_batchnorm(nn.Linear(1, 1), None, SyncBatchNormConfig(normalize_over=2))
    assert algorithm.normalize_over == 2


# -- the record of rounds ---------------------------------------------------------------------------------------------


def _recorded(rank: int, mode: Any) -> List[Dict[str, Any]]:
    bagua.init_process_group()
    model = wrapped(mode)
    model(shard(0, rank)).sum().backward()
    with record_rounds() as rounds:
        for step in range(2):
            model(shard(step, rank)).sum().backward()
        with pytest.raises(RuntimeError, match="expected one record_rounds block at a time"), record_rounds():
            pass
    model(shard(2, rank)).sum().backward()
    assert len(sync_batchnorm_layers(model)) == 3
    exposed = rounds.exposed()
    assert set(exposed) == {1, 2} and all(value >= 0 for value in exposed.values())
    return [
        {
            "layers": r.layers,
            "phase": r.phase,
            "step": r.step,
            "bytes": r.bytes,
            "ordered": r.finish is not None and r.wait is not None and r.launch <= min(r.wait, r.finish),
            "sane": 0 <= r.exposed <= r.duration,
        }
        for r in rounds
    ]


@pytest.mark.multirank
def test_rounds_of_world_mode() -> None:
    """Catches a round that is not recorded, or recorded outside of the block."""
    for rounds in run_processes(2, _recorded, "world"):
        # no backward rounds: the inputs require no gradient; no rounds of the frozen layer
        assert [(r["layers"], r["phase"], r["step"]) for r in rounds] == [
            (("Probe.norm", "Probe.other"), "forward", step)
            for step in (1, 2)  # independent layers share one message
        ]
        assert all(r["ordered"] and r["sane"] and r["bytes"] % 64 == 0 for r in rounds)


@pytest.mark.multirank
def test_rank_mode_has_one_bucket_a_step() -> None:
    """Catches a round for each layer instead of one for all; its two all-reduces sum n and n·m, then M2."""
    for rounds in run_processes(2, _recorded, "rank"):
        assert [(r["layers"], r["phase"], r["step"]) for r in rounds] == [
            (("Probe.norm", "Probe.other", "Probe.frozen"), "running", step) for step in (1, 2)
        ]
        assert all(r["ordered"] and r["sane"] and r["bytes"] == 2 * 4 * (3 + 3 + 2 + 3) for r in rounds)


def _sizes(rank: int) -> int:
    bagua.init_process_group()
    model = wrapped("rank")
    before = 0
    for step in range(12):
        if step == 2:
            before = constant.cache_info().currsize
        model(torch.randn(4 + step, *shard(0, 0).shape[1:])).sum().backward()
    return int(constant.cache_info().currsize - before)


@pytest.mark.multirank
def test_sizes_of_batches_are_not_kept() -> None:
    """Catches a large cache that grows by an entry of all layers for each size of a batch."""
    assert run_processes(2, _sizes) == [0, 0]
