"""Stand-ins for PyTorch's CUDA kernels of batch normalization, on machines without CUDA.

They follow the kernels' source, so that the tests check the arguments of the kernels and the interpretation of their
results: aten/src/ATen/native/cuda/Normalization.cu and Normalization.cuh of PyTorch 2.13.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import Any, Tuple

import pytest
import torch
from torch import Tensor

from bagua_syncbn_algo import layer as layer_module
from bagua_syncbn_algo.ops import fused, moments


def _shape(x: Tensor) -> Tuple[int, ...]:
    return (1, -1) + (1,) * (x.dim() - 2)


def _dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _accumulated(x: Tensor) -> Tensor:
    """Returns ``x`` in the dtype in which the kernels accumulate (``acc_type``)."""
    return x if x.dtype == torch.float64 else x.float()


def update_stats(x: Tensor, running_mean: Any, running_var: Any, momentum: float) -> Tuple[Tensor, Tensor]:
    """Returns the mean and biased variance (functor ``Var``), as ``batch_norm_update_stats_cuda``."""
    assert running_mean is None and running_var is None
    x = _accumulated(x)
    return x.mean(_dims(x)), x.var(_dims(x), unbiased=False)


def stats(x: Tensor, eps: float) -> Tuple[Tensor, Tensor]:
    """Returns mean and invstd, as ``batch_norm_stats_cuda``: ``InvStd`` is 0, not infinity, for variance = eps = 0."""
    mean, variance = update_stats(x, None, None, 0.0)
    return mean, torch.where((variance == 0) & (eps == 0), torch.zeros_like(variance), (variance + eps).rsqrt())


def gather_stats(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    running_mean: Any,
    running_var: Any,
    momentum: float,
    eps: float,
    counts: Any,
) -> Tuple[Tensor, Tensor]:
    """Merges means and invstds ``(W, C)``, as ``batch_norm_reduce_statistics_kernel``; updates the running statistics.

    The counts have the dtype of the running statistics, without them that of ``x``. The kernel adds them up in an
    integer, and divides by the integer plus the next count.
    """
    assert counts.dtype == (x.dtype if running_mean is None else running_mean.dtype)
    average = torch.zeros_like(mean[0])
    squares = torch.zeros_like(mean[0])
    n = 0
    for count, m, inverse in zip(counts, mean, invstd):
        v = ((1 / inverse) ** 2 - eps) * count
        factor = 1 / (n + count)
        squares = squares + v + (average - m) ** 2 * n * count * factor
        average = n * factor * average + count * factor * m
        n += int(count)
    if running_mean is not None:
        running_mean.copy_((1 - momentum) * running_mean + momentum * average)
        running_var.copy_((1 - momentum) * running_var + momentum * squares / (n - 1))
    return average, (squares / n + eps).rsqrt()


def elemt(x: Tensor, weight: Any, bias: Any, mean: Tensor, invstd: Tensor, eps: float) -> Tensor:
    s = _shape(x)
    y = (_accumulated(x) - mean.view(s)) * invstd.view(s)
    y = y if weight is None else y * weight.view(s)
    return (y if bias is None else y + bias.view(s)).to(x.dtype)


def backward_reduce(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Any, input_g: bool, weight_g: bool, bias_g: bool
) -> Any:
    dy, x = _accumulated(dy), _accumulated(x)
    assert input_g and (not (weight_g or bias_g) or weight is not None)  # these have the dtype and shape of the weight
    # In float64, so that the tests see the arithmetic around the kernels, not the order of a float32 sum.
    sums = [dy.double().sum(_dims(x)), (dy.double() * (x.double() - mean.double().view(_shape(x)))).sum(_dims(x))]
    sum_dy, sum_dy_xmu = (each.to(mean.dtype) for each in sums)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd if weight_g else None, sum_dy.clone() if bias_g else None


def backward_elemt(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, weight: Any, sum_dy: Tensor, sum_dy_xmu: Tensor, count: Tensor
) -> Tensor:
    s = _shape(x)
    assert count.dtype == torch.int32 and count.is_contiguous()  # the kernel reads it by a pointer
    total = count.long().sum()
    scale = invstd if weight is None else invstd * weight
    centred = _accumulated(x) - mean.view(s)
    slope = (invstd.square() * sum_dy_xmu / total).view(s)
    return ((_accumulated(dy) - (sum_dy / total).view(s) - centred * slope) * scale.view(s)).to(x.dtype)


HAS_TRITON = importlib.util.find_spec("triton") is not None  # has wheels for Linux only
_one_interpreter = threading.Lock()


def install(monkeypatch: pytest.MonkeyPatch, fuse: bool, triton: bool = False) -> None:
    """Replaces the kernels.

    Args:
        monkeypatch: takes the replacements away after the test.
        fuse: whether to take the fused path, for float64 too; otherwise the exact path calls the kernels.
        triton: whether the Triton kernel merges, in Triton's interpreter (``TRITON_INTERPRET=1``, set by conftest.py).
    """
    if triton:
        from bagua_syncbn_algo.ops import merge_kernel

        run = merge_kernel._run

        def run_one(*arguments: Any) -> None:
            with _one_interpreter:  # it keeps the number of the running program in a global variable
                run(*arguments)

        monkeypatch.setattr(merge_kernel, "_run", run_one)
        monkeypatch.setattr(fused, "load_merge_kernel", lambda device: merge_kernel.merge)
    else:
        monkeypatch.setattr(fused, "load_merge_kernel", lambda device: None)
    for function in (update_stats, stats, elemt, backward_reduce, backward_elemt):
        monkeypatch.setattr(torch, f"batch_norm_{function.__name__}", function)
    monkeypatch.setattr(torch, "batch_norm_gather_stats_with_counts", gather_stats)
    for module in (moments, fused, layer_module):
        monkeypatch.setattr(module, "has_fused_kernels", lambda input: True)
    if fuse:
        monkeypatch.setattr(fused, "FUSED_DTYPES", (*fused.FUSED_DTYPES, torch.float64))
