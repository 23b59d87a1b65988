"""Tests of levels and order: which operations may move, and which must not."""

from __future__ import annotations

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bagua_syncbn_algo import SyncBatchNorm, convert_sync_batchnorm, plan_of
from bagua_syncbn_algo.comm.local import TWO_RANK_STUB
from bagua_syncbn_algo.graph import ordering as ordering_module


class Dropping(nn.Module):
    """Two branches that draw random numbers, the first branch after its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.drop(self.a(x))
        second = self.b(nn.functional.dropout(x, 0.5))
        y: Tensor = first + second
        return y


class Aliased(nn.Module):
    """A second layer that reads a view of a tensor that changes in place after the first layer has read the view."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b, self.kind = nn.BatchNorm1d(3), nn.BatchNorm1d(3), kind

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y.view(-1, 3)
        first = self.a(view)
        if self.kind == "operator":
            y += first
        elif self.kind == "method":
            y.add_(first)
        elif self.kind == "function":
            nn.functional.relu(y, inplace=True)
            y = y + first
        else:
            torch.mul(y, 2, out=y)
        out: Tensor = first + self.b(view) + y
        return out


class Later(nn.Module):
    """A branch that could run early if its input did not change in place late in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        read = y.sin()  # read before the change, used only after it
        deep = self.a(self.deep(x))
        y.mul_(3)
        out: Tensor = self.b(y) + read + deep
        return out


def checked(model: nn.Module, *example: Tensor) -> Any:
    """Converts ``model``, compares it with the original and returns the number of rounds; raises if they differ."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs = tuple(x.double() for x in example or [torch.randn(4, 3)])
        converted = convert_sync_batchnorm(model.double(), example_inputs=inputs)
    (variant,) = converted.__dict__["forward"]._variants
    assert variant.run is None or variant.verified
    return plan_of(converted).rounds_forward


def test_random_numbers_are_drawn_in_program_order() -> None:
    """Catches two branches that swap their dropout masks."""
    assert checked(Dropping()) == 2
    assert checked(Dropping().eval()) == 2  # the plan is for training


class Drawing(nn.Module):
    """Two branches that run a function or module, the first branch after its layer."""

    def __init__(self, between: Any) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        if isinstance(between, nn.Module):
            self.first, self.second = between, copy.deepcopy(between)
        else:
            self.first = self.second = between

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(self.a(x))
        y: Tensor = first + self.b(self.second(x))
        return y


class Recurrent(nn.Module):
    """An LSTM with dropout between its layers, over rows of pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, num_layers=2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows, _ = self.lstm(x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
        y: Tensor = rows.reshape(x.shape[0], x.shape[2], x.shape[3], 4).permute(0, 3, 1, 2)
        return y


def noisy(x: Tensor) -> Tensor:
    return x + torch.randn(x.shape)


fx.wrap("noisy")

DRAWS = {
    "module": nn.RReLU(),
    "pooling module": nn.FractionalMaxPool2d(2, output_size=4),
    "recurrent module": Recurrent(),
    "function of torch.nn": lambda x: F.fractional_max_pool2d(x, 2, output_size=(4, 4)),
    "composite function": lambda x: F.gumbel_softmax(x, dim=1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
    "method": lambda x: x.sigmoid().bernoulli(),
    "operator of torch": lambda x: x + torch.rand_like(x),
    "unknown function": lambda x: noisy(x),
}
DRAWS_NOTHING = {
    "module": nn.AvgPool2d(3, 1, 1),
    "function of torch.nn": lambda x: F.interpolate(F.relu(x), scale_factor=2.0),
    "a name like that of a random function": lambda x: F.normalize(x, dim=1),
    "method": lambda x: x.mean((2, 3), keepdim=True),
    "operator": lambda x: x * 2 + 1,
    "operator of torch": lambda x: torch.cat([x, x]).chunk(2)[0],
}


@pytest.mark.parametrize("kind", DRAWS)
def test_whatever_may_draw_random_numbers_keeps_its_order(kind: str) -> None:
    """Catches a source of random numbers that is taken for a plain function: two branches then swap what they draw."""
    assert checked(Drawing(DRAWS[kind]), torch.randn(5, 4, 8, 8)) == 2


@pytest.mark.parametrize("kind", DRAWS_NOTHING)
def test_functions_without_random_numbers_move(kind: str) -> None:
    """Catches a plain function that is taken for a source of random numbers: independent layers then share no round."""
    assert checked(Drawing(DRAWS_NOTHING[kind]), torch.randn(5, 4, 8, 8)) == 1


@pytest.mark.parametrize("kind", ["operator", "method", "function", "out"])
def test_a_view_is_read_after_the_change(kind: str) -> None:
    """Catches a layer that runs in the round of another one, before its input has changed in place."""
    assert checked(Aliased(kind)) == 2


def test_what_is_read_before_a_change_stays_before_it() -> None:
    """Catches a read that is delayed until its level and gets the changed value."""
    assert checked(Later()) == 2


@pytest.mark.parametrize("remedy", ["_written_value", "_has_side_effect"])
def test_these_tests_fail_without_the_remedies(remedy: str, monkeypatch: Any) -> None:
    """Catches test cases that pass in any order."""
    monkeypatch.setattr(ordering_module, remedy, lambda node, module: None)
    cases = (
        [Dropping()]
        if remedy == "_has_side_effect"
        else [*map(Aliased, ("operator", "method", "function", "out")), Later()]
    )
    for model in cases:
        with pytest.raises(UserWarning, match="its regrouped forward differs"):
            checked(model)


class Towers(nn.Module):
    """Two towers that one call runs one after the other; in level order their layers alternate."""

    def __init__(self) -> None:
        super().__init__()

        def tower() -> nn.Module:
            return nn.Sequential(
                nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), nn.Conv1d(3, 3, 1)
            )

        self.left, self.right = tower(), tower()

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.left(x), self.right(y)


def test_small_candidates_do_not_change_the_order_of_rounds() -> None:
    """Catches a rank that returns to program order because its batch is small, while the others run level by level."""
    model = convert_sync_batchnorm(Towers())
    forward = model.__dict__["forward"]
    variant = forward._variants[0]
    for call in variant._calls.values():
        for candidate in call._candidates:
            candidate._work = 0.0
    run = variant.without_small_candidates(model)
    assert run is not None and variant._traced is None
    order = []
    for name, layer in model.named_modules():
        if isinstance(layer, SyncBatchNorm):
            layer._bound_channel = lambda *unused: TWO_RANK_STUB  # type: ignore[method-assign]
            layer.register_forward_hook(lambda *unused, name=name: order.append(name))
    run(model, torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert order == ["left.1", "right.1", "left.3", "right.3"]


def test_a_graph_keeps_no_copy_of_the_model() -> None:
    """Catches a traced replica, with weights of its own, that stays until a graph of this kind runs."""
    model = convert_sync_batchnorm(Towers())
    assert model.__dict__["forward"]._variants[0]._traced is not None
    gc.collect()
    assert sum(isinstance(each, Towers) for each in gc.get_objects()) == 1
