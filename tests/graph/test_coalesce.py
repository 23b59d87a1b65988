"""Tests of coalescing: rounds, exactness against layer by layer, and the user's module left as it was."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Tuple

import models
import pytest
import torch
from ranks import run_processes, run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import (
    SyncBatchNorm,
    SyncBatchNormAlgorithm,
    SyncBatchNormConfig,
    bagua,
    convert_sync_batchnorm,
    plan_of,
    record_rounds,
    revert_sync_batchnorm,
    sync_batchnorm_layers,
)
from bagua_syncbn_algo.graph import forward as forward_module
from bagua_syncbn_algo.graph.verify import UNDECIDED

# Built here: ranks are threads, and a trace takes another thread's random draws for draws of the model.
ONE_BLOCK, TWO_BLOCKS = models.Inception(4, blocks=1), models.Inception(4, blocks=2)
# Layers and levels of each model, by the structure that its docstring describes.
LEVELS = {"ResNet": (20, 17), "Inception": (55, 19), "HighResolution": (136, 38), "Pyramid": (13, 7), "Dense": (6, 6)}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return getattr(models, name)(4).to(dtype)  # type: ignore[no-any-return]


def images(dtype: torch.dtype = torch.float32, size: int = 32) -> List[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2 + rank, 3, size, size, generator=generator, dtype=dtype) * (1 + rank) for rank in range(2)]


def total(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return (output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view_as(output)).sum()
    return torch.stack([total(part) for part in output]).sum()


def rounds_of(model: nn.Module) -> int:
    return sync_batchnorm_layers(model)[0]._bound_channel().rounds


def coalesced_and_not(model: nn.Module, group: Any, **options: Any) -> Tuple[nn.Module, nn.Module]:
    other = copy.deepcopy(model)
    return (
        convert_sync_batchnorm(model, group, coalesce=True, **options),
        convert_sync_batchnorm(other, group, coalesce=False),
    )


def same(first: nn.Module, second: nn.Module, tolerance: float) -> None:
    """Compares buffers, the gradient relative to its norm, and each gradient tensor with ten times the tolerance.

    The difference of a tensor is relative to its largest value, but at least to a tenth of the largest value of all
    tensors: some gradients are zero up to rounding.
    """
    largest = max(float(p.grad.abs().max()) for p in second.parameters() if p.grad is not None)
    difference = norm = 0.0
    for (name, ours), (_, theirs) in zip(first.named_parameters(), second.named_parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            distance, scale = (ours.grad - theirs.grad).abs().max(), theirs.grad.abs().max()
            assert distance <= 10 * tolerance * max(float(scale), 0.1 * largest), (name, distance, scale)
            difference += float((ours.grad - theirs.grad).double().square().sum())
            norm += float(theirs.grad.double().square().sum())
    assert difference**0.5 <= tolerance * norm**0.5
    for (name, ours), (_, theirs) in zip(first.named_buffers(), second.named_buffers()):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, msg=name)


# -- rounds and exactness ----------------------------------------------------------------------------------------------


@pytest.mark.multirank
@pytest.mark.parametrize("name", list(LEVELS))
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_as_many_rounds_as_levels_and_the_same_gradients(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Catches an extra level, and gradients or running statistics that regrouping changes.

    Both models run the same kernels on the same numbers. Gradients of branches may be summed in another order.
    """
    batches = images(dtype)
    model = build(name, dtype)

    def body(rank: int, group: Any) -> Any:
        ours, theirs = coalesced_and_not(copy.deepcopy(model), group)
        counts = []
        for step in range(3):
            for one in (ours, theirs):
                one.zero_grad()
                before = rounds_of(one)
                total(one(batches[rank] + step)).backward()
                counts.append(rounds_of(one) - before)
            same(ours, theirs, tolerance)
            with torch.no_grad():
                for p, q in zip(ours.parameters(), theirs.parameters()):
                    p -= 0.01 * p.grad  # type: ignore[operator]
                    q.copy_(p)  # equal again: a difference in the last bit would grow over the steps
        return counts, plan_of(ours)

    for counts, plan in run_threads(2, body):
        layers, levels = LEVELS[name]
        assert (plan.layers, plan.rounds_forward, plan.rounds_backward) == (layers, levels, levels)
        # Both models share one channel: the difference of its counter belongs to the model that has just run.
        assert counts[2:] == [2 * levels, 2 * layers] * 2


