"""Random models and training loops on several ranks, against one process: ``python tests/fuzz.py --cases 2000``.

The seed determines a case: ``--seed N --cases 1`` repeats one. Every rank trains the same random model with its own
random batches, through the public interface. The reference trains on the whole batch in one process, in float64, with a
normalization layer written from the formulas. A case is wrong if outputs, gradients, parameters or running statistics
differ from the reference by more than rounding. It is also wrong if parameters or buffers differ between ranks by one
bit, or if a rank raises an error or hangs. ``--kind`` selects cases with one of the features of ``KINDS``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing as mp
import os
import queue
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).parent))

import numpy
import torch
import torch.distributed as dist
from fuzz_cases import KINDS, Case, RandomNet, Tied, Values, broken, expected, loss_of, sgd_step, state_of
from ranks import free_port
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

TOLERANCE = 1e-8  # relative to the largest value of its kind; float64 rounding is a million times smaller
CASE_SECONDS = 30.0  # after which a case counts as hung; with torch.compile, after four times as many
CASES_PER_POOL = 60  # each with_bagua keeps file descriptors open until its process ends

# -- a rank ------------------------------------------------------------------------------------------------------------


class Trainer:
    """The model of a rank and its wrapper.

    Attributes:
        inner: the converted model.
        model: what the rank calls.
    """

    def __init__(self, case: Case) -> None:
        from bagua_syncbn_algo import convert_sync_batchnorm

        self._case, self.model, self._group = case, None, None
        if case.checks and case.host != "with_bagua":
            self._group = dist.new_group()  # a channel reads the environment once for each process group
        self.inner: Any = convert_sync_batchnorm(
            RandomNet(case), coalesce=case.coalesce, overlap=case.overlap, process_group=self._group
        )
        omits = any(not all(used) for step in case.steps for f in step.forwards for used in f.used)
        self._called: Any = Tied(self.inner) if omits and not case.host.startswith("DDP") else self.inner
        if case.compiled:
            self._called = torch.compile(self._called, backend="eager")
        self.wrap()

    def wrap(self) -> None:
        """Wraps the model for its host, also again."""
        from bagua_syncbn_algo import SyncBatchNormAlgorithm

        case, self.model = self._case, self._called
        if case.host == "with_bagua":
            self.model.with_bagua([], SyncBatchNormAlgorithm(normalize_over=case.normalize_over))
        elif case.host != "none":
            self.model = DistributedDataParallel(self.model, find_unused_parameters=case.host == "DDP unused")

    def change(self, change: str) -> None:
        """Wraps the model again, in another world after ``restart``; the old wrapper exists until the new one does."""
        if change == "restart":
            restart()
            if self._case.compiled:
                torch._dynamo.reset()
            if self._group is not None:
                from bagua_syncbn_algo import sync_batchnorm_layers

                self._group = dist.new_group()
                for layer in sync_batchnorm_layers(self.inner):
                    layer.process_group = self._group
        if change:
            self.wrap()

    def close(self) -> None:
        """Destroys the process group of this model, and the graphs of the compiler."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        if self._case.compiled:
            torch._dynamo.reset()


def restart() -> None:
    """Replaces the world by another one of the same ranks, at another address."""
    from bagua_syncbn_algo import bagua

    port = [free_port()]
    dist.broadcast_object_list(port)  # of rank 0
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = str(port[0])
    bagua.init_process_group()


def run_rank(case: Case, rank: int) -> List[Values]:
    """Returns the values of this rank after each step; of a step without a batch, no values before the epoch ends."""
    from bagua_syncbn_algo import sync_batch_norm_joinable

    os.environ["BAGUA_SYNCBN_CHECK"] = "nonfinite" if case.checks else "none"
    trainer, found = Trainer(case), []
    for number, counts in enumerate(case.epochs or [(len(case.steps),) * case.world]):
        first = len(found)
        context: Any = contextlib.nullcontext()
        trainer.change(case.changes[first])
        if case.epochs:
            joined = trainer.inner if (case.seed + number) % 2 == 0 else trainer.model
            context = Join([sync_batch_norm_joinable(joined), trainer.model])
        with context:
            for index in range(first, first + counts[rank]):
                trainer.change(case.changes[index] if index > first else "")
                found.append(_run_step(case, trainer, index, rank))
        found += [{} for _ in range(counts[rank], max(counts))]
        found[-1].update(state_of(trainer.inner))
    trainer.close()
    return found


