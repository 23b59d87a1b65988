"""Step time under ``torch.compile`` of models that differ in their rounds of statistics.

Two gloo ranks run with one thread each. A step is forward, backward and the gradient all-reduce. Copies of a model
in how they exchange statistics and in the compiler; their steps are interleaved in one run. PyTorch's own SyncBatchNorm
does not run on the CPU. A ratio of a compiled to an eager variant contains the fusion of the whole model.

"bare rounds" is the compiled local step followed by as many all-gathers as the coalesced step has rounds, one after the
other, without headers and without statistics. No exchange over gloo takes less time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Dict, List

import models
import torch
import torch.distributed as dist
from coalescing import Case
from torch import nn

from bagua_syncbn_algo import bagua
from bagua_syncbn_algo.bench.measure import RANKS, interleave, run_ranks, write
from bagua_syncbn_algo.bench.schemes import build_variant, channel_of_model

VARIANTS = ("local", "coalesced", "overlapped", "compiled local", "compiled coalesced", "compiled overlapped")
BARE = "compiled local, bare rounds"


CASES = (
    Case("Inception", {"width": 32}, (4, 3, 64, 64), 20),
    Case("HighResolution", {"width": 18}, (2, 3, 64, 64), 14),
)


def run_rank(rank: int, case: Case) -> Dict[str, Any]:
    """Measures one model."""
    bagua.init_process_group()
    images, labels = torch.randn(case.shape), torch.randint(10, (case.shape[0],))
    built: Dict[str, Any] = {}
    seconds: Dict[str, float] = {}

    def step(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        torch.nn.functional.cross_entropy(model(images), labels).backward()

    for name in VARIANTS:
        torch.manual_seed(0)
        built[name] = build_variant(name, getattr(models, case.model)(**case.arguments))
        start = time.perf_counter()
        step(built[name])
        seconds[name] = time.perf_counter() - start
    rounds = {}
    for name, model in built.items():
        channel = channel_of_model(model)
        before = channel.rounds
        step(model)
        rounds[name] = channel.rounds - before
    message = torch.zeros(channel_of_model(built["coalesced"]).capacity, dtype=torch.uint8)
    gathered = [torch.zeros_like(message) for _ in range(RANKS)]

    def bare() -> None:
        step(built["compiled local"])
        for _ in range(rounds["coalesced"]):
            dist.all_gather(gathered, message)

    steps: Dict[str, Any] = {name: lambda model=model: step(model) for name, model in built.items()}
    spreads = interleave({**steps, BARE: bare}, case.steps, 4)
    return {
        "case": case._asdict(),
        "rounds": rounds,
        "first_step": seconds,
        "spreads": {name: spread._asdict() for name, spread in spreads.items()},
    }


def merged(launches: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Returns the results of several launches of one case: ratios of medians, with their range over the launches."""
    pairs = [
        ("compiled overlapped", "coalesced"),
        ("compiled coalesced", "coalesced"),
        ("compiled overlapped", "compiled local"),
        ("compiled coalesced", "compiled local"),
        (BARE, "compiled local"),
        ("compiled overlapped", BARE),
        ("compiled local", "local"),
        ("coalesced", "local"),
    ]
    ratios = {}
    for this, other in pairs:
        values = sorted(each["spreads"][this]["median"] / each["spreads"][other]["median"] for each in launches)
        ratios[f"{this} / {other}"] = {"median": statistics.median(values), "low": values[0], "high": values[-1]}
    return {"launches": launches, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--model", choices=[case.model for case in CASES])
    options = parser.parse_args()
    for case in CASES:
        if options.model in (None, case.model):
            launches = [run_ranks(run_rank, case, ranks=RANKS) for _ in range(options.launches)]
            results = merged(launches)
            write(Path(__file__).parent / "results" / f"compiled_{case.model}.json", results)
            print(case.model, launches[0]["rounds"], launches[0]["first_step"])
            for name, spread in launches[-1]["spreads"].items():
                print(f"  {name:28} {1000 * spread['median']:.1f} ms")
            for name, ratio in results["ratios"].items():
                print(f"  {name:40} {ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})")


if __name__ == "__main__":
    main()
