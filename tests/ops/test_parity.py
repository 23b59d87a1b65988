"""Tests of SyncBatchNorm on several ranks against ``torch.nn.BatchNorm`` on the concatenated batch."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import cuda_kernels
import pytest
import torch
from cuda_kernels import HAS_TRITON
from ranks import run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNorm
from bagua_syncbn_algo.ops import moments

WORLDS = [1, 2, 3, 4]


class Case(NamedTuple):
    """One comparison: the shapes, the layout, the steps and the options of the layer."""

    features: int = 3
    inner: Tuple[int, ...] = (2, 2)
    samples: Optional[Sequence[int]] = None  # per rank; by default 2 each
    layout: Callable[[Tensor], Tensor] = lambda x: x
    steps: int = 1
    options: Mapping[str, Any] = MappingProxyType({})


def non_contiguous(x: Tensor) -> Tensor:
    return torch.stack([x, x], dim=-1)[..., 0]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(1, -1).contiguous().transpose(1, -1)


CASES: Dict[str, Case] = {
    # 8 to 32 values per channel: N/(N−1) differs from 1 by at least 3 %, so a biased running variance fails
    "4d": Case(),
    "2d": Case(inner=()),
    "3d": Case(inner=(5,)),
    "5d": Case(inner=(2, 3, 2)),
    "channels_last": Case(inner=(3, 2), layout=lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": Case(inner=(2, 3, 2), layout=lambda x: x.contiguous(memory_format=torch.channels_last_3d)),
    "non_contiguous": Case(layout=non_contiguous),
    "transposed_3d": Case(inner=(5,), layout=transposed),
    "one_channel": Case(features=1),
    "uneven": Case(samples=[1, 4, 2, 3]),
    "first_empty": Case(samples=[0, 3, 2, 1]),
    "last_empty": Case(samples=[2, 1, 3, 0]),
    "one_sample_each_2d": Case(inner=(), samples=[1, 1, 1, 1]),
    "momentum_none": Case(steps=3, options={"momentum": None}),
    "momentum_half": Case(steps=3, options={"momentum": 0.5}),
    "momentum_zero": Case(steps=2, options={"momentum": 0.0}),
    "no_affine": Case(options={"affine": False}),
    "no_running": Case(options={"track_running_stats": False}),
    "eps": Case(options={"eps": 0.1}),
}


class Result(NamedTuple):
    outputs: List[Tensor]
    input_gradients: List[Tensor]
    weight_gradient: Optional[Tensor]
    bias_gradient: Optional[Tensor]
    running_mean: Optional[Tensor]
    running_var: Optional[Tensor]
    batches: Optional[Tensor]


def reference_layer(case: Case, dtype: torch.dtype) -> Any:
    kind = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[len(case.inner)]
    layer = kind(case.features, **case.options)
    prepare(layer)
    return layer.to(dtype)


def prepare(layer: Any) -> None:
    """Sets parameters and buffers to values that differ between channels, and are the same for layers of one size."""
    with torch.no_grad():
        if layer.weight is not None:
            layer.weight.copy_(torch.linspace(0.5, 1.5, layer.num_features))
            layer.bias.copy_(torch.linspace(-0.3, 0.4, layer.num_features))
        if layer.running_mean is not None:
            layer.running_mean.copy_(torch.linspace(-1, 1, layer.num_features))
            layer.running_var.copy_(torch.linspace(1, 2, layer.num_features))


def draw(case: Case, world: int, mean: float = 0.7) -> Tuple[List[List[Tensor]], List[List[Tensor]]]:
    """Returns inputs and output gradients as ``[step][rank]``, in float64 but exact in float32."""
    samples = list(case.samples or [2, 2, 2, 2])[:world]
    if sum(samples) * max(1, int(torch.tensor(case.inner).prod()) if case.inner else 1) < 2:
        samples[0] += 2
    generator = torch.Generator().manual_seed(world)

    def tensors(shift: float) -> List[Tensor]:
        return [
            (torch.randn(n, case.features, *case.inner, generator=generator) * (1 + 0.3 * r) + shift * (1 + r)).double()
            for r, n in enumerate(samples)
        ]

    return [tensors(mean) for _ in range(case.steps)], [tensors(0.1) for _ in range(case.steps)]


def reference(case: Case, inputs: Any, gradients: Any, dtype: torch.dtype) -> Result:
    layer = reference_layer(case, dtype)
    for step_inputs, step_gradients in zip(inputs, gradients):
        layer.zero_grad()
        x = torch.cat(step_inputs).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.cat(step_gradients).to(dtype))
    sizes = [len(part) for part in inputs[-1]]
    return Result(
        list(y.detach().split(sizes)),
        list(x.grad.split(sizes)),
        None if layer.weight is None else layer.weight.grad,
        None if layer.bias is None else layer.bias.grad,
        layer.running_mean,
        layer.running_var,
        layer.num_batches_tracked,
    )


def synchronized(case: Case, world: int, inputs: Any, gradients: Any, dtype: torch.dtype) -> Result:
    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(case.features, process_group=group, **case.options)
        prepare(layer)
        layer = layer.to(dtype)
        for step_inputs, step_gradients in zip(inputs, gradients):
            layer.zero_grad()
            leaf = step_inputs[rank].to(dtype).requires_grad_()
            x = case.layout(leaf)
            y = layer(x)
            if x.is_contiguous(memory_format=torch.channels_last) and x.dim() == 4 and x.numel():
                assert y.is_contiguous(memory_format=torch.channels_last)
            y.backward(step_gradients[rank].to(dtype))
        return y.detach(), leaf.grad, layer

    ranks = run_threads(world, body)
    layers = [layer for _, _, layer in ranks]
    for layer in layers[1:]:
        for mine, first in zip(layer.buffers(), layers[0].buffers()):
            assert torch.equal(mine, first), "expected bitwise equal buffers on every rank"

    def total(name: str) -> Optional[Tensor]:
        if getattr(layers[0], name) is None:
            return None
        return torch.stack([getattr(layer, name).grad for layer in layers]).sum(0)

    first = layers[0]
    return Result(
        [y for y, _, _ in ranks],
        [g for _, g, _ in ranks],
        total("weight"),
        total("bias"),
        first.running_mean,
        first.running_var,
        first.num_batches_tracked,
    )


def flat(result: Result) -> Dict[str, Tensor]:
    """Returns the tensors of a result by name, in float64, those of all ranks concatenated."""
    parts: Dict[str, Any] = result._asdict()
    parts["outputs"], parts["input_gradients"] = torch.cat(result.outputs), torch.cat(result.input_gradients)
    return {name: part.double() for name, part in parts.items() if part is not None}


@pytest.fixture(params=["small inputs", "large inputs", "fused kernels", *["Triton kernel"] * HAS_TRITON], autouse=True)
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs every test on each kind of arithmetic: two forms on the CPU, and two on the CUDA kernels' stand-ins."""
    kind: str = request.param
    if kind in ("fused kernels", "Triton kernel"):
        cuda_kernels.install(monkeypatch, fuse=True, triton=kind == "Triton kernel")
    else:
        monkeypatch.setattr(moments, "SMALL", 0 if kind == "large inputs" else 2**40)
    return kind


