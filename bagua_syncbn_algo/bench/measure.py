"""Interleaved timing of variants, medians with spread, start of rank processes, result files."""

from __future__ import annotations

import json
import os
import platform
import socket
import statistics
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["RANKS", "Spread", "interleave", "machine", "run_ranks", "take_times", "write"]

RANKS = 2


class Spread(NamedTuple):
    """The median and the quartiles of times, in seconds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Returns the spread of at least two times, in seconds."""
        low, median, high = statistics.quantiles(seconds, n=4)
        return cls(median, low, high)


def interleave(
    variants: Dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 10,
    progress: Optional[Callable[[], None]] = None,
) -> Dict[str, Spread]:
    """Times the variants in turn, once per repetition, so that a change of the machine's speed affects all of them.

    Args:
        variants: the functions to time, by name.
        repeats: the number of timed repetitions, at least 2.
        warmup: the number of repetitions before them that are not timed.
        progress: a function that is called after every call of a variant.

    Returns:
        The spread of the seconds per call, by name.
    """
    return {name: Spread.of(values) for name, values in take_times(variants, repeats, warmup, progress).items()}


def take_times(
    variants: Dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 10,
    progress: Optional[Callable[[], None]] = None,
) -> Dict[str, List[float]]:
    """Returns the seconds of every timed call, by name, to combine them with other runs; see :func:`interleave`."""
    times: Dict[str, List[float]] = {name: [] for name in variants}
    for number in range(warmup + repeats):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
            if progress is not None:
                progress()
    return times


def run_ranks(body: Callable[..., Any], *arguments: Any, ranks: int = RANKS) -> Any:
    """Runs ``body(rank, *arguments)`` on rank processes with the environment of a launcher and one thread each.

    Args:
        body: a function at module level, which initializes the process group.
        *arguments: its arguments after the rank.
        ranks: the number of processes.

    Returns:
        The result of rank 0.

    Raises:
        torch.multiprocessing.ProcessException: if a rank failed; the other ranks are terminated.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    spawn: Any = mp.spawn  # type: ignore[attr-defined]
    context = spawn(_rank_main, (ranks, port, body, arguments, results), ranks, join=False)
    value = None
    while not context.join(0.1):
        while not results.empty():  # a full pipe (64 KiB) would block the rank
            value = results.get()
    return value if results.empty() else results.get()


def _rank_main(rank: int, ranks: int, port: int, body: Callable[..., Any], arguments: Any, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    value = body(rank, *arguments)
    if rank == 0:
        results.put(value)
    dist.barrier()
    dist.destroy_process_group()


def machine() -> Dict[str, Any]:
    """Returns the processor, the number of cores and threads, and the versions of Python and PyTorch."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(path: Path, rows: Any) -> None:
    """Writes ``rows`` and the description of the machine to a JSON file."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
