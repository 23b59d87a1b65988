"""Kernel launches and host waits of synchronized BatchNorm on CUDA, counted without a GPU.

Fake tensors have a device, a shape and a dtype, but no values. They run the Python code of a CUDA forward and backward
on a machine without a GPU, and a dispatch mode counts the operators. Each operator counts as one launch, except:

- views and allocations, which launch nothing;
- an index with a boolean mask: five launches and one wait (``nonzero`` runs a reduction, a copy of its result to the
  host and a selection before the gather: ``aten/src/ATen/native/cuda/Nonzero.cu``);
- reading a value on the host, or a copy between host and device that is not asynchronous: one launch and one wait.

Headers of messages are copied to the host once a step, for all of its rounds: they have a row of their own. The script
fails if a count exceeds its limit. It runs in a process of its own: fake tensors remain in caches.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

from bagua_syncbn_algo.ops import fused, merge_kernel

WORLD = 8


class Count(NamedTuple):
    """The launches and waits of one function call."""

    launches: int
    waits: int
    operators: Dict[str, int]


# -- CUDA without CUDA -------------------------------------------------------------------------------------------------

# Indexing a CUDA tensor needs a device guard, which only CUDA builds of PyTorch register.
_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
}
"""


def register_device_guard() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_GUARD)
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        torch_libraries = Path(torch.__file__).parent / "lib"
        compiler = ["g++", "-shared", "-fPIC", "-std=c++20", *includes, str(source), "-o", str(library)]
        subprocess.run([*compiler, f"-L{torch_libraries}", "-lc10"], check=True)
        ctypes.CDLL(str(library))


class _Event:
    """A CUDA event. It has been reached: the host asks only for events of an earlier step. Synchronizing is a wait."""

    waits = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: Optional[Any] = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def wait(self, stream: Optional[Any] = None) -> None:
        pass

    def synchronize(self) -> None:
        _Event.waits += 1


def stub_cuda() -> None:
    """Replaces the functions of torch.cuda that need a driver."""
    register_device_guard()
    torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    torch.cuda.current_device = lambda: 0  # type: ignore[assignment]
    stream = SimpleNamespace(cuda_stream=0)
    torch.cuda.current_stream = lambda device=None: stream  # type: ignore[assignment,misc]
    torch.cuda.is_current_stream_capturing = lambda: False  # type: ignore[assignment]
    torch.tensor = _without_values
    torch.equal = lambda first, second: True  # type: ignore[assignment]  # the headers of all ranks
    Tensor.pin_memory = lambda tensor, device=None: tensor  # type: ignore[assignment,method-assign]
    empty = torch.empty
    torch.empty = lambda *shape, pin_memory=False, **options: empty(*shape, **options)  # type: ignore[assignment]
    torch.cuda.Event = _Event  # type: ignore[misc,assignment]
    Tensor.data_ptr = lambda tensor: 1  # type: ignore[method-assign]
    # The kernels of Triton are no operators, which the dispatch mode would see.
    merge_kernel._run = lambda grid, *arguments: Counter.active.operators.append("triton")


def _without_values(data: Any, dtype: Optional[torch.dtype] = None, device: Any = None) -> Tensor:
    """As torch.tensor. That function keeps the values of a fake tensor, and a copy of them to CUDA needs a driver."""
    array = numpy.asarray(data)
    usual = torch.float32 if array.dtype.kind == "f" else torch.int64
    return torch.empty(array.shape, dtype=usual if dtype is None else dtype, device=device)


def _statistic(input: Tensor) -> Tensor:
    return input.new_empty(input.shape[1], dtype=torch.float64 if input.dtype == torch.float64 else torch.float32)


# The shapes and dtypes that the CUDA kernels return: aten/src/ATen/native/cuda/Normalization.cu.
_META = {
    "batch_norm_stats": lambda x, eps: (_statistic(x), _statistic(x)),
    "batch_norm_update_stats": lambda x, mean, var, momentum: (_statistic(x), _statistic(x)),
    "batch_norm_elemt": lambda x, weight, bias, mean, invstd, eps: torch.empty_like(x),
    "batch_norm_gather_stats_with_counts": lambda x, mean, *rest: (mean.new_empty(mean.shape[1]),) * 2,
    "batch_norm_backward_reduce": lambda grad, x, mean, invstd, weight, *wanted: tuple(
        _statistic(x) if each else None for each in (wanted[0], *wanted)
    ),
    "batch_norm_backward_elemt": lambda grad, x, *rest: torch.empty_like(x),
}


