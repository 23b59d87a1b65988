"""Tests of outputs that the loss of one rank does not use, as in a detector without positives."""

from __future__ import annotations

import copy
import itertools
from typing import Any, Dict, List, Optional, Tuple

import pytest
import torch
from fuzz import Tied
from ranks import run_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bagua_syncbn_algo import SyncBatchNormAlgorithm, bagua, convert_sync_batchnorm

BRANCHES = ("long", "short")


class TwoBranches(nn.Module):
    """Two branches, one of which has one layer more than the other: with coalescing that layer has its own round."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.long = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 3, 1))
        self.last = nn.BatchNorm2d(3)
        self.short = nn.Sequential(nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        h = self.norm(self.stem(x)).tanh()
        return self.last(self.long(h)), self.short(h)


def loss_of(outputs: Tuple[Tensor, ...], used: Tuple[str, ...]) -> Tensor:
    return torch.stack([(y.pow(3) + y).sum() for name, y in zip(BRANCHES, outputs) if name in used]).sum()


def shard(rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2 + rank, 2, 6, 6, generator=generator).double() * (1 + rank)


def expected(model: nn.Module, used: List[Tuple[str, ...]]) -> Dict[str, Optional[Tensor]]:
    """Returns the gradients of the mean of both ranks' losses, from one process on both batches."""
    model = copy.deepcopy(model)
    long, short = model(torch.cat([shard(0), shard(1)]))
    parts = zip(long.split([2, 3]), short.split([2, 3]))
    (torch.stack([loss_of(outputs, which) for outputs, which in zip(parts, used)]).sum() / 2).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _train(rank: int, host: str, coalesce: bool, overlap: bool) -> None:
    bagua.init_process_group()
    torch.manual_seed(0)
    plain = TwoBranches().double()
    for used in itertools.product([BRANCHES, ("long",), ("short",)], repeat=2):
        model: Any = convert_sync_batchnorm(copy.deepcopy(plain), coalesce=coalesce, overlap=overlap)
        inner = model
        model = DistributedDataParallel(model, find_unused_parameters=True) if host == "DDP" else Tied(model)
        if host == "with_bagua":
            model.with_bagua([], SyncBatchNormAlgorithm())
        for _ in range(2):
            model.zero_grad()
            loss_of(model(shard(rank)), used[rank]).backward()
        for name, gradient in expected(plain, list(used)).items():
            ours = inner.get_parameter(name).grad
            if host == "none" and ours is not None:  # without a gradient all-reduce
                torch.distributed.all_reduce(ours)
                ours /= 2
            unused = gradient is None
            assert ours is not None or unused, (used, name)
            if ours is not None:
                zeros = torch.zeros_like(ours)
                torch.testing.assert_close(ours, zeros if unused else gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.multirank
@pytest.mark.parametrize("host", ["DDP", "with_bagua", "none"])
@pytest.mark.parametrize(("coalesce", "overlap"), [(True, True), (True, False), (False, False)])
def test_a_rank_that_omits_a_branch(host: str, coalesce: bool, overlap: bool) -> None:
    """Catches a rank that omits the other rank's part of an input gradient because its own loss omits the branch.

    1e-9 is far above float64 rounding and far below the error, which is 0.2 to 2.9 times the gradient.
    """
    run_processes(2, _train, host, coalesce, overlap)
