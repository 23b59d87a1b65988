"""The plan's cost model against measured communication, and what it says of 2 to 4096 ranks.

Measured: the statistics messages of one step of three models, one after the other on two gloo ranks without computation
between, by each scheme. What the model needs comes from messages measured in the same run: the smallest all-gather and
all-reduce, bare; the smallest round, packed and checked as all are; and a round of a megabyte.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import models
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from bagua_syncbn_algo import SyncPlan, convert_sync_batchnorm, plan_of
from bagua_syncbn_algo.bench.measure import RANKS, interleave, run_ranks, write
from bagua_syncbn_algo.bench.schemes import OriginalScheme
from bagua_syncbn_algo.comm.channel import Channel
from bagua_syncbn_algo.comm.transport import TorchChannel
from bagua_syncbn_algo.comm.wire import BACKWARD, FORWARD, HEADER_BYTES, sync_point

MODELS: Dict[str, Dict[str, Any]] = {
    "ResNet": {"width": 64},
    "Inception": {"width": 32},
    "HighResolution": {"width": 18},
}
SCHEMES = ("upstream", "per_layer", "planned")
_MEGABYTE = 1 << 20
_TRAIN = 100  # messages in a row, as a step has them; a fifth of it for large ones
# Seconds and bytes a second, for the picture: orders of magnitude of links within a node and between nodes.
LINKS = {"within a node (10 µs, 100 GB/s)": (10e-6, 100e9), "between nodes (30 µs, 10 GB/s)": (30e-6, 10e9)}


def replay(channel: Channel, plan: SyncPlan, together: bool) -> Callable[[], None]:
    """Returns what sends one step's messages of ``plan``: a round at once, or every layer by itself."""
    messages: List[Tuple[List[torch.Tensor], List[torch.Tensor]]] = []
    for planned in plan.rounds:
        for features in [planned.features] if together else [(count,) for count in planned.features]:
            forward = [torch.zeros(len(features), dtype=torch.int64), torch.zeros(2 * sum(features))]
            messages.append((forward, [torch.zeros(2 * sum(features))]))
    point = sync_point("replay")

    def step() -> None:
        for forward, _ in messages:
            channel.exchange(point, FORWARD, forward)
        for _, backward in reversed(messages):
            channel.exchange(point, BACKWARD, backward)

    return step


def run_rank(rank: int, repeats: int) -> Dict[str, Any]:
    """Measures the messages of all models and schemes."""
    dist.init_process_group("gloo")
    groups: List[Any] = []  # held: a channel holds its group weakly

    def group() -> Any:
        groups.append(dist.new_group()._get_backend(torch.device("cpu")))
        return groups[-1]

    plans = {name: plan_of(convert_sync_batchnorm(getattr(models, name)(**kw))) for name, kw in MODELS.items()}
    variants: Dict[str, Callable[[], None]] = {}
    for name, plan in plans.items():
        for scheme in SCHEMES:
            channel: Channel = OriginalScheme(group()) if scheme == "upstream" else TorchChannel(group())
            widest = max(planned.payload() for planned in plan.rounds)
            single = HEADER_BYTES + 8 + 8 * max(max(planned.features) for planned in plan.rounds)
            channel.capacity = widest if scheme == "planned" else single
            variants[f"{name} {scheme}"] = replay(channel, plan, scheme == "planned")
    probes = {size: TorchChannel(group()) for size in (64, _MEGABYTE)}
    for size, probe in probes.items():
        probe.capacity = size
        part = torch.zeros(size - HEADER_BYTES, dtype=torch.uint8)
        count = _TRAIN if size == 64 else _TRAIN // 5
        variants[str(size)] = lambda probe=probe, part=part, count=count: [  # type: ignore[misc]
            probe.exchange(sync_point("probe"), FORWARD, [part]) for _ in range(count)
        ]
    bare, sums = OriginalScheme(group()), torch.zeros(8)
    for name, collective in (("gather", bare.gather), ("reduce", bare.reduce)):
        variants[name] = lambda collective=collective: [  # type: ignore[misc]
            collective(sums) for _ in range(_TRAIN)
        ]
    times = {name: spread.median for name, spread in interleave(variants, repeats, warmup=3).items()}
    latency, reduction, small = (times[name] / _TRAIN for name in ("gather", "reduce", "64"))
    large = times[str(_MEGABYTE)] / (_TRAIN // 5)
    found = {"latency": latency, "reduce_latency": reduction, "overhead": max(0.0, small - latency)}
    found["bandwidth"] = _MEGABYTE / (large - small)
    rows = []
    for name, plan in plans.items():
        predicted = asdict(plan.predict(RANKS, **found))
        for scheme in SCHEMES:
            measured = times[f"{name} {scheme}"]
            rows.append({"model": name, "scheme": scheme, "measured": measured, "predicted": predicted[scheme]})
    return {**found, "rows": rows}


def draw(path: Path) -> None:
    """Draws the modelled communication time of a step of the high-resolution model for 2 to 4096 ranks."""
    from matplotlib.figure import Figure

    plan = plan_of(convert_sync_batchnorm(models.HighResolution(18)))
    worlds = [2**power for power in range(1, 13)]
    figure = Figure(figsize=(9, 4), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(LINKS), sharey=True)
    looks = {"upstream": ("#D55E00", "upstream Bagua"), "per_layer": ("#56B4E9", "a round a layer")}
    looks["planned"] = ("#0072B2", "a round a level")
    for (link, (latency, bandwidth)), axis in zip(LINKS.items(), axes):
        for scheme, (color, label) in looks.items():
            times = [1000 * getattr(plan.predict(world, latency, bandwidth), scheme) for world in worlds]
            axis.plot(worlds, times, color=color, linewidth=2)
            axis.annotate(label, (worlds[5], times[5]), (0, -14), textcoords="offset points", color=color, fontsize=8)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_title(link, fontsize=10)
        axis.set_xlabel("ranks")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("communication a step, ms (modelled)")
    title = f"Statistics of the high-resolution model ({plan.summary()})"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "docs" / "prediction.png")
    options = parser.parse_args()
    found = run_ranks(run_rank, options.repeats)
    table = Table("model", "scheme", "measured, ms", "predicted, ms", "ratio")
    for row in found["rows"]:
        cells = [f"{1000 * row[key]:.1f}" for key in ("measured", "predicted")]
        table.add_row(row["model"], row["scheme"], *cells, f"{row['predicted'] / row['measured']:.2f}")
    Console(width=100).print(table)
    names = {"latency": "latency", "reduce_latency": "of an all-reduce", "overhead": "overhead of a round"}
    print(", ".join(f"{name} {1e6 * found[key]:.0f} µs" for key, name in names.items()), end=", ")
    print(f"bandwidth {found['bandwidth'] / 1e9:.2f} GB/s")
    write(Path(__file__).parent / "results" / "prediction.json", found)
    draw(options.picture)


if __name__ == "__main__":
    main()
