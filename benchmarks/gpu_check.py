"""Checks on a machine with one GPU: parity, waits, launches, times, graph capture and errors.

``make gpu-check`` prints one table and writes ``benchmarks/results/gpu_check.json``. It runs one rank over NCCL, and
two ranks on one GPU over gloo, because NCCL refuses two ranks on a device, and one rank of a group of 8 whose other
ranks are copies of it, for the host time of a larger group. With ``--device cpu`` the script runs to its end without a
GPU, as a test of itself; the parts that need CUDA are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import models
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormError, convert_sync_batchnorm
from bagua_syncbn_algo.bench.measure import interleave, run_ranks, write
from bagua_syncbn_algo.comm.pending import OnStream
from bagua_syncbn_algo.comm.transport import TorchChannel, channel_of
from bagua_syncbn_algo.comm.wire import Roster, sync_point
from bagua_syncbn_algo.layer import batch_norm_coalesced
from bagua_syncbn_algo.ops import fused

RESULTS = Path(__file__).parent / "results"
CASES: Dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.randn(4, 16, 8, 8),
    "constant channel": lambda: torch.cat([torch.randn(4, 15, 8, 8), torch.full((4, 1, 8, 8), 0.75)], dim=1),
    "one value a channel": lambda: torch.randn(1, 16, 1, 1),
    "large mean": lambda: torch.randn(4, 16, 8, 8) + 100,
    "channels_last": lambda: torch.randn(4, 16, 8, 8).contiguous(memory_format=torch.channels_last),
}
BUFFERS = ("running_mean", "running_var")
# The shapes of ResNet-50's layers at 224².
SHAPES = [(64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7)]


_GROUPS: List[Any] = []


# -- ranks -------------------------------------------------------------------------------------------------------------


def _in_group(rank: int, body: Callable[..., Any], backend: str, arguments: Sequence[Any]) -> List[Any]:
    dist.init_process_group(backend, timeout=timedelta(seconds=300))
    text = json.dumps(body(rank, *arguments)).encode()
    device = "cuda" if backend == "nccl" else "cpu"
    length = torch.tensor([len(text)], device=device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    own = torch.tensor(list(text.ljust(max(map(int, lengths)))), dtype=torch.uint8, device=device)
    texts = [torch.empty_like(own) for _ in lengths]
    dist.all_gather(texts, own)
    return [json.loads(bytes(each.tolist())) for each in texts]


def run_in_group(body: Callable[..., Any], world: int, backend: str, *arguments: Any) -> List[Any]:
    """Returns the results of ``body(rank, *arguments)`` on all ranks of a new group, as JSON keeps them."""
    found: List[Any] = run_ranks(_in_group, body, backend, arguments, ranks=world)
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# -- parity ------------------------------------------------------------------------------------------------------------


def parity_rank(rank: int, device: str, triton: bool) -> Dict[str, float]:
    """Returns the largest error of each case on two ranks, in units of float32's or bfloat16's precision."""
    os.environ["BAGUA_SYNCBN_TRITON"] = str(int(triton))
    errors = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for name, make in CASES.items():
            torch.manual_seed(0)
            shards = [make(), make()]
            for empty in (False, True) if name == "random" else (False,):
                inputs = [shards[0], shards[1][:0] if empty else shards[1]]
                inputs = [each.to(dtype) for each in inputs]
                weights = [torch.randn_like(each) for each in inputs]
                reference = nn.BatchNorm2d(16).double()
                whole = torch.cat(inputs).double().requires_grad_()
                expected = reference(whole)
                expected.backward(torch.cat(weights).double())
                layer = SyncBatchNorm(16).to(device, torch.float64 if dtype == torch.float64 else torch.float32)
                x = inputs[rank].to(device).detach().requires_grad_()
                y = layer(x)
                y.backward(weights[rank].to(device))
                start = len(inputs[0]) * rank
                rows = slice(start, start + len(x))
                # The input gradient is a sum of terms of this size, which cancel if a channel has two values.
                term = torch.cat(weights).abs().max() / (torch.cat(inputs).double().var((0, 2, 3)) + 1e-5).sqrt().min()
                pairs = [(y.detach(), expected[rows].detach(), 1e-3), (x.grad, whole.grad[rows], float(term))]
                pairs += [(getattr(layer, key), getattr(reference, key), 1e-3) for key in BUFFERS]
                unit = torch.finfo(dtype).eps
                error = 0.0
                for actual, wanted, size in pairs:
                    if actual.numel():
                        scale = wanted.abs().max().clamp(min=size)
                        unit_ = unit if actual.dtype == dtype else torch.finfo(torch.float32).eps
                        error = max(error, float(((actual.double().cpu() - wanted).abs().max() / scale) / unit_))
                errors[f"{name}{', empty shard' if empty else ''}, {str(dtype)[6:]}"] = error
    return errors


def check_parity(device: str, triton: bool) -> List[Tuple[str, str, bool]]:
    per_rank = run_in_group(parity_rank, 2, "gloo", device, triton)
    kernel = ", merged by Triton" if triton else ""
    rows = []
    for name in per_rank[0]:
        error = max(each[name] for each in per_rank)
        limit = 1e5 if "large mean" in name else 256.0  # of a mean of 100 deviations, two digits are lost
        rows.append(
            (f"parity with float64, 2 ranks{kernel}: {name}", f"{error:.1f} ulp of the largest value", error < limit)
        )
    return rows


# -- waits, launches, time: one rank -----------------------------------------------------------------------------------


def synchronized_layer(channels: int, device: str) -> SyncBatchNorm:
    """Returns a layer that runs its rounds although there is one rank: it takes the channel of a group of its own."""
    layer = SyncBatchNorm(channels).to(device)
    group = dist.group.WORLD._get_backend(torch.device(device))
    _GROUPS.append(group)  # a channel keeps a weak reference only
    channel = TorchChannel(group)
    channel.use_device(torch.device(device, 0) if device == "cuda" else torch.device(device))
    channel.join(Roster((("layer", channels),)))
    layer.bind(channel, sync_point("layer"))
    return layer


def steps_of(layer: nn.Module, x: Tensor) -> Callable[[], None]:
    grad = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(layer(x), [x, *layer.parameters()], grad)

    return step


def time_rank(rank: int, device: str, batches: Sequence[int]) -> List[Dict[str, Any]]:
    """Returns host and device time of a layer against torch.nn.SyncBatchNorm, medians of interleaved steps."""
    found = []
    for batch in batches:
        for channels, size in SHAPES:
            x = torch.randn(batch, channels, size, size, device=device, requires_grad=True)
            layers = {"ours": synchronized_layer(channels, device), "native": nn.BatchNorm2d(channels).to(device)}
            if device == "cuda":
                layers["torch"] = nn.SyncBatchNorm(channels).to(device)
            steps = {name: steps_of(layer, x) for name, layer in layers.items()}
            for step in steps.values():
                for _ in range(5):
                    step()
            synchronize(device)
            host: Dict[str, List[float]] = {name: [] for name in steps}
            total: Dict[str, List[float]] = {name: [] for name in steps}
            for _ in range(20):
                for name, step in steps.items():
                    start = time.perf_counter()
                    step()
                    host[name].append(time.perf_counter() - start)
                    synchronize(device)
                    total[name].append(time.perf_counter() - start)
            row: Dict[str, Any] = {"batch": batch, "channels": channels, "size": size}
            for name in steps:
                row[name] = {"host": statistics.median(host[name]), "total": statistics.median(total[name])}
            found.append(row)
    return found


class _CopiedRanks(TorchChannel):
    """A channel of 8 ranks that all send this rank's message; a copy on the current stream replaces the all-gather."""

    def _all_gather(self, message: Tensor) -> Any:
        gathered = self._receive_buffer(message)
        gathered.copy_(message.expand_as(gathered))
        return gathered, OnStream(message.device) if message.is_cuda else SimpleNamespace(wait=lambda: None)


