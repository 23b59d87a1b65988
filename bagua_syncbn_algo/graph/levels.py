"""The order of a traced forward in which layers of one dependency level meet in one round."""

from __future__ import annotations

from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Set, Tuple

import torch.nn.functional as F
from torch import fx, nn

from ..layer import SyncBatchNorm
from .ordering import Groups, attribute_of, dependencies
from .split_backward import apply_split, is_weighted, why_unsplittable
from .tracing import normalize_standalone

__all__ = ["LayerCall", "SplitCandidate", "Level", "split_candidates_of", "levels_of", "regroup"]


class LayerCall(NamedTuple):
    """One use of a layer in a graph."""

    node: fx.Node
    path: str  # of the layer in the region
    layer: SyncBatchNorm
    backward: bool  # whether its input needs a gradient


class SplitCandidate(NamedTuple):
    """A convolution or linear layer whose weight gradient a backward round can overlap with."""

    node: fx.Node
    path: str  # of the layer in the region
    shared: bool  # whether its weight is used in several places


class Level(NamedTuple):
    """Applications that share a round."""

    number: int
    members: Tuple[LayerCall, ...]  # in program order


def levels_of(graph: fx.Graph, module: nn.Module, uncoalesced: Sequence[str]) -> List[Level]:
    """Returns the rounds of a traced forward, in the order in which they must run.

    A layer's level is 1 + the most layers on any way to it, where a way follows values and what must keep its order:
    in-place operations and all that touches their memory, random numbers, opaque steps.

    Args:
        graph: of ``module``.
        module: where the graph's paths lead.
        uncoalesced: paths of layers that take no part.
    """
    before = dependencies(graph, module)
    level: Dict[fx.Node, int] = {}
    needs_gradient: Dict[fx.Node, bool] = {}
    part_of = _backward_parts(graph)
    last_of: Dict[int, int] = {}  # the level of a layer's latest application
    groups: Dict[Tuple[int, Any], List[LayerCall]] = {}
    for node in graph.nodes:
        level[node] = max((level[earlier] for earlier in before[node]), default=0)
        needs_gradient[node] = any(needs_gradient[i] for i in node.all_input_nodes) or _has_parameters(node, module)
        path = _layer_path(node, module)
        if path is None or path in uncoalesced:
            continue
        layer = module.get_submodule(path)
        assert isinstance(layer, SyncBatchNorm)
        if not layer.training:
            continue
        # A layer's running statistics move in program order: a later application is never in an earlier round.
        level[node] = max(level[node] + 1, last_of.get(id(layer), 0))
        last_of[id(layer)] = level[node]
        group = (level[node], (None if layer.process_group is None else id(layer.process_group), part_of[node]))
        input_ = node.all_input_nodes[-1]
        groups.setdefault(group, []).append(LayerCall(node, path, layer, needs_gradient[input_]))
    return [Level(number, tuple(members)) for (number, _), members in sorted(groups.items(), key=lambda g: g[0][0])]


def _backward_parts(graph: fx.Graph) -> Dict[fx.Node, int]:
    """Returns which nodes belong to one backward: what is connected by values other than inputs and weights.

    Two towers that meet nowhere may each have a backward of its own, with an optimizer's step in between; one round
    for layers of both would tie these together.
    """
    groups = Groups()
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            for value in node.all_input_nodes:
                if value.op not in ("placeholder", "get_attr"):
                    groups.join(node, value)
    numbers: Dict[Any, int] = {}
    return {node: numbers.setdefault(groups.root(node), len(numbers)) for node in graph.nodes}


def split_candidates_of(
    graph: fx.Graph, module: nn.Module, levels: Sequence[Level]
) -> Tuple[List[List[SplitCandidate]], Dict[str, str]]:
    """Returns the convolutions and linear layers that the backward round of each level can overlap with.

    These are the ones on a way from the level's outputs to the next level's inputs, through whatever: what such a layer
    gives back to its input the round must wait for, but not for its weight gradient.

    Returns:
        They, for each of ``levels``; and the paths of such layers that cannot be split, with the reason.
    """
    own = {member.node: index for index, level in enumerate(levels) for member in level.members}
    latest: Dict[fx.Node, int] = {}  # the last level, in the order in which they run, that a value depends on
    candidates: List[List[SplitCandidate]] = [[] for _ in levels]
    whole: Dict[str, str] = {}
    uses = _uses_of_weights(graph, module)
    for node in graph.nodes:
        index = latest[node] = own.get(node, max((latest[value] for value in node.all_input_nodes), default=-1))
        if index < 0 or not any(member.backward for member in levels[index].members):
            continue
        if node.op == "call_function" and node.target in _WEIGHTED_FUNCTIONS:
            places = list(node.meta.get("nn_module_stack", {"forward": None}))
            whole[str(places[-1])] = f"calls {node.target.__name__} as a function"
        if node.op != "call_module":
            continue
        path = str(node.target)
        layer = module.get_submodule(path)
        if not is_weighted(layer):
            continue
        reason = why_unsplittable(layer)
        if reason is None and (len(node.args) != 1 or node.kwargs):
            reason = "is called with more than its input"
        if reason is None and uses[path] > 2:
            reason = "shares a weight between more than two places, whose gradients are added up in their own order"
        if reason is not None:
            whole[path] = reason
        elif _has_parameters(node, module):
            candidates[index].append(SplitCandidate(node, path, uses[path] > 1))
    return candidates, whole


