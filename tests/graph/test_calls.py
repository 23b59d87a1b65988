"""Tests of calls that differ: in attributes, modes, arguments and shapes, on one rank or on all."""

from __future__ import annotations

import copy
import gc
import itertools
import random
import weakref
from typing import Any, Callable, ClassVar, Dict, List, Optional, Sequence

import models
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from ranks import run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNormError, convert_sync_batchnorm, plan_of, report, sync_batchnorm_layers
from bagua_syncbn_algo.graph import forward as forward_module

numpy = pytest.importorskip("numpy")
Step = Callable[[Any, Tensor], Tensor]


class Pair(nn.Module):
    """Two independent layers: one round for both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def both(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.a(x) + self.b(2 * x.tanh())
        return y

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x)


def assert_as_one_process(reference: Any, steps: Sequence[Step]) -> List[Any]:
    """Compares outputs and gradients of two ranks with those of plain BatchNorm on the concatenated batch."""
    images = torch.randn(len(steps), 2, 4, 3, generator=torch.Generator().manual_seed(0))

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        found = []
        for step, x in zip(steps, images):
            model.zero_grad()
            y = step(model, x[rank])
            y.square().sum().backward()
            found.append((y.detach(), model.stem.weight.grad))
        return found, model

    results = run_threads(2, body)
    whole = copy.deepcopy(reference)
    for index, (step, x) in enumerate(zip(steps, images)):
        whole.zero_grad()
        expected = step(whole, x.flatten(0, 1))
        expected.square().sum().backward()
        outputs, gradients = zip(*(found[index] for found, _ in results))
        assert outputs[0].dtype == expected.dtype, f"step {index}"
        tolerance = 1e-3 if expected.dtype == torch.float32 else 5e-2
        torch.testing.assert_close(torch.cat(outputs), expected, rtol=tolerance, atol=tolerance, msg=f"step {index}")
        if expected.dtype == torch.float32:
            torch.testing.assert_close(sum(gradients), whole.stem.weight.grad, rtol=1e-3, atol=1e-3)
    return [model for _, model in results]


def run(model: Any, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


def after(change: Callable[[Any], Any]) -> Step:
    def step(model: Any, x: Tensor) -> Tensor:
        change(model)
        return run(model, x)

    return step


# -- wrong results -----------------------------------------------------------------------------------------------------


class CopiesItself(Pair):
    """A class with its own ``__deepcopy__``, whose forward differs from that of its base class."""

    def __deepcopy__(self, memo: Dict[int, Any]) -> CopiesItself:
        replica = memo[id(self)] = type(self)()
        replica.load_state_dict(self.state_dict())
        return replica

    def forward(self, x: Tensor) -> Tensor:
        return 5 * self.both(x)


@pytest.mark.multirank
def test_a_class_with_its_own_deepcopy_runs_its_own_forward() -> None:
    """Catches a trace, and a check, of the base class's forward in place of the module's own."""
    model = CopiesItself()
    images = torch.randn(2, 4, 3)

    def body(rank: int, group: Any) -> Any:  # not a copy: a converted CopiesItself cannot be copied
        mine = CopiesItself()
        mine.load_state_dict(model.state_dict())
        return convert_sync_batchnorm(mine, group)(images[rank]).detach()

    found = torch.cat(run_threads(2, body))
    torch.testing.assert_close(found, model(images.flatten(0, 1)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["spectral_norm", "weight_norm"])
def test_a_parametrized_model_is_coalesced(kind: str) -> None:
    """Catches a replica without the parametrization, whose class has a ``__deepcopy__`` and refuses ``pickle``."""
    model = Pair()
    getattr(torch.nn.utils.parametrizations, kind)(model.stem)
    plan = plan_of(convert_sync_batchnorm(model, example_inputs=(torch.randn(4, 3),)))
    assert plan.rounds_forward == 1, plan.skipped


class OwnGenerator(Pair):
    """Chooses an operation with a generator of its own, seeded alike on all ranks."""

    def __init__(self, generator: Any) -> None:
        super().__init__()
        self.draw = generator

    def forward(self, x: Tensor) -> Tensor:
        draw = next(self.draw) % 2 if hasattr(self.draw, "__next__") else self.draw.random()
        return self.both(x if draw < 0.5 else 3 * x)


@pytest.mark.multirank
@pytest.mark.parametrize("kind", ["random.Random", "numpy", "itertools"])
def test_random_numbers_of_a_generator_of_the_module(kind: str) -> None:
    """Catches a random choice, such as of skipped blocks, that is constant after the first trace."""
    generator = {
        "random.Random": lambda: random.Random(0),
        "numpy": lambda: numpy.random.default_rng(0),
        "itertools": lambda: itertools.count(),
    }[kind]()
    assert_as_one_process(OwnGenerator(generator), [run] * 8)


class DrawsTensor(Pair):
    """Draws a number from a generator of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x * int(torch.randint(1, 6, (1,), generator=self.generator)))


