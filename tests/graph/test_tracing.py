"""Tests of forwards that torch.fx silently traces wrong: each is found and named, and costs only rounds."""

from __future__ import annotations

import contextlib
import copy
import inspect
import random
import re
import threading
import weakref
from collections import OrderedDict
from typing import Any, Callable, List, Tuple, Type

import pytest
import torch
from ranks import run_threads
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import convert_sync_batchnorm, sync_batchnorm_layers
from bagua_syncbn_algo.graph.call_pattern import CallPattern
from bagua_syncbn_algo.graph.coalesce import coalesce
from bagua_syncbn_algo.graph.module_state import UntraceableError
from bagua_syncbn_algo.graph.tracing import trace


class Pair(nn.Module):
    """Two layers that could share a round if the forward could be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.BatchNorm1d(3), nn.BatchNorm1d(3), 0
        self.feature: Any = None
        self.seen: List[Any] = []
        self.register_buffer("steps", torch.zeros(()))
        self.memory = torch.zeros(3)

    def both(self, x: Tensor) -> Tensor:
        y: Tensor = self.a(x) + self.b(x * 2)
        return y


class NoGrad(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            factor = x.abs().mean()
        return self.both(x) * factor


class Decorated(Pair):
    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        return x.abs().mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * self.scale(x)


class Autocast(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.both(x.float())


class GradMode(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.n == 0):
            return self.both(x)


class Reentrant(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.both, x, use_reentrant=True)
        return y


class Checkpoint(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.both, x, use_reentrant=False)
        return y


class SavedOnCpu(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return self.both(x)


class LayerDrop(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) if torch.rand(1).item() < 2 else x


class PythonRandom(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) if random.random() < 2 else x


class Counter(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return self.both(x) * self.n


class Leaving(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.feature = x
        return self.both(x)


class Appending(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.both(x)


class Remembering(Pair):
    def forward(self, x: Tensor) -> Tensor:
        self.memory.add_(1)
        return self.both(x)


class Branching(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) if x.sum() < 1e9 else x


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 7  # differs from the gradient of a trace through forward


class OwnFunction(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(Double.apply(x))


captured = Double.apply  # bound once at import, as in most code


class CapturedFunction(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(captured(x))


class AskingMode(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * (1 if torch.is_grad_enabled() else 10)


class ReadingBuffer(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * (1 + dict(self.named_buffers())["steps"].item())


class Meter:
    def __init__(self) -> None:
        self.count = 0


class Metering(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.meter = Meter()

    def forward(self, x: Tensor) -> Tensor:
        self.meter.count += 1
        return self.both(x)


kept: List[Any] = []


class KeepingGlobally(Pair):
    def forward(self, x: Tensor) -> Tensor:
        kept.append(x)
        return self.both(x)


class Record:
    def __init__(self, y: Tensor) -> None:
        self.y = y


class ReturningAnObject(Pair):
    def forward(self, x: Tensor) -> Any:
        return Record(self.both(x))


class Constant(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * torch.tensor(2.0)


class Assigning(Pair):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y.data = x * 2
        return self.both(y)


class Swallowing(Pair):
    def forward(self, x: Tensor) -> Tensor:
        try:
            with torch.no_grad():
                x = x + 1
        except Exception:
            x = x + 2
        return self.both(x)


class Replaced(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


def replaced_forward() -> nn.Module:
    module = Replaced()
    module.forward = lambda x: module.both(x) * 2  # type: ignore[method-assign]
    return module


REASONS = [
    (NoGrad, "enters no_grad"),
    (Decorated, "enters no_grad"),
    (Autocast, "enters autocast"),
    (GradMode, "sets the gradient mode"),
    (Reentrant, "calls checkpoint|applies a custom autograd function|enters no_grad"),
    (Checkpoint, "calls checkpoint|enters saved_tensors_hooks|queries the gradient mode"),
    (SavedOnCpu, "enters saved_tensors_hooks"),
    (LayerDrop, "reads a tensor's value"),
    (PythonRandom, "draws random numbers"),
    (Counter, "changes its attribute n"),
    (Leaving, "changes its attribute feature"),
    (Appending, "changes the contents of its attribute seen"),
    (Remembering, "changes its tensor memory"),
    (Branching, "has a branch or loop that depends on data"),
    (OwnFunction, "applies a custom autograd function"),
    (CapturedFunction, "applies a custom autograd function"),
    (AskingMode, "queries the gradient mode"),
    (ReadingBuffer, "reads a tensor's value"),
    (Metering, "changes the contents of its attribute meter"),
    (KeepingGlobally, "keeps a tensor of its forward"),
    (ReturningAnObject, "returns a Record"),
    (Constant, "uses a tensor that is no input, parameter, buffer or attribute"),
    (Assigning, "assigns to a tensor's attribute data"),
    (Swallowing, "enters no_grad"),
    (replaced_forward, "has a forward set on the instance"),
]


@pytest.mark.parametrize(("build", "reason"), REASONS, ids=[build.__name__ for build, _ in REASONS])
def test_a_trap_is_named_and_the_module_left(build: Callable[[], nn.Module], reason: str) -> None:
    """Catches a construct that tracing drops silently: the plan would show one round, and training would be wrong."""
    module = build()
    before = {name: value for name, value in module.__dict__.items() if name != "_modules"}
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    plan = coalesce(convert_sync_batchnorm(module, coalesce=False))
    assert plan.rounds_forward == 2
    ((name, why),) = plan.skipped
    assert name == type(module).__name__
    assert re.search(reason, why), why
    # The attempt leaves no Proxy, no changed counter and no consumed random number.
    assert all(module.__dict__[name] is value for name, value in before.items())
    assert not module.memory.any() and not module.seen  # type: ignore[union-attr, operator]
    assert random.getstate() == random_state and torch.equal(torch.get_rng_state(), torch_state)


class Around(nn.Module):
    """A traceable model around a part that may be untraceable."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.inner = nn.BatchNorm1d(3), nn.BatchNorm1d(3), inner

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(self.first(x) + self.second(x * 2))
        return y


