"""What hiding the backward rounds saves, beside what could be saved.

Two gloo ranks, one thread each; steps of one model, interleaved: with one round a level, and the same with backward
rounds overlapped. Latency is added to every round as a wire's, from when the last rank has sent. ``could`` is the sum
over rounds of the lesser of the round (as the plain version has it) and the weight gradients that overlap with it,
measured in steps after the timed ones. Everything is measured twice: in training steps, and in steps that only
accumulate gradients (``alone``), which exchange statistics and nothing else. On a machine with a core a rank gradient
communication travels by the cores that compute: it fills some of the waits, so that hiding them saves less, and slows
what runs beside it. ``busy`` is the share of a core that a rank's process uses in the plain version's training steps.
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
    """A width of the residual network, the size of its images, and the milliseconds added to a round."""

    width: int
    size: int
    latencies: Tuple[float, ...]
    steps: int  # of either variant and kind


CASES = (Case(32, 64, (0, 1, 3), 16), Case(64, 64, (0, 1, 3), 16), Case(64, 128, (0, 1), 5))
BATCH = 4
# Processes are started anew: how threads and memory happen to lie in one of them matters.
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
    """Returns a step of each variant, on the same parameters: how these lie in memory favours neither."""
    forwards = {}
    for name in VARIANTS:
        coalesce(model, overlap=name == "overlapped")
        forwards[name] = model.forward

    def run(name: str) -> None:
        model.forward = forwards[name]
        step()

    return {name: partial(run, name) for name in VARIANTS}


def measured(steps: Dict[str, Callable[[], None]], count: int) -> Dict[str, Any]:
    """Returns the times of steps of both variants, and what could be saved."""
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
    """Returns, of some steps, the medians of each backward round and of what it hid behind; and the exposed time.

    That is the sum of the rounds' medians too: a rank that the machine holds up in one step makes the other one wait.
    """
    gradients: List[Tuple[float, float]] = []
    usual = overlap_module._CONVOLUTION_BACKWARD

    def timed(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = usual(*arguments)
        if arguments[-1][1]:
            gradients.append((start, time.perf_counter() - start))
        return result

    durations, exposed, behind, busy = [], [], [], []
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
            behind.append([sum(t for at, t in gradients if e.launch < at < end) for e, end in zip(entries, ends)])
    finally:
        overlap_module._CONVOLUTION_BACKWARD = usual
    return {
        "rounds": [statistics.median(each) for each in zip(*durations)],
        "gradients": [statistics.median(each) for each in zip(*behind)],
        "busy": statistics.median(busy),
        "exposed": sum(statistics.median(each) for each in zip(*exposed)),
    }


def pooled(launches: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Returns one row of the same case's rows in several launches."""
    row = {key: launches[0][key] for key in ("width", "size", "latency_ms")}
    kinds = {kind: _pooled([launch[kind] for launch in launches]) for kind in KINDS}
    # What can overlap is a property of the rounds and the layers: the steps that do nothing else show it best.
    could = kinds["alone"]["could"]
    for kind in kinds.values():
        kind["share"] = kind["saved"] / could
    return {**row, **kinds, "could": could}


def _pooled(launches: List[Dict[str, Any]]) -> Dict[str, Any]:
    spreads = {name: Spread.of([t for each in launches for t in each["times"][name]]) for name in VARIANTS}
    # Of steps that ran one after the other: a machine that slows down for a while slows both.
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
