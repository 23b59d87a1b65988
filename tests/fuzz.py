"""Random models and training loops on several ranks, against one process: ``python tests/fuzz.py --cases 2000``.

The seed determines a case: ``--seed N --cases 1`` repeats one. Every rank trains the same random model with its own
random batches, through the public interface. The reference trains on the whole batch in one process, in float64, with a
normalization layer written from the formulas. A case is wrong if outputs, gradients, parameters or running statistics
differ from the reference by more than rounding. It is also wrong if parameters or buffers differ between ranks by one
bit, or if a rank raises an error or hangs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import multiprocessing as mp
import os
import queue
import random
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).parent))

import numpy
import torch
import torch.distributed as dist
import torch.fx
from ranks import free_port
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

TOLERANCE = 1e-8  # relative to the largest value of its kind; float64 rounding is a million times smaller
CASE_SECONDS = 30.0  # after which a case counts as hung
CASES_PER_POOL = 60  # each with_bagua keeps file descriptors open until its process ends

# -- the random case ---------------------------------------------------------------------------------------------------

HOSTS = ("DDP", "DDP unused", "with_bagua", "none")


@dataclasses.dataclass(frozen=True)
class Forward:
    """One training forward: the number of samples and the heads that the loss uses, by rank."""

    rows: Tuple[int, ...]
    used: Tuple[Tuple[bool, ...], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step: forwards, then backward for their losses."""

    forwards: Tuple[Forward, ...]
    order: str  # of the backward passes: sum (one for all losses), forward, reverse
    no_grad: bool  # whether a training forward without gradients comes first
    breaks: Optional[Tuple[int, str, int]]  # a planned exception: the rank, forward or backward, the stage


