"""Tests of activation checkpointing: a recomputed forward reuses the statistics of its own first forward only."""

from __future__ import annotations

import copy
import functools
import gc
from typing import Any, Callable, List, Tuple

import pytest
import torch
import torch.utils.checkpoint as checkpoint_module
from ranks import run_processes, run_threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import bagua_syncbn_algo.ops.recompute as recompute
from bagua_syncbn_algo import (
    SyncBatchNorm,
    SyncBatchNormAlgorithm,
    bagua,
    convert_sync_batchnorm,
    sync_batchnorm_layers,
)

pytestmark = [
    pytest.mark.multirank,
    pytest.mark.skipif(not hasattr(torch._C, "_current_graph_task_id"), reason="needs the graph task id of torch 2.0"),
]

VARIANTS = [True, False]


def maybe_checkpoint(norm: nn.Module, run: Callable[[Tensor], Any], x: Tensor, reentrant: bool) -> Any:
    """Checkpoints ``run``, except in the reference: nn.BatchNorm would update its running statistics twice."""
    return checkpoint(run, x, use_reentrant=reentrant) if isinstance(norm, SyncBatchNorm) else run(x)


class Block(nn.Module):
    """A checkpointed region: a layer applied once, twice, in nested checkpoints, in branches, or to detached input."""

    def __init__(self, kind: str = "once", reentrant: bool = False) -> None:
        super().__init__()
        self.kind, self.reentrant = kind, reentrant
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.norm, self.other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def _inner(self, h: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(h).tanh())
        return y

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        if self.kind == "twice":  # to equal values, so that the moments of both calls agree
            return self.norm(h).tanh() + 2 * self.norm(self.first(x.flip(1).flip(1)) + 0.0).sin()
        if self.kind == "nested":
            h = maybe_checkpoint(self.norm, self._inner, h, self.reentrant)
            return self.norm(self.other(h).sin())
        if self.kind == "branches":  # the layers do not depend on each other
            return self.norm(h).tanh(), self.other(self.second(h)).sin()
        if self.kind == "data":  # a layer whose input requires no gradient
            return self.first(x) * self.other(x.detach().repeat(1, 2)[:, :4]).tanh()
        return self._inner(h)


def loss_of(output: Any) -> Tensor:
    parts = [output] if isinstance(output, Tensor) else list(output)
    return torch.stack([(part.pow(3) + part).sum() for part in parts]).sum()


def batches(count: int, repeats: bool) -> List[List[Tensor]]:
    """Returns the batches of all forwards by rank; with ``repeats``, those of rank 0 are all the same."""
    generator = torch.Generator().manual_seed(count)
    shards = [[torch.randn(3 + r, 3, generator=generator).double() * (1 + i) for i in range(count)] for r in range(2)]
    if repeats:
        shards[0] = [shards[0][0]] * count
    return shards


def train(
    model: nn.Module, xs: List[Tensor], run: Callable[[nn.Module, Tensor], Any], order: str
) -> Tuple[List[Any], ...]:
    """Runs all forwards, then backward for all losses; returns gradients of inputs and parameters, and the state."""
    leaves = [x.clone().requires_grad_() for x in xs]
    losses = [loss_of(run(model, leaf)) for leaf in leaves]
    if order == "sum":
        torch.stack(losses).sum().backward()
    else:
        for loss in losses if order == "forward" else losses[::-1]:
            loss.backward()
    del losses
    return [x.grad for x in leaves], [p.grad for p in model.parameters()], list(model.state_dict().values())


def reference(model: nn.Module, shards: List[List[Tensor]]) -> Tuple[List[Any], ...]:
    """Returns the result of :func:`train` in one process on the batches of both ranks, without checkpointing."""
    whole = [torch.cat(pair) for pair in zip(*shards)]
    return train(copy.deepcopy(model), whole, lambda model, x: model(x), "sum")