def host_times(count: int, device: str) -> Dict[str, float]:
    """Returns the host time of forward and backward of ``count`` independent layers, per layer."""
    inputs = [torch.randn(2, 64, 8, 8, device=device, requires_grad=True) for _ in range(count)]
    grads = [torch.randn_like(x) for x in inputs]
    layers = [SyncBatchNorm(64).to(device) for _ in inputs]
    channel = _CopiedRanks(dist.group.WORLD)
    channel.join(Roster((("layer", 64),), (("round", (64,) * count),)))
    for index, layer in enumerate(layers):
        layer.bind(channel, sync_point(f"layer {index}"))
    leaves = [*inputs, *(parameter for layer in layers for parameter in layer.parameters())]

    def ours(load: Any) -> None:
        fused.load_merge_kernel = load
        torch.autograd.grad(batch_norm_coalesced(layers, inputs, "round" if count > 1 else None), leaves, grads)

    load = fused.load_merge_kernel
    others = {"native": [nn.BatchNorm2d(64).to(device) for _ in inputs]}
    variants: Dict[str, Callable[[], Any]] = {"ours, ATen": lambda: ours(lambda device: None)}
    if device == "cuda":
        others["torch"] = [nn.SyncBatchNorm(64).to(device) for _ in inputs]
        if load(inputs[0].device) is not None:
            variants["ours, Triton"] = lambda: ours(load)
    for name, modules in others.items():
        steps = [steps_of(*each) for each in zip(modules, inputs)]
        variants[name] = lambda steps=steps: [step() for step in steps]
    spreads = interleave(variants, 30, 15, progress=lambda: synchronize(device))
    fused.load_merge_kernel = load
    return {f"{name}, {count} in a round": spread.median / count for name, spread in spreads.items()}