class Branches(nn.Module):
    """Branches that differ in channels, dtype and mode; one has no gradient, and one has an unused output."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm1d(3), nn.BatchNorm1d(5).double()
        self.data, self.unused, self.frozen = nn.BatchNorm1d(4), nn.BatchNorm1d(3, eps=1e-3), nn.BatchNorm1d(3)
        self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        data = self.data(x)
        a, b = self.first(x), self.second(x)
        self_made = self.unused(a)
        del self_made
        y: Tensor = self.one(a).sum(1) + self.two(b.double()).sum(1).float().tanh() + self.frozen(a).sin().sum(1)
        return y + data.sum(1)


@pytest.mark.multirank
@pytest.mark.parametrize("frozen", [False, True])
def test_unlike_branches_share_a_round(frozen: bool) -> None:
    """Catches a message that assumes one dtype or eps, gradients for unused outputs, and an updated frozen layer."""
    x = [torch.randn(3, 4), torch.randn(2, 4)]
    module = Branches()

    def body(rank: int, group: Any) -> Any:
        ours, theirs = coalesced_and_not(copy.deepcopy(module), group)
        assert plan_of(ours).rounds_forward == 1
        for model in (ours, theirs):
            if frozen:
                model.frozen.eval()  # type: ignore[union-attr, operator]
            model(x[rank]).pow(2).sum().backward()
        assert ours.unused.weight.grad is None  # type: ignore[union-attr]
        same(ours, theirs, 1e-6)
        before = rounds_of(ours)
        ours(x[rank]).pow(2).sum().backward()
        return rounds_of(ours) - before

    assert run_threads(2, body) == [2, 2]


class OneUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.left, self.right = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        y = self.lift(x)
        return self.left(y), self.right(y)


@pytest.mark.multirank
def test_an_output_that_only_one_rank_uses_still_gets_its_gradient_everywhere() -> None:
    """Catches a rank that omits its part of another rank's gradient: layer by layer, this use raises an error."""
    x = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]
    module = OneUsed().double()

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(copy.deepcopy(module), group)
        left, right = model(x[rank])
        (left.pow(3).sum() + (right.pow(3).sum() if rank == 0 else 0)).backward()
        return model.lift.weight.grad  # type: ignore[union-attr]

    reference = copy.deepcopy(module)
    left, right = reference(torch.cat(x))
    (left.pow(3).sum() + right[:4].pow(3).sum()).backward()
    torch.testing.assert_close(sum(run_threads(2, body)), reference.lift.weight.grad)


@pytest.mark.multirank
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_around_a_coalesced_module(reentrant: bool) -> None:
    """Catches a recomputed round that is exchanged again, or that updates the running statistics twice."""
    x = images(torch.float64, 16)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Conv2d(3, 16, 1), models._InceptionBlock(16, 4)).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=reentrant)
            return y

    module = Outer()

    def body(rank: int, group: Any) -> Any:
        ours, theirs = coalesced_and_not(copy.deepcopy(module), group)
        counts = []
        for _ in range(2):
            for one in (ours, theirs):
                one.zero_grad()
                before = rounds_of(one)
                total(one(x[rank].clone().requires_grad_())).backward()
                counts.append(rounds_of(one) - before)
            same(ours, theirs, 1e-12)
        return counts[2:]

    assert run_threads(2, body) == [[4, 12]] * 2


