"""A pass of Inductor over graphs with rounds of statistics: their order, their overlap, and what checkpointing keeps.

The operators of a round have no effects that a compiler knows, so that Inductor may reorder independent rounds, and may
repeat them in backward. The pass changes a graph, before it is partitioned into forward and backward, in three ways:

- Each launch comes after the wait of the previous round. The order of rounds is then that of an eager step, also if a
  rank has another graph than the others, or none.
- The backward of a convolution is split into input gradient and weight gradient. The wait of a backward round comes
  after the weight gradients that do not need its result.
- Activation checkpointing keeps the statistics of forward rounds.

Order is an argument: the operators take tensors that they do not read (``after``). The order of the nodes alone is not
enough, because Inductor's scheduler changes it. Without the pass, results are the same.

This module imports Inductor, which takes seconds. Only code that runs while Dynamo traces may import it.
"""

from __future__ import annotations

import hashlib
import operator
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import torch
import torch._inductor.config as inductor_config
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.utils.checkpoint import CheckpointPolicy

from ..comm.wire import FORWARD
from ..ops.operators import LAUNCH, WAIT, site_of, sites_without_overlap

__all__ = ["RoundsPass", "install"]

# Each round, also those with an effect, which are arguments of `with_effects`.
_LAUNCHES = (LAUNCH, torch.ops.bagua_syncbn.launch_kept.default)
_WAITS = (WAIT, torch.ops.bagua_syncbn.wait_kept.default)
_WITH_EFFECTS: Any = torch.ops.higher_order.with_effects
_CONVOLUTION = torch.ops.aten.convolution_backward.default
_PRODUCTS = (torch.ops.aten.mm.default,)
_VIEWS = tuple(
    getattr(torch.ops.aten, name).default for name in ("t", "permute", "view", "reshape", "_unsafe_view", "alias")
)


def install() -> None:
    """Adds the pass to Inductor's configuration (``joint_custom_pre_pass``), if it is not there.

    A pass that is set already runs before this one. A pass that is set later, or in ``torch.compile(options=...)``,
    replaces this one for the graphs that are compiled with it: rounds that are independent of each other may then be
    sent in another order than in an eager step. The next trace of a converted model adds this pass to a setting of
    ``torch._inductor.config``, but not to ``options``.

    The setting belongs to the current thread, like all settings of Inductor. Forward and backward are changed at once,
    when the forward is compiled, so that the thread that compiles the backward does not matter.
    """
    passes = _as_list(inductor_config.joint_custom_pre_pass)
    if not any(isinstance(each, RoundsPass) for each in passes):
        # One pass and not a list, which the configuration does not accept in all versions.
        inductor_config.joint_custom_pre_pass = RoundsPass(passes)


def _as_list(setting: Any) -> List[Any]:
    if setting is None:
        return []
    return list(setting) if isinstance(setting, (list, tuple)) else [setting]


class RoundsPass(CustomGraphPass):
    """Orders the rounds of a graph, and overlaps backward rounds with weight gradients.

    Args:
        others: passes that run before.
    """

    def __init__(self, others: Sequence[Callable[[fx.Graph], None]] = ()) -> None:
        self.others = list(others)

    def __call__(self, graph: fx.Graph) -> None:
        """Changes a graph in place. A graph without rounds is left as it is."""
        for other in self.others:
            other(graph)
        if not any(_operator(node) in _LAUNCHES for node in graph.nodes):
            return
        tangents = [node for node in graph.nodes if node.op == "placeholder" and "tangents" in str(node.target)]
        _keep_statistics(graph)
        # A backward round cannot come after a forward round by an argument, which would be kept for the backward.
        for rounds in _rounds_by_phase(graph, bool(tangents)):
            _chain(graph, rounds)
        if tangents:
            _overlap(graph, _reached_from(graph, tangents))
        graph.lint()

    def uuid(self) -> Optional[Any]:
        """Returns an identifier for Inductor's cache; ``None``, which disables the cache, if another pass has none."""
        found: List[Any] = [hashlib.sha256(Path(__file__).read_bytes()).hexdigest(), *sites_without_overlap()]
        for other in self.others:
            identifier = other.uuid() if isinstance(other, CustomGraphPass) else None
            if not identifier:
                return None
            found.append(identifier)
        return tuple(found)


