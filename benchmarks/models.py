"""Models for the benchmarks and the tests."""

from __future__ import annotations

from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

__all__ = ["Dense", "HighResolution", "Inception", "Pyramid", "ResNet"]


class _Block(nn.Module):
    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            convolution = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.shortcut(x)
        output: Tensor = self.relu(y)
        return output


class ResNet(nn.Module):
    """A residual network of eighteen layers with in-place activations and additions: 20 BatchNorm layers.

    Args:
        width: the channels of the first stage; each of the three later stages doubles the channels.
        classes: the number of outputs.
    """

    def __init__(self, width: int = 64, classes: int = 10) -> None:
        super().__init__()
        stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        stages: List[nn.Module] = []
        channels = width
        for stage in range(4):
            for block in range(2):
                stages.append(_Block(channels, width << stage, 2 if stage and not block else 1))
                channels = width << stage
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(torch.flatten(self.stages(self.stem(x)).mean((2, 3)), 1))
        return output


def _conv_bn(channels_in: int, channels_out: int, size: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    layers: List[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, size, stride, size // 2, bias=False),
        nn.BatchNorm2d(channels_out),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class _InceptionBlock(nn.Module):
    def __init__(self, channels_in: int, width: int) -> None:
        super().__init__()
        self.one = _conv_bn(channels_in, width, 1)
        self.three = nn.Sequential(_conv_bn(channels_in, width, 1), _conv_bn(width, 2 * width))
        self.five = nn.Sequential(_conv_bn(channels_in, width // 2, 1), _conv_bn(width // 2, width // 2, 5))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv_bn(channels_in, width // 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class Inception(nn.Module):
    """A network of blocks with four concatenated branches, similar to GoogLeNet: 6 layers and 2 levels a block.

    Args:
        width: the channels of a branch.
        blocks: the number of blocks.
        classes: the number of outputs.
    """

    def __init__(self, width: int = 32, blocks: int = 9, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_bn(3, 4 * width, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.blocks = nn.Sequential(*(_InceptionBlock(4 * width, width) for _ in range(blocks)))
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return output


class _BasicBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _conv_bn(channels, channels), _conv_bn(channels, channels, relu=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        y += x
        output: Tensor = self.relu(y)
        return output


class _ExchangeModule(nn.Module):
    """Parallel branches of decreasing resolution; each output is the sum of all branches, resampled."""

    def __init__(self, width: int, branches: int, blocks: int) -> None:
        super().__init__()
        channels = [width << branch for branch in range(branches)]
        self.branches = nn.ModuleList(nn.Sequential(*(_BasicBlock(c) for _ in range(blocks))) for c in channels)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self._resample(channels, source, target) for source in range(branches))
            for target in range(branches)
        )
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _resample(channels: List[int], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:
            up = nn.Upsample(scale_factor=2 ** (source - target), mode="nearest")
            return nn.Sequential(_conv_bn(channels[source], channels[target], 1, relu=False), up)
        steps = []
        for step in range(target - source):
            last = step == target - source - 1
            steps.append(_conv_bn(channels[source], channels[target if last else source], 3, 2, relu=not last))
        return nn.Sequential(*steps)

    def forward(self, inputs: List[Tensor]) -> List[Tensor]:
        branches = [branch(x) for branch, x in zip(self.branches, inputs)]
        outputs = []
        for paths in self.fuse:
            total = paths[0](branches[0])
            for path, x in zip(list(paths)[1:], branches[1:]):
                total = total + path(x)
            outputs.append(self.relu(total))
        return outputs


class HighResolution(nn.Module):
    """A network of two to four parallel branches of different resolution with exchanges, similar to HRNet.

    Args:
        width: the channels of the branch with the highest resolution; each lower branch doubles the channels.
        modules: the number of exchange modules with 2, with 3 and with 4 branches.
        blocks: the number of residual blocks in each branch of a module.
        classes: the number of outputs.
    """

    def __init__(
        self, width: int = 18, modules: Tuple[int, int, int] = (1, 3, 2), blocks: int = 2, classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv_bn(3, width, 3, 2), _conv_bn(width, width, 3, 2))
        self.stages = nn.ModuleList()
        self.downs = nn.ModuleList()
        for stage, count in enumerate(modules):
            branches = stage + 2
            self.downs.append(_conv_bn(width << stage, width << (stage + 1), 3, 2))
            self.stages.append(nn.ModuleList(_ExchangeModule(width, branches, blocks) for _ in range(count)))
        self.head = nn.Linear(width * 15, classes)

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.stem(x)]
        for down, stage in zip(self.downs, self.stages):
            branches.append(down(branches[-1]))
            for module in stage:
                branches = module(branches)
        output: Tensor = self.head(torch.cat([branch.mean((2, 3)) for branch in branches], 1))
        return output


class Pyramid(nn.Module):
    """A backbone with lateral connections and one detection head, which is applied at every level of the pyramid.

    Args:
        width: the channels of every level.
        depth: the number of layers of the shared head.
        classes: the number of outputs at every position.
    """

    def __init__(self, width: int = 32, depth: int = 2, classes: int = 4) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(_conv_bn(width if i else 3, width, 3, 2) for i in range(4))
        self.lateral = nn.ModuleList(_conv_bn(width, width, 1, relu=False) for _ in range(3))
        self.tower = nn.Sequential(*(_conv_bn(width, width) for _ in range(depth)))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> List[Tensor]:
        features = []
        for stage in self.backbone:
            x = stage(x)
            features.append(x)
        outputs = []
        above: Optional[Tensor] = None
        for lateral, feature in zip(self.lateral, reversed(features[1:])):
            merged = lateral(feature)
            if above is not None:
                merged = merged + nn.functional.interpolate(above, scale_factor=2.0)
            above = merged
            outputs.append(self.head(self.tower(merged)))
        return outputs


class Dense(nn.Module):
    """A network whose layers read all earlier outputs: no layers are independent, so coalescing saves nothing.

    Args:
        width: the channels that each layer adds.
        layers: the number of layers.
        classes: the number of outputs.
    """

    def __init__(self, width: int = 16, layers: int = 6, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width * (i + 1)),
                nn.ReLU(inplace=True),
                nn.Conv2d(width * (i + 1), width, 3, 1, 1, bias=False),
            )
            for i in range(layers)
        )
        self.head = nn.Linear(width * (layers + 1), classes)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        output: Tensor = self.head(torch.cat(features, 1).mean((2, 3)))
        return output
