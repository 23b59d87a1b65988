"""Networks as in torchvision and timm under ``torch.compile``: no graph break, the planned rounds, eager results."""

from __future__ import annotations

from typing import Any, Callable, Dict

import models
import pytest
import test_compiled
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_processes
from torch import Tensor, nn

from bagua_syncbn_algo import convert_sync_batchnorm, plan_of

pytestmark = test_compiled.pytestmark


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class Mobile(nn.Module):
    """Inverted residuals with squeeze and excitation, as in EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, stride=2)
        self.expand, self.depthwise, self.project = conv(8, 16, 1), conv(16, 16, groups=16), conv(16, 8, 1)
        self.reduce, self.gate = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        y = F.silu(self.depthwise(F.silu(self.expand(x))))
        scale = torch.sigmoid(self.gate(F.relu(self.reduce(F.adaptive_avg_pool2d(y, 1)))))
        return x + self.project(y * scale)  # type: ignore[no-any-return]


class Shuffle(nn.Module):
    """Two branches of channels that are mixed, as in ShuffleNet."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(conv(3, 3, groups=3), conv(3, 4, 1), nn.ReLU(inplace=True))
        self.right = nn.Sequential(conv(3, 4, 1), nn.ReLU(inplace=True), conv(4, 4, groups=4), conv(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x)], dim=1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Segmenter(nn.Module):
    """Parallel dilated convolutions and an upsampled output, as in DeepLab."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8, stride=2)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 4, 3, padding=d, dilation=d), nn.BatchNorm2d(4), nn.ReLU()) for d in (1, 2, 3)
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), conv(8, 4, 1), nn.ReLU())
        self.head, self.auxiliary = nn.Conv2d(16, 2, 1), nn.Sequential(conv(8, 4), nn.Conv2d(4, 2, 1))

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        y = F.relu(self.stem(x))
        pooled = F.interpolate(self.pool(y), size=y.shape[-2:], mode="nearest")
        out = self.head(torch.cat([*(branch(y) for branch in self.branches), pooled], dim=1))
        return {"out": F.interpolate(out, scale_factor=2.0), "aux": self.auxiliary(y)}


class UNet(nn.Module):
    """An encoder and a decoder with skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = conv(3, 4), conv(4, 8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.norm, self.last = nn.BatchNorm2d(4), conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        y = F.relu(self.bottom(F.max_pool2d(skip, 2)))
        return self.last(torch.cat([skip, self.norm(self.up(y))], dim=1))  # type: ignore[no-any-return]


class Perceptron(nn.Module):
    """Two-dimensional inputs, and sequences of shape (N, C, L)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12))
        self.sequence = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x.flatten(2).mean(1))
        return self.sequence(y.view(len(x), 3, 4) * 2)  # type: ignore[no-any-return]


NETWORKS: Dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: models.ResNet(4),
    "inception": lambda: models.Inception(4, blocks=1),
    "pyramid": lambda: models.Pyramid(4),
    "dense": lambda: models.Dense(4, layers=3),
    "high resolution": lambda: models.HighResolution(2, modules=(1, 1, 1), blocks=1),
    "mobile": Mobile,
    "shuffle": Shuffle,
    "segmenter": Segmenter,
    "unet": UNet,
    "perceptron": Perceptron,
}
# Networks whose compilation by Inductor takes longest; the benchmark compiles such networks.
LARGE = ("residual", "dense", "high resolution", "pyramid")


def total(output: Any) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(output)
    return torch.cat([leaf.flatten() for leaf in leaves])


def images(rank: int, step: int, size: int) -> Tensor:
    return test_compiled.images(rank, step, size=size)


def _networks(rank: int, backend: str) -> None:
    dist.init_process_group("gloo")
    for name, build in NETWORKS.items():
        if backend == "inductor" and name in LARGE:
            continue
        torch.manual_seed(0)
        model = build()
        size = 8 if name == "perceptron" else 32 if name in LARGE else 16
        found = test_compiled._compare(
            rank,
            name,
            model,
            backend,
            call=lambda target, x: total(target(x)),
            batch=lambda rank, step, size=size: images(rank, step, size),  # type: ignore[misc]
        )
        plan = plan_of(convert_sync_batchnorm(build()))
        assert len(found.rounds) == 3 * (plan.rounds_forward + plan.rounds_backward), name
    dist.destroy_process_group()


@pytest.mark.multirank
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_networks_are_one_graph(backend: str) -> None:
    """Catches a graph break (an error with ``fullgraph=True``), other rounds than planned, and other results.

    The tolerance of 1e-9 is that of float64 sums in another order.
    """
    run_processes(2, _networks, backend, limit=400.0)
