"""Tests of entry points that the conversion does not expect, and of the plan and the report of what has run."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from typing import Any, Callable, Dict, List, Optional

import models
import pytest
import torch
from ranks import run_processes, run_threads
from torch import Tensor, fx, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from bagua_syncbn_algo import SyncBatchNormAct, bagua, convert_sync_batchnorm, plan_of, report, sync_batchnorm_layers


class Towers(nn.Module):
    """Two independent towers of two layers: two rounds for four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(3, 3), self._tower(), self._tower()

    @staticmethod
    def _tower() -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3), nn.BatchNorm1d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y: Tensor = self.left(x) + self.right(x)
        return y


class Entry(nn.Module):
    """A model that is used through other methods than ``forward``, or with other arguments than expected."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.head = Towers(), nn.Linear(3, 2)

    def forward(self, x: Tensor, labels: Optional[Tensor] = None, boxes: Optional[List[Any]] = None) -> Any:
        y = self.head(self.net(x))
        if boxes is not None and float(boxes[0].sum()) < 0:
            raise ValueError("negative boxes")
        return y if labels is None else {"loss": nn.functional.cross_entropy(y, labels), "logits": y}

    def training_step(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y: Tensor = self.head(self.net(x))
        return y

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.net.stem(x)
        y: Tensor = self.net.left(x) + self.net.right(x)
        return y


# Built here: ranks are threads, and a trace takes another thread's random draws for draws of the model.
ENTRY: Any = Entry()
LABELS = torch.tensor([0, 1, 1, 0])
CALLS: Dict[str, Callable[[Any, Tensor], Tensor]] = {
    "forward": lambda model, x: model(x),
    "training_step": lambda model, x: model.training_step(x),
    "labels": lambda model, x: model(x, labels=LABELS)["loss"],
    "untraceable": lambda model, x: model(x, boxes=[x.abs()]),
    "inner": lambda model, x: model.net(x),
}


def rounds_of(model: nn.Module) -> int:
    return sync_batchnorm_layers(model)[0]._bound_channel().rounds


@pytest.mark.multirank
@pytest.mark.parametrize("kind", CALLS)
def test_whichever_entry_point_is_called_is_coalesced(kind: str) -> None:
    """Catches four rounds in place of two where the model is not called as the conversion expects."""
    x = torch.randn(2, 4, 3)
    reference: Any = Entry()  # built here: threads share the random numbers

    def body(rank: int, group: Any) -> Any:
        model: Any = convert_sync_batchnorm(copy.deepcopy(reference), group)
        for _ in range(3):
            before = rounds_of(model)
            model.zero_grad()
            CALLS[kind](model, x[rank]).square().sum().backward()
            found = rounds_of(model) - before
        return found, report(model), plan_of(model).rounds_forward, model.net.stem.weight.grad

    results = run_threads(2, body)
    for rounds, found, planned, _ in results:
        assert rounds == 2 * 2 and planned == 2  # forward and backward
        assert found.as_planned and len(found.observed) == 2, str(found)
    if kind in ("training_step", "inner"):
        for _ in range(3):
            reference.zero_grad()
            CALLS[kind](reference, x.flatten(0, 1)).square().sum().backward()
        expected = reference.net.stem.weight.grad
        torch.testing.assert_close(results[0][3] + results[1][3], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.multirank
def test_what_runs_otherwise_than_planned_is_reported_with_its_reason() -> None:
    """Catches a gain that is lost without a word: towers that are called one by one cannot share rounds."""
    x = torch.randn(2, 4, 3)

    def body(rank: int, group: Any) -> Any:
        model: Any = convert_sync_batchnorm(copy.deepcopy(ENTRY), group)
        before = str(report(model))
        for _ in range(3):
            model.forward_features(x[rank]).square().sum().backward()
        return before, report(model), plan_of(model)

    expected = "expected 2 forward rounds of statistics in a step of Entry, as planned (got 4); print(report(model))"
    with pytest.warns(UserWarning) as caught:
        results = run_threads(2, body)
    assert [str(each.message)[: len(expected)] for each in caught if "rounds" in str(each.message)] == [expected] * 2
    for before, found, plan in results:
        assert "no training step has run on several ranks" in before
        assert not found.as_planned
        assert "2 planned, 4 observed" in str(found)
        assert "- Entry: its forward is not called; the forwards of its submodules are" in str(found)
        assert plan.rounds_forward == 4 and len(plan.skipped) == 2


@pytest.mark.multirank
def test_a_forward_that_initializes_something_in_its_first_call() -> None:
    """Catches a model that runs layer by layer for ever because its first call has set an option of a configuration."""

    class Configured(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.config = types.SimpleNamespace(kind=None)

        def forward(self, x: Tensor) -> Tensor:
            if self.config.kind is None:
                self.config.kind = "regression"
            return super().forward(x)

    reference = Configured()

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(copy.deepcopy(reference), group)
        rounds = []
        for _ in range(4):
            before = rounds_of(model)
            model(torch.randn(4, 3))
            rounds.append(rounds_of(model) - before)
        return rounds, plan_of(model).rounds_forward

    assert run_threads(2, body) == [([4, 2, 2, 2], 2)] * 2


@pytest.mark.multirank
def test_calls_of_a_layer_are_counted() -> None:
    """Catches a plan that counts a shared layer of an untraced module once."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(3 if float(x.sum()) < 1e9 else 1):  # cannot be traced
                x = self.norm(x)
            return x

    def body(rank: int, group: Any) -> Any:
        model = convert_sync_batchnorm(Shared(), group)
        planned = plan_of(model).rounds_forward
        for _ in range(2):
            model(torch.randn(4, 3))
        return planned, plan_of(model).rounds_forward, len(report(model).observed)

    assert run_threads(2, body) == [(2, 4, 4)] * 2


