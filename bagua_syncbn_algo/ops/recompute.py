"""Reuse of the statistics of a forward by activation checkpointing.

Activation checkpointing runs the forward of a layer a second time, inside the backward pass. The recomputed forward
must normalize with the statistics of the first one. Another exchange would cost a round, and the running statistics
would be updated twice.

The statistics of a forward are kept exactly as long as a recomputation may need them. Their owner is an object that the
autograd graph references:

- ``checkpoint(..., use_reentrant=False)`` saves tensors through hooks. The owner is the unpack hook, which every
  tensor saved in the checkpointed region references.
- ``checkpoint(..., use_reentrant=True)`` is itself a node of the graph, as are other autograd Functions that run layers
  without gradients. The owner is the node.

A forward outside of both cannot be recomputed, and its statistics are not kept.
"""

from __future__ import annotations

import sys
from typing import Any, Iterator, List, Optional, Sequence
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..compat import current_node, graph_task, saved_tensors_hooks, sequence_of, without_modes
from .moments import LocalMoments

__all__ = ["RecomputeCache", "SavedStatistics", "inside_backward", "recomputation_owners"]

# Relative. A recomputation repeats the same arithmetic. Moments of other batches of up to 10⁸ elements differ by more.
_TOLERANCE = 1e-4
# Forwards without a graph, as those of frozen layers, that are kept under one hook. A checkpointed region has a hook of
# its own, and runs a layer fewer times. A hook such as that of `save_on_cpu` may be the same for a whole training.
_MOST_WITHOUT_GRAPH = 16


def inside_backward() -> bool:
    """Returns whether the caller runs inside a backward pass of this thread; always ``False`` before torch 2.0."""
    return graph_task() != -1


def recomputation_owners() -> List[Any]:
    """Returns the objects of the autograd graph that may run the current forward a second time.

    The list is empty in a forward that cannot be recomputed. The objects support weak references.
    """
    owners, hooks = list(_enclosing_functions()), saved_tensors_hooks()
    return owners if hooks is None or not _can_own(hooks[1]) else [*owners, hooks[1]]


def _can_own(hook: Any) -> bool:
    """Returns whether entries of a dictionary can end with ``hook``. Built-in functions cannot recompute a forward."""
    try:
        return ref(hook) is not None and hash(hook) is not None
    except TypeError:
        return False


def _enclosing_functions() -> Iterator[Any]:
    """Yields the nodes of the autograd Functions whose ``forward`` is running, the innermost first.

    PyTorch has no list of running Functions, so this searches the call stack. The first argument of each ``forward`` is
    its context, which is the node.
    """
    frame = sys._getframe(1)
    # Reading a frame's local variables keeps them until the frame ends. Few Functions enable gradients, and each module
    # has a `forward` with `self`.
    other = "self" if torch.is_grad_enabled() else ""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != other:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, BackwardCFunction):
                yield first
        frame = frame.f_back  # type: ignore[assignment]


class SavedStatistics:
    """Statistics of one training forward of a round.

    Args:
        local: the moments of this rank, which identify a recomputation.
        statistics: the merged statistics, with which a recomputation normalizes.

    Attributes:
        elements: the elements per channel on this rank, for each layer.
        moments: means and variances of this rank, shape ``(2, ΣC)``.
        statistics: the argument of the same name.
        sequence: the position of the forward's autograd node in program order.
    """

    __slots__ = ("__weakref__", "_node", "_task", "_uses", "elements", "moments", "sequence", "statistics")

    def __init__(self, local: Sequence[LocalMoments], statistics: Any) -> None:
        self.elements = tuple(part.elements for part in local)
        self.moments = _stack_moments(local)
        self.statistics = statistics
        self.sequence = 0
        self._node: Any = None
        self._task, self._uses = -1, 0

    def set_node(self, node: Any, has_graph: bool) -> None:
        """Sets the autograd node of the forward. A call has no effect while the node of an earlier call exists.

        Args:
            node: the node. It holds these statistics, so the reference to it is weak.
            has_graph: whether the node is part of a graph. If not, it is freed when the forward ends.
        """
        if self.node is None:
            self._node = ref(node) if has_graph else None
            self.sequence = sequence_of(node)

    @property
    def node(self) -> Any:
        """The autograd node of the forward; ``None`` if there is none or it is freed."""
        return None if self._node is None else self._node()

    @property
    def node_is_freed(self) -> bool:
        """Whether the forward had an autograd node that is freed."""
        return self._node is not None and self._node() is None

    @property
    def uses(self) -> int:
        """The number of recomputations that used these statistics in the current backward pass."""
        return self._uses if self._task == graph_task() else 0

    def count_use(self) -> None:
        """Counts a recomputation in the current backward pass."""
        self._task, self._uses = graph_task(), self.uses + 1


