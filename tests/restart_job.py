"""A training job with a checkpoint for each epoch, which a launcher can restart.

``test_restart.py`` runs it under ``torchrun``, and uses its parts for restarts inside of a process.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bagua_syncbn_algo.graph.split_backward as split_backward
from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm

EPOCHS, STEPS, BATCH = 3, 3, 4  # the batch is that of all ranks
HOSTS = ("ddp", "bagua")

split_backward.WORTHWHILE = 0  # overlaps also with the small convolutions of this model


class Branches(nn.Module):
    """Two independent layers (one coalesced round), then a layer behind a convolution, and dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.right = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, momentum=None))
        # No bias before a layer: its gradient is rounding only, which Adam would amplify.
        convolution = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.middle = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout))
        self.head = nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(torch.relu(self.left(x) + self.right(x))))  # type: ignore[no-any-return]


def fresh_model(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(7)
    return Branches(dropout).double()


def fresh_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def shard(epoch: int, step: int, rank: int, world: int) -> Tensor:
    """Returns the images of a rank. The order of the data depends on the epoch only."""
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(STEPS * BATCH, generator=generator)[step * BATCH : (step + 1) * BATCH]
    images = torch.linspace(-2, 3, STEPS * BATCH * 3 * 36, dtype=torch.float64).sin().view(-1, 3, 6, 6)
    images = images * torch.linspace(0.5, 2, STEPS * BATCH, dtype=torch.float64).view(-1, 1, 1, 1)
    return images[order[rank::world]] + epoch


def wrap(model: nn.Module, optimizer: torch.optim.Optimizer, host: str) -> nn.Module:
    """Returns the module to call, in a world of the host."""
    if host == "ddp":
        return DistributedDataParallel(model, broadcast_buffers=False)
    inner = bagua.algorithms.gradient_allreduce.GradientAllReduceAlgorithm()
    return model.with_bagua([optimizer], SyncBatchNormAlgorithm(inner))  # type: ignore[operator,no-any-return]


def start_world(host: str, store: Optional[Any] = None) -> None:
    """Initializes the process group of the host, for the rank in the environment."""
    if host == "bagua":
        bagua.init_process_group(store)
    elif store is None:
        dist.init_process_group("gloo")
    else:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def train_step(
    called: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, between: Any = lambda: None
) -> None:
    """Runs one step; ``between`` is called after the forward."""
    optimizer.zero_grad()
    loss = called(images).square().mean()
    between()
    loss.backward()
    optimizer.step()


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def flat(state: Dict[str, Any]) -> Dict[str, Tensor]:
    """Returns all tensors of a state by name."""
    found = {f"model.{name}": value for name, value in state["model"].items()}
    for number, values in state["optimizer"]["state"].items():
        found.update({f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in values.items()})
    return {name: value.detach().clone() for name, value in found.items()}


def save(path: Path, value: Any) -> None:
    """Writes a file that is complete whenever it exists."""
    partial = path.with_suffix(f".partial{os.getpid()}")
    torch.save(value, partial)
    os.replace(partial, path)


def latest_checkpoint(folder: Path, rank: int) -> Tuple[int, Dict[str, Any], Optional[Tensor]]:
    """Returns the next epoch, the state of the model and optimizer, and the random state of this rank."""
    marker = folder / "latest"
    if not marker.exists():
        return 0, {}, None
    epoch = int(torch.load(marker, weights_only=True))
    state = torch.load(folder / f"epoch{epoch}", weights_only=True)
    return epoch + 1, state, torch.load(folder / f"epoch{epoch}.rank{rank}", weights_only=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("host", choices=HOSTS)
    parser.add_argument("--kill", action="store_true", help="rank 1 ends in the middle of the second epoch, once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    signal.alarm(60)  # ends a rank that hangs: the launcher runs the ranks in sessions of their own
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    start_world(options.host)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = convert_sync_batchnorm(fresh_model(dropout=0.3))
    optimizer = fresh_optimizer(model)
    first, state, random_state = latest_checkpoint(options.folder, rank)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    called = wrap(model, optimizer, options.host)
    torch.manual_seed(rank)  # each rank has its own dropout
    if random_state is not None:
        torch.set_rng_state(random_state)
    for epoch in range(first, EPOCHS):
        for step in range(STEPS):
            dies = options.kill and (attempt, rank, epoch, step) == (0, 1, 1, 1)

            def between(dies: bool = dies) -> None:
                if dies:
                    os.kill(os.getpid(), signal.SIGKILL)

            train_step(called, optimizer, shard(epoch, step, rank, world), between)
        save(options.folder / f"epoch{epoch}.rank{rank}", torch.get_rng_state())
        if rank == 0:
            save(options.folder / f"epoch{epoch}", state_of(model, optimizer))
        dist.barrier()
        if rank == 0:
            save(options.folder / "latest", epoch)
    save(options.folder / f"result{rank}", {"first": first, "attempt": attempt, **flat(state_of(model, optimizer))})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