def _uses_of_weights(graph: fx.Graph, module: nn.Module) -> Dict[str, int]:
    """Returns, by a module's path, in how many places of the graph its most used parameter is used."""
    paths = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    uses = Counter(id(parameter) for path in paths for parameter in module.get_submodule(path).parameters())
    return {path: max((uses[id(p)] for p in module.get_submodule(path).parameters()), default=0) for path in paths}


_WEIGHTED_FUNCTIONS = (
    *(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear),
)


def regroup(
    graph: fx.Graph,
    module: nn.Module,
    levels: Sequence[Level],
    candidates: Sequence[Sequence[SplitCandidate]],
    call: Callable[[Level], Any],
) -> fx.Graph:
    """Returns the graph with every level of several layers, or with candidates, in one call.

    Args:
        graph: of ``module``.
        module: where the graph's paths lead.
        levels: of the graph.
        candidates: for each level those whose weight gradients its backward round overlaps with.
        call: returns the function that runs a level. The function takes the layers, the inputs and the candidates'
            modules; it returns the outputs, and the :class:`DeferrableLayers` that :func:`apply_split` takes.
    """
    split_with: Dict[fx.Node, Tuple[fx.Node, int]] = {}  # the DeferrableLayers of its round, and its index there
    before = dependencies(graph, module)
    position = {node: index for index, node in enumerate(graph.nodes)}
    done: Set[fx.Node] = set()
    copies: Dict[fx.Node, fx.Node] = {}
    new = fx.Graph()

    def copy(node: fx.Node) -> None:
        if node in split_with:
            arguments = (new.get_attr(str(node.target)), copies[node.all_input_nodes[0]], *split_with[node])
            copies[node] = new.call_function(apply_split, arguments)
        else:
            copies[node] = new.node_copy(node, lambda earlier: copies[earlier])
        done.add(node)

    def emit_before(nodes: Sequence[fx.Node]) -> None:
        wanted: Set[fx.Node] = set()
        stack = [earlier for node in nodes for earlier in before[node]]
        while stack:
            node = stack.pop()
            if node not in done and node not in wanted:
                wanted.add(node)
                stack.extend(before[node])
        for node in sorted(wanted, key=position.__getitem__):
            copy(node)

    for node in graph.nodes:
        if node.op == "placeholder":
            copy(node)
    for level, overlap_with in zip(levels, candidates):
        nodes = [member.node for member in level.members]
        emit_before(nodes)
        if len(nodes) == 1 and not overlap_with:
            copy(nodes[0])
            continue
        layers = tuple(new.get_attr(member.path) for member in level.members)
        inputs = tuple(copies[node.all_input_nodes[-1]] for node in nodes)
        modules = tuple(new.get_attr(candidate.path) for candidate in overlap_with)
        together = new.call_function(call(level), (layers, inputs, modules))
        outputs = new.call_function(_item, (together, 0))
        for index, node in enumerate(nodes):
            copies[node] = new.call_function(_item, (outputs, index))
            done.add(node)
        if overlap_with:
            deferrable = new.call_function(_item, (together, 1))
            split_with.update((candidate.node, (deferrable, place)) for place, candidate in enumerate(overlap_with))
    for node in graph.nodes:
        if node not in done:
            copy(node)
    return new


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


def _layer_path(node: fx.Node, module: nn.Module) -> Any:
    """Returns the path of the layer that ``node`` applies, or ``None``."""
    if node.op == "call_function" and node.target is normalize_standalone:
        return node.args[0].target  # type: ignore[union-attr]
    if node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), SyncBatchNorm):
        layer = module.get_submodule(str(node.target))
        if type(layer).forward is SyncBatchNorm.forward:
            return str(node.target)
    return None


def _has_parameters(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return any(parameter.requires_grad for parameter in module.get_submodule(str(node.target)).parameters())
    if node.op == "get_attr":
        value = attribute_of(module, str(node.target))
        return isinstance(value, nn.Parameter) and value.requires_grad
    return False