def _operator(node: fx.Node) -> Any:
    """Returns the operator of a node, also of one with an effect."""
    return node.args[1] if node.target is _WITH_EFFECTS else node.target


def _position(node: fx.Node, name: str) -> int:
    """Returns the position of an argument of a launch or a wait. An effect has a token and the operator before."""
    names = [each.name for each in _operator(node)._schema.arguments]
    return names.index(name) + (2 if node.target is _WITH_EFFECTS else 0)


def _argument(node: fx.Node, name: str) -> Any:
    """Returns an argument of a launch or a wait."""
    return node.kwargs[name] if name in node.kwargs else node.args[_position(node, name)]


def _come_after(node: fx.Node, tensors: Sequence[fx.Node]) -> None:
    """Makes a launch or a wait come after the computation of tensors."""
    before: List[Any] = list(_argument(node, "after"))
    before.extend(tensor for tensor in tensors if tensor not in before)
    node.update_arg(_position(node, "after"), before)
    # The arguments of the traced call. Inductor would cut the list of tensors to the length that it had then.
    node.meta.pop("eager_input_vals", None)


def _wait_of(launch: fx.Node) -> Optional[fx.Node]:
    users = list(launch.users)
    if launch.target is _WITH_EFFECTS:  # returns a token, and the handle
        users = [user for item in users if item.target is operator.getitem for user in item.users]
    return next((user for user in users if _operator(user) in _WAITS), None)