def host_rank(rank: int, device: str) -> Dict[str, float]:
    """Returns the host times of one layer and of four layers in a round, with 8 ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    # The fake group receives nothing: as above, a copy replaces the all-gather of torch.nn.SyncBatchNorm.
    dist.all_gather_into_tensor = lambda out, x, *_, **__: out.view(8, -1).copy_(x.view(1, -1))
    return {**host_times(1, device), **host_times(4, device)}


def waits_rank(rank: int) -> Dict[str, int]:
    """Returns the kernel launches of a steady step; raises where a step or a new image size synchronizes."""
    layer = synchronized_layer(64, "cuda")
    inputs = [torch.randn(4, 64, size, size, device="cuda", requires_grad=True) for size in (32, 40)]
    steps = [steps_of(layer, x) for x in inputs]
    for _ in range(4):
        steps[0]()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for step in (*steps, *steps, *steps):
        step()
    layer._bound_channel().flush()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        steps[0]()
        torch.cuda.synchronize()
    kernels = sum(event.count for event in profile.key_averages() if "Sync" not in event.key)
    return {"launches": kernels}


def capture_rank(rank: int) -> float:
    """Returns the difference between a captured and an eager step of a small model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SyncBatchNorm(8), nn.ReLU(), nn.Conv2d(8, 8, 3)).cuda()
    model[1] = synchronized_layer(8, "cuda")
    x = torch.randn(4, 3, 16, 16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(11):
            model.zero_grad(set_to_none=True)
            model(x).square().mean().backward()
    torch.cuda.synchronize()
    eager = [parameter.grad.clone() for parameter in model.parameters()]
    graph = torch.cuda.CUDAGraph()
    model.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph, stream=stream):
        model(x).square().mean().backward()
    graph.replay()
    torch.cuda.synchronize()
    captured = [parameter.grad for parameter in model.parameters()]
    return max(float((a - b).abs().max()) for a, b in zip(eager, captured))


# -- models and errors -------------------------------------------------------------------------------------------------


def model_rank(rank: int, device: str, name: str) -> Dict[str, float]:
    """Returns step times of one round a layer, coalesced, and overlapped, on two ranks of one device."""
    torch.manual_seed(0)

    def build() -> Any:
        return getattr(models, name)()

    x, labels = torch.randn(2, 3, 64, 64, device=device), torch.randint(10, (2,), device=device)
    variants = {
        "local": build().to(device),
        "a round a layer": convert_sync_batchnorm(build(), coalesce=False).to(device),
        "coalesced": convert_sync_batchnorm(build(), overlap=False).to(device),
        "overlapped": convert_sync_batchnorm(build()).to(device),
    }

    def step(model: nn.Module) -> None:
        model.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), labels).backward()
        synchronize(device)

    spreads = interleave({key: (lambda m=model: step(m)) for key, model in variants.items()}, 6, warmup=3)
    return {key: spread.median for key, spread in spreads.items()}