class SharedLayer(nn.Module):
    """One layer applied twice, the later application at the lower level."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.norm = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.norm(self.deep(x) * 3 + 1)
        second = self.norm(x)
        y: Tensor = first + second
        return y


@pytest.mark.multirank
def test_a_shared_layers_running_statistics_move_in_program_order() -> None:
    """Catches a moving average that weights the earlier application as the later one."""
    x = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]

    def body(rank: int, group: Any) -> Any:
        ours, theirs = coalesced_and_not(SharedLayer().double(), group)
        for one in (ours, theirs):
            one(x[rank]).pow(2).sum().backward()
        same(ours, theirs, 1e-12)
        return plan_of(ours).rounds_forward

    assert run_threads(2, body) == [2, 2]


class InPlace(nn.Module):
    """Two branches that read one view, the first before and the second after its memory changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.a, self.b = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x) * 1
        view = y[:, :2]
        half = view * 2
        y.add_(1)
        y += 1
        second = self.b(view)
        out: Tensor = (
            self.a(half.repeat(1, 2)).sum(1) + second.sum(1).sin() + nn.functional.relu(y, inplace=True).sum(1)
        )
        return out + view.sum(1)


@pytest.mark.multirank
def test_nothing_is_moved_across_an_in_place_operation() -> None:
    """Catches an operation that moves across an in-place change of its input, in either direction."""
    x = [torch.randn(4, 4, dtype=torch.float64) for _ in range(2)]
    module = InPlace().double()

    def body(rank: int, group: Any) -> Any:
        ours, theirs = coalesced_and_not(copy.deepcopy(module), group)
        y = [one(x[rank]) for one in (ours, theirs)]
        torch.testing.assert_close(y[0], y[1], rtol=1e-12, atol=1e-12)
        for out in y:
            out.pow(2).sum().backward()
        same(ours, theirs, 1e-12)
        return plan_of(ours).rounds_forward

    assert run_threads(2, body) == [1, 1]


class Activated(nn.BatchNorm2d):
    """BatchNorm with a fused activation, in timm's style."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lift, self.a, self.b = nn.Conv2d(3, 3, 1), Activated(3), Activated(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lift(x)
        z: Tensor = self.a(y) + self.b(y * 2)
        return z


@pytest.mark.multirank
def test_layers_with_a_fused_activation_share_a_round() -> None:
    """Catches a subclass that is taken for opaque, or that loses its activation."""
    x = images(torch.float64, 4)
    module = Fused().double()

    def body(rank: int, group: Any) -> Any:
        ours, theirs = coalesced_and_not(copy.deepcopy(module), group)
        for one in (ours, theirs):
            one.zero_grad()
            total(one(x[rank])).backward()
        same(ours, theirs, 1e-12)
        return plan_of(ours).rounds_forward, trained(ours, x[rank])

    assert run_threads(2, body) == [(1, 2)] * 2


# -- the user's module -------------------------------------------------------------------------------------------------


def trained(model: nn.Module, x: Tensor) -> int:
    """Runs two steps, the first with the equivalence check; returns the rounds of the second."""
    total(model(x)).backward()
    before = rounds_of(model)
    total(model(x)).backward()
    return rounds_of(model) - before


def test_class_keys_and_parameters_stay() -> None:
    """Catches a wrapper or a GraphModule in place of the user's object."""
    model = build("Inception")
    keys, parameters = list(model.state_dict()), list(model.parameters())
    converted = convert_sync_batchnorm(model)
    assert converted is model and type(model) is models.Inception
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in build("Inception").named_modules()]


@pytest.mark.multirank
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_still_coalesced(way: str) -> None:
    """Catches a copy that runs the original's layers, or that loses its plan."""
    x = images(size=16)

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(copy.deepcopy(ONE_BLOCK), group)
        trained(model, x[rank])
        if way == "deepcopy":
            other = copy.deepcopy(model)
        else:
            for layer in sync_batchnorm_layers(model):
                layer.process_group = None  # a live group cannot be pickled
            buffer = io.BytesIO()
            if way == "pickle":
                other = pickle.loads(pickle.dumps(model))
            else:
                torch.save(model, buffer)
                buffer.seek(0)
                other = torch.load(buffer, weights_only=False)
            for layer in sync_batchnorm_layers(other):
                layer.process_group = group
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in other.parameters():
                p += 1
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
        assert plan_of(other) == plan_of(model)
        return trained(other, x[rank]), trained(copy.deepcopy(other), x[rank])

    # 7 layers in 3 levels
    assert run_threads(2, body) == [(6, 6)] * 2