def _run_step(case: Case, trainer: Trainer, index: int, rank: int) -> Values:
    """Trains one step; returns its values."""
    values: Values = {}
    step, model, inner = case.steps[index], trainer.model, trainer.inner
    try:
        if step.no_grad:
            with torch.no_grad():
                model(case.inputs(index, 0)[rank])
        broken[:] = [step.breaks[1:]] if step.breaks is not None and step.breaks[0] == rank else []
        _train_step(case, model, index, rank, values)
    except (RuntimeError, ZeroDivisionError):
        if step.breaks is None:
            raise
        broken.clear()
        model.bagua_ddp._recover_if_interrupted()  # as the next forward would do first
        for parameter in inner.parameters():
            parameter.grad = None
    else:
        if case.host == "none":
            for parameter in inner.parameters():
                if parameter.requires_grad:
                    total = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    dist.all_reduce(total)
                    parameter.grad = total / case.world
        sgd_step(inner)
    values.update(state_of(inner))
    return values


def _train_step(case: Case, model: Any, index: int, rank: int, values: Values) -> None:
    step, leaves, losses = case.steps[index], [], []
    for number, forward in enumerate(step.forwards):
        leaf = case.inputs(index, number)[rank].requires_grad_(case.input_gradient)
        outputs = model(leaf)
        values[f"output {number}"] = torch.cat([o.detach().flatten(1) for o in outputs], 1).numpy()
        leaves.append(leaf)
        losses.append(loss_of(case, outputs, forward.used[rank]))
    del outputs
    if losses[0].requires_grad:
        if step.order == "sum":
            torch.stack(losses).sum().backward()
        else:
            for loss in losses if step.order == "forward" else losses[::-1]:
                loss.backward()
    for number, leaf in enumerate(leaves):
        if leaf.grad is not None:
            values[f"input {number}"] = leaf.grad.numpy()


# -- mutations: wrong code that the fuzz program must detect -----------------------------------------------------------


def _mutate_dx() -> None:
    """Scales the input gradient by 1 + 1e-6."""
    from bagua_syncbn_algo.ops import exact

    original = exact.input_gradient
    exact.input_gradient = lambda *arguments: original(*arguments) * (1 + 1e-6)  # type: ignore[assignment]


def _mutate_used() -> None:
    """Ignores, for a single layer, that another rank uses the output."""
    from bagua_syncbn_algo.ops import functional

    original = functional._used_by_any
    functional._used_by_any = lambda ranks: [False] if ranks.numel() == 1 else original(ranks)


def _mutate_saved() -> None:
    """Drops the oldest statistics if several are saved."""
    from bagua_syncbn_algo.ops.recompute import RecomputeCache

    original = RecomputeCache.save

    def save(self: Any, statistics: Any, owners: Any) -> None:
        original(self, statistics, owners)
        everything = self._all()
        if len(everything) > 1:
            for saved in list(self._saved.values()):
                if everything[-1] in saved:
                    saved.remove(everything[-1])

    RecomputeCache.save = save  # type: ignore[method-assign]


MUTATIONS = {"dx": _mutate_dx, "used": _mutate_used, "saved": _mutate_saved}

# -- many cases --------------------------------------------------------------------------------------------------------


