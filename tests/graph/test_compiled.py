"""Models under ``torch.compile``: one graph, the rounds of an eager step, and its results.

The ranks are processes: Dynamo serves one thread at a time, and a rank communicates while its graph is traced.
"""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any, Callable, Dict, List, Tuple

import models
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from ranks import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm, record_rounds
from bagua_syncbn_algo.compat import CAPTURES_ROUNDS

pytestmark = pytest.mark.skipif(not CAPTURES_ROUNDS, reason="rounds are captured from torch 2.6 on")


class Options(nn.Module):
    """Layers with all kinds of options, some of which share a round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(8),
                nn.BatchNorm2d(8, momentum=None),
                nn.BatchNorm2d(8, affine=False, eps=1e-3),
                nn.BatchNorm2d(8, track_running_stats=False),
            ]
        )
        self.last = nn.BatchNorm1d(8, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.last(torch.stack([norm(y * (i + 1)) for i, norm in enumerate(self.norms)]).sum(0).mean((2, 3)))


class Repeated(nn.Module):
    """A layer that is applied three times, twice in one level."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(self.norm(y) + self.norm(y * 2))


class Flagged(nn.Module):
    """A forward that depends on an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = False
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.second(x)
        return y * 2 if self.twice else y


def keep_rounds(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keeps the results of rounds, for selective activation checkpointing."""
    kept = operator in (torch.ops.bagua_syncbn.launch.default, torch.ops.bagua_syncbn.wait.default)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class Checkpointed(nn.Module):
    """Layers inside of activation checkpointing."""

    def __init__(self, selective: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        policy = partial(create_selective_checkpoint_contexts, keep_rounds)
        self.options: Dict[str, Any] = {"context_fn": policy} if selective else {}

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, self.stem(x), use_reentrant=False, **self.options)  # type: ignore[no-any-return]


