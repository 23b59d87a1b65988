"""The plan's cost model compared with measured communication, and its predictions for 2 to 4096 ranks.

Two gloo ranks send the statistics messages of one step of three models, by each scheme, without computation in between.
The parameters of the cost model are measured in the same run. They come from the smallest bare all-gather and
all-reduce, from the smallest round with its packing and checks, and from a round of one megabyte.
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
from bagua_syncbn_algo.bench.schemes import UpstreamScheme
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
_CONSECUTIVE = 100  # messages one after the other, as in a step; a fifth of them for large messages
# Latency in seconds and bandwidth in bytes a second for the picture: orders of magnitude.
LINKS = {"within a node (10 µs, 100 GB/s)": (10e-6, 100e9), "between nodes (30 µs, 10 GB/s)": (30e-6, 10e9)}


def replay(channel: Channel, plan: SyncPlan, together: bool) -> Callable[[], None]:
    """Returns a function that sends the messages of one step of ``plan``: one a round (``together``) or one a layer."""
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
    groups: List[Any] = []  # keeps the groups alive: a channel has a weak reference to its group

    def group() -> Any:
        groups.append(dist.new_group()._get_backend(torch.device("cpu")))
        return groups[-1]

    plans = {name: plan_of(convert_sync_batchnorm(getattr(models, name)(**kw))) for name, kw in MODELS.items()}
    variants: Dict[str, Callable[[], None]] = {}
    for name, plan in plans.items():
        for scheme in SCHEMES:
            channel: Channel = UpstreamScheme(group()) if scheme == "upstream" else TorchChannel(group())
            widest = max(planned.payload() for planned in plan.rounds)
            single = HEADER_BYTES + 8 + 8 * max(max(planned.features) for planned in plan.rounds)
            channel.capacity = widest if scheme == "planned" else single
            variants[f"{name} {scheme}"] = replay(channel, plan, scheme == "planned")
    probes = {size: TorchChannel(group()) for size in (64, _MEGABYTE)}
    for size, probe in probes.items():
        probe.capacity = size
        part = torch.zeros(size - HEADER_BYTES, dtype=torch.uint8)
        count = _CONSECUTIVE if size == 64 else _CONSECUTIVE // 5
        variants[str(size)] = lambda probe=probe, part=part, count=count: [  # type: ignore[misc]
            probe.exchange(sync_point("probe"), FORWARD, [part]) for _ in range(count)
        ]
    bare, sums = UpstreamScheme(group()), torch.zeros(8)
    for name, collective in (("gather", bare.gather), ("reduce", bare.reduce)):
        variants[name] = lambda collective=collective: [  # type: ignore[misc]
            collective(sums) for _ in range(_CONSECUTIVE)
        ]
    times = {name: spread.median for name, spread in interleave(variants, repeats, warmup=3).items()}
    latency, reduction, small = (times[name] / _CONSECUTIVE for name in ("gather", "reduce", "64"))
    large = times[str(_MEGABYTE)] / (_CONSECUTIVE // 5)
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
    names = {"latency": "all-gather latency", "reduce_latency": "all-reduce latency", "overhead": "overhead of a round"}
    print(", ".join(f"{name} {1e6 * found[key]:.0f} µs" for key, name in names.items()), end=", ")
    print(f"bandwidth {found['bandwidth'] / 1e9:.2f} GB/s")
    write(Path(__file__).parent / "results" / "prediction.json", found)
    draw(options.picture)


if __name__ == "__main__":
    main()
