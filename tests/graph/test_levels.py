"""Levels and order: what may move, and what must not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bagua_syncbn_algo import convert_sync_batchnorm, plan_of
from bagua_syncbn_algo.graph import ordering as ordering_module


class Dropping(nn.Module):
    """Two branches that draw random numbers, the first of them after its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.drop(self.a(x))
        second = self.b(nn.functional.dropout(x, 0.5))
        y: Tensor = first + second
        return y


class Aliased(nn.Module):
    """The second layer's input is a view of what an in-place addition changes, after the first one has read it."""

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
    """A branch that would be early, but for an in-place change of its input that comes late."""

    def __init__(self) -> None:
        super().__init__()
        self.deep, self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        read = y.sin()  # before the change, though nobody needs it until after
        deep = self.a(self.deep(x))
        y.mul_(3)
        out: Tensor = self.b(y) + read + deep
        return out


def checked(model: nn.Module) -> Any:
    """Converts, comparing with the original; returns the number of rounds. A difference is an error."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example = (torch.randn(4, 3, dtype=torch.float64),)
        converted = convert_sync_batchnorm(model.double(), example_inputs=example)
    forward = converted.__dict__.get("forward")
    assert forward is None or forward._variants[0].verified
    return plan_of(converted).rounds_forward


def test_random_numbers_are_drawn_in_program_order() -> None:
    """Catches two branches that swap their dropout masks."""
    assert checked(Dropping()) == 2
    assert checked(Dropping().eval()) == 2  # the plan is for training


@pytest.mark.parametrize("kind", ["operator", "method", "function", "out"])
def test_a_view_is_read_after_the_change(kind: str) -> None:
    """Catches a layer that is run with its neighbour, before its input has the value that it reads."""
    assert checked(Aliased(kind)) == 2


def test_what_is_read_before_a_change_stays_before_it() -> None:
    """Catches a reader that is put off until its level, and finds the changed value."""
    assert checked(Later()) == 2


@pytest.mark.parametrize("remedy", ["_written", "_is_effect"])
def test_these_tests_fail_without_the_remedies(remedy: str, monkeypatch: Any) -> None:
    """Catches cases that any order would pass."""
    monkeypatch.setattr(ordering_module, remedy, lambda node, module: None)
    cases = (
        [Dropping()] if remedy == "_is_effect" else [*map(Aliased, ("operator", "method", "function", "out")), Later()]
    )
    for model in cases:
        with pytest.raises(UserWarning, match="its regrouped forward differs"):
            checked(model)
