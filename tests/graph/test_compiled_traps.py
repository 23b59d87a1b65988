"""Traps of ``torch.compile`` that the design met, each with the model that falls into it."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any, Callable

import models
import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from ranks import run_processes
from test_compiled import Options, Run, images
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bagua_syncbn_algo import SyncBatchNormError, convert_sync_batchnorm
from bagua_syncbn_algo.compat import CAPTURES_ROUNDS

pytestmark = pytest.mark.skipif(not CAPTURES_ROUNDS, reason="rounds are captured from torch 2.6 on")


class Twice(nn.Module):
    """A layer that is applied two times to one input: its two rounds have equal arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) * 2 + self.norm(y).square()


class Skipping(nn.Module):
    """A forward that leaves out a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = False
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x if self.skip else self.first(x))  # type: ignore[no-any-return]


def _skip(rank: int) -> str:
    dist.init_process_group("gloo")
    model = convert_sync_batchnorm(Skipping().double(), coalesce=False)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(images(rank, 0)).square().sum().backward()
    model.skip = rank == 1
    with pytest.raises(SyncBatchNormError) as caught:
        compiled(images(rank, 1))
    dist.destroy_process_group()
    return str(caught.value)


@pytest.mark.multirank
def test_a_graph_that_leaves_out_a_layer_is_an_error_on_all_ranks() -> None:
    """Catches operators without headers: a rank would use the statistics of another layer, without an error."""
    for message in run_processes(2, _skip):
        assert "Skipping.first" in message and "Skipping.second" in message and "rank 1" in message, message


def _reuse(rank: int) -> None:
    from bagua_syncbn_algo.comm.transport import channel_of
    from bagua_syncbn_algo.comm.wire import FORWARD, Roster, sync_point
    from bagua_syncbn_algo.ops.operators import LAUNCH, WAIT, Site, add_site

    dist.init_process_group("gloo")
    channel, point = channel_of(None), sync_point("layer")
    channel.join(Roster((("layer", 4),)))
    site = Site(["layer"], lambda device: (channel, point), lambda *rest: None)
    key = add_site("a round", site)
    results = []
    for number in (1.0, 2.0):
        payload = torch.full((4,), number + 10 * rank)
        handle = LAUNCH(payload, [2], [], key, FORWARD)
        payload.fill_(-1)  # the compiler uses the memory for another tensor
        results.append(WAIT(handle, [], 2, 1, 4, key, FORWARD)[1])
    for number, result in zip((1.0, 2.0), results):
        torch.testing.assert_close(result, torch.tensor([[number], [number + 10]]).expand(2, 4))
    dist.destroy_process_group()


@pytest.mark.multirank
def test_messages_and_results_have_memory_of_their_own() -> None:
    """Catches a message that is sent from memory that the compiler reuses, and a result that the next round changes."""
    run_processes(2, _reuse)


def _compared(rank: int) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)

    def converted(model: nn.Module, **options: Any) -> Any:
        torch._dynamo.reset()
        return convert_sync_batchnorm(copy.deepcopy(model).double(), **options)

    def step_of(call: Any) -> Callable[[int], Tensor]:
        return lambda step: call(images(rank, step)).square().mean()

    for coalesce in (True, False):
        base = Twice()
        eager = converted(base, coalesce=coalesce)
        expected = Run(eager, step_of(eager))
        for backend in ("aot_eager", "inductor"):
            model = converted(base, coalesce=coalesce)
            found = Run(model, step_of(torch.compile(model, backend=backend, fullgraph=True)))
            found.compare(expected, f"equal rounds, {backend}, coalesce={coalesce}")

    # Ten blocks of one class: more graphs of one forward than Dynamo's limit of 8.
    deep = models.Inception(4, blocks=10)
    eager = converted(deep)
    expected = Run(eager, step_of(DistributedDataParallel(eager)), steps=2)
    for limit in (8, 32):
        regional = converted(deep)
        with torch._dynamo.config.patch(recompile_limit=limit):
            for block in regional.blocks:
                block.compile(backend="eager")
            found = Run(regional, step_of(DistributedDataParallel(regional)), steps=2)
        found.compare(expected, f"regional, limit {limit}")

    # Small buckets: DistributedDataParallel splits the graph, and levels with it.
    around = converted(deep)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1000  # of a model with less than the usual 1 MiB
    wrapped: Any = torch.compile(DistributedDataParallel(around, bucket_cap_mb=0.001), backend="aot_eager")
    found = Run(around, step_of(wrapped), steps=2)
    found.rounds = expected.rounds
    found.compare(expected, "small buckets")
    dist.destroy_process_group()


def _sizes(rank: int) -> None:
    dist.init_process_group("gloo")

    def step_of(call: Any) -> Callable[[int], Tensor]:
        return lambda step: call(images(rank, step, count=4)[: 3 - step if rank == 1 else None]).square().sum()

    for options in ({}, {"dynamic": True}):
        torch._dynamo.reset()
        torch.manual_seed(0)
        base = Options().double()
        eager, model = convert_sync_batchnorm(copy.deepcopy(base)), convert_sync_batchnorm(copy.deepcopy(base))
        expected = Run(eager, step_of(eager), steps=4)
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True, **options)
        Run(model, step_of(compiled), steps=4).compare(expected, f"3, 2, 1 and 0 images, {options}")
    dist.destroy_process_group()


@pytest.mark.multirank
def test_batches_of_changing_size() -> None:
    """Catches the number of elements of the first batch as a constant of the graph, and ranks that recompile alone."""
    run_processes(2, _sizes, limit=200.0)


@pytest.mark.multirank
def test_equal_rounds_many_blocks_and_small_buckets() -> None:
    """Catches a compiler that merges rounds with equal arguments, and parts whose rounds are not those of the model."""
    run_processes(2, _compared, limit=300.0)


_OLD = """
import os, warnings
import torch
torch.__version__ = torch.torch_version.TorchVersion("2.5.1")
import torch.distributed as dist
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
import bagua_syncbn_algo
from bagua_syncbn_algo import convert_sync_batchnorm
from torch import nn
def build():
    torch.manual_seed(0)
    return convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    eager, model = build(), build()
    x = torch.randn(2, 3, 4, 4)
    expected = eager(x)
    assert not caught, [str(each.message) for each in caught]
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        found = compiled(x)
    torch.testing.assert_close(found, expected)