@pytest.mark.multirank
@pytest.mark.parametrize("inner", [NoGrad, Autocast, Checkpoint, Counter, LayerDrop, Branching, OwnFunction])
def test_around_an_untraceable_part_the_rest_is_regrouped(inner: Type[nn.Module]) -> None:
    """Catches an untraceable part that keeps the whole model uncoalesced, or that does not run layer by layer."""
    model = Around(inner()).double()
    x = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]

    def body(rank: int, group: Any) -> Any:
        gradients, rounds = [], []
        for coalesced in (True, False):
            one = convert_sync_batchnorm(copy.deepcopy(model), group, coalesce=coalesced)
            for _ in range(2):
                one.zero_grad()
                leaf = x[rank].clone().requires_grad_()
                channel = sync_batchnorm_layers(one)[0]._bound_channel()
                before = channel.rounds
                one(leaf).pow(2).sum().backward()
            gradients.append([leaf.grad, *(p.grad for p in one.parameters())])
            rounds.append(channel.rounds - before)
        for ours, theirs in zip(*gradients):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        return rounds

    # LayerDrop draws from generators that both threads share.
    assert run_threads(2, body) == [[6, 8]] * 2


def test_the_largest_traceable_submodules_of_an_untraceable_model() -> None:
    """Catches a model left uncoalesced as a whole because its outermost forward enters a context."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Around(nn.Identity()), Around(Counter())])

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                for part in self.parts:
                    x = part(x)
            return x

    model = convert_sync_batchnorm(Outer(), coalesce=False)
    plan = coalesce(model)
    assert [len(planned.layers) for planned in plan.rounds] == [2, 2, 1, 1]
    assert [name for name, _ in plan.skipped] == ["Outer", "Outer.parts.1.inner"]
    assert model.__dict__["forward"].outcome.failure == "enters autocast"
    assert all(part.__dict__["forward"].outcome.failure is None for part in model.parts)  # type: ignore[union-attr]


class Faithful(Pair):
    """Operations that torch.fx alone traces wrong, and that can be traced right."""

    def forward(self, x: Tensor, mask: Any = None, scale: float = 1.0) -> Tensor:
        y = x * 1
        other = y
        y += 1  # in place: `other` changes too
        self.steps.add_(1)  # type: ignore[operator]
        y = self.both(other)
        if mask is not None:
            y = y * mask
        return y * scale * self.steps


@pytest.mark.multirank
def test_in_place_arithmetic_buffers_and_arguments_are_traced_as_they_are() -> None:
    """Catches `+=` traced out of place, a buffer traced as a constant, and a default argument taken for a tensor."""
    x = [torch.randn(4, 3, dtype=torch.float64) for _ in range(2)]
    mask = torch.rand(4, 1, dtype=torch.float64)
    calls: Any = [((), {}), ((mask,), {}), ((), {"scale": 3.0}), ((None, 1), {}), ((None, True), {})]
    model = Faithful().double()

    def body(rank: int, group: Any) -> Any:
        ours = convert_sync_batchnorm(copy.deepcopy(model), group)
        theirs = convert_sync_batchnorm(copy.deepcopy(model), group, coalesce=False)
        channel = sync_batchnorm_layers(ours)[0]._bound_channel()
        rounds = []
        for args, kwargs in calls:
            before = channel.rounds
            first = ours(x[rank], *args, **kwargs)
            rounds.append(channel.rounds - before)
            torch.testing.assert_close(first, theirs(x[rank], *args, **kwargs), rtol=1e-12, atol=1e-12)
        assert ours.steps == theirs.steps == len(calls)
        return rounds

    assert run_threads(2, body) == [[1] * len(calls)] * 2


class Towers(Pair):
    """Two unconnected layers: each may have its own backward and its own optimizer."""

    def forward(self, x: Tensor, z: Tensor) -> Tuple[Tensor, Tensor]:
        return self.a(x), self.b(z)


class Clamping(Pair):
    """Changes a submodule's weight before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.fc.weight.data.clamp_(-1, 1)
        return self.both(self.fc(x)).sin()


