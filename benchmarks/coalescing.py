"""Step time with one round a level, compared with upstream Bagua's scheme, torch's scheme and one round a layer.

Two gloo ranks run with one thread each. A step is forward, backward and the gradient all-reduce. Eight copies of a
model differ in how they exchange statistics; their steps are interleaved in one run, and all use the same kernels. The
schemes of upstream and torch are measured twice: over a group of ``torch.distributed``, as their users have it, and
over a group with yielding threads, as this package makes it. A ratio to the second isolates the share of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import models
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bagua_syncbn_algo import bagua, plan_of, record_rounds
from bagua_syncbn_algo.bench.measure import RANKS, interleave, run_ranks, write
from bagua_syncbn_algo.bench.schemes import build_variant, channel_of_model
from bagua_syncbn_algo.bench.steps import bars_of, overhead_of
from bagua_syncbn_algo.comm.groups import member_group

VARIANTS = ("local", "upstream", "torch", "per layer", "coalesced", "overlapped")
RECORDED = 3
# The same schemes over a group with yielding threads, see comm/groups.py.
YIELDING = {"upstream, yielding": "upstream", "torch, yielding": "torch"}

BASELINES = ("upstream", "torch", *YIELDING)


class Case(NamedTuple):
    """A model and its input."""

    model: str
    arguments: Dict[str, Any]
    shape: Tuple[int, int, int, int]
    steps: int


CASES = (
    Case("ResNet", {"width": 64}, (4, 3, 64, 64), 16),
    Case("Inception", {"width": 32}, (4, 3, 64, 64), 10),
    Case("HighResolution", {"width": 18}, (2, 3, 64, 64), 10),
)


def run_rank(rank: int, case: Case) -> Dict[str, Any]:
    """Measures one model."""
    bagua.init_process_group()
    images, labels = torch.randn(case.shape), torch.randint(10, (case.shape[0],))
    built: Dict[str, Any] = {}

    def step(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        nn.functional.cross_entropy(model(images), labels).backward()

    for name in (*VARIANTS[:3], *YIELDING, *VARIANTS[3:]):
        torch.manual_seed(0)
        group = member_group(range(RANKS)) if name in YIELDING else None
        built[name] = build_variant(
            YIELDING.get(name, name), getattr(models, case.model)(**case.arguments), group=group
        )
        step(built[name])
        step(built[name])
    rounds, seconds = {}, {}
    for name, model in built.items():
        channel = channel_of_model(model)
        before = channel.rounds
        recorded = []
        for _ in range(RECORDED):
            with record_rounds() as record:
                step(model)
            recorded.append(sum(entry.duration for entry in record))
        rounds[name] = (channel.rounds - before) // RECORDED
        seconds[name] = statistics.median(recorded)
    spreads = interleave({name: (lambda m=model: step(m)) for name, model in built.items()}, case.steps, warmup=3)
    return {
        "case": case._asdict(),
        "rounds": rounds,
        "spreads": {name: spread._asdict() for name, spread in spreads.items()},
        "plan": plan_of(built["coalesced"]).summary(),
        "rounds_seconds": {name: seconds[name] for name in ("per layer", "coalesced")},
    }


def draw(rows: List[Dict[str, Any]], path: Path) -> None:
    """Draws the step times as bars, a group for each model, with the rounds of a step on them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(rows))
    for row, axis in zip(rows, axes):
        times, errors, looks = bars_of(row["spreads"], VARIANTS)
        bars = axis.bar(VARIANTS, times, yerr=errors, **looks)
        axis.bar_label(bars, [str(row["rounds"][name]) for name in VARIANTS], fontsize=8, padding=4)
        axis.set_title(f"{row['case']['model']}: {times[-1] / times[1]:.2f} x upstream's", fontsize=10)
        axis.tick_params(axis="x", rotation=35, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("step time, ms (median, middle half)")
    title = "One round of statistics a dependency level: 2 gloo ranks on one machine; above the bars: rounds a step"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=[case.model for case in CASES])
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "docs" / "coalescing.png")
    options = parser.parse_args()
    rows = []
    table = Table(
        "model",
        *(f"{name}, ms" for name in VARIANTS),
        *(f"overhead / {name}" for name in BASELINES),
        title="rounds a step in ()",
    )
    for case in CASES:
        if case.model not in options.models:
            continue
        row = run_ranks(run_rank, case)
        rows.append(row)
        medians = {name: row["spreads"][name]["median"] for name in VARIANTS}
        cells = [f"{1000 * medians[name]:.0f} ({row['rounds'][name]})" for name in VARIANTS]
        found = {"variants": row["spreads"]}
        row["overhead"] = {name: overhead_of(found, "overlapped", name) for name in BASELINES}
        table.add_row(case.model, *cells, *(f"{row['overhead'][name]:.2f}" for name in BASELINES))
    Console(width=140).print(table)
    write(Path(__file__).parent / "results" / "coalescing.json", rows)
    if len(rows) == len(CASES):
        draw(rows, options.picture)


if __name__ == "__main__":
    main()
