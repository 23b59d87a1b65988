"""Peak memory of a training step with one round a layer, with one round a level, and with overlapped rounds.

Two gloo ranks train each model. The peak is the memory that PyTorch allocates above the start of the step. It comes
from the allocator's events on rank 0, after three steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Dict

import models
import torch
from coalescing import CASES, Case
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from bagua_syncbn_algo import bagua
from bagua_syncbn_algo.bench.measure import run_ranks, write
from bagua_syncbn_algo.bench.schemes import build_variant

VARIANTS = ("per layer", "coalesced", "overlapped")


def peak(step: Any) -> int:
    """Returns the peak of the bytes that ``step`` allocates above its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def run_rank(rank: int, case: Case) -> Dict[str, Any]:
    """Measures one model."""
    bagua.init_process_group()
    images, labels = torch.randn(case.shape), torch.randint(10, (case.shape[0],))
    peaks: Dict[str, int] = {}
    for name in VARIANTS:
        torch.manual_seed(0)
        model = build_variant(name, getattr(models, case.model)(**case.arguments))

        def step(model: Any = model) -> None:
            for parameter in model.parameters():
                parameter.grad = None
            torch.nn.functional.cross_entropy(model(images), labels).backward()

        for _ in range(3):
            step()
        peaks[name] = peak(step)
    return {"model": case.model, "peaks": peaks}


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    table = Table("model", *(f"{name}, MiB" for name in VARIANTS), "overlapped / per layer")
    rows = []
    for case in CASES:
        row = run_ranks(run_rank, case)
        row["ratio"] = row["peaks"]["overlapped"] / row["peaks"]["per layer"]
        rows.append(row)
        table.add_row(row["model"], *(f"{row['peaks'][name] / 2**20:.1f}" for name in VARIANTS), f"{row['ratio']:.3f}")
    Console(width=100).print(table)
    write(Path(__file__).parent / "results" / "memory.json", rows)


if __name__ == "__main__":
    main()
