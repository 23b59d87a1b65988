"""Channels of one process, which communicate with nobody."""

from __future__ import annotations

from typing import Callable, List, Sequence

import torch
from torch import Tensor

from .channel import Channel
from .wire import DEFAULT_CAPACITY, FORWARD, Roster, SyncPoint

__all__ = ["SINGLE_PROCESS", "TWO_RANK_STUB"]


class _SingleProcessChannel(Channel):
    """The null object: one rank, nothing to exchange."""

    local = True

    def __init__(self) -> None:
        super().__init__()
        self.capacity = DEFAULT_CAPACITY

    def join(self, roster: Roster, itemsize: int = 4) -> int:
        return 0

    def launch(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> Callable[[], List[Tensor]]:
        return lambda: [part.unsqueeze(0) for part in parts]

    def fail(self, point: SyncPoint, phase: int, error: BaseException, wait: bool = True) -> None:
        pass


class _TwoRankStub(_SingleProcessChannel):
    """One rank that plays two: by the arithmetic of several, even where this rank's batch alone is too small for it."""

    local = False
    trial = True

    def launch(self, point: SyncPoint, phase: int, parts: Sequence[Tensor]) -> Callable[[], List[Tensor]]:
        # The other one has two elements more, with other moments; its gradient sums are the same.
        others = {torch.int64: 2}
        both = [torch.stack([part, part + (others.get(part.dtype, 1) if phase == FORWARD else 0)]) for part in parts]
        return lambda: both


SINGLE_PROCESS = _SingleProcessChannel()
TWO_RANK_STUB = _TwoRankStub()
