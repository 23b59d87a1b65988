"""What a graph of ``torch.compile`` depends on: shapes, numbers, process groups, failed steps, wrappers around it."""

from __future__ import annotations

import copy
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from ranks import free_port, run_processes
from test_compiled import Run, images
from test_inductor import scheduled
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from bagua_syncbn_algo import convert_sync_batchnorm, sync_batch_norm_joinable
from bagua_syncbn_algo.compat import CAPTURES_ROUNDS

pytestmark = pytest.mark.skipif(not CAPTURES_ROUNDS, reason="rounds are captured from torch 2.6 on")


class Layers(nn.Module):
    """Parts of the models below."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.a, self.b, self.c = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.a(y) + self.b(y * 2) + self.c(y * 3)


class Branch(Layers):
    """Other layers for other shapes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.a(y) + self.b(y) * 2 if x.shape[2] > 6 else self.a(y) + self.c(y) * 3


class Size(Layers):
    """A forward that computes with a shape."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.a(y) / int(x.shape[-1]) + self.b(y * 2) * len(x)


class Number(Layers):
    """Other layers for other numbers."""

    def forward(self, x: Tensor, k: int = 1, factor: float = 1.0) -> Tensor:
        y = self.conv(x) * factor
        p, q = self.a(y), self.b(y * k)
        return self.c(p * factor + q) if k > 2 else p + q * 2


class Frozen(Layers):
    """A round with a layer whose output has no gradient, which another layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.a(x), self.b(self.conv(x))
        return self.c(p * 2) + q


class First(Layers):
    """A layer on the input of the graph."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.a(x))


class Regions(Layers):
    """Layers for images, and layers for regions, of which a rank may have none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor, regions: Tensor) -> Tensor:
        y = self.a(self.conv(x))
        r = self.first(regions)
        return self.b(y.relu()).sum() + self.second(r * 2).square().sum() / 3


class Checkpointed(Layers):
    """A compiled part inside of eager activation checkpointing."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, self.conv(x), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def loss_of(y: Tensor) -> Tensor:
    weights = torch.sin(torch.arange(y.numel(), dtype=y.dtype)).view(y.shape)
    return (y * weights).sum() + y.pow(3).mean()


def pair(model: nn.Module, **options: Any) -> Tuple[Any, Any]:
    torch._dynamo.reset()
    return tuple(convert_sync_batchnorm(copy.deepcopy(model).double(), **options) for _ in range(2))  # type: ignore[return-value]


def compare(
    rank: int,
    model: nn.Module,
    sizes: Tuple[int, ...],
    arguments: Callable[[int], Tuple[Any, ...]] = lambda step: (),
    backend: Any = "aot_eager",
    **options: Any,
) -> None:
    """Trains copies eagerly and compiled, on images of changing size."""
    eager, found = pair(model)
    compiled = torch.compile(found, backend=backend, **options)

    def step_of(call: Any) -> Callable[[int], Tensor]:
        return lambda step: loss_of(call(images(rank, step, size=sizes[step]), *arguments(step)))

    expected = Run(eager, step_of(eager), len(sizes))
    Run(found, step_of(compiled), len(sizes)).compare(expected, type(model).__name__)


def _guards(rank: int, port: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    compare(rank, Branch(), (5, 6, 8, 4, 9, 5))
    compare(rank, Size(), (5, 6, 8, 4, 9))
    numbers = (1, 3, 2, 5, 1, 4)
    compare(rank, Number(), (6,) * 6, lambda step: (numbers[step], 1 + numbers[step] / 4))
    compare(rank, Frozen(), (6, 6))
    compare(rank, First(), (6, 6, 7), dynamic=True)
    # A step before there is a process group.
    dist.destroy_process_group()
    torch.manual_seed(0)
    eager, model = pair(Layers())
    compiled = torch.compile(model, backend="aot_eager")
    for target in (eager, compiled):
        target(images(0, 0))  # the same on both ranks, whose running statistics stay equal
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    expected = Run(eager, lambda step: loss_of(eager(images(rank, step))))
    assert expected.rounds
    Run(model, lambda step: loss_of(compiled(images(rank, step)))).compare(expected, "compiled without a group")
    dist.destroy_process_group()


@pytest.mark.multirank
def test_shapes_numbers_gradients_and_groups_are_guarded() -> None:
    """Catches a graph that serves other shapes, numbers or groups than those it was traced for: wrong without an error.

    Also a round for an output without a gradient, and a number of channels that is symbolic.
    """
    run_processes(2, _guards, free_port(), limit=300.0)


class NoMemory(TorchDispatchMode):
    """Fails in the weight gradient, which runs between launch and wait of a backward round."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.convolution_backward.default and not args[-1][0]:
            raise RuntimeError("out of memory (simulated)")
        return function(*args, **(kwargs or {}))