@pytest.mark.multirank
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_float64_equals_batch_norm_on_the_whole_batch(name: str, world: int) -> None:
    """Catches a wrong N, a biased running variance, a mean of per-rank means; 1e-12 is rounding in float64."""
    case = CASES[name]
    inputs, gradients = draw(case, world)
    expected = flat(reference(case, inputs, gradients, torch.float64))
    actual = flat(synchronized(case, world, inputs, gradients, torch.float64))
    assert actual.keys() == expected.keys()
    for part, value in expected.items():
        error = (actual[part] - value).abs().max()
        assert error <= 1e-12 * value.abs().max(), f"{part} is off by {error}"


@pytest.mark.multirank
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_float32_is_as_accurate_as_batch_norm(name: str, world: int) -> None:
    """Catches lost digits: allows 4 times the error of the float32 reference, or 4 ulp of the largest value."""
    case = CASES[name]
    inputs, gradients = draw(case, world)
    exact = flat(reference(case, inputs, gradients, torch.float64))
    native = flat(reference(case, inputs, gradients, torch.float32))
    actual = flat(synchronized(case, world, inputs, gradients, torch.float32))
    for part, value in exact.items():
        ulp = torch.finfo(torch.float32).eps * value.abs().max()
        allowed = max(4 * (native[part] - value).abs().max(), 4 * ulp)
        error = (actual[part] - value).abs().max()
        assert error <= allowed, f"{part} is off by {error}, allowed {allowed}"


@pytest.mark.multirank
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_variance_survives_a_large_mean(world: int, layout: torch.memory_format) -> None:
    """Catches E[x²] − E[x]² and Σ x(x − m), which lose all digits of the variance at a mean of 10⁴ σ in float32."""
    x = (torch.randn(4 * world, 3, 8, 8, dtype=torch.float64) + 1e4).float()  # rounded to float32 first
    exact = x.double().var((0, 2, 3))

    def body(rank: int, group: Any) -> Tensor:
        layer = SyncBatchNorm(3, momentum=1.0, process_group=group)
        layer(x[4 * rank : 4 * rank + 4].contiguous(memory_format=layout))
        assert layer.running_var is not None
        return layer.running_var

    single_rank = [sync_single(x.contiguous(memory_format=layout))]
    variances = single_rank if world == 1 else run_threads(world, body)
    for variance in variances:
        assert ((variance - exact) / exact).abs().max() < 1e-3


def sync_single(x: Tensor) -> Tensor:
    """Returns the variance from the package's own arithmetic on one rank, where the layer would use a native kernel."""
    from bagua_syncbn_algo.comm.local import SINGLE_PROCESS
    from bagua_syncbn_algo.comm.wire import sync_point
    from bagua_syncbn_algo.ops.functional import Member, sync_batch_norm

    found = []
    sync_batch_norm(
        [Member(x, None, None, 1e-5, "test")],
        SINGLE_PROCESS,
        sync_point("test"),
        update=lambda local, statistics: found.append(statistics.merged.unbiased_variance()),
    )
    return found[0]