@pytest.mark.multirank
def test_a_head_replaced_after_conversion_is_used_and_evaluation_is_as_written() -> None:
    """Catches a graph that keeps the submodules with which it was traced."""
    x = images(size=16)
    heads = nn.Sequential(nn.Linear(16, 7), nn.BatchNorm1d(7)), nn.Linear(16, 3)

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(copy.deepcopy(ONE_BLOCK), group)
        trained(model, x[rank])
        model.head = copy.deepcopy(heads[0])
        assert model(x[rank]).shape[1] == 7
        model.head = copy.deepcopy(heads[1])
        assert model(x[rank]).shape[1] == 3
        rounds = trained(model, x[rank])
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias.fill_(5.0)
            assert (model(x[rank]) == 5).all()
        model.eval()
        before = rounds_of(model)
        assert (model(x[rank]) == 5).all() and rounds_of(model) == before
        return rounds

    assert run_threads(2, body) == [6, 6]


@pytest.mark.multirank
def test_hooks_fire_as_often_as_before() -> None:
    """Catches hooks that a regrouped forward skips: on layers, leaves, containers and the model itself."""
    x = images(size=16)

    def body(rank: int, group: Any) -> Any:
        fired: List[str] = []
        model = convert_sync_batchnorm(copy.deepcopy(TWO_BLOCKS), group)
        trained(model, x[rank])

        def hook(name: str) -> Callable[..., None]:
            return lambda *unused: fired.append(name)

        handles = [
            model.register_forward_hook(hook("model")),
            model.head.register_forward_hook(hook("leaf")),  # type: ignore[union-attr, operator]
            model.blocks[0].register_forward_hook(hook("container")),  # type: ignore[index, union-attr, operator]
            model.blocks[1].one[1].register_forward_hook(hook("layer")),  # type: ignore[index, union-attr, operator]
            model.blocks[1].five[0][1].register_forward_pre_hook(hook("before")),  # type: ignore[index, union-attr, operator]
        ]
        total(model(x[rank])).backward()
        first = sorted(fired)
        for handle in handles:
            handle.remove()
        fired.clear()
        return first, trained(model, x[rank]), fired

    expected = sorted(["model", "leaf", "container", "layer", "before"])
    with pytest.warns(UserWarning, match="expected 5 forward rounds .* of Inception, as planned"):  # with the hooks
        assert run_threads(2, body) == [(expected, 10, [])] * 2  # 13 layers in 5 levels


@pytest.mark.multirank
def test_backward_hooks_of_a_layer_see_its_gradients() -> None:
    """Catches a hook that wraps an input which the round does not use."""
    x = [torch.randn(4, 3) for _ in range(2)]

    def body(rank: int, group: Any) -> Any:
        seen = []
        model = convert_sync_batchnorm(Flagged(), group)
        model.a.register_full_backward_hook(lambda layer, grads, _: seen.append(grads[0]))  # type: ignore[union-attr, operator]
        leaf = x[rank].clone().requires_grad_()
        model(leaf).pow(2).sum().backward()
        (grad,) = seen
        return grad.shape, grad.isfinite().all().item(), bool(leaf.grad.any())

    assert run_threads(2, body) == [((4, 3), True, True)] * 2


@pytest.mark.multirank
def test_modes_of_submodules_and_moves_after_conversion() -> None:
    """Catches a graph traced in other modes, and a graph that keeps tensors of the old dtype."""
    x = images(size=16)

    def body(rank: int, group: Any) -> Any:
        ours, theirs = coalesced_and_not(copy.deepcopy(TWO_BLOCKS), group)
        for change in (
            lambda m: None,
            lambda m: m.blocks[0].eval(),
            lambda m: m.train(),
            lambda m: m.blocks[1].requires_grad_(False),
            lambda m: m.double(),
        ):
            for one in (ours, theirs):
                change(one)
                one.zero_grad()
                dtype = next(one.parameters()).dtype
                total(one(x[rank].to(dtype))).backward()
            same(ours, theirs, 1e-4)

    run_threads(2, body)