@pytest.mark.multirank
def test_a_number_from_a_tensor_that_a_generator_has_drawn() -> None:
    """Catches a random number that is constant after the first trace: ``int(tensor)`` reads a value."""
    assert_as_one_process(DrawsTensor(), [run] * 8)


class MaybeMasked(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x if getattr(self, "mask", None) is None else x * self.mask)


MASK = torch.tensor([1.0, 0.0, 2.0])


@pytest.mark.multirank
@pytest.mark.parametrize("registered", [True, False])
def test_a_buffer_that_is_set_later(registered: bool) -> None:
    """Catches a graph without a buffer that was ``None``, or did not exist, when the forward was traced."""
    reference: Any = MaybeMasked()
    if not registered:
        del reference.mask
    assert_as_one_process(reference, [run, after(lambda model: model.register_buffer("mask", MASK)), run])


@pytest.mark.multirank
def test_a_frozen_parameter_that_is_set_later() -> None:
    """Catches a graph without a parameter that was ``None`` when the forward was traced."""
    reference: Any = MaybeMasked()
    del reference.mask
    reference.register_parameter("mask", None)
    frozen = nn.Parameter(MASK.clone(), requires_grad=False)
    assert_as_one_process(reference, [run, after(lambda model: setattr(model, "mask", frozen)), run])


class FunctionalDropout(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.both(F.dropout(x, self.drop.p, self.drop.training))


@pytest.mark.multirank
def test_the_mode_of_a_plain_layer_that_the_forward_reads() -> None:
    """Catches a dropout that goes on after its layer has been switched to evaluation."""
    assert_as_one_process(FunctionalDropout(), [run, after(lambda model: model.drop.eval()), run])


class Follows(Pair):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:  # a trace with shapes
            raise ValueError
        y = x @ torch.ones_like(x[:3, :3])
        return self.both(x).to(y.dtype)


@pytest.mark.multirank
def test_the_dtype_of_autocast_that_changes() -> None:
    """Catches a dtype of the first autocast in a graph for a second one."""

    def under(dtype: torch.dtype) -> Step:
        def step(model: Any, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return run(model, x)

        return step

    assert_as_one_process(Follows(), [under(torch.bfloat16), under(torch.float16)])


class Head(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 3:  # a trace with shapes
            raise ValueError
        y = self.head(x)
        return self.both(x) * y.sum(1, keepdim=True) / y.shape[1]


def _widen(model: Any) -> None:
    model.head.weight, model.head.bias = nn.Parameter(torch.linspace(0, 1, 27).view(9, 3)), nn.Parameter(torch.ones(9))


@pytest.mark.multirank
def test_parameters_of_another_shape_after_a_trace_with_shapes() -> None:
    """Catches a number of channels of the former parameters in a graph, where a trace knows the shapes of layers."""
    assert_as_one_process(Head(), [run, after(_widen), run])


class Activated(Pair):
    act: Any = staticmethod(torch.relu)

    def __init__(self) -> None:
        super().__init__()
        self.table: Any = [[1.0, 2.0]]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.both(x)) * self.table[0][1]
        return y


@pytest.mark.multirank
@pytest.mark.parametrize("change", [{"act": torch.tanh}, {"table": [[1.0, 7.0]]}], ids=["function", "nested list"])
def test_an_attribute_that_is_replaced_by_another_object(change: Dict[str, Any]) -> None:
    """Catches a function, or a list of lists, that was replaced while the graph has the former one."""
    assert_as_one_process(Activated(), [run, after(lambda model: model.__dict__.update(change)), run])


# -- errors where layer-by-layer code works ----------------------------------------------------------------------------


class Flexible(Pair):
    def forward(self, x: Tensor, y: Optional[Tensor] = None, alpha: Any = 1.0, meta: Any = None) -> Tensor:
        return self.both(x * alpha) + (0 if y is None else self.both(y))


def _meta(*names: str) -> List[Dict[str, str]]:
    return [{"file": name} for name in names]


USUAL_AND_OTHER: Dict[str, Any] = {
    "one tensor twice": (lambda m, x: m(x, x + 0), lambda m, x: m(x, x)),
    "an int": (lambda m, x: m(x, alpha=0.5), lambda m, x: m(x, alpha=1)),
    "order of keywords": (lambda m, x: m(x=x, alpha=0.5), lambda m, x: m(alpha=0.5, x=x)),
    "file names": (lambda m, x: m(x, meta=_meta("a.jpg")), lambda m, x: m(x, meta=_meta("b.jpg"))),
    "a longer list": (lambda m, x: m(x, meta=[x.sum()]), lambda m, x: m(x, meta=[x.sum(), x.sum()])),
}


@pytest.mark.multirank
@pytest.mark.parametrize("coalesce", [False, True])
@pytest.mark.parametrize("kind", USUAL_AND_OTHER)
def test_a_rank_with_another_kind_of_call(kind: str, coalesce: bool) -> None:
    """Catches one rank that checks a new graph while the other rank is in a round: only the arguments differ."""
    usual, other = USUAL_AND_OTHER[kind]
    reference = Flexible()  # built here: a trace takes another thread's random draws for draws of the model

    def body(rank: int, group: Any) -> None:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group, coalesce=coalesce)
        for step in range(3):
            (other if rank == 1 and step == 1 else usual)(model, torch.randn(4, 3)).sum().backward()

    run_threads(2, body, timeout=8.0)


class ReadsSmall(Pair):
    """Reads an element of small batches only; the layers are the same for all batches."""

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x if x.shape[0] > 2 or float(x.sum()) < 1e9 else -x)


