"""Cost of world-wide running statistics with normalization per rank, compared with the model without the plugin.

Two gloo ranks with one thread each train a ResNet-18-like model. Steps of both models are interleaved in one run.
``exposed`` is the share of the statistics round for which the end of backward waits, from ``record_rounds()``.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, Dict, List

import torch
from models import ResNet
from rich.console import Console
from rich.table import Table

from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm, record_rounds
from bagua_syncbn_algo.bench.measure import interleave, run_ranks, write


def trainer(plugin: bool, width: int, size: int, batch: int) -> Any:
    """Returns a function that trains one step."""
    torch.manual_seed(0)
    model: Any = ResNet(width)
    inner = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    algorithm = inner
    if plugin:
        model, algorithm = convert_sync_batchnorm(model), SyncBatchNormAlgorithm(inner, normalize_over="rank")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.with_bagua([optimizer], algorithm)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))

    def step() -> None:
        optimizer.zero_grad(set_to_none=False)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def run_rank(rank: int, options: argparse.Namespace) -> Dict[str, Any]:
    """Measures one width."""
    bagua.init_process_group()
    variants = {
        name: trainer(name == "plugin", options.width, options.size, options.batch) for name in ("bare", "plugin")
    }
    with record_rounds() as rounds:
        spreads = interleave(variants, options.steps, warmup=5)
    # without the warm-up steps; the bare model has no rounds
    running = [entry for entry in rounds if entry.phase == "running"][5:]
    return {
        "spreads": spreads,
        "rounds_per_step": len(running) / options.steps,
        "layers": len(running[0].layers),
        "duration": statistics.median(entry.duration for entry in running),
        "exposed": statistics.median(entry.exposed / entry.duration for entry in running),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    options = parser.parse_args()
    table = Table("width", "without plugin, ms", "with, ratio", "rounds a step", "layers in it", "round, ms", "exposed")
    rows: List[Dict[str, Any]] = []
    for width in options.widths:
        row = run_ranks(run_rank, argparse.Namespace(**vars(options), width=width))
        bare, plugin = row["spreads"]["bare"], row["spreads"]["plugin"]
        row.update(width=width, ratio=plugin.median / bare.median)
        table.add_row(
            str(width),
            f"{bare.median * 1e3:.1f} ({bare.low * 1e3:.1f}-{bare.high * 1e3:.1f})",
            f"{row['ratio']:.3f}",
            f"{row['rounds_per_step']:g}",
            str(row["layers"]),
            f"{row['duration'] * 1e3:.1f}",
            f"{row['exposed']:.0%}",
        )
        rows.append(row)
    Console(width=120).print(table)
    write(Path(__file__).parent / "results" / "running_stats.json", rows)


if __name__ == "__main__":
    main()
