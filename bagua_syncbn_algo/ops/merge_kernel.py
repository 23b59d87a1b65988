"""One Triton kernel that merges the statistics of all layers of a round and updates their running statistics.

The fused ATen kernel merges one layer per launch, in float32. This kernel merges all layers of a round in one launch,
in float64, with the arithmetic of :func:`.moments.merge_moments`. Triton is optional: CUDA builds of PyTorch contain
it. Import this module only where Triton is installed, see :func:`.fused.load_merge_kernel`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .exact import to_device
from .moments import merge_moments

__all__ = ["Merged", "check", "merge"]

_BLOCK = tl.constexpr(128)  # channels per program
_COLUMNS = tl.constexpr(5)  # of the table: first channel, channels, addresses of running mean, variance and counter


class Merged(NamedTuple):
    """The statistics of all ranks."""

    mean: Tensor  # (ΣC,)
    invstd: Tensor  # (ΣC,): 1 / √(variance + eps), with biased variance
    counts: Tensor  # (L, W) int32: elements per channel


@triton.jit
def _merge(
    counts, counts_stride, moments, moments_stride, table, scalars, mean, invstd, out_counts, channels, ranks
):  # fmt: skip
    """One program merges a block of channels of one layer; see :func:`merge`."""
    layer, block = tl.program_id(0), tl.program_id(1)
    first, size = tl.load(table + _COLUMNS * layer), tl.load(table + _COLUMNS * layer + 1)
    eps, momentum = tl.load(scalars + 2 * layer), tl.load(scalars + 2 * layer + 1)
    offsets = block * _BLOCK + tl.arange(0, _BLOCK)
    mask = offsets < size
    total = tl.load(counts + layer).to(tl.float64)
    for rank in range(1, ranks):
        total += tl.load(counts + rank * counts_stride + layer).to(tl.float64)
    # In rank order: all ranks compute the same bits.
    m = tl.zeros([_BLOCK], dtype=tl.float64)
    for rank in range(ranks):
        share = tl.load(counts + rank * counts_stride + layer).to(tl.float64) / total
        m += share * tl.load(moments + rank * moments_stride + first + offsets, mask=mask, other=0.0).to(tl.float64)
    v = tl.zeros([_BLOCK], dtype=tl.float64)
    for rank in range(ranks):
        share = tl.load(counts + rank * counts_stride + layer).to(tl.float64) / total
        row = moments + rank * moments_stride + first + offsets
        deviation = tl.load(row, mask=mask, other=0.0).to(tl.float64) - m
        v += share * (tl.load(row + channels, mask=mask, other=0.0).to(tl.float64) + deviation * deviation)
    tl.store(mean + first + offsets, m.to(mean.dtype.element_ty), mask=mask)
    tl.store(invstd + first + offsets, (1.0 / tl.sqrt(v + eps)).to(invstd.dtype.element_ty), mask=mask)
    address = tl.load(table + _COLUMNS * layer + 2)
    if address != 0:
        running = address.to(tl.pointer_type(tl.float32)) + offsets
        old = tl.load(running, mask=mask, other=0.0).to(tl.float64)
        tl.store(running, (old + momentum * (m - old)).to(tl.float32), mask=mask)
        running = tl.load(table + _COLUMNS * layer + 3).to(tl.pointer_type(tl.float32)) + offsets
        old = tl.load(running, mask=mask, other=0.0).to(tl.float64)
        unbiased = v * (total / (total - 1))
        tl.store(running, (old + momentum * (unbiased - old)).to(tl.float32), mask=mask)
    if block == 0:
        counter = tl.load(table + _COLUMNS * layer + 4)
        if counter != 0:
            counter_pointer = counter.to(tl.pointer_type(tl.int64))
            tl.store(counter_pointer, tl.load(counter_pointer) + 1)
        for rank in range(ranks):
            n = tl.load(counts + rank * counts_stride + layer)
            tl.store(out_counts + layer * ranks + rank, n.to(tl.int32))


def merge(
    counts: Tensor, moments: Tensor, features: Tuple[int, ...], eps: Sequence[float], buffers: Sequence[Optional[Any]]
) -> Merged:
    """Merges the moments of ``W`` ranks and updates the running statistics, in one launch.

    Args:
        counts: elements per channel, shape ``(W, L)`` for L layers, int64; at least 2 over all ranks.
        moments: means of all layers, then biased variances of all layers, shape ``(W, 2ΣC)``, float32 or float64.
        features: channels of each layer.
        eps: of each layer.
        buffers: for each layer its running statistics, or ``None``. No two layers share them.
    """
    table, scalars = _table(
        features,
        tuple(eps),
        tuple(0.0 if each is None else each.momentum for each in buffers),
        tuple(
            (0, 0, 0) if each is None else (each.mean.data_ptr(), each.variance.data_ptr(), each.counter.data_ptr())
            for each in buffers
        ),
        moments.device,
    )
    channels, ranks = sum(features), len(counts)
    mean, invstd = moments.new_empty(2, channels).unbind(0)
    out_counts = counts.new_empty((len(features), ranks), dtype=torch.int32)
    _run(
        (len(features), triton.cdiv(max(features), _BLOCK.value)),
        *(counts, counts.stride(0), moments, moments.stride(0), table, scalars),
        *(mean, invstd, out_counts, channels, ranks),
    )
    return Merged(mean, invstd, out_counts)


def _run(grid: Tuple[int, int], *arguments: Any) -> None:
    """Launches the kernel on the device of its arguments, which Triton expects to be the current device."""
    device = arguments[0].device
    with torch.cuda.device(device if device.type == "cuda" else -1):
        _merge[grid](*arguments)


@lru_cache(maxsize=65536)  # never evicted in practice: a captured graph reads it
def _table(
    features: Tuple[int, ...],
    eps: Tuple[float, ...],
    momenta: Tuple[float, ...],
    addresses: Tuple[Tuple[int, int, int], ...],
    device: torch.device,
) -> Tuple[Tensor, Tensor]:
    """Returns the table of integers ``(L, 5)`` and that of ``(eps, momentum)``. One copy moves both to the device."""
    with torch.inference_mode(False):  # the tensors outlive an inference_mode block that may be active
        starts = [sum(features[:index]) for index in range(len(features))]
        rows = [[*each[:2], *each[2]] for each in zip(starts, features, addresses)]
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        scalars = torch.tensor(list(zip(eps, momenta)), dtype=torch.float64, device="cpu")
        both = to_device(torch.cat([table.flatten(), scalars.flatten().view(torch.int64)]), device)
        return both[: table.numel()], both[table.numel() :].view(torch.float64)


def check(device: torch.device) -> None:
    """Compiles the kernel and compares its result with :func:`.moments.merge_moments`.

    Raises:
        RuntimeError: if they differ. The compiler raises errors of its own.
    """
    features, eps = (3, 200), (1e-5, 1e-3)
    ramp = torch.arange(3 * 406, device=device, dtype=torch.float32).view(3, 406).sin().abs()
    counts = torch.tensor([[0, 0], [2, 5], [7, 1]], device=device)
    expected = merge_moments(counts, ramp, features)
    wanted = expected.variance + torch.tensor(eps, device=device).repeat_interleave(
        torch.tensor(features, device=device)
    )
    found = merge(counts, ramp, features, eps, [None, None])
    close = torch.allclose(found.mean, expected.mean) and torch.allclose(found.invstd, wanted.rsqrt())
    if not close or not torch.equal(found.counts.long(), counts.t()):
        raise RuntimeError("the result differs from that of ATen operators")
