"""Tests of the injected faults: the list and its table are complete, and the cheapest faults end as expected."""

from __future__ import annotations

from pathlib import Path
from typing import Tuple

import pytest

from tests.faults.__main__ import cases
from tests.faults.cases import BARE, EXACT, FAULTS, HOSTS, NAMED, Fault
from tests.faults.check import run
from tests.faults.model import PLACES

PAGE = Path(__file__).parent.parent / "docs" / "fault_table.md"


def test_the_list_is_complete() -> None:
    """Catches a fault that replaces another one of the same name, and a fault that runs on no host."""
    assert len(FAULTS) >= 40 and len({fault.name for fault in FAULTS}) == len(FAULTS)
    for host in HOSTS:
        assert sum(bool(fault.expected(host)) for fault in FAULTS) >= 40
    assert all(fault.ddp or fault.bagua for fault in FAULTS)
    assert {fault.place for fault in FAULTS} >= set(PLACES)


def test_the_table_has_each_fault() -> None:
    """Catches a table that was written before a fault was added, and a row that contradicts the expectation."""
    lines = PAGE.read_text().splitlines()
    for fault, host in cases():
        shown = {"ddp": "DDP", "bagua": "Bagua"}[host]
        found = [line for line in lines if line.startswith(f"| {fault.name} | {shown} |")]
        assert len(found) == 1, (fault.name, host)
        # Errors of PyTorch's own collectives depend on which of its threads ends first.
        allowed = [fault.expected(host)] + [NAMED] * (fault.expected(host) == BARE)
        assert any(found[0].endswith(f"| {result} |") for result in allowed), found


CHEAP = [
    ("skips a layer in the third step", "ddp"),
    ("freezes a weight in the third step", "bagua"),
    ("SIGKILL: forward, between two rounds", "bagua"),
    ("exception: loss", "ddp"),
    ("has images of another size", "ddp"),
]


@pytest.mark.multirank
@pytest.mark.parametrize("case", CHEAP, ids=lambda case: f"{case[0]}, {case[1]}")
def test_a_fault_ends_as_expected(case: Tuple[str, str]) -> None:
    """Catches ranks that hang, errors without place and rank, and wrong numbers, on each host."""
    fault: Fault = next(fault for fault in FAULTS if fault.name == case[0])
    row = run(fault, case[1])
    assert not row.problems, row
    assert row.says or row.result == EXACT
