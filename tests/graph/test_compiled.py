"""Models under ``torch.compile``: one graph, the rounds of an eager step, and its results.

The ranks are processes: Dynamo serves one thread at a time, and a rank communicates while its graph is traced.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, Callable, Dict, List, Optional, Tuple

import models
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import SyncBatchNorm, convert_sync_batchnorm, record_rounds
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


class Checkpointed(nn.Module):
    """Layers inside of activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.body = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, self.stem(x), use_reentrant=False)  # type: ignore[no-any-return]


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
                rounds.next_step()
                step(number).backward()
        self.gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.buffers = [buffer.clone() for buffer in model.buffers()]
        self.rounds = [(entry.phase, entry.layers, entry.step) for entry in rounds]

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
    assert sum(phase == "forward" for phase, _, step in inception.rounds if step == 1) == 5  # its levels
    _compare(rank, "without overlap", models.Inception(4, blocks=1), "aot_eager", overlap=False)
    dist.destroy_process_group()


@pytest.mark.multirank
def test_graphs_compute_what_eager_steps_compute() -> None:
    """Catches a graph break, other rounds than those of an eager step, and other gradients or running statistics.

    The tolerance of 1e-9 is that of float64 sums in another order.
    """
    run_processes(2, _cases, limit=300.0)
