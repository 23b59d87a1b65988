"""Tests of the Triton kernel, in Triton's interpreter on CPU tensors, against ATen operators."""

from __future__ import annotations

import sys
from typing import Any, List, Optional, Tuple

import cuda_kernels
import pytest
import torch
from ranks import run_threads
from torch import Tensor, nn

from bagua_syncbn_algo import SyncBatchNorm, SyncBatchNormError
from bagua_syncbn_algo.layer import batch_norm_coalesced
from bagua_syncbn_algo.ops import fused
from bagua_syncbn_algo.ops.fused import Buffers
from bagua_syncbn_algo.ops.moments import merge_moments

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
merge_kernel = pytest.importorskip("bagua_syncbn_algo.ops.merge_kernel")

CPU = torch.device("cpu")


def buffers_of(features: int) -> Buffers:
    return Buffers(torch.linspace(-1, 1, features), torch.linspace(1, 2, features), torch.tensor(7), 0.3)


@pytest.mark.parametrize("features", [(1,), (3, 5), (128, 1, 300)])
@pytest.mark.parametrize("counts", [[[4], [6]], [[0], [5], [9]], [[3], [0]], [[0], [0], [2]], [[2**28]] * 4])
def test_one_launch_merges_all_layers(features: Tuple[int, ...], counts: List[List[int]]) -> None:
    """Catches channels of another layer or block, an empty shard with weight, and an overflow of int32."""
    ranks, channels = len(counts), sum(features)
    counts_of = torch.tensor(counts) * torch.arange(1, len(features) + 1)
    means, variances = torch.randn(ranks, channels), torch.rand(ranks, channels)
    variances[:, 0] = 1e-30  # smaller than eps
    variances[counts_of[:, 0] == 0] = 0
    eps = [10.0 ** -(3 + index) for index in range(len(features))]
    buffers: List[Optional[Buffers]] = [buffers_of(each) for each in features]
    if len(features) > 1:
        buffers[1] = None
    # As views of received messages, whose rows are longer than the statistics.
    received = torch.cat([torch.zeros(ranks, 4), means, variances, torch.zeros(ranks, 3)], dim=1)
    moments = received[:, 4:-3]
    mean, invstd, per_layer = merge_kernel.merge(counts_of, moments, features, eps, buffers)
    expected = merge_moments(counts_of, moments.double(), features)
    eps_of = torch.repeat_interleave(torch.tensor(eps, dtype=torch.float64), torch.tensor(features))
    torch.testing.assert_close(mean, expected.mean.float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(invstd, (expected.variance + eps_of).rsqrt().float(), rtol=1e-6, atol=0)
    assert per_layer.dtype == torch.int32 and torch.equal(per_layer.long(), counts_of.t())
    unbiased = expected.unbiased_variance()
    starts = [sum(features[:index]) for index in range(len(features))]
    for start, size, running in zip(starts, features, buffers):
        if running is not None:
            before, part = buffers_of(size), slice(start, start + size)
            torch.testing.assert_close(running.mean.double(), before.mean.double().lerp(expected.mean[part], 0.3))
            torch.testing.assert_close(running.variance.double(), before.variance.double().lerp(unbiased[part], 0.3))
            assert running.counter == 8


def test_the_merge_has_the_order_of_the_ranks() -> None:
    """Catches a sum in another order, with which ranks whose launches differ would compute other bits."""
    counts, variances = torch.ones(3, 1, dtype=torch.int64), torch.zeros(3, 1)
    for rows, wanted in (([2.0**60, 1.0, -(2.0**60)], 0.0), ([2.0**60, -(2.0**60), 1.0], 1 / 3)):
        moments = torch.cat([torch.tensor(rows).view(3, 1), variances], dim=1)
        mean, _, _ = merge_kernel.merge(counts, moments, (1,), [1e-5], [None])
        assert mean.double().item() == pytest.approx(wanted)


@pytest.mark.multirank
@pytest.mark.parametrize("samples", [(0, 4, 3), (4, 0, 2), (1, 1, 1)])
def test_layers_of_a_round(monkeypatch: pytest.MonkeyPatch, samples: Tuple[int, ...]) -> None:
    """Catches wrong gradients or running statistics of layers that share a launch, and a batch that counts twice."""
    cuda_kernels.install(monkeypatch, fuse=True, triton=True)
    features = (3, 5)
    inputs = [[torch.randn(n, c) for n in samples] for c in features]

    def body(rank: int, group: Any) -> Any:
        layers = [SyncBatchNorm(c, process_group=group) for c in features]
        leaves = [x[rank].clone().requires_grad_() for x in inputs]
        outputs = batch_norm_coalesced(layers, leaves, "round")
        sum(output.pow(3).sum() for output in outputs).backward()
        return leaves, outputs, layers

    results = run_threads(len(samples), body)
    for index, c in enumerate(features):
        reference = nn.BatchNorm1d(c)
        whole = torch.cat(inputs[index]).requires_grad_()
        expected = reference(whole)
        expected.pow(3).sum().backward()
        assert whole.grad is not None
        found: List[Tensor] = [torch.cat([rank[part][index] for rank in results]) for part in (0, 1)]
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)
        gradients = torch.cat([leaves[index].grad for leaves, _, _ in results])
        torch.testing.assert_close(gradients, whole.grad, rtol=1e-3, atol=1e-4)
        for _, _, layers in results:
            torch.testing.assert_close(layers[index].running_var, reference.running_var)
            assert layers[index].num_batches_tracked == 1


