"""Long runs: memory, descriptors and threads of each rank over thousands of steps, and two runs that must be equal.

Four gloo ranks with one thread each train a small model under DistributedDataParallel, and with ``with_bagua``. Batches
differ in size over ranks and steps, and some are empty. Some steps accumulate gradients, some run an evaluation first.
The program fails if resident memory grows by more than 2 % after step 500, if a rank holds more descriptors, threads or
Python objects, if ranks have different parameters or buffers, or if a second run has other values.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import os
import random
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, ContextManager, Dict, Iterable, List, NamedTuple, Sequence, Tuple

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bagua_syncbn_algo.graph.split_backward as split_backward
from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm, plan_of, record_rounds
from bagua_syncbn_algo.bench.measure import run_ranks, write

HOSTS = ("DDP", "with_bagua")
STEPS, RANKS = 5000, 4
GROWTH = 0.02  # of resident memory, between the two windows of samples
OBJECTS_A_STEP = 0.05  # Python objects; a leak of one object has at least 1
SAMPLES, WINDOW = 100, 10  # of a run, and of each of its two windows
STATES = 20  # of a run: hashes of parameters and buffers
SIZES = (6, 8, 11)  # heights and widths of images
CLASSES = 10
PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
SECTION = "## Long runs"

# -- a rank ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two independent layers (one coalesced round), one that is applied twice, and one with a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12))
        self.right = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12))
        self.body, self.shared = nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.last = nn.Sequential(nn.Conv2d(12, 16, 3, 2), nn.BatchNorm2d(16, momentum=None), nn.ReLU(inplace=True))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.shared(torch.relu(self.left(x) + self.right(x))))
        h = h + self.shared(self.body(h))
        output: Tensor = self.head(self.last(h).mean((2, 3)))
        return output


class Step(NamedTuple):
    """What all ranks do in a step; each rank draws the same steps."""

    forwards: int
    evaluates: bool
    rows: Tuple[Tuple[int, ...], ...]  # by forward and rank
    sizes: Tuple[Tuple[int, ...], ...]

    @classmethod
    def of(cls, number: int, ranks: int) -> Step:
        """Returns the step of a number."""
        choose = random.Random(number)
        forwards = 2 if choose.random() < 0.1 else 1
        rows, sizes = [], []
        for _ in range(forwards):
            counts = [choose.randint(1, 3) for _ in range(ranks)]
            if ranks > 1 and choose.random() < 0.1:
                counts[choose.randrange(ranks)] = 0
            rows.append(tuple(counts))
            sizes.append(tuple(choose.choice(SIZES) for _ in range(ranks)))
        return cls(forwards, choose.random() < 0.1, tuple(rows), tuple(sizes))


class Sample(NamedTuple):
    """What a process holds after a step."""

    step: int
    resident: int  # bytes
    descriptors: int
    threads: int
    objects: int  # that the garbage collector tracks, without those of the first steps

    @classmethod
    def take(cls, step: int) -> Sample:
        """Returns the sample of this process."""
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        descriptors, threads = (len(os.listdir(f"/proc/self/{each}")) for each in ("fd", "task"))
        return cls(step, pages * os.sysconf("SC_PAGE_SIZE"), descriptors, threads, len(gc.get_objects()))


def batch_of(step: Step, number: int, forward: int, rank: int) -> Tuple[Tensor, Tensor]:
    """Returns the images and labels of a rank."""
    generator = torch.Generator().manual_seed(1000 * number + 10 * rank + forward)
    rows, size = step.rows[forward][rank], step.sizes[forward][rank]
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    images = torch.randn(rows, 3, size, size, generator=generator) + labels.view(-1, 1, 1, 1) / CLASSES
    return images, labels


def accumulating(model: Any) -> ContextManager[None]:
    """Returns a context in which backward does not send gradients."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def without_gradients() -> Any:
        model.bagua_ddp.require_backward_grad_sync = False
        yield
        model.bagua_ddp.require_backward_grad_sync = True

    return without_gradients()


def train_step(model: Any, optimizer: torch.optim.Optimizer, number: int, rank: int, ranks: int) -> None:
    step = Step.of(number, ranks)
    if step.evaluates:
        model.eval()
        with torch.no_grad():
            model(batch_of(step, number, 0, rank)[0])
        model.train()
    optimizer.zero_grad()
    for forward in range(step.forwards):
        images, labels = batch_of(step, number, forward, rank)
        with contextlib.nullcontext() if forward + 1 == step.forwards else accumulating(model):
            (nn.functional.cross_entropy(model(images), labels, reduction="sum") / 4).backward()
    optimizer.step()


