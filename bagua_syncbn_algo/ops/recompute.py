"""Reuse of a forward's statistics by activation checkpointing.

Activation checkpointing runs a layer's forward a second time, inside the backward pass. The recomputed forward must
normalize with the statistics of the first one: another exchange would cost a round, and the running statistics would
move twice.

The statistics of a forward live exactly as long as a recomputation can ask for them. Their owner is an object that the
autograd graph holds:

- ``checkpoint(..., use_reentrant=False)`` saves tensors through hooks. The owner is the unpack hook, which every
  tensor saved in the checkpointed region refers to.
- ``checkpoint(..., use_reentrant=True)``, and other autograd Functions that run layers without gradients, are nodes of
  the graph themselves. The owner is the node.

A forward that runs in neither of them cannot be recomputed, and nothing is kept for it.
"""

from __future__ import annotations

import sys
from typing import Any, Iterator, List, Optional, Sequence
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..compat import current_node, graph_task, saved_tensors_hooks, sequence_of
from .moments import GlobalMoments, LocalMoments

__all__ = ["RecomputeCache", "SavedStatistics", "inside_backward", "recomputation_owners"]

_AGREEMENT = 1e-4  # a recomputation repeats the same arithmetic; other batches differ by more, up to 10⁸ elements


def inside_backward() -> bool:
    """Whether the caller runs inside a backward pass of this thread; always ``False`` before torch 2.0."""
    return graph_task() != -1


def recomputation_owners() -> List[Any]:
    """Returns the objects of the autograd graph that may run the current forward a second time.

    The list is empty in an ordinary forward. The objects can be referred to weakly.
    """
    if not torch.is_grad_enabled():
        return list(_enclosing_functions())
    hooks = saved_tensors_hooks()
    return [] if hooks is None else [hooks[1]]


