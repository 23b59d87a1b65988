"""Time of the statistics' arithmetic without communication, compared with nn.BatchNorm2d: forward and backward.

The benchmark runs on one thread. The columns are ratios of medians to ``nn.BatchNorm2d``, which runs through autograd.
``kernels`` calls only the tensor functions (moments, normalization, sums, input gradient). ``function`` runs them
through autograd and a channel of one rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bagua_syncbn_algo.bench.measure import interleave, write
from bagua_syncbn_algo.comm.local import SINGLE_PROCESS
from bagua_syncbn_algo.comm.wire import sync_point
from bagua_syncbn_algo.ops import moments
from bagua_syncbn_algo.ops.functional import Member, sync_batch_norm

# Shape, memory format, and the upper limit of the ratio for `kernels`.
SIZES = [
    ((4, 64, 32, 32), torch.contiguous_format, 0.90),
    ((4, 256, 16, 16), torch.contiguous_format, 0.90),
    ((4, 512, 8, 8), torch.contiguous_format, 1.10),
    ((4, 64, 32, 32), torch.channels_last, 1.05),
    ((4, 256, 16, 16), torch.channels_last, 1.05),
    ((4, 512, 8, 8), torch.channels_last, 1.05),
]
EPS = 1e-5


def kernels(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> List[Tensor]:
    """Runs forward and backward by the tensor functions on a single rank."""
    local = moments.local_moments(x)
    # Several ranks would merge their moments here. That belongs to the communication and depends on C only.
    invstd = (local.variance + EPS).rsqrt_()
    statistics = moments.LayerStatistics(local.mean, local.variance, invstd, EPS)
    y = moments.normalize(x, local, statistics, weight, bias)
    sum_dy, sum_dy_xhat = moments.gradient_sums(dy, x, statistics)
    slope = invstd * (sum_dy_xhat / local.elements)
    dx = moments.input_gradient(dy, x, statistics, weight, sum_dy / local.elements, slope)
    return [y, dx, sum_dy_xhat, sum_dy]


def variants(x: Tensor, dy: Tensor) -> Dict[str, Any]:
    """Returns the three timed variants for one input."""
    native = nn.BatchNorm2d(x.shape[1], eps=EPS)
    weight, bias = native.weight.detach(), native.bias.detach()
    leaf = x.clone().requires_grad_()
    leaves = (leaf, native.weight, native.bias)
    point = sync_point("benchmark")

    def function() -> Any:
        (y,) = sync_batch_norm([Member(*leaves, EPS, "test")], SINGLE_PROCESS, point)
        return torch.autograd.grad(y, leaves, dy)

    return {
        "nn.BatchNorm2d": lambda: torch.autograd.grad(native(leaf), leaves, dy),
        "kernels": lambda: kernels(x, dy, weight, bias),
        "function": function,
    }


def main() -> None:
    torch.set_num_threads(1)
    table = Table("input", "layout", "nn.BatchNorm2d, µs", "kernels", "limit", "function")
    rows = []
    for shape, layout, limit in SIZES:
        x, dy = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(2))
        spreads = interleave(variants(x, dy), repeats=300)
        base = spreads["nn.BatchNorm2d"].median
        ratios = {name: spread.median / base for name, spread in spreads.items()}
        name = "channels-last" if layout == torch.channels_last else "channels-first"
        table.add_row(
            "×".join(map(str, shape)),
            name,
            f"{base * 1e6:.0f}",
            f"{ratios['kernels']:.2f}",
            f"{limit:.2f}",
            f"{ratios['function']:.2f}",
        )
        rows.append({"shape": shape, "layout": name, "limit": limit, "ratios": ratios, "seconds": spreads})
    Console().print(table)
    write(Path(__file__).parent / "results" / "kernels.json", rows)


if __name__ == "__main__":
    main()
