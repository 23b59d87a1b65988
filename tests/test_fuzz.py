"""The fuzz in small: 200 cases are right, and it notices wrong code."""

from __future__ import annotations

import fuzz
import pytest

CHUNK = 50


@pytest.mark.multirank
@pytest.mark.timeout(300)
@pytest.mark.parametrize("first", range(0, 200, CHUNK))
def test_random_models_and_loops(first: int) -> None:
    """Catches wrong numbers in combinations that nobody has thought of; ``make fuzz`` runs ten times as many."""
    done, wrong = fuzz.run_cases(range(first, first + CHUNK))
    assert done == CHUNK and not wrong, wrong


@pytest.mark.multirank
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mutation", sorted(fuzz.MUTATIONS))
def test_wrong_code_is_noticed(mutation: str) -> None:
    """Catches a fuzz that cannot fail: a tolerance too wide, or a generator that never comes to the place."""
    done, wrong = fuzz.run_cases(range(200), mutation, stop_at_first=True)
    assert len(wrong) == 1, f"not noticed in {done} cases"
    assert "off by" in next(iter(wrong.values()))