def digest(tensors: Iterable[Tensor]) -> str:
    """Returns a hash of the bytes of all tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def run_rank(rank: int, host: str, steps: int, ranks: int) -> List[Dict[str, Any]]:
    """Trains ``steps`` steps; returns the reports of all ranks.

    Collectives:
        Those of training. One all-gather of objects at the end.
    """
    split_backward.WORTHWHILE = 0  # overlaps also with the small convolutions of this model
    bagua.init_process_group()
    torch.manual_seed(0)
    inner = convert_sync_batchnorm(Net())
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.01, momentum=0.9)
    model: Any = inner
    if host == "DDP":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of another name for the option from torch 2.13 on
            model = DistributedDataParallel(inner, broadcast_buffers=False)
    else:
        model.with_bagua([optimizer], SyncBatchNormAlgorithm())
    with record_rounds() as rounds:
        train_step(model, optimizer, 0, rank, ranks)
    plan: Any = plan_of(inner)
    first, interval = start_of(steps), max(1, steps // SAMPLES)
    states: List[Tuple[int, str, str]] = []
    samples: List[Tuple[int, ...]] = []  # plain tuples of numbers, which the garbage collector does not track
    began = time.perf_counter()
    for number in range(1, steps):
        train_step(model, optimizer, number, rank, ranks)
        if number == first // 2:
            gc.collect()
            gc.freeze()  # later collections skip the objects of the imports: 2 ms instead of 100 ms
        if number >= first and number % interval == 0:
            samples.append(tuple(Sample.take(number)))
        if (number + 1) % max(1, steps // STATES) == 0:
            states.append((number + 1, digest(inner.parameters()), digest(inner.buffers())))
    gc.unfreeze()
    report = {
        "samples": [Sample(*values) for values in samples],
        "seconds": time.perf_counter() - began,
        "states": states,
        "finite": all(bool(torch.isfinite(value).all()) for value in inner.state_dict().values()),
        "plan": plan.summary(),
        "coalesced": sum(len(planned.layers) > 1 for planned in plan.rounds),
        "overlapped": sum(bool(planned.overlapped_with) for planned in plan.rounds),
        "rounds": len(rounds),
    }
    reports: List[Any] = [None] * ranks
    dist.all_gather_object(reports, report)
    return reports


def start_of(steps: int) -> int:
    """Returns the step from which on nothing may grow: 500, or a tenth of a shorter run."""
    return min(500, steps // 10)


# -- checks ------------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """The medians of the first and of the last samples of a rank."""

    steps: float  # between the medians
    before: Sample
    after: Sample

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Change:
        """Returns the change between the first and the last window of the samples."""
        before, after = (
            Sample(*(int(statistics.median(values)) for values in zip(*window)))
            for window in (samples[:WINDOW], samples[-WINDOW:])
        )
        return cls(after.step - before.step, before, after)

    @property
    def growth(self) -> float:
        """The relative growth of resident memory."""
        return self.after.resident / self.before.resident - 1


def growth_problems(rank: int, samples: Sequence[Sample], limit: float = GROWTH) -> List[str]:
    """Returns what grows on a rank, a sentence each; empty if nothing does.

    Args:
        rank: the rank, for the sentences.
        samples: its samples, at least two windows.
        limit: the allowed relative growth of resident memory.
    """
    change = Change.of(samples)
    before, after, since = change.before, change.after, f"after step {samples[0].step} on rank {rank}"
    found = []
    if not abs(change.growth) <= limit:
        values = f"{before.resident / 2**20:.1f} to {after.resident / 2**20:.1f} MiB"
        found.append(f"expected resident memory to change by at most {limit:.0%} {since} (got {values})")
    for name in ("descriptors", "threads"):
        values = {getattr(sample, name) for sample in samples}
        if len(values) > 1:
            found.append(f"expected a constant number of {name} {since} (got {min(values)} to {max(values)})")
    if after.objects - before.objects > OBJECTS_A_STEP * change.steps:
        found.append(f"expected no further Python objects {since} (got {before.objects} to {after.objects})")
    return found


def problems(first: Sequence[Dict[str, Any]], again: Sequence[Dict[str, Any]], limit: float = GROWTH) -> List[str]:
    """Returns what is wrong with two runs, a sentence each; empty if nothing is.

    Args:
        first: the reports of all ranks of one run.
        again: those of another run with the same seeds.
        limit: the allowed relative growth of resident memory.
    """
    found = []
    for run, reports in (("the first run", first), ("the second run", again)):
        for rank, report in enumerate(reports):
            found += [f"{run}: {problem}" for problem in growth_problems(rank, report["samples"], limit)]
            if not report["finite"]:
                found.append(f"{run}: expected finite parameters and buffers (got NaN or infinity on rank {rank})")
            if rank:
                found += [f"{run}: {each} on rank {rank}" for each in differences(reports[0], report)]
    return found + [f"both runs: {each} in the second one" for each in differences(first[0], again[0])]


def differences(one: Dict[str, Any], other: Dict[str, Any]) -> List[str]:
    """Returns the first difference of parameters and of buffers between two reports; empty without any."""
    found = []
    for kind, name in enumerate(("parameters", "buffers"), start=1):
        pairs = list(zip(one["states"], other["states"]))
        steps = [a[0] for a, b in pairs if a[kind] != b[kind]]
        if steps or not pairs:
            where = f"others after step {steps[0]}" if steps else "none"
            found.append(f"expected the same {name} at every step (got {where})")
    return found


# -- the program -------------------------------------------------------------------------------------------------------


def row_of(host: str, steps: int, first: Sequence[Dict[str, Any]], again: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Returns the result of a host."""
    changes = [Change.of(report["samples"]) for report in [*first, *again]]
    return {
        "host": host,
        "steps": steps,
        "ranks": len(first),
        "seconds": [runs[0]["seconds"] for runs in (first, again)],
        **{key: first[0][key] for key in ("plan", "coalesced", "overlapped", "rounds")},  # rounds of the first step
        "resident_before": [change.before.resident for change in changes],  # of all ranks of both runs
        "resident_after": [change.after.resident for change in changes],
        "growth": [change.growth for change in changes],
        "descriptors": [[change.before.descriptors, change.after.descriptors] for change in changes],
        "threads": [[change.before.threads, change.after.threads] for change in changes],
        "objects": [[change.before.objects, change.after.objects] for change in changes],
        "equal": not any(differences(first[0], report) for report in [*first, *again]),
        "resident": [[sample.resident for sample in report["samples"]] for report in first],  # of the first run
        "problems": problems(first, again),
    }