def _worker(rank: int, world: int, port: int, mutation: Optional[str], tasks: Any, results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    from bagua_syncbn_algo import bagua
    from bagua_syncbn_algo.comm import channel

    channel._NOTICE_SECONDS = 0.3  # type: ignore[attr-defined]
    bagua.init_process_group()
    if mutation is not None:
        MUTATIONS[mutation]()
    for seed in iter(tasks.get, None):
        warnings.simplefilter("ignore")  # again: the import of the compiler resets the filters
        try:
            results.put((seed, rank, run_rank(Case.of(seed), rank), None))
        except BaseException:
            results.put((seed, rank, None, traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """The processes of all ranks, which run cases one after the other."""

    def __init__(self, world: int, mutation: Optional[str]) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "torch.utils.checkpoint", "fuzz"])
        self.world, self.cases = world, 0
        self._tasks = [context.Queue() for _ in range(world)]
        self._results = context.Queue()
        port = free_port()
        self._processes = [
            context.Process(target=_worker, args=(rank, world, port, mutation, self._tasks[rank], self._results))
            for rank in range(world)
        ]
        for process in self._processes:
            process.daemon = True
            process.start()

    def start(self, seed: int) -> None:
        self.cases += 1
        for tasks in self._tasks:
            tasks.put(seed)

    def finish(self, seconds: float) -> Tuple[List[Any], Optional[str]]:
        """Returns the values of each rank, and the errors of the ranks that failed."""
        found: List[Any] = [None] * self.world
        errors, deadline = [], time.monotonic() + seconds
        for _ in range(self.world):
            try:
                _, rank, values, error = self._results.get(timeout=max(0.1, deadline - time.monotonic()))
            except queue.Empty:
                errors.append("a rank hangs or has died")
                break
            found[rank] = values
            if error is not None:
                errors.append(f"rank {rank}: {error}")
                deadline = min(deadline, time.monotonic() + 5)
        return found, "\n".join(errors) or None

    def close(self, kill: bool = False) -> None:
        for tasks, process in zip(self._tasks, self._processes):
            if kill:
                process.kill()
            else:
                tasks.put(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def compare(case: Case, ranks: List[List[Values]]) -> Optional[str]:
    """Returns the first difference in words, or ``None``."""
    reference = expected(case, ranks[0])
    for index, values in enumerate(reference):
        largest: Dict[str, float] = {}
        for name, value in values.items():
            if value is not None and value.size:
                kind = name.split()[0]
                largest[kind] = max(largest.get(kind, 0.0), float(numpy.abs(value).max()))
        active = case.active(index)
        for name, value in values.items():
            shards_only = name.startswith(("output", "input"))
            everyone = case.ends_epoch(index) and not shards_only
            shards = [rank[index].get(name) for rank, has_data in zip(ranks, active) if has_data or everyone]
            if shards_only:
                if any(shard is None for shard in shards):
                    return f"step {index}, {name}: missing on a rank"
                found = numpy.concatenate([numpy.asarray(shard) for shard in shards])
            else:
                if any(shard is None for shard in shards):
                    return f"step {index}, {name}: missing on a rank"
                found = numpy.asarray(shards[0])
                for rank, shard in enumerate(shards):
                    if not numpy.array_equal(numpy.asarray(shard), found):
                        return f"step {index}, {name}: rank {rank} differs from rank 0"
            distance = float(numpy.abs(found - value).max()) if found.size else 0.0
            if not distance <= TOLERANCE * max(1e-3, largest[name.split()[0]]):
                return f"step {index}, {name}: off by {distance:.3g} at values up to {numpy.abs(value).max():.3g}"
    return None


def run_cases(
    seeds: Sequence[int],
    mutation: Optional[str] = None,
    seconds: float = float("inf"),
    stop_at_first: bool = False,
    progress: Callable[[Any], Any] = iter,
) -> Tuple[int, Dict[int, str]]:
    """Runs cases until all have run or the time is over.

    Args:
        seeds: the seeds of the cases.
        mutation: the name of wrong code to run, one of ``MUTATIONS``; ``None`` for none.
        seconds: the time limit.
        stop_at_first: whether to stop at the first wrong case.
        progress: wraps the iteration over the seeds.

    Returns:
        The number of cases that ran, and the problems of wrong cases by seed.
    """
    pools: Dict[int, Pool] = {}
    wrong: Dict[int, str] = {}
    done, deadline = 0, time.monotonic() + seconds
    try:
        for seed in progress(seeds):
            if time.monotonic() > deadline:
                break
            case = Case.of(seed)
            pool = pools.get(case.world)
            if pool is not None and pool.cases >= CASES_PER_POOL:
                pool.close()
                pool = None
            if pool is None:
                pool = pools[case.world] = Pool(case.world, mutation)
            pool.start(seed)
            found, error = pool.finish(CASE_SECONDS * (4 if case.compiled else 1))
            done += 1
            if error is not None:
                pools.pop(case.world).close(kill=True)
            problem = error if error is not None else compare(case, found)
            if problem is not None:
                wrong[seed] = problem
                if stop_at_first:
                    break
    finally:
        for pool in pools.values():
            pool.close()
    return done, wrong


def seeds_of(kind: Optional[str], first: int, cases: int) -> List[int]:
    """Returns the seeds of ``cases`` cases of a kind, of any kind for ``None``, from the seed ``first`` on."""
    found = (seed for seed in itertools.count(first) if kind is None or kind in Case.of(seed).kinds)
    return list(itertools.islice(found, cases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--minutes", type=float, default=15, help="time limit")
    parser.add_argument("--mutate", choices=sorted(MUTATIONS), help="run wrong code, and stop where a case detects it")
    parser.add_argument("--kind", choices=KINDS, help="run only cases of this kind")
    parser.add_argument("--show", action="store_true", help="print the cases")
    options = parser.parse_args()
    from rich.progress import track

    seeds = seeds_of(options.kind, options.seed, options.cases)
    if options.show:
        for seed in seeds:
            print(Case.of(seed))
    done, wrong = run_cases(
        seeds, options.mutate, 60 * options.minutes, options.mutate is not None, lambda each: track(each, "cases")
    )
    for seed, problem in wrong.items():
        print(f"seed {seed}: {problem}\n  repeat it: python tests/fuzz.py --cases 1 --seed {seed} --show")
    print(f"{done} cases, {len(wrong)} wrong")
    if options.mutate is not None:
        sys.exit(not wrong)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    import fuzz  # as module `fuzz`, not `__main__`: the ranks import it by this name

    fuzz.main()
