"""Models to measure on, written for the benchmarks."""

from __future__ import annotations

from typing import List

import torch
from torch import Tensor, nn

__all__ = ["ResNet"]


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
        width: channels of the first stage; doubled at each of the three that follow.
        classes: outputs.
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
