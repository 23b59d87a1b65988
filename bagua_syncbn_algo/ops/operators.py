"""Operators for graphs of ``torch.compile``: the start of a round of statistics, and the wait for its result.

A graph refers to a round by a string, the key of its :class:`Site`. The site knows the layers and finds their channel
in each call, so that a compiled step sends the same messages as an eager step: a rank may run its graph while another
rank runs the same step eagerly. The header of a message, and thus the comparison of layers and ranks, is the channel's.

The operators have no side effects that a compiler must know: a round whose result is not used may be removed. `launch`
copies its message, because a compiler reuses memory, and `wait` returns new tensors.
"""

from __future__ import annotations

import weakref
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from ..comm.wire import FORWARD, SyncPoint
from ..compat import graph_task, keep_operator
from .exact import constant, require_two_values

__all__ = ["LAUNCH", "WAIT", "Site", "add_site", "operators_for", "site_of", "sites_without_overlap"]


class Site:
    """One round of a model, as the operators find it.

    Args:
        layers: the names of the layers, for errors.
        bind: returns the channel and the sync point of the round; it may create a group, as in an eager forward.
        after_launch: called after each forward round with the channel, the sync point and the rounds before it.
        overlap: whether the backward round overlaps with weight gradients.
    """

    def __init__(
        self,
        layers: Sequence[str],
        bind: Callable[[torch.device], Tuple[Any, SyncPoint]],
        after_launch: Callable[[Any, SyncPoint, int], None],
        overlap: bool = True,
    ) -> None:
        self.layers, self.bind, self.after_launch, self.overlap = layers, bind, after_launch, overlap
        self.pending: Dict[Tuple[str, int], _Pending] = {}  # by key and phase
        self._keys: List[str] = []
        self._trace: Callable[[], Any] = lambda: None
        self._uses = 0

    def next_key(self, name: str, trace: Any) -> str:
        """Returns a key for a round in a graph.

        The rounds of one graph have different keys. A compiler merges operators with equal arguments, such as the two
        rounds of a layer that is applied twice to one input, for which an eager rank would wait.

        Args:
            name: the beginning of the key.
            trace: the context of the current trace.
        """
        if self._trace() is not trace:
            self._trace, self._uses = weakref.ref(trace), 0
        if self._uses == len(self._keys):
            self._keys.append(add_site(name, self))
        self._uses += 1
        return self._keys[self._uses - 1]


class _Pending(NamedTuple):
    """A round that has been launched."""

    arrived: Callable[[], List[Tensor]]
    elements: Sequence[int]


_sites: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()


def add_site(name: str, site: Site) -> str:
    """Registers a site; returns its key, which is equal in the next process that runs the same program."""
    number, key = 1, name
    while key in _sites:
        number += 1
        key = f"{name} ({number})"
    _sites[key] = site
    return key


def site_of(key: str) -> Site:
    """Returns a site.

    Raises:
        RuntimeError: if the model has been freed.
    """
    site = _sites.get(key)
    if site is None:
        raise RuntimeError(
            f"expected the model of a compiled graph to exist (got none with {key}, which has been freed); compile the "
            "model again"
        )
    return site


def sites_without_overlap() -> List[str]:
    """Returns the keys of the sites whose backward rounds do not overlap."""
    return sorted(key for key, site in list(_sites.items()) if not site.overlap)


def _launch(payload: Tensor, elements: Sequence[int], after: Sequence[Tensor], key: str, phase: int) -> Tensor:
    """Starts a round; see the schema below."""
    site = site_of(key)
    channel, point = site.bind(payload.device)
    before = channel.rounds
    parts = [payload]
    if phase == FORWARD:
        parts = [constant(tuple(map(int, elements)), torch.int64, payload.device), payload]
    # A round of a step that has failed before its wait may be there still: the new one takes its place.
    site.pending[key, phase] = _Pending(channel.launch(point, phase, parts), elements)
    if phase == FORWARD:
        site.after_launch(channel, point, before)
    return payload.new_empty(0)


