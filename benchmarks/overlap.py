"""Time that overlapped backward rounds save, compared with the time that they could save.

Two gloo ranks run with one thread each. Steps of one model are interleaved: with one round a level, and the same with
overlapped backward rounds. The latency added to every round counts from when the last rank has sent, as on a wire.
``could`` is the sum over rounds of the smaller of two times, measured in steps after the timed ones: the round without
overlap, and the weight gradients that overlap with it.

Both training steps and steps that only accumulate gradients (``alone``) are measured; the latter exchange statistics
only. On a machine with one core a rank, gradient communication runs on the cores that compute. It fills some of the
waits, so that overlap saves less, and it slows down concurrent computation. ``busy`` is the share of a core that a
rank's process uses in steps without overlap.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import models
import torch
from rich.console import Console
from rich.table import Table

from bagua_syncbn_algo import bagua, record_rounds
from bagua_syncbn_algo.bench.latency import add_latency
from bagua_syncbn_algo.bench.measure import Spread, run_ranks, take_times, write
from bagua_syncbn_algo.bench.schemes import build_variant, channel_of_model
from bagua_syncbn_algo.bench.steps import training_step
from bagua_syncbn_algo.graph import split_backward as overlap_module
from bagua_syncbn_algo.graph.coalesce import coalesce

VARIANTS = ("coalesced", "overlapped")
KINDS = ("training", "alone")
RECORDED = 5


class Case(NamedTuple):
    """The width of the residual network, the size of its images, and the latencies added to a round in ms."""

    width: int
    size: int
    latencies: Tuple[float, ...]
    steps: int  # timed steps of each variant and kind


CASES = (Case(32, 64, (0, 1, 3), 16), Case(64, 64, (0, 1, 3), 16), Case(64, 128, (0, 1), 5))
BATCH = 4
# Each launch starts new processes, because the placement of threads and memory in a process affects the times.
LAUNCHES = 3


def run_rank(rank: int, cases: Tuple[Case, ...]) -> List[Dict[str, Any]]:
    """Measures all cases once."""
    bagua.init_process_group()
    rows = []
    for case in cases:
        torch.manual_seed(rank)
        images = torch.randn(BATCH, 3, case.size, case.size)
        torch.manual_seed(0)
        model = build_variant("overlapped", models.ResNet(case.width))
        steps = variants_of(model, training_step(model, images))
        for step in steps.values():
            step()
        for latency in case.latencies:
            add_latency(channel_of_model(model), latency / 1000)
            row: Dict[str, Any] = {"width": case.width, "size": case.size, "latency_ms": latency}
            for kind in KINDS:
                model.bagua_ddp.require_backward_grad_sync = kind == "training"
                row[kind] = measured(steps, case.steps)
            rows.append(row)
    return rows


def variants_of(model: Any, step: Callable[[], None]) -> Dict[str, Callable[[], None]]:
    """Returns a step of each variant on the same parameters, so that their memory layout favours neither."""
    forwards = {}
    for name in VARIANTS:
        coalesce(model, overlap=name == "overlapped")
        forwards[name] = model.forward

    def run(name: str) -> None:
        model.forward = forwards[name]
        step()

    return {name: partial(run, name) for name in VARIANTS}


def measured(steps: Dict[str, Callable[[], None]], count: int) -> Dict[str, Any]:
    """Returns the step times of both variants, and the time that overlap could save."""
    times = take_times(steps, count, warmup=3)
    plain, overlapped = (recorded(steps[name]) for name in VARIANTS)
    pairs = list(zip(plain["rounds"], overlapped["gradients"]))
    return {
        "times": times,
        "could": sum(min(pair) for pair in pairs),
        "gradients_longer_than_rounds": sum(gradient > round_ for round_, gradient in pairs) / len(pairs),
        "exposed": {"coalesced": plain["exposed"], "overlapped": overlapped["exposed"]},
        "busy": plain["busy"],
    }


def recorded(step: Any) -> Dict[str, Any]:
    """Returns medians over steps: each backward round, its overlapping gradients, the exposed time, the busy share.

    The exposed time is a sum of medians by round, because a delay of one rank in one step makes the other rank wait.
    """
    gradients: List[Tuple[float, float]] = []
    original = overlap_module._CONVOLUTION_BACKWARD

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = original(*arguments)
        if arguments[-1][1]:
            gradients.append((start, time.perf_counter() - start))
        return result

    durations, exposed, overlapping, busy = [], [], [], []
    overlap_module._CONVOLUTION_BACKWARD = timed
    try:
        for _ in range(RECORDED):
            gradients.clear()
            wall, processor = time.perf_counter(), time.process_time()
            with record_rounds() as record:
                step()
            busy.append((time.process_time() - processor) / (time.perf_counter() - wall))
            entries = [entry for entry in record if entry.phase == "backward"]
            durations.append([entry.duration for entry in entries])
            exposed.append([entry.exposed for entry in entries])
            ends = [*(entry.launch for entry in entries[1:]), float("inf")]
            overlapping.append([sum(t for at, t in gradients if e.launch < at < end) for e, end in zip(entries, ends)])
    finally:
        overlap_module._CONVOLUTION_BACKWARD = original
    return {
        "rounds": [statistics.median(each) for each in zip(*durations)],
        "gradients": [statistics.median(each) for each in zip(*overlapping)],
        "busy": statistics.median(busy),
        "exposed": sum(statistics.median(each) for each in zip(*exposed)),
    }


def pooled(launches: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Returns one row from the rows of one case in several launches."""
    row = {key: launches[0][key] for key in ("width", "size", "latency_ms")}
    kinds = {kind: _pooled([launch[kind] for launch in launches]) for kind in KINDS}
    # The rounds and layers determine this limit; steps without gradient communication measure it best.
    could = kinds["alone"]["could"]
    for kind in kinds.values():
        kind["share"] = kind["saved"] / could
    return {**row, **kinds, "could": could}


