"""Synchronized batch normalization as a Bagua algorithm.

Run it with ``torchrun --nproc_per_node 2 examples/bagua_minimal.py``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm


def main() -> None:
    bagua.init_process_group()
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    model = convert_sync_batchnorm(model)  # before with_bagua
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inner = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    model = model.with_bagua([optimizer], SyncBatchNormAlgorithm(inner))
    for step in range(5):
        generator = torch.Generator().manual_seed(2 * step + bagua.get_rank())
        images, labels = torch.randn(2, 3, 8, 8, generator=generator), torch.randint(2, (2,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    print(f"rank {bagua.get_rank()}: running mean {model[1].running_mean.sum():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
