"""Tests of the fuzz program: 200 cases pass, and each mutation of the code is detected."""

from __future__ import annotations

import fuzz
import pytest

CHUNK = 50


@pytest.mark.multirank
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(0, 200, CHUNK))
def test_random_models_and_loops(first: int) -> None:
    """Catches wrong numbers in random combinations of features; ``make fuzz`` runs ten times as many cases."""
    done, wrong = fuzz.run_cases(range(first, first + CHUNK))
    assert done == CHUNK and not wrong, wrong


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_every_kind_is_among_these_cases(kind: str) -> None:
    """Catches a feature that is drawn too seldom, or only together with an option that makes it meaningless."""
    cases = [fuzz.Case.of(seed) for seed in fuzz.seeds_of(kind, 0, 5)]
    assert max(case.seed for case in cases) < 200 and all(kind in case.kinds for case in cases)
    if kind == "join":
        assert any(len(set(counts)) > 1 for case in cases for counts in case.epochs)


@pytest.mark.multirank
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", sorted(fuzz.MUTATIONS))
def test_wrong_code_is_noticed(mutation: str) -> None:
    """Catches fuzzing that cannot fail: a tolerance that is too wide, or cases that never run the mutated code."""
    done, wrong = fuzz.run_cases(range(200), mutation, stop_at_first=True)
    assert len(wrong) == 1, f"not detected in {done} cases"
    assert "off by" in next(iter(wrong.values()))