@pytest.mark.multirank
@pytest.mark.parametrize("first", [True, False])
def test_a_rank_with_a_shape_whose_forward_cannot_be_traced(first: bool) -> None:
    """Catches ranks that wait in different rounds because one of them has a smaller batch."""
    reference = ReadsSmall()

    def body(rank: int, group: Any) -> int:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        for step in range(2):
            before = sync_batchnorm_layers(model)[0]._bound_channel().rounds
            small = rank == 1 and step == (0 if first else 1)
            model(torch.randn(2 if small else 4, 3))
        return sync_batchnorm_layers(model)[0]._bound_channel().rounds - before

    if first:  # no rank regroups this forward
        with pytest.warns(UserWarning, match=r"rank 1 reports the difference|got 2"):
            assert run_threads(2, body, timeout=8.0) == [2, 2]
    else:
        with pytest.raises(SyncBatchNormError, match=r"of ReadsSmall that can be regrouped|expected rank 1 to send"):
            run_threads(2, body, timeout=8.0)


# -- retraces and references -------------------------------------------------------------------------------------------


class ChecksShape(Pair):
    def forward(self, x: Tensor, alpha: float = 1.0) -> Tensor:
        if x.shape[1] != 3:
            raise ValueError
        return self.both(x) * alpha


def _count_checks(monkeypatch: pytest.MonkeyPatch, reference: Any, steps: Sequence[Step], size: Any) -> int:
    original, calls = forward_module.check_equivalence, []

    def check(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(forward_module, "check_equivalence", check)

    def body(rank: int, group: Any) -> int:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        for index, step in enumerate(steps):
            step(model, torch.randn(size(index), 3))
        return sync_batchnorm_layers(model)[0]._bound_channel().rounds

    run_threads(2, body)
    return len(calls) // 2


@pytest.mark.multirank
def test_a_model_of_nested_modules_is_traced_once() -> None:
    """Catches a guard that fails at every step, because the submodules have coalesced forwards and the replica none."""
    reference, x = models.Inception(4, blocks=2), torch.randn(2, 2, 3, 32, 32)

    def body(rank: int, group: Any) -> List[int]:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        for _ in range(3):
            model(x[rank]).sum().backward()
        forwards = [part.__dict__["forward"] for part in model.modules() if "forward" in part.__dict__]
        return sorted(len(each._variants) for each in forwards)[-2:]

    assert run_threads(2, body) == [[0, 1]] * 2


@pytest.mark.multirank
def test_shapes_in_turn_are_traced_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a trace and a check in every step, each of which takes many times as long as the step."""
    assert _count_checks(monkeypatch, ChecksShape(), [run] * 80, lambda i: 2 + i % 33) == 33


@pytest.mark.multirank
def test_guards_of_graphs_for_other_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a step that compares the guards of all shapes, 7 ms with 31 shapes of a model of 40 layers."""
    original, calls = forward_module.Guard.holds, []

    def holds(guard: Any) -> bool:
        calls.append(1)
        return original(guard)

    monkeypatch.setattr(forward_module.Guard, "holds", holds)
    reference = ChecksShape()

    def body(rank: int, group: Any) -> None:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        for size in [*range(2, 22), *[21] * 20]:
            model(torch.randn(size, 3))

    run_threads(2, body)
    assert len(calls) <= 2 * 40 * 2, len(calls)


@pytest.mark.multirank
def test_a_forward_with_the_shape_after_a_layer_is_coalesced() -> None:
    """Catches a trace with shapes that refuses what fake tensors do with each parameter (``inference_mode``)."""

    class AfterLayer(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(self.stem(x), self.weight)
            if y.shape != x.shape:
                y = y[:, : x.shape[1]]
            return self.both(y)

    for model in assert_as_one_process(AfterLayer(), [run] * 3):
        assert plan_of(model).rounds_forward == 1, plan_of(model).skipped


@pytest.mark.multirank
def test_the_type_of_an_argument_decides_a_branch() -> None:
    """Catches a graph of the wrong branch, which the check disables, although ``isinstance(x, Tensor)`` is known."""

    class EitherType(Pair):
        def forward(self, x: Any) -> Tensor:
            return self.both(x if isinstance(x, Tensor) else torch.cat((x, x), 1)[:, 3:] * 2)

    for model in assert_as_one_process(EitherType(), [run] * 3):
        assert plan_of(model).rounds_forward == 1, plan_of(model).skipped


class Replicated(Pair):
    alive: ClassVar[List[Any]] = []

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.alive.append(weakref.ref(self))

    def forward(self, x: Tensor) -> Tensor:
        return self.both(x) * float(x.sum())


def test_replicas_of_a_trace_are_freed() -> None:
    """Catches copies of all parameters that stay until the garbage collector runs, which may be many steps later."""
    Replicated.alive.clear()
    gc.collect()
    gc.disable()
    try:
        convert_sync_batchnorm(Replicated())
        convert_sync_batchnorm(Replicated(), example_inputs=(torch.randn(4, 3),))
        assert Replicated.alive and sum(each() is not None for each in Replicated.alive) == 0
    finally:
        gc.enable()


# -- the plan and the report -------------------------------------------------------------------------------------------


class Untraced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.repeats = 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.repeats if float(x.sum()) < 1e9 else 0):
            x = self.second(self.first(x))
        return x


def _plan_and_report(make: Callable[[], Any], steps: Sequence[Step]) -> Any:
    reference = make()

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        for step in steps:
            step(model, torch.randn(4, 3, requires_grad=True)).square().sum().backward()
        return plan_of(model), report(model)

    return run_threads(2, body)[0]


@pytest.mark.multirank
def test_a_first_layer_that_is_frozen_later() -> None:
    """Catches a step that never ends in the plan, because the layer with which it began is frozen."""
    plan, found = _plan_and_report(Untraced, [run, after(lambda model: model.first.eval()), *[run] * 8])
    assert len(found.observed) == 1, str(found)
    assert plan.rounds_forward <= 2, plan.summary()


@pytest.mark.multirank
def test_a_shared_first_layer() -> None:
    """Catches a plan that takes each call of a shared first layer, such as of a detection head, for a step."""

    def make() -> Any:
        model = Untraced()
        model.repeats = 5
        return model

    plan, found = _plan_and_report(make, [run] * 4)
    assert plan.rounds_forward == len(found.observed) == 10


class Entries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
        self.right = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(x) + self.right(x)
        return y

    def step(self, x: Tensor) -> Tensor:
        return Entries.forward(self, x)


@pytest.mark.multirank
def test_an_outer_module_that_is_called_once_only() -> None:
    """Catches a plan of the first call, which no later step makes, and a step that never ends."""
    plan, found = _plan_and_report(Entries, [run, *[lambda model, x: model.step(x)] * 5])
    assert len(found.observed) == 2, str(found)
    assert plan.rounds_forward == 2, plan.summary()


class Checkpointed(nn.Module):
    """Blocks that activation checkpointing recomputes, with convolutions that are too small to be split."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        out: Tensor = y + self.bn3(self.conv3(x))
        return out


@pytest.mark.multirank
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_recomputation_runs_the_graph_of_its_forward(accumulate: int) -> None:
    """Catches a graph that is built again, without small convolutions, between a forward and its recomputation."""
    reference, x = Checkpointed(), torch.randn(2, 2, 3, 8, 8)

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        for _ in range(3):
            model.zero_grad()
            sum(model(x[rank]).square().sum() for _ in range(accumulate)).backward()  # type: ignore[union-attr]
        return model.stem.weight.grad, len(report(model).observed)

    results = run_threads(2, body)
    whole = copy.deepcopy(reference)
    sum(whole(x.flatten(0, 1)).square().sum() for _ in range(accumulate)).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(results[0][0] + results[1][0], whole.stem.weight.grad, rtol=1e-3, atol=1e-3)
    assert [rounds for _, rounds in results] == [4, 4]  # two levels a block
