"""Tests of the plan: counts, text, the cost model."""

from __future__ import annotations

import pytest
from models import Inception, Pyramid

from bagua_syncbn_algo import PlannedRound, SyncPlan, convert_sync_batchnorm, plan_of


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
