"""Records of training forwards, so that a recomputed forward repeats neither communication nor updates.

Activation checkpointing runs a layer's forward a second time, inside the backward pass. That forward must normalize
with the statistics of the first: exchanging again would cost a round, and update the running statistics twice.
"""

from __future__ import annotations

from collections import deque
from typing import Callable, Deque, Optional, Sequence

import torch

from .moments import GlobalMoments, LocalMoments

__all__ = ["Record", "Records", "inside_backward"]

_MAX_OPEN = 8  # a forward without a backward (evaluation by training mode, say) leaves its record behind
_AGREEMENT = 1e-4  # recomputation repeats the same arithmetic; other batches differ by more, up to 10⁸ elements


_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)  # not before torch 2.0


def inside_backward() -> bool:
    """Whether the caller runs inside a backward pass of this thread; always ``False`` before torch 2.0."""
    return _graph_task() != -1


def _graph_is_kept() -> bool:
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and bool(keeps())


class Record:
    """What one training forward of a round found out."""

    __slots__ = ("local", "merged")

    def __init__(self, local: Sequence[LocalMoments], merged: GlobalMoments) -> None:
        self.local = [part.forget() for part in local]
        self.merged = merged

    def distance(self, local: Sequence[LocalMoments]) -> float:
        """Returns how far the local moments are apart: means in standard deviations, variances relative.

        What is not a number counts as agreement.
        """
        return max(_distance(ours, theirs) for ours, theirs in zip(self.local, local))


def _distance(ours: LocalMoments, theirs: LocalMoments) -> float:
    if ours.elements != theirs.elements:
        return float("inf")
    information = torch.finfo(theirs.mean.dtype)
    scale = theirs.variance.sqrt() + information.eps * theirs.mean.abs() + information.tiny
    means = (theirs.mean - ours.mean).abs() / scale
    variances = (theirs.variance - ours.variance).abs() / (theirs.variance + information.tiny)
    return float(torch.stack([means, variances]).nan_to_num(0.0).max())


class Records:
    """The open records of one round, the oldest dropped first."""

    def __init__(self) -> None:
        self._open: Deque[Record] = deque(maxlen=_MAX_OPEN)

    def __len__(self) -> int:
        return len(self._open)

    def open(self, record: Record) -> None:
        """Keeps ``record`` until the backward of its forward has run."""
        self._open.append(record)

    def close(self, record: Record) -> None:
        """Forgets ``record``, unless the backward that runs keeps its graph for another one."""
        if record in self._open and not _graph_is_kept():
            self._open.remove(record)

    def match(self, local: Callable[[], Sequence[LocalMoments]]) -> Optional[Record]:
        """Returns the record that a forward inside a backward repeats, or ``None`` for an ordinary forward.

        Args:
            local: computes the forward's local moments; called only where several records are open.
        """
        if not self._open or not inside_backward():
            return None
        if len(self._open) == 1:
            return self._open[0]
        moments = local()
        nearest = min(self._open, key=lambda record: record.distance(moments))
        return nearest if nearest.distance(moments) < _AGREEMENT else None
