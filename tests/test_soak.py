"""Tests of the program for long runs: a short run passes, and each of its checks can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import pytest
import soak

from bagua_syncbn_algo.bench.measure import run_ranks

MIB = 2**20


def samples(resident: float = 0.0, descriptors: float = 0.0, threads: float = 0.0, objects: float = 0.0) -> Any:
    """Returns the samples of a rank; the arguments are what it leaks in each step."""
    return [
        soak.Sample(
            step,
            int(300 * MIB + resident * step),
            int(20 + descriptors * step),
            int(12 + threads * step),
            int(9000 + objects * step),
        )
        for step in range(500, 5000, 50)
    ]


def report(**changed: Any) -> Dict[str, Any]:
    return {"samples": samples(), "states": [(250, "a", "b"), (500, "c", "d")], "finite": True, **changed}


def test_constant_numbers_are_no_growth() -> None:
    """Catches a check that fails without a leak, or because of noise that a median ignores."""
    noisy = samples()
    noisy[-1] = noisy[-1]._replace(resident=noisy[-1].resident + 30 * MIB)
    assert soak.growth_problems(0, noisy) == []
    assert soak.problems([report(), report()], [report(), report()]) == []


@pytest.mark.parametrize(
    ("leak", "words"),
    [
        ({"resident": 2048}, "resident memory to change by at most 2% after step 500 on rank 3 (got 301.4 to 309."),
        ({"descriptors": 0.001}, "a constant number of descriptors after step 500 on rank 3 (got 20 to 24)"),
        ({"threads": 0.001}, "a constant number of threads after step 500 on rank 3 (got 12 to 16)"),
        ({"objects": 1}, "no further Python objects after step 500 on rank 3 (got 9725 to 13"),
    ],
)
def test_a_leak_is_a_problem(leak: Dict[str, float], words: str) -> None:
    """Catches a check that accepts a leak: 2 KiB or an object in a step, a descriptor or a thread in 1,000 steps."""
    (found,) = soak.growth_problems(3, samples(**leak))
    assert words in found


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"states": [(250, "a", "x"), (500, "c", "x")]},
            "the first run: expected the same buffers at every step (got others after step 250) on rank 1",
        ),
        (
            {"states": [(250, "a", "b"), (500, "x", "d")]},
            "the first run: expected the same parameters at every step (got others after step 500) on rank 1",
        ),
        ({"finite": False}, "expected finite parameters and buffers (got NaN or infinity on rank 1)"),
    ],
)
def test_different_ranks_are_a_problem(changed: Dict[str, Any], words: str) -> None:
    """Catches a comparison that leaves out a rank, or either parameters or buffers."""
    found = soak.problems([report(), report(**changed)], [report(), report()])
    assert len(found) == 1 and words in found[0]


def test_different_runs_are_a_problem() -> None:
    """Catches a comparison of a run with itself."""
    again = [report(states=[(250, "a", "x")]), report(states=[(250, "a", "x")])]
    (found,) = soak.problems([report(), report()], again)
    assert found == "both runs: expected the same buffers at every step (got others after step 250) in the second one"
    assert len(soak.problems([report()], [report(states=[])])) == 2


@pytest.mark.multirank
def test_a_short_run(tmp_path: Path) -> None:
    """Catches a program that does not run, and a run without coalesced, repeated or overlapped rounds.

    After so few steps, caches and the allocator have not met all shapes: objects may grow, and memory by 10 %.
    """
    host = "with_bagua"
    reports: List[Any] = run_ranks(soak.run_rank, host, 60, 2, ranks=2)
    found = soak.problems(reports, reports, limit=0.1)
    assert len(reports) == 2 and [each for each in found if "Python objects" not in each] == []
    assert reports[0]["coalesced"] == 1 and reports[0]["overlapped"] >= 1
    assert reports[0]["rounds"] >= 8  # of four rounds, in forward and backward
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n## Long runs\n\nWords.\n\n| host | old |\n| --- | --- |\n| DDP | 1 |\n\n## Later\n\n| host | 2 |\n"
    )
    soak.write_section([soak.row_of(host, 60, reports, reports)], page)
    text = page.read_text()
    assert text.startswith("# Page\n\n## Long runs\n\nWords.\n\n| host | ranks, steps |") and "old" not in text
    assert text.endswith(" yes |\n\n## Later\n\n| host | 2 |\n") and f"| {host} | 2, 60 |" in text


def test_steps_have_all_features() -> None:
    """Catches a loop that never accumulates gradients, evaluates, changes shapes or has an empty batch."""
    steps = [soak.Step.of(number, 4) for number in range(300)]
    assert {step.forwards for step in steps} == {1, 2} and {step.evaluates for step in steps} == {False, True}
    counts = {rows for step in steps for each in step.rows for rows in each}
    assert counts == {0, 1, 2, 3} and {s for step in steps for each in step.sizes for s in each} == set(soak.SIZES)
    assert all(sum(each) >= 2 for step in steps for each in step.rows)