class Keywords(nn.Module):
    """A forward with nested arguments and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, pair: Tuple[Tensor, Tensor], scale: float = 1.0, mode: str = "sum") -> Dict[str, Any]:
        first, second = self.a(pair[0]), self.b(pair[1])
        return {mode: first + second, "rest": [first * scale, None]}


def plain(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def pair_call(model: nn.Module, x: Tensor) -> Any:
    found = model((x, x * 2), scale=3.0)
    return found["sum"] + found["rest"][0]


def images(rank: int, step: int, dtype: torch.dtype = torch.float64, size: int = 8, count: int = 0) -> Tensor:
    torch.manual_seed(100 * step + rank)
    return torch.randn(count or 2 + rank, 3, size, size).to(dtype) * 3 + rank


class Run:
    """The gradients, buffers and rounds of some training steps."""

    def __init__(self, model: nn.Module, step: Callable[[int], Tensor], steps: int = 3) -> None:
        with record_rounds() as rounds:
            for number in range(steps):
                step(number).backward()
        self.gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.buffers = [buffer.clone() for buffer in model.buffers()]
        self.rounds = [(entry.phase, entry.layers) for entry in rounds]

    def compare(self, other: Run, name: str, tolerance: float = 1e-9) -> None:
        """Compares with the run of an eager model."""
        assert self.rounds == other.rounds, (name, self.rounds[:6], other.rounds[:6])
        assert len(self.gradients) == len(other.gradients), name
        for found, expected in zip(self.gradients, other.gradients):
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}")
        for found, expected in zip(self.buffers, other.buffers):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=lambda m: f"{name}: {m}")


def compile_fully(model: nn.Module, backend: str) -> Any:
    return torch.compile(model, fullgraph=True, backend=backend)


def _compare(
    rank: int,
    name: str,
    model: nn.Module,
    backend: str,
    call: Callable[[nn.Module, Tensor], Any] = plain,
    batch: Callable[[int, int], Tensor] = images,
    **options: Any,
) -> Run:
    """Trains copies of a model eagerly and compiled, with one full graph."""
    torch._dynamo.reset()
    eager = convert_sync_batchnorm(copy.deepcopy(model).double(), **options)
    compiled_model = convert_sync_batchnorm(copy.deepcopy(model).double(), **options)
    compiled = compile_fully(compiled_model, backend)
    expected = Run(eager, lambda step: call(eager, batch(rank, step)).square().sum())
    found = Run(compiled_model, lambda step: call(compiled, batch(rank, step)).square().sum())
    assert expected.rounds, name
    found.compare(expected, name)
    return found


def channels_last(rank: int, step: int) -> Tensor:
    return images(rank, step).to(memory_format=torch.channels_last)


def with_an_empty_shard(rank: int, step: int) -> Tensor:
    return images(rank, step)[: 0 if rank == 1 and step == 1 else None]


def empty_requiring_a_gradient(rank: int, step: int) -> Tensor:
    return with_an_empty_shard(rank, step).requires_grad_()


def single_rows(rank: int, step: int) -> Tensor:
    return images(rank, step, size=1, count=1)


def requiring_a_gradient(rank: int, step: int) -> Tensor:
    return images(rank, step).requires_grad_()


def _cases(rank: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    for coalesce in (True, False):
        _compare(rank, "options", Options(), "aot_eager", coalesce=coalesce)
        _compare(rank, "repeated", Repeated(), "aot_eager", coalesce=coalesce)
        _compare(rank, "channels last", Options(), "aot_eager", batch=channels_last, coalesce=coalesce)
        _compare(rank, "an empty shard", Options(), "aot_eager", batch=with_an_empty_shard, coalesce=coalesce)
        _compare(rank, "gradients", Options(), "eager", batch=requiring_a_gradient, coalesce=coalesce)
        _compare(rank, "nested", Keywords(), "aot_eager", call=pair_call, coalesce=coalesce)
    _compare(rank, "rows", Flagged(), "aot_eager", batch=single_rows)
    inception = _compare(rank, "inception", models.Inception(4, blocks=2), "aot_eager")
    assert sum(phase == "forward" for phase, _ in inception.rounds) == 3 * 5  # its levels
    _compare(rank, "without overlap", models.Inception(4, blocks=1), "aot_eager", overlap=False)
    dist.destroy_process_group()


@pytest.mark.multirank
def test_graphs_compute_what_eager_steps_compute() -> None:
    """Catches a graph break, other rounds than those of an eager step, and other gradients or running statistics.

    The tolerance of 1e-9 is that of float64 sums in another order.
    """
    run_processes(2, _cases, limit=300.0)


def _wrapped(rank: int) -> None:
    """Compares, with an eager model in DistributedDataParallel, what people build from the same parts."""
    bagua.init_process_group()
    torch.manual_seed(0)
    base = models.Inception(4, blocks=2).double()

    def eager_step(model: nn.Module) -> Callable[[int], Tensor]:
        return lambda step: model(images(rank, step, size=16)).square().mean()

    def converted() -> Any:
        torch._dynamo.reset()
        return convert_sync_batchnorm(copy.deepcopy(base))

    reference = converted()
    expected = Run(reference, eager_step(DistributedDataParallel(reference)))

    inside = converted()
    Run(inside, eager_step(DistributedDataParallel(torch.compile(inside, backend="aot_eager")))).compare(
        expected, "DDP(compile(model))"
    )
    around = converted()
    Run(around, eager_step(torch.compile(DistributedDataParallel(around), backend="aot_eager"))).compare(
        expected, "compile(DDP(model))"
    )
    regional = converted()
    for block in regional.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    found = Run(regional, eager_step(DistributedDataParallel(regional)))
    assert len(found.rounds) == len(expected.rounds), "regional compilation has other rounds"
    assert any(len(layers) > 1 for _, layers in found.rounds)
    bagua_model: Any = converted()
    compiled = torch.compile(bagua_model, backend="aot_eager")
    compiled.with_bagua([], SyncBatchNormAlgorithm())
    Run(bagua_model, eager_step(compiled)).compare(expected, "with_bagua of a compiled model")
    late = copy.deepcopy(base)
    compiled = torch.compile(late, backend="aot_eager")
    assert convert_sync_batchnorm(compiled) is compiled
    Run(late, eager_step(DistributedDataParallel(compiled))).compare(expected, "converted after torch.compile")
    dist.destroy_process_group()


@pytest.mark.multirank
def test_compiled_models_in_wrappers() -> None:
    """Catches wrappers and regional compilation that lose rounds, overlap or the average of gradients."""
    run_processes(2, _wrapped, limit=200.0)


def _changes(rank: int) -> List[str]:
    bagua.init_process_group()
    torch.manual_seed(0)
    # An attribute that the regrouped forward depends on.
    eager, model = convert_sync_batchnorm(Flagged().double()), convert_sync_batchnorm(Flagged().double())
    compiled = compile_fully(model, "eager")
    for step, twice in enumerate((False, True, True, False)):
        eager.twice = model.twice = twice
        torch.testing.assert_close(compiled(images(rank, step)), eager(images(rank, step)))
    eager.eval(), model.eval()
    torch.testing.assert_close(compiled(images(rank, 9)), eager(images(rank, 9)))
    eager.train(), model.train()
    with record_rounds() as rounds, torch.no_grad():  # recalibration of the running statistics
        torch.testing.assert_close(compiled(images(rank, 9)), eager(images(rank, 9)))
    assert len(rounds) == 2
    torch.testing.assert_close(model.first.running_var, eager.first.running_var)
    # Autocast, and half-precision inputs.
    torch._dynamo.reset()
    network = models.Inception(4, blocks=1)
    eager, model = convert_sync_batchnorm(copy.deepcopy(network)), convert_sync_batchnorm(network)
    compiled = compile_fully(model, "aot_eager")

    def step_of(target: Any) -> Callable[[int], Tensor]:
        def step(number: int) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return target(images(rank, number, torch.float32, 16)).float().square().mean()  # type: ignore[no-any-return]

        return step

    expected, found = Run(eager, step_of(eager)), Run(model, step_of(compiled))
    assert found.rounds == expected.rounds
    for p, q in zip(found.gradients, expected.gradients):
        torch.testing.assert_close(p, q, rtol=5e-2, atol=5e-2 * float(q.abs().max()))
    # Running statistics that are pooled, and invalid inputs: eager, with a warning that says why.
    torch._dynamo.reset()
    pooled: Any = convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    pooled.with_bagua([], SyncBatchNormAlgorithm(normalize_over="rank"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(pooled, backend="eager")(images(rank, 0, torch.float32)).sum().backward()
        layer = SyncBatchNorm(3)
        with pytest.raises(ValueError, match="expected 3 channels"):
            torch.compile(layer, backend="eager")(torch.ones(2, 4, 2, 2))
    dist.destroy_process_group()
    # Dynamo may trace a forward several times.
    return sorted({str(each.message) for each in caught if "torch.compile can capture" in str(each.message)})


@pytest.mark.multirank
def test_changes_between_steps() -> None:
    """Catches a graph that misses a change of an attribute or mode, and what cannot be captured without a reason."""
    for messages in run_processes(2, _changes, limit=200.0):
        assert len(messages) == 2
        assert "pooled" in messages[0] and "the input is invalid" in messages[1], messages


def _fallback(rank: int) -> None:
    """Rank 1 meets new shapes beyond its recompilation limit, and runs eagerly from then on."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    base = models.Inception(4, blocks=2).double()
    eager = convert_sync_batchnorm(copy.deepcopy(base))
    model = convert_sync_batchnorm(copy.deepcopy(base))
    if rank == 1:
        torch._dynamo.config.recompile_limit = 1
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)

    def batch(step: int) -> Tensor:
        return images(rank, step, size=16, count=2 + (step if rank == 1 else 0))

    expected = Run(eager, lambda step: eager(batch(step)).square().mean(), steps=4)
    Run(model, lambda step: compiled(batch(step)).square().mean(), steps=4).compare(expected, "fallback")
    dist.destroy_process_group()


