"""Fair timing for all benchmarks: variants interleaved in one run, medians with spread, results with their machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import torch

RESULTS = Path(__file__).parent / "results"


class Spread(NamedTuple):
    """Seconds: the median and the middle half around it."""

    median: float
    low: float
    high: float


def interleave(variants: Dict[str, Callable[[], Any]], repeats: int, warmup: int = 10) -> Dict[str, Spread]:
    """Times every variant once in each round, so that a machine that slows down slows them all.

    Args:
        variants: what to run, by name.
        repeats: counted rounds.
        warmup: rounds not counted, first.

    Returns:
        Seconds a call, by name.
    """
    times: Dict[str, List[float]] = {name: [] for name in variants}
    for number in range(warmup + repeats):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    spreads = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        spreads[name] = Spread(median, low, high)
    return spreads


def machine() -> Dict[str, Any]:
    """Returns what a reader needs to judge the numbers."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(name: str, rows: Any) -> Path:
    """Writes ``rows`` with the machine to ``results/<name>.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path