def _item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """Returns an element of the tuple that a node returns."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with graph.inserting_after(node):
        created = graph.call_function(operator.getitem, (node, index))
    created.meta = {key: value for key, value in node.meta.items() if key not in ("val", "tensor_meta")}
    created.meta["val"] = node.meta["val"][index]
    return created


def _rounds_by_phase(graph: fx.Graph, by_phase: bool) -> List[List[Tuple[fx.Node, fx.Node]]]:
    """Returns launch and wait of all rounds in graph order: all in one list, or one list for each phase."""
    found: Dict[Any, List[Tuple[fx.Node, fx.Node]]] = {}
    for node in graph.nodes:
        wait = _wait_of(node) if _operator(node) in _LAUNCHES else None
        if wait is not None:
            found.setdefault(_argument(node, "phase") if by_phase else None, []).append((node, wait))
    return list(found.values())


def _keep_statistics(graph: fx.Graph) -> None:
    """Excludes forward rounds from what the partitioner may compute again in backward.

    A repeated round would be a message that an eager rank does not send.
    """
    for node in graph.nodes:
        if node.target in (LAUNCH, WAIT) and _argument(node, "phase") == FORWARD:
            for each in (node, *(user for user in node.users if user.target is operator.getitem)):
                each.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _chain(graph: fx.Graph, rounds: Sequence[Tuple[fx.Node, fx.Node]]) -> None:
    """Makes each launch come after the wait of the round before."""
    position = _positions(graph)
    for (_, wait), (launch, _) in zip(rounds, rounds[1:]):
        if position[wait] < position[launch]:
            # The payloads: the counts of a backward round have no elements.
            _come_after(launch, [_item(graph, wait, 2 if wait.target is _WITH_EFFECTS else 1)])


def _positions(graph: fx.Graph) -> Dict[fx.Node, int]:
    return {node: index for index, node in enumerate(graph.nodes)}


def _reached_from(graph: fx.Graph, sources: Sequence[fx.Node]) -> Set[fx.Node]:
    """Returns the nodes that depend on sources, with the sources."""
    reached = set(sources)
    for node in graph.nodes:
        if any(each in reached for each in node.all_input_nodes):
            reached.add(node)
    return reached


def _needed_for(targets: Sequence[fx.Node]) -> Set[fx.Node]:
    """Returns the nodes that targets depend on, with the targets."""
    found, pending = set(targets), list(targets)
    while pending:
        for each in pending.pop().all_input_nodes:
            if each not in found:
                found.add(each)
                pending.append(each)
    return found


def _overlap(graph: fx.Graph, backward: Set[fx.Node]) -> None:
    """Moves weight gradients between launch and wait of the backward round that needs the input gradient.

    Only those of the layers next to the round: each one that is delayed keeps the activations that it reads.
    """
    rounds = [node for node in graph.nodes if node.target is LAUNCH and node in backward]
    launches = [launch for launch in rounds if site_of(_argument(launch, "key")).overlap]
    layers = {launch: _layers_before(launch, backward) for launch in launches}
    products = [node for node in graph.nodes if node.target in _PRODUCTS and node in backward]
    gradients: Dict[fx.Node, List[fx.Node]] = {}
    for launch in launches:
        found = [_split(graph, layer) for layer in layers[launch] if layer.target is _CONVOLUTION]
        sources = {_without_views(layer.args[0]) for layer in layers[launch] if layer.target in _PRODUCTS}
        found += [node for node in products if _without_views(node.args[0]) in sources]
        gradients[launch] = [node for node in found if node is not None]
    needed, position = _needed_for(rounds), _positions(graph)
    taken: Set[fx.Node] = set()
    for launch in launches:
        wait = _wait_of(launch)
        delayed = [node for node in gradients[launch] if node not in needed and node not in taken]
        delayed = [node for node in delayed if position[node] < position[launch]]
        if wait is None or not delayed:
            continue
        taken.update(delayed)
        moved = set(delayed)
        between, node = [], min(delayed, key=position.__getitem__)
        while node is not wait:
            between.append(node)
            node = node.next
        for node in between:
            if node in moved or any(each in moved for each in node.all_input_nodes):
                moved.add(node)  # also what depends on a gradient, such as its cast
                wait.prepend(node)
        _come_after(wait, [tensor for each in delayed for tensor in _tensors(each)])


def _layers_before(launch: fx.Node, backward: Set[fx.Node]) -> List[fx.Node]:
    """Returns the backward nodes of the convolutions and linear layers whose input gradient a round needs first."""
    found: List[fx.Node] = []
    seen, pending = {launch}, [launch]
    while pending:
        for node in pending.pop().all_input_nodes:
            if node in seen or node not in backward or node.target is WAIT:
                continue
            seen.add(node)
            (found if node.target in (_CONVOLUTION, *_PRODUCTS) else pending).append(node)
    return found


def _without_views(value: Any) -> Any:
    """Returns the node whose result a node shows in another shape; a linear layer's weight gradient transposes it."""
    while isinstance(value, fx.Node) and value.target in _VIEWS:
        value = value.args[0]
    return value


def _tensors(node: fx.Node) -> List[fx.Node]:
    """Returns the tensors that a gradient node computes."""
    if node.target is _CONVOLUTION:
        return [user for user in node.users if user.target is operator.getitem]
    return [node]


def _split(graph: fx.Graph, node: fx.Node) -> Optional[fx.Node]:
    """Splits the backward of a convolution into the input gradient and the others; returns the node of the others.

    Returns ``None`` if it does not compute both.
    """
    *arguments, mask = node.args
    items = [user for user in node.users if user.target is operator.getitem and user.args[1] != 0]
    if not mask[0] or not items or node.kwargs:  # type: ignore[index]
        return None
    node.args = (*arguments, [True, False, False])
    with graph.inserting_after(node):
        rest = graph.call_function(_CONVOLUTION, (*arguments, [False, *mask[1:]]))  # type: ignore[index,misc]
    values = node.meta["val"]
    rest.meta = dict(node.meta)
    node.meta["val"], rest.meta["val"] = (values[0], None, None), (None, *values[1:])
    for item in items:
        item.replace_input_with(node, rest)
    return rest