@pytest.mark.multirank
def test_revert_and_converting_again() -> None:
    """Catches a reverted model that still has the coalesced forward."""
    model = convert_sync_batchnorm(build("Inception"))
    assert "forward" in model.__dict__
    convert_sync_batchnorm(model, coalesce=False)
    assert "forward" not in model.__dict__ and plan_of(model).rounds_forward == 55
    convert_sync_batchnorm(model)
    revert_sync_batchnorm(model)
    assert "forward" not in model.__dict__ and not sync_batchnorm_layers(model)


def test_the_switch(monkeypatch: Any, caplog: Any) -> None:
    """Catches an environment variable that is not read, and a conversion that does not log its result."""
    caplog.set_level(logging.INFO)
    assert "forward" in convert_sync_batchnorm(build("Pyramid")).__dict__
    assert "coalesced Pyramid: layers 13, rounds forward 7, backward 7" in caplog.text
    monkeypatch.setenv("BAGUA_SYNCBN_COALESCE", "0")
    assert "forward" not in convert_sync_batchnorm(build("Pyramid")).__dict__
    assert "forward" in convert_sync_batchnorm(build("Pyramid"), coalesce=True).__dict__
    monkeypatch.setenv("BAGUA_SYNCBN_COALESCE", "2")
    with pytest.raises(ValueError, match=r"expected BAGUA_SYNCBN_COALESCE to be 0 or 1 \(got '2'\)"):
        SyncBatchNormConfig.from_env()


# -- agreement and faults ----------------------------------------------------------------------------------------------


class Flagged(nn.Module):
    """A module with an attribute that a trace takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.options = nn.BatchNorm1d(3), nn.BatchNorm1d(3), SimpleNamespace(factor=1.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x * 2) * self.options.factor
        return y


@pytest.mark.multirank
def test_a_graph_that_differs_on_one_rank_is_given_up_on_all() -> None:
    """Catches a check whose result stays on one rank: the other ranks would wait in other rounds."""
    x = [torch.randn(4, 3) for _ in range(2)]

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(Flagged(), group)
        if rank == 1:
            model.options.factor = 2.0  # type: ignore[union-attr]
        y = model(x[rank])
        reference = nn.BatchNorm1d(3, affine=False)
        z = reference(torch.cat(x)) * (1 + (1 if rank == 0 else 2) * 1.0)
        torch.testing.assert_close(y, z[4 * rank : 4 * rank + 4], rtol=1e-4, atol=1e-4)
        rounds = trained(model, x[rank])
        # Converting again on every rank is the remedy for a changed object.
        model.options.factor = 2.0  # type: ignore[union-attr]
        convert_sync_batchnorm(model)
        return rounds, trained(model, x[rank])

    with pytest.warns(
        UserWarning, match="expected the regrouped forward of Flagged to compute what the original computes"
    ):
        assert run_threads(2, body) == [(2, 1)] * 2  # forward only: the input needs no gradient


class Switched(nn.Module):
    """A module whose forward depends on its own attributes and on those of its parts."""

    count = 0

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.act, self.part = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.LeakyReLU(0.5), Opaque()
        self.factor, self.order, self.names = 1.0, [0, 1], {"skip": False}

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.part(x)
        outputs = [self.a(x), self.b(x * 2)]
        y: Tensor = outputs[self.order[0]] * self.factor + outputs[self.order[1]] * self.act.negative_slope
        if getattr(self, "squares", False):
            y = y * y
        if self.count:
            y = y + 1
        return x if self.names["skip"] else y


class Opaque(nn.Module):
    """A module that cannot be traced, with an attribute that every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.calls >= 0:
            self.calls += 1
        return x.sin()