found = [str(each.message) for each in caught if "torch.compile" in str(each.message)]
assert len(found) == 1, found
print(found[0])
dist.destroy_process_group()
"""


def test_one_warning_before_torch_2_6() -> None:
    """Catches a compiled model of an older version that silently runs eagerly.

    The version is set before the import; Dynamo is the installed one. That is what the package reads of an old version.
    """
    found = subprocess.run([sys.executable, "-c", _OLD], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr[-2000:]
    assert "torch 2.6" in found.stdout and "got 2.5.1" in found.stdout, found.stdout


_IMPORTING = """
import sys
import torch
from torch import nn
from bagua_syncbn_algo import convert_sync_batchnorm, plan_of
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    def forward(self, x):
        import torch._dynamo
        return self.a(x) + self.b(x) if isinstance(x, torch.Tensor) else x
assert "torch._dynamo" not in sys.modules
assert plan_of(convert_sync_batchnorm(Net())).rounds_forward == 1
assert "torch._dynamo" in sys.modules
def function(x):
    return x + 1 if isinstance(x, (torch.Tensor, nn.Parameter)) and isinstance(len(sys.argv), int) else x
torch.compile(function, backend="eager", fullgraph=True)(torch.ones(2))
"""


def test_an_import_of_the_compiler_while_a_forward_is_traced() -> None:
    """Catches a compiler that is imported while ``isinstance`` is replaced: then each call of it breaks a graph."""
    found = subprocess.run([sys.executable, "-c", _IMPORTING], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr[-2000:]
