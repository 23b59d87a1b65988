"""The random cases of the fuzz program: options, model, and the reference in one process; see ``fuzz.py``."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy
import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# -- the random case ---------------------------------------------------------------------------------------------------

HOSTS = ("DDP", "DDP unused", "with_bagua", "none")
KINDS = ("join", "wrap", "restart", "checks", "compiled", "resizes", "saves")
SAVED = (
    "addmm.default",
    "convolution.default",
    "mul.Tensor",
    "sum.dim_IntList",
    "add.Tensor",
    "sqrt.default",
    "cat.default",
)


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
    epochs: Tuple[Tuple[int, ...], ...]  # the numbers of batches of each rank, by `Join` context; empty without any
    changes: Tuple[str, ...]  # before each step: nothing, wrap (the model again), restart (the process group)
    checks: bool  # whether statistics that are not finite are an error
    compiled: bool  # whether torch.compile captures the model
    resizes: bool  # whether each step has inputs of another size, on which the forward depends
    saves: Tuple[
        str, ...
    ]  # the operators whose results selective checkpointing keeps; empty for ordinary checkpointing

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

        def forward(choose: random.Random, active: Sequence[bool] = (True,) * world) -> Forward:
            fewest = 2 if group == 1 else 0
            while True:
                rows = [choose.choice([fewest, 1 + fewest // 2, 2, 3]) for _ in range(world)]
                rows = [count if each else 0 for count, each in zip(rows, active)]
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
            return Step(tuple(forward(choose) for _ in range(count)), order, choose.random() < 0.1, breaks)

        steps = tuple(step() for _ in range(choose.randint(1, 3)))
        breaking = any(each.breaks for each in steps)
        coalesce = choose.random() < 0.75
        more = random.Random(f"more of {seed}")
        epochs: Tuple[Tuple[int, ...], ...] = ()
        if ddp and more.random() < 0.3:
            counts = [tuple(more.randint(0, 3) for _ in range(world)) for _ in range(more.randint(1, 2))]
            epochs = tuple(each for each in counts if any(each)) or ((1,) * world,)
            actives = [[count > i for count in each] for each in epochs for i in range(max(each))]
            steps = tuple(Step((forward(more, active),), "sum", False, None) for active in actives)
        starts = {sum(map(max, epochs[:i])) for i in range(len(epochs))} or set(range(len(steps)))
        changes = [more.choices(["", "wrap", "restart"], [80, 12, 8])[0] for _ in steps]
        overlap = coalesce and choose.random() < 0.7
        spatial = choose.choice([(), (5,), (4, 4), (4, 4)])
        # DDP requires a trainable parameter, and an exception in a backward hook requires a backward.
        frozen = choose.choice(["none", "none", "some", "some" if ddp or breaking else "all"])
        input_gradient = choose.random() < 0.4
        repeats = choose.randrange(world) if choose.random() < 0.25 else -1
        plain = not (breaking or omits or epochs or any(c is not None for c in checkpoints))
        return cls(
            seed=seed,
            world=world,
            host=host,
            normalize_over=mode,
            coalesce=coalesce,
            overlap=overlap,
            spatial=spatial,
            heads=heads,
            stages=stages,
            checkpoints=checkpoints,
            frozen=frozen,
            input_gradient=input_gradient,
            repeats=repeats,
            steps=steps,
            epochs=epochs,
            changes=tuple(change if i and i in starts else "" for i, change in enumerate(changes)),
            checks=more.random() < 0.15,
            compiled=plain and mode == "world" and more.random() < 0.15,
            resizes=bool(spatial) and repeats < 0 and more.random() < 0.2,
            saves=tuple(more.sample(SAVED, more.randint(1, 3))) if False in checkpoints and more.random() < 0.3 else (),
        )

    @property
    def group(self) -> int:
        """The number of ranks that normalize together."""
        return int({"world": self.world, "node": 2, "rank": 1}.get(self.normalize_over, self.normalize_over))

    @property
    def kinds(self) -> List[str]:
        """The members of ``KINDS`` that the case has."""
        found = {"join": bool(self.epochs), "checks": self.checks, "compiled": self.compiled, "resizes": self.resizes}
        found["saves"] = bool(self.saves)
        return [kind for kind in KINDS if found.get(kind, kind in self.changes)]

    def active(self, step: int) -> Tuple[bool, ...]:
        """Returns, for each rank, whether it has a batch in a step."""
        first = 0
        for counts in self.epochs:
            if step < first + max(counts):
                return tuple(count > step - first for count in counts)
            first += max(counts)
        return (True,) * self.world

    def ends_epoch(self, step: int) -> bool:
        """Returns whether all ranks have the same parameters and buffers after a step."""
        ends = [sum(map(max, self.epochs[: i + 1])) for i in range(len(self.epochs))]
        return not ends or step + 1 in ends

    def inputs(self, step: int, forward: int) -> List[Tensor]:
        """Returns the batches of all ranks."""
        batches = []
        spatial = [size + step % 3 for size in self.spatial] if self.resizes else self.spatial
        for rank, rows in enumerate(self.steps[step].forwards[forward].rows):
            repeats = rank == self.repeats
            key = (self.seed, rank) if repeats else (self.seed, rank, step, forward)
            generator = torch.Generator().manual_seed(hash(key) % 2**31)
            x = torch.randn(4, 3, *spatial, generator=generator, dtype=torch.float64)
            batches.append((x * (1 + 0.5 * rank) + 0.3 * rank)[: min(rows, 4)].clone())
        return batches


# -- the random model --------------------------------------------------------------------------------------------------

broken: List[Tuple[str, int]] = []  # forward or backward, and the stage: where this rank raises an exception


def break_at(stage: int, h: Tensor) -> Tensor:
    """Raises an exception after a stage, in forward or in backward, if one is planned there."""

    def fail(_: Any = None) -> None:
        raise ZeroDivisionError("planned")

    if ("forward", stage) in broken:
        fail()
    if ("backward", stage) in broken and h.requires_grad:
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


class Sized(nn.Module):
    """A forward that depends on the size of its input: its numbers, and the order of its layers."""

    def __init__(self, choose: random.Random, channels: int, dim: int) -> None:
        super().__init__()
        self.first, self.second = Unit(choose, channels, channels, dim), Unit(choose, channels, channels, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.second(x)) if x.shape[-1] % 2 else self.second(self.first(x))
        return y / int(x.shape[-1])  # type: ignore[no-any-return]


class Stage(nn.Module):
    """A part of the model that may be checkpointed, and keep the results of some operators."""

    def __init__(self, inner: nn.Module, use_reentrant: Optional[bool], saves: Sequence[str]) -> None:
        super().__init__()
        self.inner, self.use_reentrant, self.reference = inner, use_reentrant, False
        self.saves = () if use_reentrant else saves

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor
        if self.use_reentrant is None:
            y = self.inner(x)
        elif self.reference:
            # A reentrant checkpoint runs its first forward without gradients, so statistics are merged at once.
            with Reference.merging_at_once(self.use_reentrant):
                y = self.inner(x)
        elif self.saves:
            contexts = functools.partial(create_selective_checkpoint_contexts, functools.partial(_policy, self.saves))
            y = checkpoint(self.inner, x, use_reentrant=False, context_fn=contexts)
        else:
            y = checkpoint(self.inner, x, use_reentrant=self.use_reentrant)
        return y


def _policy(saves: Sequence[str], context: Any, operator: Any, *args: Any, **kwargs: Any) -> Any:
    is_saved = str(operator).replace("aten.", "") in saves
    return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE


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
        if case.resizes:
            kinds = [lambda: Sized(choose, channels, dim), *kinds[1:3]]
        self.stages = nn.ModuleList(
            Stage(choose.choice(kinds)(), reentrant, case.saves) for reentrant in case.checkpoints
        )
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
            sgd_step(model)
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


def sgd_step(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
                parameter.grad = None


def state_of(model: nn.Module) -> Values:
    found: Values = {f"parameter {name}": p.detach().numpy().copy() for name, p in model.named_parameters()}
    found.update({f"buffer {name}": b.numpy().copy() for name, b in model.named_buffers()})
    return found