def register_kernels() -> Any:
    library = torch.library.Library("aten", "IMPL", "Meta")
    for name, function in _META.items():
        library.impl(name, function)
    return library


# -- counting ----------------------------------------------------------------------------------------------------------

_FREE = {
    *("alias", "as_strided", "chunk", "detach", "expand", "lift_fresh", "permute", "reshape", "select", "slice"),
    *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "_unsafe_view", "device"),
    *("is_pinned", "sym_size", "sym_numel"),
}


class Counter(TorchDispatchMode):
    """Counts launches and waits of the operators that run on CUDA tensors."""

    active: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.operators: List[str] = []
        self.waits = 0
        Counter.active = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        if name in _FREE or not any(tensor.is_cuda for tensor in tensors):
            return result
        self.operators.append(name)
        if name == "index" and any(each is not None and each.dtype == torch.bool for each in args[1]):
            self.operators += [name] * 4
            self.waits += 1
        elif name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
            self.waits += 1
        elif name in ("_to_copy", "copy_") and len({tensor.device.type for tensor in tensors}) > 1:
            asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            self.waits += not asynchronous
        return result


class Context:
    """What autograd gives to a Function; the engine itself refuses devices that do not exist."""

    def __init__(self, needs: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs)
        self.saved_tensors: Tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    def mark_dirty(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


# -- cases -------------------------------------------------------------------------------------------------------------


def count(function: Any) -> Count:
    waits = _Event.waits
    with Counter() as counter, torch.no_grad():
        function()
    operators = {name: counter.operators.count(name) for name in dict.fromkeys(counter.operators)}
    return Count(len(counter.operators), counter.waits + _Event.waits - waits, operators)


def count_torch(layers: int, size: int) -> Tuple[Count, Count]:
    """Counts torch.nn.SyncBatchNorm."""
    from torch.nn.modules._functions import SyncBatchNorm

    inputs = [torch.empty(2, 16, size, size, device="cuda") for _ in range(layers)]
    vectors = [[torch.empty(16, device="cuda") for _ in range(4)] for _ in range(layers)]
    batches = [torch.empty((), dtype=torch.int64, device="cuda") for _ in range(layers)]
    contexts = [Context([True] * 3) for _ in range(layers)]

    def forward() -> None:
        for context, input, (weight, bias, mean, variance), batch in zip(contexts, inputs, vectors, batches):
            batch.add_(1)
            SyncBatchNorm.forward(context, input, weight, bias, mean, variance, 1e-5, 0.1, dist.group.WORLD, WORLD)

    def backward() -> None:
        for context, input in zip(contexts, inputs):
            SyncBatchNorm.backward(context, torch.empty_like(input))

    return count(forward), count(backward)


def to_cuda(layer: Any) -> Any:
    """Moves a layer to the fake device; ``torch.tensor(0, device="cuda")`` in its constructor would need a driver."""
    for name, parameter in layer.named_parameters():
        layer._parameters[name] = torch.nn.Parameter(torch.empty(parameter.shape, device="cuda"))
    for name, buffer in layer.named_buffers():
        layer._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return layer


class OurCase:
    """Layers of this package that share a round, with the autograd engine replaced by direct calls."""

    def __init__(self, layers: int, momentum: Optional[float] = 0.1, triton: bool = False) -> None:
        from bagua_syncbn_algo import SyncBatchNorm
        from bagua_syncbn_algo.comm.transport import TorchChannel
        from bagua_syncbn_algo.comm.wire import sync_point
        from bagua_syncbn_algo.graph.plan import PlannedRound
        from bagua_syncbn_algo.graph.variant import _LevelCall

        fused.load_merge_kernel = lambda device: merge_kernel.merge if triton else None
        self.layers = [to_cuda(SyncBatchNorm(16, momentum=momentum)) for _ in range(layers)]
        channel = TorchChannel(dist.group.WORLD)
        channel.capacity = 4096
        for index, layer in enumerate(self.layers):
            layer.bind(channel, sync_point(f"layer {index}"))
        self.channel = channel
        names = tuple(f"layer {index}" for index in range(layers))
        self.call = _LevelCall(PlannedRound("", 1, names, (16,) * layers), [])
        self.context: Any = None

    def forward(self, size: int) -> Count:
        from bagua_syncbn_algo.ops import functional

        def apply(call: Any, *tensors: Any) -> Any:
            self.context = Context([True, *(True for _ in tensors)])
            return functional._SyncBatchNorm.forward(self.context, call, *tensors)

        functional._SyncBatchNorm.apply = apply  # type: ignore[method-assign]
        self.end_step()
        inputs = [torch.empty(2, 16, size, size, device="cuda") for _ in self.layers]
        found = count(lambda: self.call(self.layers, inputs, ()))
        self.grads = [torch.empty_like(input) for input in inputs]
        return found

    def end_step(self) -> Count:
        """Counts what a step takes once, for all of its rounds: the copy of their headers to the host."""
        rings = list(self.channel._rings._rings.values())
        return Count(0, 0, {}) if not rings else count(rings[0].rotate)

    def backward(self) -> Count:
        from bagua_syncbn_algo.ops import functional

        needs = self.context.needs_input_grad[1:]
        return count(lambda: functional._BackwardRound(self.context, self.grads, needs).wait(needs))


def count_running_statistics(layers: int) -> Iterator[Tuple[str, Count]]:
    """Counts a step of the running statistics of layers that normalize over fewer ranks than the world."""
    from bagua_syncbn_algo import SyncBatchNorm
    from bagua_syncbn_algo.comm.transport import TorchChannel
    from bagua_syncbn_algo.ops.running_stats import RunningPool, Slot

    norms = [to_cuda(SyncBatchNorm(16)) for _ in range(layers)]
    pool = RunningPool(norms, TorchChannel(dist.group.WORLD))
    for _ in range(2):
        for norm in norms:
            pool.add(Slot.of(norm, torch.float32, torch.device("cuda")), 128)
        found = [("load", count(pool.load)), ("second sum", count(pool.second_reduction)), ("apply", count(pool.apply))]
    yield from found


class Row(NamedTuple):
    """The counts of one pass, and the limits of this package."""

    what: str
    torch: Count
    ours: Count
    limit: Optional[int]


def measure() -> Iterator[Row]:
    cases = ((1, 7, 5, False), (4, 16, 11, False), (1, 5, 5, True), (4, 11, 11, True))
    for layers, forward_limit, backward_limit, triton in cases:
        name = f"{layers} layer{'s in a round' if layers > 1 else ''}{', Triton' if triton else ''}"
        theirs = count_torch(layers, 8)
        case = OurCase(layers, triton=triton)
        for _ in range(3):  # steps: the first one creates buffers and constants
            forward, backward = case.forward(8), case.backward()
        yield Row(f"{name}, forward", theirs[0], forward, forward_limit)
        yield Row(f"{name}, backward", theirs[1], backward, backward_limit)
        new = case.forward(9)
        yield Row(f"{name}, forward of a new image size", theirs[0], new, forward_limit + 1)
        yield Row(f"{name}, backward of a new image size", theirs[1], case.backward(), backward_limit)
    yield Row("once a step: headers", Count(0, 0, {}), case.end_step(), 2)
    yield Row("once a step: flush", Count(0, 0, {}), count(case.channel.flush), 0)
    for what, found in count_running_statistics(4):
        yield Row(f"once a step, normalize_over='rank', 4 layers: {what}", Count(0, 0, {}), found, None)
    exact = OurCase(1, momentum=None)
    for _ in range(3):
        forward, backward = exact.forward(8), exact.backward()
    yield Row("1 layer, momentum=None (exact merge), forward", Count(0, 0, {}), forward, None)
    yield Row("1 layer, momentum=None (exact merge), backward", Count(0, 0, {}), backward, None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--operators", action="store_true", help="print the counted operators, too")
    options = parser.parse_args()
    stub_cuda()
    library = register_kernels()
    table = Table("", "torch.nn.SyncBatchNorm: launches, waits", "this package: launches, waits", "limit")
    failures, results = [], []
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):
        dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
        for row in measure():
            results.append(row)
            theirs = f"{row.torch.launches}, {row.torch.waits}" if row.torch.launches else ""
            limit = "" if row.limit is None else f"{row.limit}, 0"
            table.add_row(row.what, theirs, f"{row.ours.launches}, {row.ours.waits}", limit)
            if options.operators:
                print(row.what, row.ours.operators)
            if row.ours.waits or (row.limit is not None and row.ours.launches > row.limit):
                failures.append(f"{row.what}: {row.ours.launches} launches and {row.ours.waits} waits")
        dist.destroy_process_group()
    del library
    Console(width=120).print(table)
    if failures:
        sys.exit(
            f"expected at most the limit of launches, and no wait of the host (got {'; '.join(failures)}); run with "
            "--operators to see them"
        )


if __name__ == "__main__":
    main()