@dataclasses.dataclass(frozen=True)
class Case:
    """The options of a model and a training loop; the seed determines the rest."""

    seed: int
    world: int
    host: str
    normalize_over: Any
    coalesce: bool
    overlap: bool
    spatial: Tuple[int, ...]
    heads: int
    stages: int
    checkpoints: Tuple[Optional[bool], ...]  # by stage: use_reentrant, or None without a checkpoint
    frozen: str  # none, some, all
    input_gradient: bool
    repeats: int  # the rank whose batch is the same in every forward; -1 for none
    steps: Tuple[Step, ...]

    @classmethod
    def of(cls, seed: int) -> Case:
        """Returns the case of a seed."""
        choose = random.Random(seed)
        world = 4 if seed % 6 == 0 else 2
        host = choose.choice(HOSTS)
        mode = choose.choice(["world", "world", "rank", "node", 1, 2]) if host == "with_bagua" else "world"
        group = {"world": world, "node": 2, "rank": 1}.get(mode, mode)
        stages, heads = choose.randint(1, 3), choose.randint(1, 3)
        ddp = host.startswith("DDP")
        reentrant = [False] if ddp else [True, False]
        checkpoints = tuple(choose.choice([None, None, *reentrant]) for _ in range(stages))
        omits = host != "DDP" and heads > 1 and choose.random() < 0.6
        # Both hosts accept one gradient per parameter and backward; several reentrant checkpoints would produce more.
        one_forward = ddp or (host == "with_bagua" and True in checkpoints)
        max_forwards = (
            1 if one_forward else choose.choice([1, 1, 2, 3, 10 if any(c is not None for c in checkpoints) else 4])
        )

        def forward() -> Forward:
            fewest = 2 if group == 1 else 0
            while True:
                rows = [choose.choice([fewest, 1 + fewest // 2, 2, 3]) for _ in range(world)]
                if group == 1 and choose.random() < 0.2:
                    rows[choose.randrange(world)] = 0
                sums = [sum(rows[i : i + group]) for i in range(0, world, group)]
                if all(total >= 2 for total in sums) or (group == 1 and max(rows) >= 2):
                    break
            used = [tuple(not omits or choose.random() < 0.6 for _ in range(heads)) for _ in range(world)]
            used = [each if any(each) else (True, *each[1:]) for each in used]
            return Forward(tuple(rows), tuple(used))

        def step() -> Step:
            count = choose.randint(1, max_forwards)
            breaks = None
            if host == "with_bagua" and choose.random() < 0.15 and count == 1 and True not in checkpoints:
                breaks = choose.randrange(world), choose.choice(["forward", "backward"]), choose.randrange(stages)
            order = choose.choice(["sum", "forward", "reverse"]) if breaks is None else "sum"
            return Step(tuple(forward() for _ in range(count)), order, choose.random() < 0.1, breaks)

        steps = tuple(step() for _ in range(choose.randint(1, 3)))
        breaking = any(each.breaks for each in steps)
        coalesce = choose.random() < 0.75
        return cls(
            seed=seed,
            world=world,
            host=host,
            normalize_over=mode,
            coalesce=coalesce,
            overlap=coalesce and choose.random() < 0.7,
            spatial=choose.choice([(), (5,), (4, 4), (4, 4)]),
            heads=heads,
            stages=stages,
            checkpoints=checkpoints,
            # DDP requires a trainable parameter, and an exception in a backward hook requires a backward.
            frozen=choose.choice(["none", "none", "some", "some" if ddp or breaking else "all"]),
            input_gradient=choose.random() < 0.4,
            repeats=choose.randrange(world) if choose.random() < 0.25 else -1,
            steps=steps,
        )

    @property
    def group(self) -> int:
        """The number of ranks that normalize together."""
        return int({"world": self.world, "node": 2, "rank": 1}.get(self.normalize_over, self.normalize_over))

    def inputs(self, step: int, forward: int) -> List[Tensor]:
        """Returns the batches of all ranks."""
        batches = []
        for rank, rows in enumerate(self.steps[step].forwards[forward].rows):
            repeats = rank == self.repeats
            key = (self.seed, rank) if repeats else (self.seed, rank, step, forward)
            generator = torch.Generator().manual_seed(hash(key) % 2**31)
            x = torch.randn(4, 3, *self.spatial, generator=generator, dtype=torch.float64)
            batches.append((x * (1 + 0.5 * rank) + 0.3 * rank)[: min(rows, 4)].clone())
        return batches


# -- the random model --------------------------------------------------------------------------------------------------

_broken: List[Tuple[str, int]] = []  # forward or backward, and the stage: where this rank raises an exception


def break_at(stage: int, h: Tensor) -> Tensor:
    """Raises an exception after a stage, in forward or in backward, if one is planned there."""

    def fail(_: Any = None) -> None:
        raise ZeroDivisionError("planned")

    if ("forward", stage) in _broken:
        fail()
    if ("backward", stage) in _broken and h.requires_grad:
        h.register_hook(fail)
    return h


torch.fx.wrap("break_at")


class Unit(nn.Module):
    """A convolution or linear layer, a normalization layer and an activation."""

    def __init__(self, choose: random.Random, inputs: int, outputs: int, dim: int) -> None:
        super().__init__()
        self.weighted: nn.Module
        if dim == 0:
            self.weighted = nn.Linear(inputs, outputs, bias=choose.random() < 0.5)
        else:
            kind = (nn.Conv1d, nn.Conv2d)[dim - 1]
            size = choose.choice([1, 3])
            self.weighted = kind(inputs, outputs, size, padding=size // 2, bias=choose.random() < 0.5)
        self.norm = norm(choose, outputs, dim)
        self.act = choose.choice([nn.Tanh, nn.Softplus, nn.Sigmoid, nn.Identity])()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.act(self.norm(self.weighted(x)))
        return y


def norm(choose: random.Random, features: int, dim: int) -> nn.Module:
    """Returns a BatchNorm layer with random options."""
    options: Dict[str, Any] = {"eps": choose.choice([1e-2, 1e-1]), "momentum": choose.choice([0.1, 0.3, None])}
    layer = (nn.BatchNorm2d if dim == 2 else nn.BatchNorm1d)(
        features, affine=choose.random() < 0.85, track_running_stats=choose.random() < 0.8, **options
    )
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer


class Branches(nn.Module):
    """Paths of different depth, whose outputs are summed."""

    def __init__(self, choose: random.Random, channels: int, dim: int) -> None:
        super().__init__()
        self.paths = nn.ModuleList(
            nn.Sequential(*(Unit(choose, channels, channels, dim) for _ in range(choose.randint(0, 2))))
            for _ in range(choose.randint(2, 3))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([path(x) for path in self.paths]).sum(0)


class Shared(nn.Module):
    """One normalization layer, applied twice."""

    def __init__(self, choose: random.Random, channels: int, dim: int) -> None:
        super().__init__()
        self.unit, self.norm = Unit(choose, channels, channels, dim), norm(choose, channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x).sin() + 2 * self.norm(self.unit(x))
        return y


class Stage(nn.Module):
    """A part of the model that may be checkpointed."""

    def __init__(self, inner: nn.Module, use_reentrant: Optional[bool]) -> None:
        super().__init__()
        self.inner, self.use_reentrant, self.reference = inner, use_reentrant, False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.use_reentrant is None:
            y = self.inner(x)
        elif self.reference:
            # A reentrant checkpoint runs its first forward without gradients, so statistics are merged at once.
            with Reference.merging_at_once(self.use_reentrant):
                y = self.inner(x)
        else:
            y = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return y


class RandomNet(nn.Module):
    """A model of a stem, stages, and heads that share their input."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        choose, dim, channels = random.Random(case.seed + 1), len(case.spatial), 4
        torch.manual_seed(case.seed)
        self.stem = Unit(choose, 3, channels, dim)
        kinds: List[Callable[[], nn.Module]] = [
            lambda: Unit(choose, channels, channels, dim),
            lambda: Branches(choose, channels, dim),
            lambda: Branches(choose, channels, dim),
            lambda: Shared(choose, channels, dim),
        ]
        self.stages = nn.ModuleList(Stage(choose.choice(kinds)(), reentrant) for reentrant in case.checkpoints)
        self.heads = nn.ModuleList(
            nn.Sequential(*(Unit(choose, channels, channels, dim) for _ in range(choose.randint(0, 2))))
            for _ in range(case.heads)
        )
        self.double().train()
        for part in self.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats and choose.random() < 0.1:
                part.eval()
        for parameter in self.parameters():
            if case.frozen == "all" or (case.frozen == "some" and choose.random() < 0.3):
                parameter.requires_grad_(False)
        if case.frozen == "some":  # one parameter is always trained: without any there is no backward
            self.stem.weighted.weight.requires_grad_(True)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        h = self.stem(x)
        for index, stage in enumerate(self.stages):
            h = break_at(index, stage(h))
        return tuple(head(h) + 0.1 * h for head in self.heads)


class Sink(torch.autograd.Function):
    """A function that joins outputs, as DistributedDataParallel does: backward from one output runs that of all."""

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(output.clone() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads


class Tied(nn.Module):
    """A model whose outputs pass through :class:`Sink`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return Sink.apply(*self.model(x))


def loss_of(case: Case, outputs: Sequence[Tensor], used: Sequence[bool]) -> Tensor:
    """Returns the loss of one rank; under plain DDP, an unused output has a weight of zero."""
    terms = []
    for index, (output, uses) in enumerate(zip(outputs, used)):
        if uses or case.host == "DDP":
            term = (output.pow(2) * (0.3 + 0.2 * index) + output.sin()).sum()
            terms.append(term if uses else 0.0 * term)
    return torch.stack(terms).sum()


# -- the reference -----------------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """BatchNorm over the batches of all ranks in one tensor, written from the formulas."""

    segments: Sequence[int] = ()  # rows of each group of ranks
    pools = False  # whether running statistics are updated after backward
    at_once = False  # whether they are updated in forward despite `pools`

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.momentum = layer.weight, layer.bias, layer.eps, layer.momentum
        self.tracks = layer.track_running_stats
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name))
        self.training = layer.training
        self._pool: List[Tensor] = []

    @classmethod
    @contextlib.contextmanager
    def merging_at_once(cls, on: bool) -> Iterator[None]:
        before, Reference.at_once = Reference.at_once, Reference.at_once or on
        yield
        Reference.at_once = before

    def forward(self, x: Tensor) -> Tensor:
        dims, shape = [d for d in range(x.dim()) if d != 1], (1, -1) + (1,) * (x.dim() - 2)

        def affine(y: Tensor) -> Tensor:
            return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)

        if not self.training:
            scale = (self.running_var + self.eps).rsqrt()
            return affine((x - self.running_mean.view(shape)) * scale.view(shape))
        parts = []
        for part in x.split(list(self.segments)):
            if part.numel():
                mean = part.mean(dims, keepdim=True)
                variance = (part - mean).square().mean(dims, keepdim=True)
                part = affine((part - mean) * (variance + self.eps).rsqrt())
            parts.append(part)
        if self.tracks:
            if self.pools and torch.is_grad_enabled() and not Reference.at_once:
                self._pool.append(x.detach())
            else:
                self._update(x.detach())
        return torch.cat(parts)

    def flush(self) -> None:
        """Updates the running statistics with the pooled batches."""
        pool, self._pool = self._pool, []
        if pool:
            self._update(torch.cat(pool))

    def _update(self, x: Tensor) -> None:
        dims = [d for d in range(x.dim()) if d != 1]
        self.num_batches_tracked += 1
        weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean += weight * (x.mean(dims) - self.running_mean)
        self.running_var += weight * (x.var(dims) - self.running_var)


def with_reference_layers(module: nn.Module) -> nn.Module:
    """Returns ``module`` with references in place of its BatchNorm layers, and without checkpoints."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, Reference(child))
        else:
            with_reference_layers(child)
    if isinstance(module, Stage):
        module.reference = True
    return module


Values = Dict[str, Optional[numpy.ndarray]]


def expected(case: Case, measured: Sequence[Values]) -> List[Values]:
    """Returns the values of the reference after each step, for all ranks together.

    Args:
        case: the case.
        measured: the values of one rank after each step. The reference copies the buffers from them after a failed
            step, because the order of the rounds determines how many layers the forward has run.
    """
    model: Any = with_reference_layers(RandomNet(case))
    norms = [part for part in model.modules() if isinstance(part, Reference)]
    pools = case.group < case.world and any(p.requires_grad for p in model.parameters())
    found: List[Values] = []
    for index, step in enumerate(case.steps):
        values: Values = {}
        for layer in norms:
            layer.pools = pools
        failed = step.breaks is not None
        if step.no_grad:
            with torch.no_grad():
                _run_reference(case, model, norms, index, 0, False)
        if failed:
            state = {k: torch.tensor(v) for k, v in measured[index].items() if k.startswith(("buffer ",))}
            for name, buffer in model.named_buffers():
                buffer.copy_(state[f"buffer {name}"])
            for layer in norms:
                layer._pool.clear()
        else:
            losses, leaves = [], []
            for forward in range(len(step.forwards)):
                leaf, loss, outputs = _run_reference(case, model, norms, index, forward, case.input_gradient)
                leaves.append(leaf)
                losses.append(loss)
                values[f"output {forward}"] = torch.cat([o.detach().flatten(1) for o in outputs], 1).numpy()
            total = torch.stack(losses).sum() / case.world
            if total.requires_grad:
                total.backward()
            for layer in norms:
                layer.flush()
            for forward, leaf in enumerate(leaves):
                if leaf.grad is not None:
                    values[f"input {forward}"] = leaf.grad.numpy() * case.world
            _sgd_step(model)
        values.update(state_of(model))
        found.append(values)
    return found


def _run_reference(case: Case, model: Any, norms: Any, step: int, forward: int, gradient: bool) -> Any:
    batches = case.inputs(step, forward)
    rows = [len(batch) for batch in batches]
    Reference.segments = [sum(rows[i : i + case.group]) for i in range(0, case.world, case.group)]
    leaf = torch.cat(batches).requires_grad_(gradient)
    outputs = model(leaf)
    parts = list(zip(*(output.split(rows) for output in outputs)))
    used = case.steps[step].forwards[forward].used
    losses = [loss_of(case, part, which) for part, which in zip(parts, used)]
    return leaf, torch.stack(losses).sum(), outputs


def _sgd_step(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
                parameter.grad = None


def state_of(model: nn.Module) -> Values:
    found: Values = {f"parameter {name}": p.detach().numpy().copy() for name, p in model.named_parameters()}
    found.update({f"buffer {name}": b.numpy().copy() for name, b in model.named_buffers()})
    return found


# -- a rank ------------------------------------------------------------------------------------------------------------


def run_rank(case: Case, rank: int) -> List[Values]:
    """Returns the values of this rank after each step."""
    from bagua_syncbn_algo import SyncBatchNormAlgorithm, convert_sync_batchnorm

    plain = RandomNet(case)
    inner: Any = convert_sync_batchnorm(plain, coalesce=case.coalesce, overlap=case.overlap)
    omits = any(not all(used) for step in case.steps for f in step.forwards for used in f.used)
    model: Any = Tied(inner) if omits and not case.host.startswith("DDP") else inner
    if case.host == "with_bagua":
        model.with_bagua([], SyncBatchNormAlgorithm(normalize_over=case.normalize_over))
    elif case.host != "none":
        model = DistributedDataParallel(model, find_unused_parameters=case.host == "DDP unused")
    found = []
    for index, step in enumerate(case.steps):
        values: Values = {}
        try:
            if step.no_grad:
                with torch.no_grad():
                    model(case.inputs(index, 0)[rank])
            _broken[:] = [step.breaks[1:]] if step.breaks is not None and step.breaks[0] == rank else []
            _train_step(case, model, index, rank, values)
        except (RuntimeError, ZeroDivisionError):
            if step.breaks is None:
                raise
            _broken.clear()
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
            _sgd_step(inner)
        values.update(state_of(inner))
        found.append(values)
    return found


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
    warnings.simplefilter("ignore")
    from bagua_syncbn_algo import bagua
    from bagua_syncbn_algo.comm import channel

    channel._NOTICE_SECONDS = 0.3  # type: ignore[attr-defined]
    bagua.init_process_group()
    if mutation is not None:
        MUTATIONS[mutation]()
    for seed in iter(tasks.get, None):
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
        for name, value in values.items():
            shards = [rank[index].get(name) for rank in ranks]
            if name.startswith(("output", "input")):
                if any(shard is None for shard in shards):
                    return f"step {index}, {name}: missing on a rank"
                found = numpy.concatenate([numpy.asarray(shard) for shard in shards])
            else:
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
            found, error = pool.finish(CASE_SECONDS)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case")
    parser.add_argument("--minutes", type=float, default=15, help="time limit")
    parser.add_argument("--mutate", choices=sorted(MUTATIONS), help="run wrong code, and stop where a case detects it")
    parser.add_argument("--show", action="store_true", help="print the cases")
    options = parser.parse_args()
    from rich.progress import track

    seeds = range(options.seed, options.seed + options.cases)
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
