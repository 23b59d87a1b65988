"""Tests of local moments, merge, normalization and gradients, with CPU kernels and stand-ins for CUDA kernels."""

from __future__ import annotations

from typing import Any, Tuple

import cuda_kernels
import pytest
import torch
from cuda_kernels import HAS_TRITON
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormError
from bagua_syncbn_algo.comm.local import SINGLE_PROCESS
from bagua_syncbn_algo.comm.wire import sync_point
from bagua_syncbn_algo.layer import batch_norm_coalesced
from bagua_syncbn_algo.ops import moments
from bagua_syncbn_algo.ops.functional import Member, sync_batch_norm
from bagua_syncbn_algo.ops.fused import Buffers, FusedStatistics

LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [0.0, 1.0, 1e2, 1e4])
def test_local_moments_keep_their_digits(layout: torch.memory_format, ratio: float) -> None:
    """Catches cancellation, even where the mean is 10⁴ standard deviations.

    Channels-first moments are accurate to float32 rounding. ATen's channels-last kernel, which nn.BatchNorm2d uses too,
    sums in float32. Its mean has a relative error up to 1e-6. The relative error of its variance is the square of the
    mean's error in units of σ.
    """
    x = (torch.randn(8, 5, 13, 11) + ratio).contiguous(memory_format=layout)
    local = moments.local_moments(x)
    exact_mean, exact = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
    assert local.elements == 8 * 13 * 11
    assert ((local.mean - exact_mean).abs() / (exact_mean.abs() + 1)).max() < 1e-6
    tolerance = 1e-6 if layout == torch.contiguous_format or ratio < 1e4 else 1e-4
    assert ((local.variance - exact) / exact).abs().max() < tolerance


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_channels_have_no_negative_variance(layout: torch.memory_format) -> None:
    """Catches a Σc² − (Σc)²/n that is negative by rounding: rsqrt would return NaN for eps = 0."""
    x = torch.full((4, 3, 5, 5), 0.1).contiguous(memory_format=layout)
    assert (moments.local_moments(x).variance >= 0).all()
    assert moments.local_moments(x).variance.max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=5).filter(lambda c: sum(c) >= 2),
    mean=st.floats(-1e3, 1e3),
    seed=st.integers(0, 99),
)
def test_merge_is_that_of_the_concatenation(counts: list[int], mean: float, seed: int) -> None:
    """Catches a mean of means, a missing term n_r(m_r − M)² and errors for empty ranks; 1e-12 is float64 rounding."""
    generator = torch.Generator().manual_seed(seed)
    shards = [
        torch.randn(n, 2, generator=generator, dtype=torch.float64) + mean * (i + 1) for i, n in enumerate(counts)
    ]
    zero = torch.zeros(2, dtype=torch.float64)
    means = torch.stack([shard.mean(0) if len(shard) else zero for shard in shards])
    variances = torch.stack([shard.var(0, unbiased=False) if len(shard) else zero for shard in shards])
    merged = moments.merge_moments(torch.tensor([[n] for n in counts]), torch.cat([means, variances], dim=1), (2,))
    whole = torch.cat(shards)
    assert int(merged.weights.elements) == len(whole)
    torch.testing.assert_close(merged.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.variance, whole.var(0, unbiased=False), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(merged.unbiased_variance(), whole.var(0), rtol=1e-9, atol=1e-12)


def test_merge_keeps_large_counts_exact() -> None:
    """Catches counts in float32: 2²⁴ + 1 elements on one rank and 1 on another have variance n₁n₂/N²."""
    counts = torch.tensor([[2**24 + 1], [1]])
    merged = moments.merge_moments(counts, torch.tensor([[0.0, 0.0], [1.0, 0.0]]), (1,))
    total = 2**24 + 2
    assert int(merged.weights.elements) == total
    assert merged.mean.item() == pytest.approx(1 / total, rel=1e-6)
    assert merged.variance.item() == pytest.approx((total - 1) / total**2, rel=1e-6)


def test_statistics_dtypes() -> None:
    """Catches statistics in half precision, and float64 input that is rounded to float32."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert moments.statistics_dtype(dtype) == torch.float32
    assert moments.statistics_dtype(torch.float64) == torch.float64


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("kind", ["random", "a constant channel", "one value a channel"])
@pytest.mark.parametrize(("fuse", "triton"), [(False, False), (True, False), *[(True, True)] * HAS_TRITON])
def test_cuda_kernels_are_called_as_they_want(
    monkeypatch: pytest.MonkeyPatch, affine: bool, kind: str, fuse: bool, triton: bool
) -> None:
    """Catches sums taken for means, a variance for invstd, or a wrong argument order on CUDA.

    Also catches an infinite variance of a constant channel, as of a dead ReLU or of the pooled features of one image.
    """
    x = torch.randn(4, 3, 5, 2, dtype=torch.float64)
    if kind == "a constant channel":
        x[:, 1] = 0.75
    elif kind == "one value a channel":
        x = x[:1, :, :1, :1]
        local = moments.local_moments(x.contiguous(memory_format=torch.channels_last))
        cuda_kernels.install(monkeypatch, fuse, triton)
        found = moments.local_moments(x)
        assert torch.equal(found.mean, x.flatten()) and torch.equal(found.variance, torch.zeros(3).double())
        assert torch.equal(local.variance, found.variance)
        return
    dy = torch.randn_like(x)
    weight, bias = (torch.rand(3).double(), torch.rand(3).double()) if affine else (None, None)

    def run() -> Any:
        leaves = [t.clone().requires_grad_() if t is not None else None for t in (x, weight, bias)]
        running = [torch.zeros(3), torch.ones(3)] if triton else [torch.zeros(3).double(), torch.ones(3).double()]
        (y,) = sync_batch_norm(
            [Member(*leaves, 1e-5, "test")],
            SINGLE_PROCESS,
            sync_point("test"),
            buffers=[Buffers(*running, torch.tensor(0), 0.1)],
        )
        statistics = y.grad_fn.call.statistics
        if not isinstance(statistics, FusedStatistics):
            merged = statistics.merged
            running[0].lerp_(merged.mean.to(running[0].dtype), 0.1)
            running[1].lerp_(merged.unbiased_variance().to(running[0].dtype), 0.1)
        y.backward(dy)
        running = [each.double() for each in running]
        return running, y.detach(), statistics.layers[0].invstd, [leaf.grad for leaf in leaves if leaf is not None]

    expected = run()
    cuda_kernels.install(monkeypatch, fuse, triton)
    found = run()
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-12, atol=1e-12)
    rounding = 1e-6 if triton else 1e-12  # of float32 running statistics
    torch.testing.assert_close(found[0], expected[0], rtol=rounding, atol=rounding)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 3, 2, 2), (2, 2, 2, 1, 2)])
def test_gradcheck(shape: Any, affine: bool) -> None:
    """Catches a wrong term in the gradient of the input, weight or bias."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    affines = [torch.rand(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else []

    def f(x: Tensor, *affine: Tensor) -> Tensor:
        weight, bias = affine or (None, None)
        return sync_batch_norm([Member(x, weight, bias, 1e-3, "test")], SINGLE_PROCESS, sync_point("test"))[0]

    assert torch.autograd.gradcheck(f, (x, *affines))


@pytest.mark.parametrize(("shape", "affine"), [((5, 3), True), ((2, 3, 2, 2), True), ((4, 2, 2), False)])
def test_second_derivatives(shape: Any, affine: bool) -> None:
    """Catches a wrong or missing term in the derivative of backward, such as one through the statistics."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    affines = [torch.rand(shape[1], dtype=torch.float64, requires_grad=True) for _ in range(2)] if affine else []

    def f(x: Tensor, *affine: Tensor) -> Tensor:
        weight, bias = affine or (None, None)
        return sync_batch_norm([Member(x, weight, bias, 1e-3, "test")], SINGLE_PROCESS, sync_point("test"))[0]

    assert torch.autograd.gradgradcheck(f, (x, *affines))
    assert torch.autograd.gradgradcheck(
        lambda x, *affine: f(x.transpose(0, -1).contiguous().transpose(0, -1), *affine), (x, *affines)
    )


def test_third_derivatives_are_refused() -> None:
    """Catches a third derivative that silently omits the terms through the statistics."""
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (y,) = sync_batch_norm([Member(x, None, None, 1e-3, "test")], SINGLE_PROCESS, sync_point("Net.bn1"))
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"at most second derivatives through Net\.bn1 .*create_graph"):
        torch.autograd.grad(gradient.square().sum(), x, create_graph=True)


def test_a_bias_without_a_weight_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a request for the bias gradient from a kernel that takes its dtype from the weight."""
    x, bias = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.zeros(3).double().requires_grad_()

    def gradients() -> Any:
        (y,) = sync_batch_norm(
            [Member(x, None, bias, 1e-5, "test")], SINGLE_PROCESS, sync_point("test"), buffers=[None]
        )
        return torch.autograd.grad(y.pow(3).sum(), [x, bias])

    expected = gradients()
    cuda_kernels.install(monkeypatch, fuse=True)
    torch.testing.assert_close(gradients(), expected)


@pytest.mark.multirank
def test_ranks_with_different_kernels_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches variances that another rank reads as inverse standard deviations: both messages have one length."""
    cuda_kernels.install(monkeypatch, fuse=True)

    def body(rank: int, group: Any) -> None:
        layer = SyncBatchNorm(3, momentum=0.1 if rank == 0 else None, process_group=group)
        with pytest.raises(SyncBatchNormError, match=r"of one kind at .*\(got fused on rank 0, exact on rank 1\)"):
            layer(torch.randn(4, 3))

    run_threads(2, body)


@pytest.mark.multirank
@pytest.mark.parametrize("features", [(3,), (3, 5)])
@pytest.mark.parametrize("samples", [(0, 4, 3), (4, 0, 2)])
def test_the_fused_merge_skips_empty_shards(
    monkeypatch: pytest.MonkeyPatch, features: Tuple[int, ...], samples: Tuple[int, ...]
) -> None:
    """Catches NaN from a merge whose first count is 0, and layers of a round that read each other's statistics."""
    cuda_kernels.install(monkeypatch, fuse=True)
    inputs = [[torch.randn(n, c, dtype=torch.float64) for n in samples] for c in features]

    def body(rank: int, group: Any) -> Any:
        layers = [SyncBatchNorm(c, process_group=group).double() for c in features]
        outputs = batch_norm_coalesced(layers, [x[rank] for x in inputs], "round" if len(layers) > 1 else None)
        return outputs, [layer.running_var for layer in layers]

    for rank, (outputs, variances) in enumerate(run_threads(len(samples), body)):
        for x, output, variance in zip(inputs, outputs, variances):
            reference = nn.BatchNorm1d(x[0].shape[1]).double()
            start = sum(samples[:rank])
            expected = reference(torch.cat(x))[start : start + samples[rank]]
            torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(variance, reference.running_var, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("features", "kept"), [(2048, 1), (2049, 0)])
def test_weights_of_wide_rounds_are_not_kept(features: int, kept: int) -> None:
    """Catches a cache whose size is that of all ranks' channels, for each of 1,024 batch sizes."""
    moments._cached_weights.cache_clear()
    counts = torch.tensor([[3], [5]])
    weights = moments.weights_of(counts, (features,))
    assert moments._cached_weights.cache_info().currsize == kept
    assert weights.shares.flatten().tolist() == [3 / 8, 5 / 8] and float(weights.elements) == 8
