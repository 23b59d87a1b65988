"""Channels of a single process, which do not communicate."""

from __future__ import annotations

from typing import Any, Callable, List, Sequence

import torch
from torch import Tensor

from .channel import Channel
from .wire import DEFAULT_CAPACITY, FORWARD, Roster, SyncPoint

__all__ = ["SINGLE_PROCESS", "TWO_RANK_STUB"]


class _SingleProcessChannel(Channel):
    """A channel of one rank, on which there is nothing to exchange."""

    local = True

    def __init__(self) -> None:
        super().__init__()
        self.capacity = DEFAULT_CAPACITY

    def join(self, roster: Roster, itemsize: int = 4, state: Callable[[], int] = int) -> int:
        return 0

    def launch(self, point: SyncPoint, phase: int, parts: Sequence[Any], flags: int = 0) -> Callable[[], List[Tensor]]:
        return lambda: [(part if isinstance(part, Tensor) else torch.cat(list(part))).unsqueeze(0) for part in parts]

    def fail(self, point: SyncPoint, phase: int, error: BaseException, wait: bool = True) -> None:
        pass


class _TwoRankStub(_SingleProcessChannel):
    """A channel for trial runs that invents the statistics of a second rank.

    Layers then use the arithmetic of several ranks, and accept a batch that is too small for one rank.
    """

    local = False
    trial = True

    def launch(self, point: SyncPoint, phase: int, parts: Sequence[Any], flags: int = 0) -> Callable[[], List[Tensor]]:
        # The second rank has 2 elements more, and mean and variance larger by 1. Its gradient sums are the same.
        offsets = {torch.int64: 2}
        both = [torch.stack([part, part + (offsets.get(part.dtype, 1) if phase == FORWARD else 0)]) for part in parts]
        return lambda: both


SINGLE_PROCESS = _SingleProcessChannel()
TWO_RANK_STUB = _TwoRankStub()
