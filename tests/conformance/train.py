"""One rank of a conformance run: the same user code on either host; saves its final state.

Usage: ``python train.py HOST ALGORITHM MODE STEPS OUT``, in a launcher's environment.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn


class Fork(nn.Module):
    """Two parallel branches whose statistics share a round."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))
        self.right = nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(x) + self.right(x)
        return y


def build() -> nn.Module:
    torch.manual_seed(int(os.environ["RANK"]))  # with_bagua must broadcast rank 0's parameters
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        Fork(),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(6 * 4, 3),
    )


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(3, 2, 6, 6, generator=generator) * (1 + rank) + rank


def algorithm_of(bagua: Any, name: str, model: nn.Module) -> Any:
    """Returns the inner algorithm and its optimizer."""
    if name == "qadam":
        from bagua.torch_api.algorithms.q_adam import QAdamOptimizer

        optimizer = QAdamOptimizer(model.parameters(), lr=0.01, warmup_steps=3)
        return bagua.algorithms.Algorithm.init("qadam", q_adam_optimizer=optimizer), optimizer
    options = {"async": {"sync_interval_ms": 10}}.get(name, {"hierarchical": False})
    return bagua.algorithms.Algorithm.init(name, **options), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def main(host: str, name: str, mode: str, steps: int, out: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["BAGUA_SYNCBN_HOST"] = host
    if host == "upstream":
        import cuda_shim

        cuda_shim.install()
    from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm

    assert (bagua.__name__ == "bagua.torch_api") == (host == "upstream"), bagua.__name__
    bagua.init_process_group()
    rank = bagua.get_rank()
    model: Any = convert_sync_batchnorm(build())
    inner, optimizer = algorithm_of(bagua, name, model)
    # "bare" is without the plugin: the layers then exchange over torch.distributed, as under plain DDP
    algorithm = (
        inner
        if mode == "bare"
        else SyncBatchNormAlgorithm(inner, normalize_over=int(mode) if mode.isdecimal() else mode)
    )
    model = model.with_bagua([optimizer], algorithm)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        (model(batch(step % 7, rank)) - 1).square().mean().backward()
        optimizer.step()
    channel = getattr(model.bagua_algorithm, "channel", None)
    torch.save(
        {
            "state": model.state_dict(),
            "buckets": [[t.bagua_tensor_name for t in bucket.tensors] for bucket in model.bagua_buckets],
            "rounds": None if channel is None else channel.rounds,
            "sent": None if channel is None else [bool(b.tensors[0].any()) for b in channel.buckets],
            "steps": model.bagua_ddp.bagua_train_step_counter,
        },
        f"{out}.{rank}",
    )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5])
    sys.stdout.flush()
    os._exit(0)  # upstream leaves an autotune server and threads running