@pytest.mark.multirank
def test_changed_attributes_are_used() -> None:
    """Catches a flag that is set after the conversion and ignored, and a graph for each call of a part that counts."""
    x = [torch.randn(4, 3) for _ in range(2)]
    changes: List[Callable[[Any], Any]] = [
        lambda m: None,
        lambda m: setattr(m, "factor", 2.0),
        lambda m: m.order.reverse(),
        lambda m: setattr(m, "squares", True),
        lambda m: setattr(m.act, "negative_slope", 0.1),
        lambda m: setattr(m, "count", 1),
        lambda m: m.names.update(skip=True),
    ]

    def body(rank: int, group: Any) -> Any:
        model, reference = convert_sync_batchnorm(Switched(), group), Switched()
        rounds = []
        for change in changes:
            change(model)
            change(reference)
            before = rounds_of(model)
            for _ in range(2):
                y = model(x[rank])
                expected = reference(torch.cat(x))[4 * rank : 4 * rank + 4]
                torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
            rounds.append(rounds_of(model) - before)
        return rounds, len(model.__dict__["forward"]._variants)

    assert run_threads(2, body) == [([2] * len(changes), len(changes))] * 2  # two steps of one round, forward only


def test_a_difference_is_found_at_conversion_with_example_inputs() -> None:
    """Catches example inputs that are traced and not compared: no trace sees the counter of this forward."""
    calls = [0]

    class Counting(Flagged):
        def forward(self, x: Tensor) -> Tensor:
            calls[0] += 1
            y: Tensor = self.a(x) + self.b(x * 2) * calls[0]
            return y

    with pytest.warns(UserWarning, match="its regrouped forward differs"):
        convert_sync_batchnorm(Counting(), example_inputs=(torch.randn(4, 3),))


@pytest.mark.multirank
def test_ranks_with_other_plans_are_told_the_first_difference() -> None:
    """Catches a rank that coalesces while others do not: its messages would hold other layers than theirs."""
    x = torch.randn(4, 3)

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(Flagged(), group, coalesce=rank == 0)
        model(x)

    for error in run_threads(2, body, errors=True):
        assert "the first difference is number 2: round of Flagged.a, Flagged.b on rank 0, nothing on rank 1" in str(
            error
        )


@pytest.mark.multirank
def test_bad_input_in_a_round_names_the_layer_on_both_ranks() -> None:
    """Catches a rank that waits in a round that the other rank has left with an error."""
    x = torch.randn(4, 3)

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(Flagged(), group)
        model(x)
        model(x[:, :2] if rank == 1 else x)

    errors = [str(error) for error in run_threads(2, body, errors=True)]
    assert "expected 3 channels in dimension 1 at Flagged.a" in errors[1]
    assert "expected rank 1 to send statistics at round 1 (Flagged.a, Flagged.b)" in errors[0]
    assert "at Flagged.a (got input of shape (4, 2))" in errors[0]


@pytest.mark.multirank
def test_ranks_with_one_image_or_none() -> None:
    """Catches a check of the first batch that needs values of the whole batch."""
    x = torch.randn(4, 3)

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(Flagged(), group)
        rounds = trained(model, x[: 4 * rank])
        for layer in sync_batchnorm_layers(model):
            assert layer.num_batches_tracked == 2
        return rounds

    assert run_threads(2, body) == [1, 1]  # forward only