@pytest.mark.multirank
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("params", ["float32", "same"])
def test_half_precision_input_keeps_float32_statistics(dtype: torch.dtype, params: str) -> None:
    """Catches statistics in the input's dtype instead of float32; the output may differ by its own rounding."""
    x = torch.randn(6, 3, 4, 4).to(dtype)
    dy = torch.randn(6, 3, 4, 4).to(dtype)
    case = Case()

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, process_group=group)
        prepare(layer)
        if params == "same":
            layer = layer.to(dtype)
        leaf = x[3 * rank : 3 * rank + 3].clone().requires_grad_()
        y = layer(leaf)
        assert y.dtype == dtype
        y.backward(dy[3 * rank : 3 * rank + 3])
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        return y.detach(), leaf.grad, layer

    (y0, g0, layer), (y1, g1, _) = run_threads(2, body)
    expected = reference(case, [[x[:3].double(), x[3:].double()]], [[dy[:3].double(), dy[3:].double()]], torch.float64)
    eps = torch.finfo(dtype).eps
    weight_eps = eps if params == "same" else torch.finfo(torch.float32).eps
    for actual, value in ((torch.cat([y0, y1]), expected.outputs), (torch.cat([g0, g1]), expected.input_gradients)):
        whole = torch.cat(value)
        assert (actual.double() - whole).abs().max() <= 4 * eps * whole.abs().max()
    assert layer.weight.dtype == layer.running_var.dtype == (dtype if params == "same" else torch.float32)
    assert expected.running_var is not None
    assert (layer.running_var.double() - expected.running_var).abs().max() <= 4 * weight_eps * 4


@pytest.mark.multirank
def test_two_forwards_before_backward() -> None:
    """Catches state stored on the layer instead of the graph: the second forward would overwrite it."""
    a, b = torch.randn(2, 2, 3, 2, 2, dtype=torch.float64), torch.randn(2, 2, 3, 2, 2, dtype=torch.float64)

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, process_group=group).double()
        xa, xb = a[rank].clone().requires_grad_(), b[rank].clone().requires_grad_()
        (layer(xa).square().mul(torch.arange(4.0).view(2, 2)).sum() + layer(xb).pow(3).sum()).backward()
        return xa.grad, xb.grad, layer.running_mean

    results = run_threads(2, body)
    layer = nn.BatchNorm2d(3).double()
    xa, xb = a.flatten(0, 1).clone().requires_grad_(), b.flatten(0, 1).clone().requires_grad_()
    (layer(xa).square().mul(torch.arange(4.0).view(2, 2)).sum() + layer(xb).pow(3).sum()).backward()
    torch.testing.assert_close(torch.cat([r[0] for r in results]), xa.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in results]), xb.grad, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(results[0][2], layer.running_mean, rtol=1e-12, atol=0)


@pytest.mark.multirank
def test_gradient_accumulation_and_input_without_gradient() -> None:
    """Catches gradients that are set instead of added, and a backward round for an input that requires no gradient."""
    x = torch.randn(2, 2, 3, 2, 2)

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, process_group=group)
        layer(x[rank]).pow(3).sum().backward()
        once = layer.weight.grad.clone()
        rounds_once = layer._channel.rounds  # type: ignore[union-attr]
        layer(x[rank]).pow(3).sum().backward()
        return once, layer.weight.grad, rounds_once, layer._channel.rounds  # type: ignore[union-attr]

    for once, twice, rounds_once, rounds_twice in run_threads(2, body):
        torch.testing.assert_close(twice, 2 * once)
        assert (rounds_once, rounds_twice) == (1, 2)


@pytest.mark.multirank
def test_autocast_keeps_statistics_out_of_bfloat16() -> None:
    """Catches an operation in the merge that autocast runs in bfloat16 (3 digits)."""
    x = torch.randn(2, 4, 3, 5, 5)

    def body(rank: int, group: Any, enabled: bool) -> Any:
        layer = SyncBatchNorm(3, momentum=1.0, process_group=group)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = layer(x[rank])
        return y, layer.running_mean, layer.running_var

    for plain, cast in zip(run_threads(2, body, False), run_threads(2, body, True)):
        for expected, actual in zip(plain, cast):
            assert torch.equal(expected, actual)


@pytest.mark.multirank
def test_empty_batch_shapes_survive() -> None:
    """Catches an empty shard that is passed to a native kernel: some kernels end the process with SIGFPE."""
    shards = [torch.randn(0, 3, 2, 2), torch.randn(3, 3, 2, 2)]

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, process_group=group)
        x = shards[rank].clone().requires_grad_()
        y = layer(x)
        y.sum().backward()
        return y.shape, x.grad, layer.weight.grad

    (shape, gradient, weight_gradient), _ = run_threads(2, body)
    assert shape == (0, 3, 2, 2) and gradient.shape == (0, 3, 2, 2)
    assert torch.equal(weight_gradient, torch.zeros(3))
