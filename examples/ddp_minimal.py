"""Synchronized batch normalization under DistributedDataParallel.

Run it with ``torchrun --nproc_per_node 2 examples/ddp_minimal.py``.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bagua_syncbn_algo import convert_sync_batchnorm, plan_of


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 2))
    model = convert_sync_batchnorm(model)
    if dist.get_rank() == 0:
        print(plan_of(model).summary())
    # The running statistics are the same on every rank, so DDP does not need to broadcast them.
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for step in range(5):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        images, labels = torch.randn(2, 3, 8, 8, generator=generator), torch.randint(2, (2,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(wrapped(images), labels)
        loss.backward()
        optimizer.step()
    print(f"rank {dist.get_rank()}: running mean {model.get_buffer('1.running_mean').sum():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