@pytest.mark.multirank
def test_a_layer_that_occurs_twice_is_updated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two programs of one launch that write the same running statistics."""
    cuda_kernels.install(monkeypatch, fuse=True, triton=True)
    inputs = torch.randn(2, 2, 4, 3)

    def body(rank: int, group: Any) -> Any:
        layer = SyncBatchNorm(3, process_group=group)
        batch_norm_coalesced([layer, layer], list(inputs[rank]), "round")
        return layer

    reference = nn.BatchNorm1d(3)
    for each in range(2):
        reference(inputs[:, each].flatten(0, 1))
    for layer in run_threads(2, body):
        assert layer.num_batches_tracked == 2
        torch.testing.assert_close(layer.running_var, reference.running_var)


@pytest.mark.multirank
@pytest.mark.parametrize("other", ["another layer", "another kind"])
def test_a_foreign_header_is_an_error(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """Catches statistics of another layer, or without variances, that the kernel would merge silently."""
    cuda_kernels.install(monkeypatch, fuse=True, triton=True)

    def body(rank: int, group: Any) -> None:
        kind = other == "another kind" and rank == 1
        layers = [SyncBatchNorm(3, momentum=None if kind else 0.1, process_group=group) for _ in range(2)]
        for layer in layers:
            layer._bound_channel()
        wanted = (
            "at the same layer" if other == "another layer" else r"\(got fused by Triton on rank 0, exact on rank 1\)"
        )
        with pytest.raises(SyncBatchNormError, match=wanted):
            layers[rank if other == "another layer" else 0](torch.randn(4, 3))

    run_threads(2, body)


def test_the_kernel_is_checked_before_its_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a compiler that does not work, or works wrongly, and ends the training although ATen's kernels do."""
    load = fused.load_merge_kernel.__wrapped__
    assert load(CPU) is merge_kernel.merge
    monkeypatch.setattr(merge_kernel, "_run", lambda grid, *arguments: arguments[6].zero_())
    with pytest.warns(
        UserWarning, match=r"to work on cpu \(got RuntimeError: the result differs.*BAGUA_SYNCBN_TRITON=0"
    ):
        assert load(CPU) is None
    monkeypatch.setenv("BAGUA_SYNCBN_TRITON", "0")
    assert load(CPU) is None


def test_triton_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an import that only machines with Triton survive."""
    monkeypatch.setitem(sys.modules, "triton", None)  # an import of it raises ImportError
    monkeypatch.delitem(sys.modules, "bagua_syncbn_algo.ops.merge_kernel")
    monkeypatch.delattr("bagua_syncbn_algo.ops.merge_kernel")
    assert fused.load_merge_kernel.__wrapped__(CPU) is None
