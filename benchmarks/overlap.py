"""What hiding the backward rounds saves, beside what could be saved.

Two gloo ranks, one thread each; steps of two copies of a model, interleaved: one round a level, and the same with
backward rounds hidden. Latency is added to every round as a wire's, from when the last rank has sent. ``could`` is the
sum over rounds of the lesser of the round (as the plain version has it) and the weight gradients that hide it. Both are
measured in steps after the timed ones, without gradient communication: on a machine with a core a rank it travels by
the cores that compute, and while it does both take up to five times as long (``could_beside_gradients``). ``busy`` is
the share of a core that a rank's process uses in the plain version, gradient communication included.
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

from bagua_syncbn_algo import bagua, record_rounds
from bagua_syncbn_algo import overlap as overlap_module
from bagua_syncbn_algo.bench.measure import Spread, run_ranks, take_times, write
from bagua_syncbn_algo.bench.schemes import add_latency, build_variant, channel_of_model
from bagua_syncbn_algo.bench.steps import training_step

VARIANTS = ("coalesced", "hidden")
RECORDED = 5


class Case(NamedTuple):
    """A width of the residual network, the size of its images, and the milliseconds added to a round."""

    width: int
    size: int
    latencies: Tuple[float, ...]
    steps: int


CASES = (Case(32, 64, (0, 1, 3), 28), Case(64, 64, (0, 1, 3), 26), Case(64, 128, (0, 1), 5))
BATCH = 4
# Processes are started anew: how memory happens to lie in one of them favours one variant or the other.
LAUNCHES = 2


def run_rank(rank: int, cases: Tuple[Case, ...]) -> List[Dict[str, Any]]:
    """Measures all cases once."""
    bagua.init_process_group()
    rows = []
    for case in cases:
        torch.manual_seed(rank)
        images = torch.randn(BATCH, 3, case.size, case.size)
        built: Dict[str, Any] = {}
        for name in VARIANTS:
            torch.manual_seed(0)
            built[name] = build_variant(name, models.ResNet(case.width))
        steps = {name: training_step(model, images) for name, model in built.items()}
        for step in steps.values():
            step()
        for latency in case.latencies:
            for name in VARIANTS:
                add_latency(channel_of_model(built[name]), latency / 1000)
            times = take_times(steps, case.steps, warmup=3)
            plain, hidden = recorded(steps["coalesced"]), recorded(steps["hidden"])
            alone = {}
            for name, model in built.items():
                model.bagua_ddp.require_backward_grad_sync = False
                alone[name] = recorded(steps[name])
                model.bagua_ddp.require_backward_grad_sync = True
            pairs = list(zip(alone["coalesced"]["rounds"], alone["hidden"]["gradients"]))
            beside = zip(plain["rounds"], hidden["gradients"])
            rows.append(
                {
                    "width": case.width,
                    "size": case.size,
                    "latency_ms": latency,
                    "times": times,
                    "could": sum(min(pair) for pair in pairs),
                    "could_beside_gradients": sum(min(pair) for pair in beside),
                    "gradients_longer_than_rounds": sum(gradient > round_ for round_, gradient in pairs) / len(pairs),
                    "exposed": {"coalesced": plain["exposed"], "hidden": hidden["exposed"]},
                    "busy": plain["busy"],
                }
            )
    return rows


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
    first = launches[0]
    spreads = {name: Spread.of([t for row in launches for t in row["times"][name]]) for name in VARIANTS}
    # Of steps that ran one after the other: a machine that slows down for a while slows both.
    saved = statistics.median(a - b for row in launches for a, b in zip(*(row["times"][name] for name in VARIANTS)))
    could, beside = (statistics.median(row[key] for row in launches) for key in ("could", "could_beside_gradients"))
    exposed = {name: statistics.median(row["exposed"][name] for row in launches) for name in VARIANTS}
    return {
        **{key: first[key] for key in ("width", "size", "latency_ms")},
        "variants": {name: spread._asdict() for name, spread in spreads.items()},
        "saved": saved,
        "could": could,
        "could_beside_gradients": beside,
        "share": saved / could,
        "gradients_longer_than_rounds": statistics.median(row["gradients_longer_than_rounds"] for row in launches),
        "busy": statistics.median(row["busy"] for row in launches),
        "exposed": exposed,
        "exposed_ratio": exposed["hidden"] / exposed["coalesced"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--launches", type=int, default=LAUNCHES)
    options = parser.parse_args()
    launches = [run_ranks(run_rank, CASES) for _ in range(options.launches)]
    rows = [pooled(list(each)) for each in zip(*launches)]
    heading = ["width", "images", "added, ms", *(f"{name}, ms" for name in VARIANTS), "hidden / coalesced"]
    table = Table(*heading, "saved, ms", "could, ms", "saved / could", "exposed backward", "gradients > rounds", "busy")
    for row in rows:
        medians = {name: 1000 * row["variants"][name]["median"] for name in VARIANTS}
        table.add_row(
            f"{row['width']}",
            f"{row['size']}²",
            f"{row['latency_ms']:g}",
            *(f"{medians[name]:.0f}" for name in VARIANTS),
            f"{medians['hidden'] / medians['coalesced']:.2f}",
            f"{1000 * row['saved']:.1f}",
            f"{1000 * row['could']:.1f}",
            f"{row['share']:.2f}",
            f"{row['exposed_ratio']:.2f}",
            f"{row['gradients_longer_than_rounds']:.0%}",
            f"{row['busy']:.0%}",
        )
    Console(width=150).print(table)
    write(Path(__file__).parent / "results" / "overlap.json", rows)


if __name__ == "__main__":
    main()