def _failed_step(rank: int) -> None:
    from bagua_syncbn_algo.graph.inductor import RoundsPass

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    eager, model = pair(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)))
    compiled = torch.compile(model, backend=scheduled(RoundsPass(), False, []))
    found: Dict[bool, List[Any]] = {}
    for is_compiled, target in ((False, eager), (True, compiled)):
        gradients = found.setdefault(is_compiled, [])
        for step in range(4):
            target.zero_grad()
            loss = loss_of(target(images(rank, step)))
            if step == 1 and is_compiled:
                with pytest.raises(RuntimeError, match="simulated"), NoMemory():
                    loss.backward()
            else:
                loss.backward()
            if step != 1:
                gradients += [parameter.grad.clone() for parameter in target.parameters()]
    for value, expected in zip(found[True], found[False]):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    dist.destroy_process_group()


@pytest.mark.multirank
def test_a_failed_step_leaves_no_round_to_the_next_one() -> None:
    """Catches gradient sums of a step that failed between launch and wait, in all later steps, without an error."""
    run_processes(2, _failed_step, limit=100.0)


def _checkpointed(rank: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    for reentrant in (False, True):
        eager, model = pair(Checkpointed(reentrant))
        model.block.compile(backend="aot_eager")
        expected = Run(eager, lambda step: loss_of(eager(images(rank, step))))  # noqa: B023
        found = Run(model, lambda step: loss_of(model(images(rank, step))))  # noqa: B023
        assert len(found.rounds) == 3 * 6  # of each step: two in forward, again in backward, and two of backward
        found.rounds = expected.rounds
        found.compare(expected, f"reentrant={reentrant}")
    dist.destroy_process_group()


@pytest.mark.multirank
def test_checkpointing_around_a_compiled_part_counts_a_batch_once() -> None:
    """Catches running statistics that the recomputation of a graph moves a second time."""
    run_processes(2, _checkpointed, limit=100.0)


def _regions(rank: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    eager, model = pair(Regions(), coalesce=False)
    compiled: Any = torch.compile(model, backend="inductor")

    def step_of(call: Any) -> Callable[[int], Tensor]:
        def step(number: int) -> Tensor:
            x = images(rank, number)
            return call(x, x.flatten(2)[: 0 if rank == 1 else 2, :, 0] * 1.0)  # type: ignore[no-any-return]

        return step

    expected = Run(eager, step_of(eager), 2)
    Run(model, step_of(compiled), 2).compare(expected, "regions")
    dist.destroy_process_group()


@pytest.mark.multirank
def test_rounds_with_and_without_an_effect_have_one_order() -> None:
    """Catches rounds of empty shards without an order between them and the other rounds: an error of the layers."""
    run_processes(2, _regions, limit=200.0)


def _uneven(rank: int) -> List[str]:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    eager, model = pair(Layers())
    states = []
    for target, called in ((eager, eager), (model, torch.compile(model, backend="eager"))):
        ddp = DistributedDataParallel(called, broadcast_buffers=False)
        with Join([sync_batch_norm_joinable(target), ddp]):
            for step in range(2 + rank):
                loss_of(ddp(images(rank, step))).backward()
        states.append(
            [*(buffer for buffer in target.buffers()), *(p.grad for p in target.parameters() if p.grad is not None)]
        )
        dist.barrier()
    for value, expected in zip(*states):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    messages = []
    alone = DistributedDataParallel(torch.compile(model, backend="eager"), broadcast_buffers=False)
    with pytest.raises(RuntimeError) as caught, Join([alone]):
        alone(images(rank, 0))
    messages.append(str(caught.value))
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values: Dict[str, Tensor], x: Tensor) -> Tensor:
        return loss_of(torch.func.functional_call(model, values, (x,)))

    torch._dynamo.reset()
    with pytest.raises(RuntimeError) as caught:
        torch.compile(torch.func.grad(loss), backend="aot_eager")(parameters, images(rank, 0))
    messages.append(str(caught.value))
    dist.destroy_process_group()
    return messages


@pytest.mark.multirank
def test_uneven_data_and_transforms_with_a_compiled_model() -> None:
    """Catches a compiled model that Join does not find, and misuse that ends in a hang or in an error of the tracer."""
    for alone, transform in run_processes(2, _uneven, limit=120.0):
        assert "use Join([sync_batch_norm_joinable(model), ddp])" in alone, alone
        assert "expected no torch.func transform around a training forward of Layers." in transform, transform