@pytest.mark.multirank
def test_a_frozen_part_and_a_replaced_part_are_named() -> None:
    """Catches a report that says nothing about layers that no longer run, or that run twice."""

    def body(rank: int, group: Any) -> Any:
        model: Any = convert_sync_batchnorm(copy.deepcopy(ENTRY), group)
        model.net.left.eval()
        for _ in range(2):
            model(torch.randn(4, 3))
        return str(report(model))

    for text in run_threads(2, body):
        assert "Entry.net.left.0, Entry.net.left.3 did not run" in text


def test_the_plan_is_that_of_the_model_inside_a_wrapper() -> None:
    """Catches layers that are counted twice because a wrapper changes their paths."""
    model = convert_sync_batchnorm(models.Inception(4, blocks=1))
    plan = plan_of(model)
    assert plan_of(nn.Sequential(model)) == plan
    assert plan_of(nn.ModuleDict({"student": model})).summary() == plan.summary()
    copies: List[Any] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    assert [plan_of(each) for each in copies] == [plan, plan]


def wrap_forward(model: Any) -> None:
    """Replaces the forward through ``__func__``, as mixed-precision wrappers do (accelerate, ``prepare_model``)."""
    function = model.forward.__func__

    @functools.wraps(function)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            return function(self, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


@pytest.mark.multirank
def test_a_wrapped_forward_stays_coalesced() -> None:
    """Catches a wrapper of the class's forward that runs layer by layer, and a copy that runs the original's parts."""
    x = torch.randn(2, 4, 3)

    def body(rank: int, group: Any) -> Any:
        model: Any = convert_sync_batchnorm(copy.deepcopy(ENTRY.net), group)
        wrap_forward(model)
        replica = copy.deepcopy(model)
        for _ in range(2):
            before = rounds_of(model)
            y = model(x[rank])
            rounds = rounds_of(model) - before
        with torch.no_grad():
            replica.left[3].weight.zero_()
            replica.left[3].bias.zero_()
            replica.right[3].weight.zero_()
            replica.right[3].bias.zero_()
        assert y.any() and not replica(x[rank]).any()
        return rounds, plan_of(model).rounds_forward

    assert run_threads(2, body) == [(2, 2)] * 2


SHARDED = ("whole", "blocks", "replicate", "FSDP1", "FSDP1, original")


def _sharded(rank: int) -> Any:
    bagua.init_process_group()
    x = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    found = {}
    for kind in SHARDED:
        torch.manual_seed(0)
        model: Any = models.Inception(8, blocks=2)
        reference = copy.deepcopy(model)
        model = convert_sync_batchnorm(model)
        planned = plan_of(model).rounds_forward
        if kind.startswith("FSDP1"):
            options = {"use_orig_params": kind.endswith("original"), "device_id": torch.device("cpu")}
            model = FullyShardedDataParallel(model, **options)
        elif kind == "replicate":
            replicate(model)
        else:
            for block in model.blocks if kind == "blocks" else []:
                fully_shard(block)
            fully_shard(model)
        for _ in range(3):
            y = model(x[rank])
            y.sum().backward()
            expected = reference(x.flatten(0, 1))[4 * rank : 4 * rank + 4]
        torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
        found[kind] = planned, len(report(model).observed), report(model).as_planned
    return found


@pytest.mark.multirank
def test_models_that_refuse_to_be_copied() -> None:
    """Catches a model of FSDP or ``replicate`` that runs layer by layer because its classes refuse ``deepcopy``."""
    for found in run_processes(2, _sharded):
        assert found == {kind: (5, 5, True) for kind in SHARDED}


class Activated(nn.Module):
    """A layer with a fused activation beside a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.BatchNorm1d(3)
        self.act = SyncBatchNormAct(3)
        self.act.drop, self.act.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.plain(x))
        return y


@pytest.mark.parametrize("training", [True, False])
def test_the_graphs_of_other_tools_have_a_layer_as_one_node(training: bool) -> None:
    """Catches a layer whose input check branches on a value of ``create_feature_extractor`` or ``prepare_fx``."""
    model: Any = convert_sync_batchnorm(Activated()).train(training)
    graph = fx.symbolic_trace(copy.deepcopy(model))
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["plain", "act.drop", "act.act"]
    x = torch.randn(4, 3)
    torch.testing.assert_close(graph(x), model(x))