def cells(row: Dict[str, Any]) -> List[str]:
    """Returns the cells of a table for the result of a host."""

    def span(pairs: Sequence[Sequence[int]]) -> str:
        before, after = ([pair[i] for pair in pairs] for i in (0, 1))
        return f"{min(before)}–{max(before)} → {min(after)}–{max(after)}"

    largest = max(row["growth"], key=abs)
    return [
        row["host"],
        f"{row['ranks']}, {row['steps']:,}",
        f"{statistics.mean(row['resident_before']) / 2**20:.1f} → {statistics.mean(row['resident_after']) / 2**20:.1f}",
        f"{largest:+.2%}",
        span(row["descriptors"]),
        span(row["threads"]),
        span(row["objects"]),
        "yes" if row["equal"] else "no",
    ]


HEADING = (
    "host",
    "ranks, steps",
    "resident, MiB",
    "largest change of a rank",
    "descriptors",
    "threads",
    "Python objects",
    "equal over ranks and runs",
)


def write_section(rows: Sequence[Dict[str, Any]], page: Path = PAGE) -> None:
    """Writes the results to the section of a page, which ends before the next section of the same level."""
    lines = ["| " + " | ".join(each) + " |" for each in [HEADING, ["---"] * len(HEADING), *map(cells, rows)]]
    text = page.read_text()
    before, _, rest = text.partition(f"{SECTION}\n")
    prose, _, later = rest.partition("| host")
    _, _, later = later.partition("\n\n")
    page.write_text(f"{before}{SECTION}\n{prose}" + "\n".join(lines) + "\n" + (f"\n{later}" if later else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of each of the two runs")
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--host", choices=HOSTS, action="append", help="default: all")
    options = parser.parse_args()
    if options.steps < 6 * WINDOW:
        parser.error(f"expected at least {6 * WINDOW} steps (got {options.steps}); increase --steps")
    table, rows = Table(*HEADING), []
    for host in options.host or HOSTS:
        first, again = (run_ranks(run_rank, host, options.steps, options.ranks, ranks=options.ranks) for _ in range(2))
        rows.append(row_of(host, options.steps, first, again))
        table.add_row(*cells(rows[-1]))
    Console(width=140).print(table)
    for row in rows:
        print(f"{row['host']}: {row['plan']}, {row['seconds'][0] / row['steps'] * 1e3:.1f} ms a step")
        for problem in row["problems"]:
            print(f"{row['host']}: {problem}", file=sys.stderr)
    if options.steps >= STEPS and options.host is None:  # not the results of a trial
        write(Path(__file__).parent / "results" / "soak.json", rows)
        write_section(rows)
    sys.exit(any(row["problems"] for row in rows))


if __name__ == "__main__":
    main()