def _pooled(launches: List[Dict[str, Any]]) -> Dict[str, Any]:
    spreads = {name: Spread.of([t for each in launches for t in each["times"][name]]) for name in VARIANTS}
    # Differences of consecutive steps: a temporary slowdown of the machine affects both.
    saved = statistics.median(a - b for each in launches for a, b in zip(*(each["times"][name] for name in VARIANTS)))
    exposed = {name: statistics.median(each["exposed"][name] for each in launches) for name in VARIANTS}
    return {
        "variants": {name: spread._asdict() for name, spread in spreads.items()},
        "saved": saved,
        "exposed": exposed,
        "exposed_ratio": exposed["overlapped"] / exposed["coalesced"],
        **{
            key: statistics.median(each[key] for each in launches)
            for key in ("could", "gradients_longer_than_rounds", "busy")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    options = parser.parse_args()
    launches = [run_ranks(run_rank, CASES) for _ in range(options.launches)]
    rows = [pooled(list(each)) for each in zip(*launches)]
    heading = ["width", "images", "added, ms", "steps", *(f"{name}, ms" for name in VARIANTS), "overlapped / coalesced"]
    table = Table(*heading, "saved, ms", "could, ms", "saved / could", "exposed backward", "gradients > rounds", "busy")
    for row in rows:
        for kind in KINDS:
            each = row[kind]
            medians = {name: 1000 * each["variants"][name]["median"] for name in VARIANTS}
            table.add_row(
                f"{row['width']}",
                f"{row['size']}²",
                f"{row['latency_ms']:g}",
                kind,
                *(f"{medians[name]:.0f}" for name in VARIANTS),
                f"{medians['overlapped'] / medians['coalesced']:.2f}",
                f"{1000 * each['saved']:.1f}",
                f"{1000 * row['could']:.1f}",
                f"{each['share']:.2f}",
                f"{each['exposed_ratio']:.2f}",
                f"{each['gradients_longer_than_rounds']:.0%}",
                f"{each['busy']:.0%}",
            )
    Console(width=150).print(table)
    write(Path(__file__).parent / "results" / "overlap.json", rows)


if __name__ == "__main__":
    main()
