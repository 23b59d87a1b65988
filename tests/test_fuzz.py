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


@pytest.mark.multirank
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", sorted(fuzz.MUTATIONS))
def test_wrong_code_is_noticed(mutation: str) -> None:
    """Catches fuzzing that cannot fail: a tolerance that is too wide, or cases that never run the mutated code."""
    done, wrong = fuzz.run_cases(range(200), mutation, stop_at_first=True)
    assert len(wrong) == 1, f"not detected in {done} cases"
    assert "off by" in next(iter(wrong.values()))