@pytest.mark.multirank
def test_a_rank_may_fall_back_to_eager_mode() -> None:
    """Catches messages of a graph that differ from those of an eager step."""
    run_processes(2, _fallback, limit=120.0)


def _inductor(rank: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    _compare(rank, "options", Options(), "inductor")
    # Not a convolution: Inductor expects other strides than its backward returns for an empty batch.
    _compare(rank, "an empty shard", Flagged(), "inductor", batch=empty_requiring_a_gradient)
    _compare(rank, "options per layer", Options(), "inductor", coalesce=False)
    found = _compare(rank, "inception", models.Inception(4, blocks=1), "inductor", batch=channels_last)
    assert found.rounds
    dist.destroy_process_group()


@pytest.mark.multirank
def test_inductor_computes_what_eager_steps_compute() -> None:
    """Catches a round whose message Inductor reuses, or that it moves."""
    run_processes(2, _inductor, limit=300.0)


def _checkpointed(rank: int) -> List[int]:
    dist.init_process_group("gloo")
    counts = []
    torch.manual_seed(0)
    plain_model = nn.Sequential(nn.Conv2d(3, 4, 1), Checkpointed(False).body).double()
    for selective in (False, True):
        torch._dynamo.reset()
        model = Checkpointed(selective).double()
        model.load_state_dict(dict(zip(model.state_dict(), plain_model.state_dict().values())))
        reference = convert_sync_batchnorm(copy.deepcopy(plain_model))
        expected = Run(reference, lambda step: reference(images(rank, step)).square().sum())  # noqa: B023
        model = convert_sync_batchnorm(model)
        compiled = compile_fully(model, "aot_eager")
        found = Run(model, lambda step: compiled(images(rank, step)).square().sum())  # noqa: B023
        counts.append(len(found.rounds))
        found.rounds = expected.rounds  # whose names differ
        found.compare(expected, "checkpointed")
    dist.destroy_process_group()
    return counts


@pytest.mark.multirank
def test_activation_checkpointing() -> None:
    """Catches a recomputation that updates running statistics, and a policy that cannot keep the rounds.

    Without Inductor's pass or a policy, backward repeats the two forward rounds of each of the three steps.
    """
    for counts in run_processes(2, _checkpointed, limit=100.0):
        assert counts == [3 * 6, 3 * 4]
