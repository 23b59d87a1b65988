"""Tests of the plan: counts, text, the cost model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from models import Inception, Pyramid

from bagua_syncbn_algo import PlannedRound, SyncPlan, convert_sync_batchnorm, plan_of
from bagua_syncbn_algo.graph import plan as plan_module


def test_counts_and_one_line() -> None:
    """Catches a layer that is applied three times and counted once."""
    plan = plan_of(convert_sync_batchnorm(Pyramid(4)))
    assert plan.summary() == "layers 13, rounds forward 7, backward 7"
    assert plan.rounds[0].name == "Pyramid.backbone.0.1"
    tower = [r for r in plan.rounds if "Pyramid.tower.0.1" in r.layers]
    assert sum(r.layers.count("Pyramid.tower.0.1") for r in tower) == 3


def test_backward_rounds_only_where_an_input_needs_a_gradient() -> None:
    """Catches a backward round planned for a frozen stem."""
    model = Inception(4, blocks=1)
    model.stem.requires_grad_(False)
    plan = plan_of(convert_sync_batchnorm(model))
    assert (plan.rounds_forward, plan.rounds_backward) == (3, 2)


def test_json_round_trip_and_its_error() -> None:
    """Catches a field that the JSON text loses."""
    model = Pyramid(4)
    model.tower.register_forward_hook(lambda *unused: None)
    plan = plan_of(convert_sync_batchnorm(model))
    assert plan.skipped == (("Pyramid.tower", "has hooks"),)
    assert SyncPlan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match=r"expected a plan as SyncPlan.to_json writes it \(got 'nonsense'"):
        SyncPlan.from_json("nonsense")


def _changed(**fields: object) -> str:
    plan = json.loads(SyncPlan("M", (PlannedRound("", 1, ("a",), (8,)),)).to_json())
    inside = {name: value for name, value in fields.items() if name in plan["rounds"][0]}
    plan["rounds"][0].update(inside)
    plan.update({name: value for name, value in fields.items() if name not in inside})
    return json.dumps(plan)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (_changed(model=3), "model is of type int, not a text"),
        (_changed(rounds={}), "rounds is of type dict, not a list"),
        (_changed(rounds=[3]), r"rounds\[0\] is of type int, not an object"),
        (_changed(features=[-8]), r"a number of features of rounds\[0\] is -8, not an integer from 1"),
        (_changed(features=[8.5]), "is 8.5, not an integer"),
        (_changed(features=[10**400]), "is out of range|too large|is inf|not an integer"),
        (_changed(features=[True]), "not an integer"),
        (_changed(features=[8, 8]), "1 layers and features of 2"),
        (_changed(level=-1), "level of rounds"),
        (_changed(level=float("nan")), "NaN is no number of a plan"),
        (_changed(level=float("inf")), "Infinity is no number of a plan"),
        (_changed(backward="yes"), "backward of .* not true or false"),
        (_changed(overlapped_with="abc"), "overlapped_with of .* is of type str, not a list"),
        (_changed(skipped=[["a"]]), "skipped has an entry that is not a name with a reason"),
        (_changed().replace('"level"', '"levels"'), "no 'level'"),
        ("[" * 100_000, "expected a plan"),
        ("[" * 100_000 + "]" * 100_000, "expected a plan"),
        ('{"rounds": ' * 50_000 + "1" + "}" * 50_000, "expected a plan"),
        ("9" * 5000, "expected a plan"),
        ("3", "the plan is of type int, not an object"),
        ("", "expected a plan"),
    ],
)
def test_texts_that_are_no_plans(text: str, found: str) -> None:
    """Catches a plan of wrong types or negative numbers, and errors other than ValueError, such as RecursionError."""
    with pytest.raises(ValueError, match=found) as caught:
        SyncPlan.from_json(text)
    assert (
        str(caught.value).startswith("expected a plan as SyncPlan.to_json writes it") and len(str(caught.value)) < 500
    )


def test_huge_and_binary_texts_are_no_plans(mocker: Any) -> None:
    """Catches a text that is parsed although it is far larger than any plan, and a text that is not a string."""
    mocker.patch.object(plan_module, "_MOST_CHARACTERS", 100)
    with pytest.raises(ValueError, match=r"of at most 100 characters \(got 101 characters\)"):
        SyncPlan.from_json("x" * 101)
    with pytest.raises(ValueError, match=r"\(got bytes\)"):
        SyncPlan.from_json(b"{}")  # type: ignore[arg-type]


def test_predictions_by_hand() -> None:
    """Catches a wrong factor in the cost model: rounds of 1 and 2 layers, 4 ranks, latency alone, bandwidth alone."""
    plan = SyncPlan("M", (PlannedRound("", 1, ("a",), (8,)), PlannedRound("", 2, ("b", "c"), (8, 8), backward=False)))
    latency = plan.predict(4, 1e-3, 1e30)
    assert latency.planned == pytest.approx(3 * 2e-3)  # 2 forward, 1 backward, 2 hops each
    assert latency.per_layer == pytest.approx(4 * 2e-3)
    assert latency.upstream == pytest.approx(3 * 3 * 2e-3 + 2 * 4e-3)
    size = plan.predict(4, 0.0, 1.0)
    assert size.planned == pytest.approx(3 * 3 * (32 + 16 + 2 * 4 * 16))
    assert size.per_layer == pytest.approx(4 * 3 * (32 + 8 + 2 * 4 * 8))
    assert size.upstream == pytest.approx(3 * 3 * (4 + 2 * 32) + 2 * 2 * 3 / 4 * 32)
    assert plan.predict(4, 1e-3, 1e30, reduce_latency=0.0).upstream == pytest.approx(3 * 3 * 2e-3)
    packed = plan.predict(4, 0.0, 1e30, overhead=1.0)
    assert (packed.upstream, packed.per_layer, packed.planned) == (pytest.approx(0), pytest.approx(4), pytest.approx(3))
    assert plan.predict(1, 1.0, 1.0, overhead=1.0).planned == 0
    with pytest.raises(ValueError, match=r"positive bandwidth \(got 2, 1.0, 0.0, 0\)"):
        plan.predict(2, 1.0, 0)
    with pytest.raises(ValueError, match=r"overhead of at least 0"):
        plan.predict(2, 1.0, 1.0, overhead=-1.0)