def _enclosing_functions() -> Iterator[Any]:
    """Yields the nodes of the autograd Functions whose ``forward`` is running, from the innermost outwards.

    PyTorch does not say which Functions are running. The context that each ``forward`` takes first is the node itself.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, BackwardCFunction):
                yield first
        frame = frame.f_back  # type: ignore[assignment]


class SavedStatistics:
    """Statistics of one training forward of a round.

    Args:
        local: moments of this rank, by which a recomputation is recognized.
        merged: moments of all ranks, which a recomputation normalizes with.
    """

    __slots__ = ("__weakref__", "_node", "_task", "_uses", "elements", "merged", "moments", "sequence")

    def __init__(self, local: Sequence[LocalMoments], merged: GlobalMoments) -> None:
        self.elements = tuple(part.elements for part in local)
        self.moments = _flat(local)
        self.merged = merged
        self.sequence = 0
        self._node: Any = None
        self._task, self._uses = -1, 0

    def belongs_to(self, node: Any, has_graph: bool) -> None:
        """Notes the autograd node of the forward, which must not be held: it holds these statistics.

        Args:
            node: the node.
            has_graph: whether the node is part of a graph; else it is freed with the forward.
        """
        if self.node is None:
            self._node = ref(node) if has_graph else None
            self.sequence = sequence_of(node)

    @property
    def node(self) -> Any:
        """The autograd node of the forward; ``None`` if it has none, or no longer."""
        return None if self._node is None else self._node()

    @property
    def is_over(self) -> bool:
        """Whether the forward had an autograd node, which is freed."""
        return self._node is not None and self._node() is None

    @property
    def uses(self) -> int:
        """How many recomputations have used these statistics in the current backward pass."""
        return self._uses if self._task == graph_task() else 0

    def use(self) -> None:
        """Counts a recomputation in the current backward pass."""
        self._task, self._uses = graph_task(), self.uses + 1


class RecomputeCache:
    """Statistics of the forwards of one round that may be recomputed."""

    def __init__(self) -> None:
        # By owner, in program order. Statistics never refer to their owner: an entry ends with it.
        self._saved: WeakKeyDictionary[Any, List[SavedStatistics]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._all())

    def save(self, statistics: SavedStatistics, owners: Sequence[Any]) -> None:
        """Keeps ``statistics`` as long as one of ``owners`` lives."""
        for owner in owners:
            earlier = self._saved.get(owner, [])
            if not isinstance(owner, BackwardCFunction):  # hooks may serve many steps
                earlier = [each for each in earlier if not each.is_over]
            self._saved[owner] = [*earlier, statistics]

    def match(self, local: Sequence[LocalMoments]) -> Optional[SavedStatistics]:
        """Returns the statistics of the forward that is being recomputed; ``None`` for an ordinary forward.

        A recomputation repeats the moments of its forward. Where several forwards have the same moments on this rank,
        the autograd graph tells in which checkpointed region the backward pass is, and the forwards of that region are
        taken in program order. A forward on new data has other moments: it is an ordinary one inside a backward, too.

        Args:
            local: moments of the layers in this forward.
        """
        if not self._saved or not inside_backward():
            return None
        node = current_node()
        own = self._saved.get(node, ()) if isinstance(node, BackwardCFunction) else ()  # others own nothing
        candidates = _agreeing(own, local)
        if not candidates:
            candidates = _agreeing(self._all(), local)
            if len(candidates) > 1 and node is not None:
                candidates = self._region_of(node, candidates)
        if not candidates:
            return None
        found = min(candidates, key=lambda statistics: statistics.uses)  # the first of those that were used least
        found.use()
        return found

    def _region_of(self, node: Any, candidates: Sequence[SavedStatistics]) -> List[SavedStatistics]:
        """Returns the candidates of the checkpointed region whose backward ``node`` is, in program order."""
        reachable, sequence = _reachable(node, candidates), sequence_of(node)
        if reachable:
            nearest = max(reachable, key=lambda each: each.sequence)
        else:  # of another branch: the latest one before the node, else the first one after it
            nearest = min(candidates, key=lambda each: (each.sequence > sequence, abs(each.sequence - sequence)))
        region = next(saved for saved in list(self._saved.values()) if nearest in saved)
        return [each for each in region if each in candidates]

    def _all(self) -> List[SavedStatistics]:
        """Returns all statistics, each once, the latest first."""
        unique = {id(each): each for saved in list(self._saved.values()) for each in saved}
        return sorted(unique.values(), key=lambda statistics: statistics.sequence, reverse=True)


def _agreeing(saved: Sequence[SavedStatistics], local: Sequence[LocalMoments]) -> List[SavedStatistics]:
    """Returns those with the moments ``local``: means in standard deviations, variances relative.

    A value that is not a number agrees with every other one.
    """
    elements = tuple(part.elements for part in local)
    candidates = [statistics for statistics in saved if statistics.elements == elements]
    if not candidates:
        return []
    means, variances = _flat(local)
    information = torch.finfo(means.dtype)
    all_means, all_variances = torch.stack([statistics.moments for statistics in candidates]).unbind(1)
    scale = all_variances.sqrt() + information.eps * all_means.abs() + information.tiny
    spread = scale.square() + information.tiny
    apart = torch.cat([(means - all_means).abs() / scale, (variances - all_variances).abs() / spread], dim=1)
    agrees = (apart.nan_to_num(0.0).amax(1) < _AGREEMENT).tolist()
    return [statistics for statistics, agreed in zip(candidates, agrees) if agreed]


def _reachable(node: Any, candidates: Sequence[SavedStatistics]) -> List[SavedStatistics]:
    """Returns those whose autograd node is ``node`` or one that ``node`` was computed from."""
    wanted = {each.node: each for each in candidates if each.node is not None}
    if not wanted:
        return []
    earliest = min(each.sequence for each in wanted.values())
    found, seen, stack = [], {node}, [node]
    while stack:
        current = stack.pop()
        if current in wanted:
            found.append(wanted[current])
        for earlier, _ in current.next_functions:
            if earlier is not None and earlier not in seen and sequence_of(earlier) >= earliest:
                seen.add(earlier)
                stack.append(earlier)
    return found


def _flat(local: Sequence[LocalMoments]) -> Tensor:
    """Returns means and variances of all layers, shape ``(2, ΣC)``."""
    dtype = torch.float64 if any(part.mean.dtype == torch.float64 for part in local) else torch.float32
    rows = [torch.cat([row.to(dtype) for row in rows]) for rows in zip(*((part.mean, part.variance) for part in local))]
    return torch.stack(rows)