def errors_rank(rank: int, device: str) -> str:
    """Returns the error of a layer that rank 1 skips once, found at most two steps later."""
    layers = [SyncBatchNorm(4).to(device) for _ in range(3)]
    x = torch.randn(2, 4, 3, 3, device=device)
    try:
        for step in range(6):
            for index, layer in enumerate(layers):
                if not (rank == 1 and step == 2 and index == 1):
                    layer(x)
            if rank == 1 and step == 2:
                layers[2](x)
            channel_of(None).flush()
    except SyncBatchNormError as error:
        return str(error)
    return ""


def nan_rank(rank: int, device: str) -> List[List[bool]]:
    """Returns which channels of output and running mean are finite, if rank 1 has a NaN in channel 2."""
    layer = SyncBatchNorm(4).to(device)
    x = torch.randn(2, 4, 3, 3, device=device)
    x[0, 2, 0, 0] = float("nan") if rank == 1 else 0.0
    output = layer(x)
    return [output.isfinite().all(0).flatten(1).all(1).tolist(), layer.running_mean.isfinite().tolist()]


def check_models(device: str) -> Tuple[List[Tuple[str, str, bool]], Dict[str, Any]]:
    rows, found = [], {}
    for name in ("HighResolution", "ResNet"):
        medians = run_in_group(model_rank, 2, "gloo", device, name)[0]
        found[name] = medians
        text = ", ".join(f"{key} {1000 * value:.1f} ms" for key, value in medians.items())
        rows.append((f"{name}, 2 ranks on one device over gloo", text, True))
    return rows, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16, 64])
    options = parser.parse_args()
    device = options.device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a machine with a GPU and a CUDA build of PyTorch (got none); --device cpu tests this script")
    backend = "nccl" if device == "cuda" else "gloo"
    rows = check_parity(device, triton=False)
    if device == "cuda" and fused.load_merge_kernel(torch.device(device, 0)) is not None:
        rows += check_parity(device, triton=True)
    errors = run_in_group(errors_rank, 2, "gloo", device)
    named = all("expected every rank to be at the same layer" in error for error in errors)
    rows.append(("a skipped layer is named on both ranks", errors[0][:60] or "no error", named))
    finite = run_in_group(nan_rank, 2, "gloo", device)
    as_expected = finite == [[[True, True, False, True]] * 2] * 2
    rows.append(("a NaN reaches its channel on both ranks, and no other", str(finite[0][0]), as_expected))
    host = run_ranks(host_rank, device, ranks=1)
    rows += [(f"host time of a layer, 8 ranks, {name}", f"{1e6 * value:.0f} µs", True) for name, value in host.items()]
    times = run_in_group(time_rank, 1, backend, device, options.batches)[0]
    for row in times:
        of = "torch" if "torch" in row else "native"
        ratios = [row["ours"][kind] / row[of][kind] for kind in ("host", "total")]
        shape = f"{row['batch']}×{row['channels']}×{row['size']}²"
        rows.append((f"time of a layer, {shape}", f"host {ratios[0]:.2f}, total {ratios[1]:.2f} × {of}", True))
    results: Dict[str, Any] = {"times": times, "host": host}
    if device == "cuda":
        launches = run_in_group(waits_rank, 1, backend)[0]
        rows.append(("launches of a step, without any synchronization", str(launches["launches"]), True))
        difference = run_in_group(capture_rank, 1, backend)[0]
        rows.append(("captured against eager step", f"{difference:.1e}", difference < 1e-5))
        results.update(launches=launches, capture=difference)
    model_rows, results["models"] = check_models(device)
    rows += model_rows
    width = max(len(row[0]) for row in rows)
    for what, value, passed in rows:
        print(f"{what.ljust(width)}  {'ok    ' if passed else 'FAILED'}  {value}")
    results["rows"] = rows
    if device == "cuda":
        results["device"] = torch.cuda.get_device_name()
        write(RESULTS / "gpu_check.json", results)
    if not all(passed for _, _, passed in rows):
        sys.exit("expected all checks to pass (got the failures above); see the rows with FAILED")


if __name__ == "__main__":
    main()