class Pooled(nn.Module):
    """A branch as in DeepLab, with one value per channel and image."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.part = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.part(x) + self.whole(x.mean((2, 3), keepdim=True))
        return y


@pytest.mark.multirank
def test_one_image_a_rank_pooled_to_one_value() -> None:
    """Catches a check of the first batch that fails at every step and costs two forwards each time."""
    x = [torch.randn(1, 3, 4, 4) for _ in range(2)]

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(Pooled(), group)
        return trained(model, x[rank]), model.__dict__["forward"]._variants[0].verified

    assert run_threads(2, body) == [(1, True)] * 2


@pytest.mark.multirank
def test_what_cannot_be_checked_stays_as_written(monkeypatch: Any) -> None:
    """Catches a regrouped forward that runs without a comparison, and a comparison that is tried forever."""
    x = torch.randn(4, 3)
    monkeypatch.setattr(forward_module, "check_equivalence", lambda *unused: (UNDECIDED, ""))

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(Flagged(), group)
        return [trained(model, x) for _ in range(3)], model.__dict__["forward"]._variants[0].trials

    with pytest.warns(UserWarning, match="no rank could run the check in 3 batches"):
        assert run_threads(2, body) == [([2, 2, 2], 3)] * 2


# -- hosts -------------------------------------------------------------------------------------------------------------


def _hosts(rank: int) -> Optional[Dict[str, int]]:
    bagua.init_process_group()
    x = images(size=16)[rank]
    counts: Dict[str, int] = {}

    def step(name: str, model: Any) -> None:
        with record_rounds() as rounds:
            total(model(x)).backward()
        counts[name] = len(rounds)

    torch.manual_seed(0)
    ddp = nn.parallel.DistributedDataParallel(convert_sync_batchnorm(models.Inception(4, blocks=1)))
    wrapped: Any = convert_sync_batchnorm(models.Inception(4, blocks=1))
    wrapped.load_state_dict(ddp.module.state_dict())
    wrapped.with_bagua([], SyncBatchNormAlgorithm())
    for _ in range(2):
        for name, model in (("ddp", ddp), ("bagua", wrapped)):
            step(name, model)
    channel = wrapped.bagua_algorithm.channel
    assert len(channel.buckets) == 3  # a registered tensor for each message, and no other
    assert all(bucket.tensors[0].any() for bucket in channel.buckets), "a registered tensor that is never sent"
    for p, q in zip(ddp.parameters(), wrapped.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    # Each rank normalizes by itself; the only round pools the world's running statistics.
    local: Any = convert_sync_batchnorm(models.Inception(4, blocks=1))
    local.with_bagua([], SyncBatchNormAlgorithm(normalize_over="rank"))
    step("rank", local)
    compiled = torch.compile(convert_sync_batchnorm(models.Inception(4, blocks=1)), backend="eager")
    for _ in range(2):
        step("compiled", compiled)
    compiled.eval()
    compiled(x)
    return counts


@pytest.mark.multirank
def test_under_ddp_under_bagua_and_compiled() -> None:
    """Catches a host that bypasses the regrouped forward, and a compiled model that fails."""
    for counts in run_processes(2, _hosts):
        assert counts == {"ddp": 6, "bagua": 6, "rank": 1, "compiled": 6}


def _groups(rank: int) -> Any:
    bagua.init_process_group()
    torch.manual_seed(rank)
    model: Any = convert_sync_batchnorm(Flagged())
    model.with_bagua([], SyncBatchNormAlgorithm(normalize_over=2))
    for _ in range(2):
        x = torch.randn(4, 3).requires_grad_()
        model(x).pow(2).sum().backward()
    return {name: value.clone() for name, value in model.named_buffers()}, model.bagua_algorithm.channel.rounds


@pytest.mark.multirank
def test_rounds_in_groups_leave_the_worlds_running_statistics() -> None:
    """Catches a round that does not pool its layers' moments."""
    results = run_processes(4, _groups)
    for buffers, rounds in results:
        assert rounds == 4
        assert buffers["a.num_batches_tracked"] == 2
        for name, value in buffers.items():
            assert torch.equal(value, results[0][0][name])


def test_layers_of_a_round_are_named() -> None:
    """Catches a plan with names that no layer has."""
    model = convert_sync_batchnorm(build("Pyramid"))
    names = {layer.sync_name for layer in sync_batchnorm_layers(model)}
    assert {name for planned in plan_of(model).rounds for name in planned.layers} == names
    assert all(isinstance(layer, SyncBatchNorm) for layer in sync_batchnorm_layers(model))