class Squaring(Pair):
    """Changes its input in place; both arguments may be the same tensor."""

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        u = self.a(z * 2).sin()
        x.mul_(x)
        y: Tensor = u + self.b(z * 3) * (10 if x is z else 1)
        return y


class Ordered(Pair):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(y=self.both(x))


class Partly(Pair):
    """One of three outputs requires no gradient once its layer is frozen."""

    def forward(self, x: Tensor) -> Any:
        return [self.a(x), self.b(x), self.a(x) + self.b(x)]


class Appended(Pair):
    def forward(self, x: Tensor, features: List[Tensor]) -> Tensor:
        features.append(x)
        return self.both(x)


def both_ways(model: nn.Module, use: Callable[[nn.Module, int], Any]) -> List[List[Any]]:
    """Returns the results of ``use(model, rank)`` on two ranks, coalesced and layer by layer."""

    def body(rank: int, group: Any) -> Any:
        results = []
        for coalesced in (True, False):
            one = convert_sync_batchnorm(copy.deepcopy(model), group, coalesce=coalesced)
            results.append(use(one, rank))
        return results

    return run_threads(2, body)  # type: ignore[no-any-return]


@pytest.mark.multirank
def test_two_towers_have_backwards_of_their_own() -> None:
    """Catches a round shared by layers whose backwards are separate."""
    x = torch.randn(4, 3)

    def use(model: nn.Module, rank: int) -> Any:
        for _ in range(2):
            u, v = model(x, x * 2)
            u.pow(3).sum().backward()
            with torch.no_grad():
                model.a.weight.add_(1)  # type: ignore[union-attr, operator]
            v.pow(3).sum().backward()
        return model.b.weight.grad  # type: ignore[union-attr]

    for ours, theirs in both_ways(Towers(), use):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.multirank