def compare(found: List[Any], expected: Tuple[List[Any], ...]) -> None:
    """Compares both ranks with one process, in float64: 1e-9 is far above rounding and far below any wrong term."""
    for index, gradient in enumerate(expected[0]):
        ours = torch.cat([inputs[index] for inputs, _, _ in found])
        torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-9)
    for index, gradient in enumerate(expected[1]):
        parts = [parameters[index] for _, parameters, _ in found if parameters[index] is not None]
        assert bool(parts) == (gradient is not None)
        if parts:
            torch.testing.assert_close(sum(parts), gradient, rtol=1e-9, atol=1e-9)
    for _, _, state in found:
        for ours, theirs in zip(state, expected[2]):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def check(model: nn.Module, shards: List[List[Tensor]], run: Any, order: str = "sum", coalesce: bool = False) -> None:
    model = model.double()

    def body(rank: int, group: Any) -> Any:
        mine = convert_sync_batchnorm(copy.deepcopy(model), group, coalesce=coalesce)
        channel = sync_batchnorm_layers(mine)[0]._bound_channel()
        before = channel.rounds
        found = train(mine, shards[rank], run, order)
        return channel.rounds - before, found, sync_batchnorm_layers(mine)

    results = run_threads(2, body)
    compare([found for _, found, _ in results], reference(model, shards))
    assert results[0][0] == results[1][0]
    # Not inside ``body``: ``gc.collect`` returns at once while another thread is collecting.
    gc.collect()
    assert not any(len(layer._recompute_cache) for _, _, layers in results for layer in layers)


@pytest.mark.parametrize("reentrant", VARIANTS)
@pytest.mark.parametrize("count", [1, 8, 9, 16, 64])
@pytest.mark.parametrize("repeats", [False, True])
def test_many_forwards_before_backward(count: int, reentrant: bool, repeats: bool) -> None:
    """Catches a limit on the forwards before backward, and wrong statistics if a batch repeats on one rank only."""
    check(Block(), batches(count, repeats), lambda model, x: checkpoint(model, x, use_reentrant=reentrant))


@pytest.mark.parametrize("reentrant", VARIANTS)
@pytest.mark.parametrize("kind", ["once", "twice", "nested", "branches", "data"])
@pytest.mark.parametrize("order", ["sum", "forward", "reverse"])
@pytest.mark.parametrize("repeats", [False, True])
def test_kinds_of_regions_and_orders_of_backwards(kind: str, reentrant: bool, order: str, repeats: bool) -> None:
    """Catches statistics of another forward where only the autograd graph identifies the recomputed one."""
    check(
        Block(kind, reentrant),
        batches(3, repeats),
        lambda model, x: checkpoint(model, x, use_reentrant=reentrant),
        order,
    )


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("determinism", ["default", "none"])
def test_options_of_checkpointing(early_stop: bool, determinism: str) -> None:
    """Catches a recomputation that saves other tensors than the first forward, or that does not stop early."""

    def run(model: nn.Module, x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=False, determinism_check=determinism)

    with set_checkpoint_early_stop(early_stop):
        check(Block(), batches(4, True), run)