def _wait(
    handle: Tensor, after: Sequence[Tensor], ranks: int, layers: int, length: int, key: str, phase: int
) -> Tuple[Tensor, Tensor]:
    """Waits for a round; see the schema below."""
    site = site_of(key)
    pending = site.pending.pop((key, phase), None)
    if pending is None:
        raise RuntimeError(
            f"expected a launched round of {key} to wait for (got none: the compiler has repeated the wait alone); "
            "keep the result of the operator bagua_syncbn::wait in the policy of activation checkpointing"
        )
    gathered = pending.arrived()
    found = len(gathered[-1])
    if found != ranks:
        raise RuntimeError(
            f"expected {ranks} ranks at {key}, as in the step that was compiled (got {found}); call "
            "torch._dynamo.reset() after a change of the process group"
        )
    if phase != FORWARD:
        return handle.new_empty((ranks + 1, 0), dtype=torch.int64), gathered[-1].clone()
    require_two_values(pending.elements, gathered[0], site.layers)
    # In backward, this forward is a recomputation of activation checkpointing around the graph.
    counted = constant((int(graph_task() == -1),) * layers, torch.int64, handle.device)
    return torch.cat([gathered[0], counted[None]]), gathered[-1].clone()


def _fake_launch(payload: Tensor, elements: Any, after: Any, key: str, phase: int) -> Tensor:
    return payload.new_empty(0)


def _fake_wait(
    handle: Tensor, after: Any, ranks: int, layers: int, length: Any, key: str, phase: int
) -> Tuple[Tensor, Tensor]:
    counts = layers if phase == FORWARD else 0
    return handle.new_empty((ranks + 1, counts), dtype=torch.int64), handle.new_empty((ranks, length))


# payload: the statistics of this rank. elements: per channel, of each layer. after: tensors that must be computed
# before, which are not read. handle: the result of `launch`. The result of `wait`: the elements on each rank and, in
# the last row, whether the running statistics count this batch, shape (W + 1, L); and the payloads, (W, length).
_library = torch.library.Library("bagua_syncbn", "DEF")
# Messages have one dimension, and the tensors of `after` are not read: their layout is the compiler's choice. Without
# the tag it would copy a weight gradient to the strides of the traced call.
_ANY_LAYOUT = tuple(filter(None, [getattr(torch.Tag, "flexible_layout", None)]))
_LAUNCH_SCHEMA = "(Tensor payload, SymInt[] elements, Tensor[] after, str key, int phase) -> Tensor"
_WAIT_SCHEMA = (
    "(Tensor handle, Tensor[] after, int ranks, int layers, int length, str key, int phase) -> (Tensor, Tensor)"
)
for _suffix in ("", "_kept"):
    _library.define(f"launch{_suffix}{_LAUNCH_SCHEMA}", tags=_ANY_LAYOUT)
    _library.define(f"wait{_suffix}{_WAIT_SCHEMA}", tags=_ANY_LAYOUT)
for _name, _function, _fake in (
    ("launch", _launch, _fake_launch),
    ("wait", _wait, _fake_wait),
    ("launch_kept", _launch, _fake_launch),
    ("wait_kept", _wait, _fake_wait),
):
    for _device in ("CPU", "CUDA"):
        _library.impl(_name, _function, _device)
    torch.library.register_fake(f"bagua_syncbn::{_name}", _fake)
    if _name.endswith("kept"):
        keep_operator(f"bagua_syncbn::{_name}")

LAUNCH: Any = torch.ops.bagua_syncbn.launch.default
WAIT: Any = torch.ops.bagua_syncbn.wait.default


def operators_for(elements: Sequence[Any]) -> Tuple[Any, Any]:
    """Returns the operators to launch a round and to wait for it.

    Results that follow from an empty shard are empty or zero, so that a compiler would remove the round, for which the
    other ranks wait. For them the operators have an effect. Other rounds do without: AOTAutograd does not support
    effects inside of activation checkpointing.

    Args:
        elements: the elements per channel of each layer on this rank.
    """
    kept = any(isinstance(each, int) and each == 0 for each in elements)
    operators = torch.ops.bagua_syncbn
    if kept:
        return operators.launch_kept.default, operators.wait_kept.default
    return LAUNCH, WAIT