class RecomputeCache:
    """Statistics of the forwards of one round that may be recomputed. Its length is the number of saved statistics."""

    def __init__(self) -> None:
        # By owner, in program order. Statistics never reference their owner, so an entry is freed with its owner.
        self._saved: WeakKeyDictionary[Any, List[SavedStatistics]] = WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self._all())

    def save(self, statistics: SavedStatistics, owners: Sequence[Any]) -> None:
        """Keeps ``statistics`` as long as one of ``owners`` exists."""
        for owner in owners:
            earlier = self._saved.get(owner, [])
            if not isinstance(owner, BackwardCFunction):  # hooks may be reused in many steps
                earlier = _possibly_needed(earlier)
            self._saved[owner] = [*earlier, statistics]

    def match(self, local: Sequence[LocalMoments]) -> Optional[SavedStatistics]:
        """Returns the statistics of the forward that is being recomputed; ``None`` for an ordinary forward.

        A recomputation has the moments of its first forward. If several forwards have the same moments on this rank,
        the autograd graph identifies the checkpointed region that the backward pass is in. The forwards of that region
        are then matched in program order. A forward on new data inside a backward has other moments and is ordinary.

        Args:
            local: the moments of each layer in this forward.
        """
        if not self._saved or not inside_backward():
            return None
        node = current_node()
        own = self._saved.get(node, ()) if isinstance(node, BackwardCFunction) else ()  # other nodes own no statistics
        # Selective checkpointing expects the operators of the first forward, which compares nothing.
        with without_modes():
            candidates = _matching(own, local) or _matching(self._all(), local)
        if len(candidates) > 1 and node is not None and candidates[0] not in own:
            candidates = self._region_of(node, candidates)
        if not candidates:
            return None
        chosen = min(candidates, key=lambda statistics: statistics.uses)  # the first of the least used
        chosen.count_use()
        return chosen

    def _region_of(self, node: Any, candidates: Sequence[SavedStatistics]) -> List[SavedStatistics]:
        """Returns the candidates of the checkpointed region that ``node`` belongs to, in program order."""
        reachable, sequence = _reachable(node, candidates), sequence_of(node)
        if reachable:
            nearest = max(reachable, key=lambda each: each.sequence)
        else:  # all are in other branches: the latest one before the node, else the first one after it
            nearest = min(candidates, key=lambda each: (each.sequence > sequence, abs(each.sequence - sequence)))
        region = next(saved for saved in list(self._saved.values()) if nearest in saved)
        return [each for each in region if each in candidates]

    def _all(self) -> List[SavedStatistics]:
        """Returns all statistics without duplicates, the latest first."""
        unique = {id(each): each for saved in list(self._saved.values()) for each in saved}
        return sorted(unique.values(), key=lambda statistics: statistics.sequence, reverse=True)


def _possibly_needed(saved: Sequence[SavedStatistics]) -> List[SavedStatistics]:
    """Returns the statistics whose graph exists, and the latest ones of forwards without a graph."""
    alive = [each for each in saved if not each.node_is_freed]
    latest = {id(each) for each in [each for each in alive if each.node is None][-_MOST_WITHOUT_GRAPH:]}
    return [each for each in alive if each.node is not None or id(each) in latest]


def _matching(saved: Sequence[SavedStatistics], local: Sequence[LocalMoments]) -> List[SavedStatistics]:
    """Returns the statistics of ``saved`` whose local moments equal ``local`` within the tolerance.

    Means are compared relative to the standard deviation, variances relative to the variance. NaN equals every value.
    """
    elements = tuple(part.elements for part in local)
    candidates = [statistics for statistics in saved if statistics.elements == elements]
    if not candidates:
        return []
    means, variances = _stack_moments(local)
    info = torch.finfo(means.dtype)
    all_means, all_variances = torch.stack([statistics.moments for statistics in candidates]).unbind(1)
    scale = all_variances.sqrt() + info.eps * all_means.abs() + info.tiny
    spread = scale.square() + info.tiny
    deviations = torch.cat([(means - all_means).abs() / scale, (variances - all_variances).abs() / spread], dim=1)
    matches = (deviations.nan_to_num(0.0).amax(1) < _TOLERANCE).tolist()
    return [statistics for statistics, is_match in zip(candidates, matches) if is_match]


def _reachable(node: Any, candidates: Sequence[SavedStatistics]) -> List[SavedStatistics]:
    """Returns the candidates whose autograd node is ``node`` or reachable from it, towards the inputs."""
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


def _stack_moments(local: Sequence[LocalMoments]) -> Tensor:
    """Returns the means and variances of all layers, shape ``(2, ΣC)``."""
    dtype = torch.float64 if any(part.mean.dtype == torch.float64 for part in local) else torch.float32
    rows = [torch.cat([row.to(dtype) for row in rows]) for rows in zip(*((part.mean, part.variance) for part in local))]
    return torch.stack(rows)