@pytest.mark.parametrize("reentrant", VARIANTS)
def test_coalesced_rounds(reentrant: bool) -> None:
    """Catches coalesced rounds that reuse statistics of another forward, or of the first batch's equivalence check."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block("branches")

        def forward(self, x: Tensor) -> Any:
            return maybe_checkpoint(self.inner.norm, self.inner, x, reentrant)

    for repeats in (False, True):
        check(Outer(), batches(5, repeats), lambda model, x: model(x), coalesce=True)


@pytest.mark.parametrize("reentrant", VARIANTS)
@pytest.mark.parametrize("same_on_rank_0", [False, True])
def test_new_data_inside_a_backward_is_an_ordinary_forward(reentrant: bool, same_on_rank_0: bool) -> None:
    """Catches a forward on new data in a backward hook that reuses the statistics of an earlier forward.

    If the new data of one rank equal its old data, this rank skips the exchange: an error names the layer.
    """
    old, new = batches(2, False)[0][0], batches(3, False)[0][1]

    def body(rank: int, group: Any) -> Any:
        norm = SyncBatchNorm(3, process_group=group).double()
        leaf = (old + rank).requires_grad_()
        found = []

        def hook(gradient: Tensor) -> None:
            data = leaf.detach().clone() if same_on_rank_0 and rank == 0 else new * (1 + rank)
            found.append(norm(data))

        y = checkpoint(lambda x: norm(x).sin(), leaf, use_reentrant=reentrant)
        y.register_hook(hook)
        y.sum().backward()
        assert norm.num_batches_tracked is not None
        return found[0].detach(), norm.num_batches_tracked.item()

    if same_on_rank_0:
        errors = run_threads(2, body, errors=True, timeout=5)
        assert all("expected every rank to be at the same layer" in str(error) for error in errors)
        return
    (first, batches_0), (second, batches_1) = run_threads(2, body)
    whole = torch.cat([new, new * 2])
    expected = nn.functional.batch_norm(whole, None, None, training=True)
    torch.testing.assert_close(torch.cat([first, second]), expected)
    assert batches_0 == batches_1 == 2


@pytest.mark.parametrize("reentrant", VARIANTS)
def test_a_second_backward_of_a_checkpointed_graph(reentrant: bool) -> None:
    """Catches statistics that are dropped in the first of two backwards: the second would exchange moments again."""
    x = torch.randn(2, 5, 3)

    def body(rank: int, group: Any) -> Any:
        norm = SyncBatchNorm(3, process_group=group)
        leaf = x[rank].clone().requires_grad_()
        loss = checkpoint(lambda h: norm(h).tanh(), leaf, use_reentrant=reentrant).pow(3).sum()
        loss.backward(retain_graph=True)
        once = leaf.grad.clone()
        loss.backward()
        assert norm.num_batches_tracked is not None
        return norm._bound_channel().rounds, norm.num_batches_tracked.item(), once, leaf.grad

    for count, updates, once, twice in run_threads(2, body):
        assert (count, updates) == (3, 1)
        torch.testing.assert_close(twice, 2 * once)


def test_nothing_is_kept_for_ordinary_forwards() -> None:
    """Catches memory held for forwards that cannot be recomputed, with or without a graph."""
    x = torch.randn(2, 5, 3)

    def body(rank: int, group: Any) -> Any:
        norm = SyncBatchNorm(3, process_group=group)
        outputs = [norm(x[rank].clone().requires_grad_()) for _ in range(3)]
        with torch.no_grad():
            outputs += [norm(x[rank]) for _ in range(3)]
        return len(norm._recompute_cache)

    assert run_threads(2, body) == [0, 0]


@pytest.mark.parametrize("reentrant", VARIANTS)
def test_what_is_kept_goes_with_the_graph(reentrant: bool) -> None:
    """Catches statistics that outlive the graph of a checkpointed forward without a backward."""
    x = torch.randn(2, 5, 3)

    def body(rank: int, group: Any) -> Any:
        norm = SyncBatchNorm(3, process_group=group)
        y = checkpoint(lambda h: norm(h).tanh(), x[rank].clone().requires_grad_(), use_reentrant=reentrant)
        return len(norm._recompute_cache), norm, y

    results = run_threads(2, body)
    norms = [norm for _, norm, _ in results]
    assert [held for held, _, _ in results] == [1, 1]
    del results
    gc.collect()  # PyTorch's checkpointing may leave a reference cycle
    assert [len(norm._recompute_cache) for norm in norms] == [0, 0]


def test_hooks_that_serve_many_steps_keep_one_forward() -> None:
    """Catches statistics of every step that are held by saved-tensor hooks created once for the whole training."""
    x = torch.randn(2, 5, 3)

    def body(rank: int, group: Any) -> Any:
        norm = SyncBatchNorm(3, process_group=group)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
        for _ in range(5):
            with hooks:
                loss = norm(x[rank].clone().requires_grad_()).pow(2).sum()
            loss.backward()
            del loss
        return len(norm._recompute_cache)

    assert run_threads(2, body) == [1, 1]


def test_hooks_of_a_whole_training_keep_few_forwards_without_a_graph() -> None:
    """Catches statistics of every step of a frozen layer, whose forwards have no autograd node that ends."""
    x = torch.randn(2, 5, 3)

    def body(rank: int, group: Any) -> Any:
        norm = SyncBatchNorm(3, process_group=group).requires_grad_(False)
        with torch.autograd.graph.save_on_cpu():
            for step in range(40):
                norm(x[rank] + step)
                with torch.no_grad():
                    norm(x[rank] - step)
            return len(norm._recompute_cache)

    assert run_threads(2, body) == [recompute._MOST_WITHOUT_GRAPH + 1] * 2


def test_hooks_that_cannot_be_referenced() -> None:
    """Catches an error about weak references to a built-in function, after the running statistics have moved."""
    x = torch.randn(2, 5, 3)

    def body(rank: int, group: Any) -> Any:
        norm = SyncBatchNorm(3, process_group=group)
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.double, torch.Tensor.float):
            loss = norm(x[rank].clone().requires_grad_()).pow(2).sum()
        loss.backward()
        return len(norm._recompute_cache), int(norm.num_batches_tracked)  # type: ignore[arg-type]

    assert run_threads(2, body) == [(0, 1)] * 2


class Modes(nn.Module):
    """A region that sets the gradient mode of a part itself."""

    def __init__(self, mode: Callable[[], Any]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            h = self.norm(self.first(x))
        return torch.tanh(self.last(h) + self.first(x))


@pytest.mark.parametrize("reentrant", VARIANTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("coalesce", [True, False])
def test_regions_that_set_the_gradient_mode(mode: Any, reentrant: bool, coalesce: bool) -> None:
    """Catches a recomputation that is not recognized because the region runs with or without gradients itself."""
    check(
        Modes(mode),
        batches(3, False),
        lambda model, x: (
            checkpoint(model, x, use_reentrant=reentrant) if isinstance(model.norm, SyncBatchNorm) else model(x)
        ),
        coalesce=coalesce,
    )


class Convolutions(nn.Module):
    """Layers between operators that a policy may save."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm, self.other = nn.BatchNorm2d(4, **options), nn.BatchNorm2d(4, **options)
        self.factor = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).relu()
        h = (self.other(self.second(h)).relu().sqrt() + torch.cat([h, h], 1)[:, :4, 1:-1, 1:-1].clone()).mean((2, 3))
        return h.sum(0).pow(2) * self.factor * h / (1 + h.square())


