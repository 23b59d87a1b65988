"""Rounds and gradients of converted models under training frameworks; `make frameworks` runs this script.

For each framework and entry point, two gloo ranks train for some steps. One process then trains in float64 with plain
BatchNorm on the concatenated batches. The script writes `benchmarks/results/frameworks.json` and the table in
`docs/frameworks.md`.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from framework_cases import cases
from framework_job import SHARDS, Case, Job, collected_warnings, largest_difference, loop, start
from tables import table
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bagua_syncbn_algo.bench.measure import run_ranks, write

RESULTS = Path(__file__).parent / "results" / "frameworks.json"
PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"

# Why the observed rounds are not the planned ones, by framework and a part of the entry point: the reasons of graphs
# that were not made. The table shows a reason only if the numbers differ.
REASONS = {
    ("GAN", ""): "the plan after training is that of the latest call, in which the discriminator is frozen",
}
BEGIN, END = "<!-- table: written by benchmarks/frameworks.py -->", "<!-- end of table -->"


def build(case: Case, dtype: torch.dtype) -> nn.Module:
    """Returns the model of a case. Every process starts with the same weights."""
    torch.manual_seed(0)
    return case.build().train().to(dtype)


def run_case(rank: int, index: int) -> Dict[str, Any]:
    """Trains a case on this rank, and in one process on rank 0; returns a row of the table."""
    case = cases()[index]
    reference, rounding, local = (None, None, None)
    if rank == 0:  # before distributed training, so that no rank waits in a collective meanwhile
        reference = alone(case)
        rounding = alone(case, shards=range(SHARDS)[::-1], autocast=case.autocast)
        local = alone(case, whole=False)
    start(rank)
    with collected_warnings() as warned:
        job = Job(case, [rank], synchronized=True)
        (case.train or loop)(job, build(case, job.dtype))
    start(rank)  # a framework may have destroyed the process group, with which the caller ends
    if reference is None:
        return {}
    assert local is not None and rounding is not None
    per_step = [last - first for first, last in zip(job.rounds, job.rounds[1:])]
    return {
        "planned": job.planned[-1],
        "planned_at_conversion": job.planned[0],
        "observed": per_step[-1],
        "observed_each_step": [job.rounds[0], *per_step],
        "a_round_a_layer": reference.layers,
        "gradients": largest_difference(job.gradients, reference.gradients),
        "statistics": largest_difference(job.statistics, reference.statistics),
        "gradients_one_process": largest_difference(rounding.gradients, reference.gradients),
        "gradients_per_rank": largest_difference(local.gradients, reference.gradients),
        "skipped": job.skipped,
        "warnings": warned,
        "note": case.note,
    }


def alone(case: Case, shards: Sequence[int] = range(SHARDS), whole: bool = True, autocast: bool = False) -> Job:
    """Trains a case in this process on the data of all ranks, with plain BatchNorm layers.

    Args:
        case: the case.
        shards: the order of the shards in a batch. Another order changes the rounding only.
        whole: whether a batch is normalized as a whole; otherwise each shard is, as without synchronization.
        autocast: whether to train in the precision of the case instead of float64.
    """
    job = Job(case, list(shards), synchronized=False, whole=whole, autocast=autocast)
    model = build(case, job.dtype)
    calls = [0]

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:
        calls[0] += layer.training and 1 + (torch.is_grad_enabled() and output.requires_grad)

    for part in model.modules():
        if isinstance(part, _BatchNorm):
            part.register_forward_hook(count)
    (case.reference or case.train or loop)(job, model)
    job.layers = calls[0] // job.steps_done
    return job


def reason_of(row: Dict[str, Any]) -> str:
    """Returns why a row's rounds are not those of the plan, or not those of a coalesced model."""
    reasons = [row["note"]] if row["note"] else []
    if not row["observed"] == row["planned_at_conversion"] == row["planned"]:
        reasons += [
            reason for (name, entry), reason in REASONS.items() if name == row["framework"] and entry in row["entry"]
        ]
    reasons += [f"{name}: {reason}" for name, reason in row["skipped"][:2]]
    if len(row["skipped"]) > 2:
        reasons.append(f"{len(row['skipped']) - 2} more")
    return "; ".join(reasons + row["warnings"][:1])


def table_of(rows: List[Dict[str, Any]]) -> List[str]:
    heading = ["framework", "entry point", "rounds: planned", "observed", "a round a layer", "gradients"]
    heading += ["running statistics", "gradients, one process", "gradients, not synchronized", "remarks"]
    body = []
    for row in rows:
        if "error" in row:
            body.append([row["framework"], row["entry"], *["–"] * 7, f"failed: {_cell(row['error'])}"])
            continue
        keys = ("gradients", "statistics", "gradients_one_process", "gradients_per_rank")
        planned = str(row["planned_at_conversion"])
        if row["planned"] != row["planned_at_conversion"]:
            planned += f" (after training: {row['planned']})"
        counts = [planned, str(row["observed"]), str(row["a_round_a_layer"])]
        body.append(
            [row["framework"], row["entry"], *counts, *(f"{row[key]:.0e}" for key in keys), _cell(reason_of(row))]
        )
    return table(heading, body)


def _cell(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= 240 else f"{text[:237]}..."


def write_page(rows: List[Dict[str, Any]], versions: Dict[str, str]) -> None:
    """Replaces the table in the documentation."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    PAGE.write_text("\n".join([before + BEGIN, "", f"Versions: {named}.", "", *table_of(rows), "", END]) + after)


def versions() -> Dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "timm", "lightning", "accelerate", "transformers", "torchvision", "mmengine"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run only the rows that contain this text")
    parser.add_argument("--seconds", type=float, default=1000, help="start no row after this time")
    options = parser.parse_args(arguments)
    rows: List[Dict[str, Any]] = []
    begin = time.monotonic()
    for index, case in enumerate(cases()):
        label = f"{case.framework}: {case.entry}"
        if options.only.lower() not in label.lower():
            continue
        row: Dict[str, Any] = {"framework": case.framework, "entry": case.entry}
        started = time.monotonic()
        try:
            if started - begin > options.seconds:
                raise TimeoutError(f"expected all rows within {options.seconds:g} s (got more); use --seconds")
            row.update(run_ranks(run_case, index))
        except Exception as error:  # one row must not end the others
            traceback.print_exc()
            lines = [line for line in str(error).strip().splitlines() if line.strip()]
            row["error"] = lines[-1] if lines else repr(error)
        row["seconds"] = time.monotonic() - started
        rows.append(row)
        shown = {key: value for key, value in row.items() if key not in ("framework", "entry")}
        print(f"{label}\n    {json.dumps(shown)}", flush=True)
    if options.only and RESULTS.exists():  # replaces these rows of an earlier run
        found = {(row["framework"], row["entry"]): row for row in [*json.loads(RESULTS.read_text())["rows"], *rows]}
        rows = [found[key] for key in ((case.framework, case.entry) for case in cases()) if key in found]
    print("\n".join(table_of(rows)))
    write(RESULTS, rows)
    write_page(rows, versions())


if __name__ == "__main__":
    main()
