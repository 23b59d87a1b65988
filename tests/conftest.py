"""Shared fixtures and hooks: one thread per rank, fixed seeds, and failures for skipped multi-rank tests."""

from __future__ import annotations

import os
from typing import Any, Dict, Iterator

import pytest
import torch

torch.set_num_threads(1)
os.environ["TRITON_INTERPRET"] = "1"  # the kernels of Triton run on CPU tensors; read when a kernel is defined

_multirank: Dict[str, str] = {}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeds the random numbers and removes the package's environment variables."""
    for name in [name for name in os.environ if name.startswith("BAGUA_SYNCBN")]:
        monkeypatch.delenv(name)
    torch.manual_seed(0)
    yield


def pytest_collection_modifyitems(items: Any) -> None:
    for item in items:
        if item.get_closest_marker("multirank"):
            _multirank[item.nodeid] = "did not run"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    outcome = yield
    report = outcome.get_result()
    if item.nodeid in _multirank:
        if report.skipped:
            report.outcome = "failed"
            report.longrepr = "a multi-rank test must not be skipped"
        if report.when == "call" or report.failed:
            _multirank[item.nodeid] = report.outcome


def pytest_deselected(items: Any) -> None:
    for item in items:
        _multirank.pop(item.nodeid, None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    passed = sum(state == "passed" for state in _multirank.values())
    not_run = sum(state == "did not run" for state in _multirank.values())
    terminalreporter.write_line(f"multi-rank tests: {passed} passed, {not_run} did not run")