@pytest.mark.parametrize("kind", ["clamp", "alias", "patched", "number", "ordered", "list", "dtype"])
def test_the_same_as_layer_by_layer_after_the_first_batch(kind: str) -> None:
    """Catches differences that the check of the first batch cannot find, because they occur later or elsewhere.

    The cases are a clamped weight, one tensor passed twice, a forward patched on a submodule, a number that differs
    between ranks, the class of the output, a changed argument and another dtype.
    """
    x = [torch.randn(4, 3), torch.randn(4, 3)]
    models = {
        "clamp": Clamping,
        "alias": Squaring,
        "patched": lambda: Around(Branching()),
        "number": Faithful,
        "ordered": Ordered,
        "list": Appended,
        "dtype": Pair,
    }
    model = models[kind]() if kind != "dtype" else Replaced()

    def use(model: nn.Module, rank: int) -> Any:
        seen = []
        for step in range(3):
            data = x[rank].clone()
            if kind == "clamp":
                y = model(data)
                with torch.no_grad():
                    model.fc.weight.mul_(3)  # type: ignore[union-attr, operator]
            elif kind == "alias":
                y = model(data, data if step else data.clone())
            elif kind == "patched":
                y = model(data)
                model.inner.forward = lambda x: x * 7  # type: ignore[union-attr, method-assign, assignment]
            elif kind == "number":
                y = model(data, None, 1.0 if step == 0 else 0.5 + rank)
            elif kind == "ordered":
                output = model(data)
                assert type(output) is OrderedDict
                y = output["y"]
            elif kind == "list":
                features: List[Tensor] = []
                y = model(data, features)
                assert len(features) == 1
            else:
                y = (model.double() if step else model)(data.double() if step else data)
            seen.append(y.detach().double())
        return torch.stack(seen)

    warned = pytest.warns(UserWarning, match="got 2") if kind == "list" else contextlib.nullcontext()
    with warned:  # the expected call has no list, and the real one cannot be traced
        for ours, theirs in both_ways(model, use):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.multirank
def test_an_output_without_gradient_beside_one_with_it() -> None:
    """Catches a frozen layer's output that requires a gradient because another layer of the round does."""
    x = torch.randn(4, 3)

    def use(model: nn.Module, rank: int) -> Any:
        model.b.requires_grad_(False)  # type: ignore[union-attr, operator]
        model(x)
        return [output.requires_grad for output in model(x)]

    for ours, theirs in both_ways(Partly(), use):
        assert ours == theirs == [True, False, True]


def test_a_module_is_gone_when_it_is_let_go() -> None:
    """Catches a reference cycle between a module and the forward that is installed on it."""
    model = convert_sync_batchnorm(Replaced())
    reference = weakref.ref(model)
    del model
    assert reference() is None


def test_other_tools_see_a_forward() -> None:
    """Catches a ``*args, **kwargs`` signature, with which trainers drop columns of a data set."""
    model = convert_sync_batchnorm(Faithful())
    assert list(inspect.signature(model.forward).parameters) == ["x", "mask", "scale"]
    assert model.forward.__self__ is model and model.forward.__name__ == "forward"


def test_too_many_kinds_of_calls_are_given_up() -> None:
    """Catches a new trace at every step where an argument counts the steps."""
    model = convert_sync_batchnorm(Faithful())
    forward: Any = model.__dict__["forward"]
    with pytest.warns(UserWarning, match="expected at most 32 kinds of training forward of Faithful"):
        for step in range(40):
            pattern, _ = CallPattern.of((torch.ones(2, 3), None, str(step)), {})
            variant = forward.variant(pattern, [])
    assert variant is None


def test_values_that_no_pattern_holds() -> None:
    """Catches a user's object that is traced as a constant."""
    pattern, tensors = CallPattern.of((torch.ones(2), object()), {})
    assert pattern is None and len(tensors) == 1
    assert CallPattern.of((1,), {})[0] != CallPattern.of((True,), {})[0]  # 1 == True, but a forward may tell them apart
    assert CallPattern.of((1,), {})[0] == CallPattern.of((2,), {})[0]  # numbers may differ, also between ranks
    assert CallPattern.of((tensors[0], tensors[0]), {})[0] != CallPattern.of((tensors[0], torch.ones(2)), {})[0]


def test_a_module_that_cannot_be_copied() -> None:
    """Catches an error of copy.deepcopy that reaches the user."""
    module = convert_sync_batchnorm(Pair(), coalesce=False)
    module.lock = threading.Lock()
    pattern, _ = CallPattern.of((torch.ones(2, 3),), {})
    assert pattern is not None
    with pytest.raises(UntraceableError, match="cannot be copied"):
        trace(module, pattern)
