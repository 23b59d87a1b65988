"""What hiding the backward rounds saves, beside what could be saved.

Two gloo ranks, one thread each; steps of two copies of a model, interleaved: one round a level, and the same with
backward rounds hidden. Latency is added to every round as a delay on completion. ``could`` is the sum over rounds of
the lesser of the round (as the plain version has it) and the weight gradients that hide it, both measured in steps
after the timed ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import models
import torch
from rich.console import Console
from rich.table import Table

from bagua_syncbn_algo import bagua, plan_of, record_rounds
from bagua_syncbn_algo import overlap as overlap_module
from bagua_syncbn_algo.bench.measure import interleave, run_ranks, write
from bagua_syncbn_algo.bench.schemes import build_variant, channel_of_model
from bagua_syncbn_algo.bench.steps import training_step

VARIANTS = ("coalesced", "hidden")
RECORDED = 9


class Case(NamedTuple):
    """A model, its input, and the milliseconds added to a round."""

    model: str
    width: int
    shape: Tuple[int, int, int, int]
    latencies: Tuple[float, ...]
    steps: int


CASES = (
    Case("ResNet", 32, (4, 3, 64, 64), (0, 1, 3), 40),
    Case("ResNet", 64, (4, 3, 64, 64), (0, 1, 3), 30),
    Case("ResNet", 128, (4, 3, 64, 64), (0,), 12),
)


def run_rank(rank: int, case: Case) -> List[Dict[str, Any]]:
    """Measures one case."""
    bagua.init_process_group()
    torch.manual_seed(rank)
    images = torch.randn(case.shape)
    built: Dict[str, Any] = {}
    for name in VARIANTS:
        torch.manual_seed(0)
        built[name] = build_variant(name, getattr(models, case.model)(case.width))
    steps = {name: training_step(model, images) for name, model in built.items()}
    for step in steps.values():
        step()
    rows = []
    for latency in case.latencies:
        for name in VARIANTS:
            channel_of_model(built[name]).delay = latency / 1000
        spreads = interleave(steps, case.steps, warmup=3)
        plain, hidden = recorded(steps["coalesced"]), recorded(steps["hidden"])
        could = sum(min(round_, gradient) for round_, gradient in zip(plain["rounds"], hidden["gradients"]))
        rows.append(
            {
                "model": case.model,
                "width": case.width,
                "latency_ms": latency,
                "variants": {name: spread._asdict() for name, spread in spreads.items()},
                "could": could,
                "exposed": {"coalesced": plain["exposed"], "hidden": hidden["exposed"]},
                "rounds": sum(plain["rounds"]),
                "gradients": sum(hidden["gradients"]),
                "shortest_gradient_longer_than_a_round": min(
                    gradient - round_ for round_, gradient in zip(plain["rounds"], hidden["gradients"])
                )
                > 0,
                "plan": plan_of(built["hidden"]).summary(),
            }
        )
    return rows


def recorded(step: Any) -> Dict[str, Any]:
    """Returns, of some steps, the medians of each backward round, of what it hid behind, and of all exposed time."""
    gradients: List[Tuple[float, float]] = []
    usual = overlap_module._CONVOLUTION_BACKWARD

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = usual(*arguments)
        if arguments[-1][1]:
            gradients.append((start, time.perf_counter() - start))
        return result

    durations, exposed, behind = [], [], []
    overlap_module._CONVOLUTION_BACKWARD = timed
    try:
        for _ in range(RECORDED):
            gradients.clear()
            with record_rounds() as record:
                step()
            entries = [entry for entry in record if entry.phase == "backward"]
            durations.append([entry.duration for entry in entries])
            exposed.append(sum(entry.exposed for entry in entries))
            ends = [*(entry.launch for entry in entries[1:]), float("inf")]
            behind.append([sum(t for at, t in gradients if e.launch < at < end) for e, end in zip(entries, ends)])
    finally:
        overlap_module._CONVOLUTION_BACKWARD = usual
    return {
        "rounds": [statistics.median(each) for each in zip(*durations)],
        "gradients": [statistics.median(each) for each in zip(*behind)],
        "exposed": statistics.median(exposed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=sorted({case.model for case in CASES}))
    parser.add_argument("--widths", type=int, nargs="+", default=sorted({case.width for case in CASES}))
    options = parser.parse_args()
    heading = ["model", "added, ms", *(f"{name}, ms" for name in VARIANTS), "hidden / coalesced"]
    table = Table(*heading, "saved, ms", "could, ms", "saved / could", "exposed backward")
    rows: List[Dict[str, Any]] = []
    for case in CASES:
        if case.model in options.models and case.width in options.widths:
            rows += run_ranks(run_rank, case)
    for row in rows:
        medians = {name: 1000 * row["variants"][name]["median"] for name in VARIANTS}
        saved, could = medians["coalesced"] - medians["hidden"], 1000 * row["could"]
        exposed = row["exposed"]["hidden"] / row["exposed"]["coalesced"]
        row["exposed_ratio"] = exposed
        table.add_row(
            f"{row['model']} {row['width']}",
            f"{row['latency_ms']:g}",
            *(f"{medians[name]:.0f}" for name in VARIANTS),
            f"{medians['hidden'] / medians['coalesced']:.2f}",
            f"{saved:.1f}",
            f"{could:.1f}",
            f"{saved / could:.2f}",
            f"{exposed:.2f}",
        )
    Console(width=150).print(table)
    if len(rows) == sum(len(case.latencies) for case in CASES):
        write(Path(__file__).parent / "results" / "overlap.json", rows)


if __name__ == "__main__":
    main()