SAVED = [
    ("convolution.default",),
    ("mul.Tensor", "sum.dim_IntList"),
    ("pow.Tensor_Scalar", "sqrt.default", "clone.default", "cat.default"),
    ("add.Tensor", "div.Tensor", "_to_copy.default", "zeros.default", "add_.Tensor"),
]


def selective(model: nn.Module, x: Tensor, saved: Any) -> Any:
    """Runs a model with selective activation checkpointing."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
        is_saved = str(operator).replace("aten.", "") in saved
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(model, x, use_reentrant=False, context_fn=contexts)


has_policies = pytest.mark.skipif(not hasattr(checkpoint_module, "CheckpointPolicy"), reason="torch 2.4 has policies")


def compare_selective(model: nn.Module, saved: Any, x: Tensor) -> int:
    """Compares two steps with and without checkpointing; returns the number of batches that were counted."""
    twin = copy.deepcopy(model)
    for _ in range(2):
        for each, run in ((model, lambda m: selective(m, x, saved)), (twin, lambda m: m(x))):
            each.zero_grad()
            run(each).sum().backward()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(model.buffers(), twin.buffers()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return int(model.norm.num_batches_tracked)  # type: ignore[union-attr, arg-type]


def images_of(rank: int) -> Tensor:
    return torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


@has_policies
@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("coalesce", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_selective_checkpointing(saved: Any, coalesce: bool, world: int) -> None:
    """Catches operators of only the first forward, or only the recomputation, among those that a policy saves.

    The tolerance of 1e-9 is far above the rounding of float64 sums in another order.
    """
    torch.manual_seed(0)
    model = Convolutions(momentum=None if world == 1 else 0.1).double()

    def body(rank: int, group: Any) -> int:
        mine = convert_sync_batchnorm(copy.deepcopy(model), group if world > 1 else None, coalesce=coalesce)
        return compare_selective(mine, saved, images_of(rank))

    assert run_threads(world, body) == [2] * world


def _selective_per_rank(rank: int) -> List[int]:
    bagua.init_process_group()
    counted = []
    for saved in SAVED:
        torch.manual_seed(0)
        base = Convolutions().double()
        models: Any = [convert_sync_batchnorm(copy.deepcopy(base)) for _ in range(2)]
        for model in models:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            model.with_bagua([optimizer], SyncBatchNormAlgorithm(normalize_over="rank"))
        x = images_of(rank)
        for _ in range(2):
            losses = [selective(models[0], x, saved).sum(), models[1](x).sum()]
            for loss in losses:
                loss.backward()
        for ours, theirs in zip(models[0].state_dict().values(), models[1].state_dict().values()):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        for ours, theirs in zip(models[0].parameters(), models[1].parameters()):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)
        counted.append(int(models[0].norm.num_batches_tracked))
    return counted


@has_policies
def test_selective_checkpointing_where_each_rank_normalizes_alone() -> None:
    """Catches the pool of running statistics among the operators that a policy saves."""
    assert run_processes(2, _selective_per_rank) == [[2] * len(SAVED)] * 2
