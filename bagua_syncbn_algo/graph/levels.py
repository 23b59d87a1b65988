"""Dependency levels of a traced forward, and the regrouped graph in which the layers of one level share a round."""

from __future__ import annotations

from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Set, Tuple

import torch.nn.functional as F
from torch import fx, nn

from ..layer import SyncBatchNorm
from .module_state import attribute_of
from .ordering import DisjointSets, dependencies
from .split_backward import apply_split, is_weighted, why_unsplittable
from .tracing import normalize_standalone

__all__ = ["LayerCall", "SplitCandidate", "Level", "split_candidates_of", "levels_of", "regroup"]


class LayerCall(NamedTuple):
    """One call of a SyncBatchNorm layer in a graph."""

    node: fx.Node
    path: str  # path of the layer in the traced module
    layer: SyncBatchNorm
    backward: bool  # whether the input of the call requires a gradient


class SplitCandidate(NamedTuple):
    """A convolution or linear layer whose weight gradient can overlap with a backward round."""

    node: fx.Node
    path: str  # path of the layer in the traced module
    shared: bool  # whether the weight of the layer is used in several places


class Level(NamedTuple):
    """Layer calls that share a round."""

    number: int
    members: Tuple[LayerCall, ...]  # in program order


def levels_of(graph: fx.Graph, module: nn.Module, uncoalesced: Sequence[str]) -> List[Level]:
    """Returns the rounds of a traced forward, in the order in which they must run.

    The level of a layer call is 1 + the largest number of layer calls on a path to it. Paths follow
    :func:`~bagua_syncbn_algo.graph.ordering.dependencies`. Calls of one level share a round if they have the same
    process group and are in one connected component (see :func:`_backward_components`).

    Args:
        graph: a traced forward of ``module``.
        module: the module that contains the paths in ``graph``.
        uncoalesced: paths of layers to omit.
    """
    before = dependencies(graph, module)
    level: Dict[fx.Node, int] = {}
    needs_gradient: Dict[fx.Node, bool] = {}
    component_of = _backward_components(graph)
    last_level: Dict[int, int] = {}  # by the id of a layer: the level of its latest call
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
        # Running statistics are updated in program order: a later call of a layer is never in an earlier round.
        level[node] = max(level[node] + 1, last_level.get(id(layer), 0))
        last_level[id(layer)] = level[node]
        group = (level[node], (None if layer.process_group is None else id(layer.process_group), component_of[node]))
        input_ = node.all_input_nodes[-1]
        groups.setdefault(group, []).append(LayerCall(node, path, layer, needs_gradient[input_]))
    return [Level(number, tuple(members)) for (number, _), members in sorted(groups.items(), key=lambda g: g[0][0])]


def _backward_components(graph: fx.Graph) -> Dict[fx.Node, int]:
    """Returns the connected component of each node, as a number. Inputs and weights do not connect nodes.

    Components have no intermediate value in common. Each may have a separate backward pass, with an optimizer step in
    between. A round with layers of two components would require a common backward pass.
    """
    components = DisjointSets()
    for node in graph.nodes:
        if node.op not in ("placeholder", "get_attr", "output"):
            for value in node.all_input_nodes:
                if value.op not in ("placeholder", "get_attr"):
                    components.join(node, value)
    numbers: Dict[Any, int] = {}
    return {node: numbers.setdefault(components.root(node), len(numbers)) for node in graph.nodes}


def split_candidates_of(
    graph: fx.Graph, module: nn.Module, levels: Sequence[Level]
) -> Tuple[List[List[SplitCandidate]], Dict[str, str]]:
    """Returns the convolutions and linear layers whose weight gradients can overlap with the round of each level.

    A candidate depends on the outputs of its level and of no later level. The round needs the input gradient of such a
    layer, but not the weight gradient.

    Args:
        graph: a traced forward of ``module``.
        module: the module that contains the paths in ``graph``.
        levels: the levels of ``graph``, in the order in which they run.

    Returns:
        The candidates of each of ``levels``. Then, with the reason, the paths of layers that cannot be split and of
        modules that call a convolution or linear layer as a function.
    """
    level_index = {member.node: index for index, level in enumerate(levels) for member in level.members}
    latest: Dict[fx.Node, int] = {}  # index of the last level on which a value depends; -1 for none
    candidates: List[List[SplitCandidate]] = [[] for _ in levels]
    unsplit: Dict[str, str] = {}
    uses = _uses_of_weights(graph, module)
    for node in graph.nodes:
        index = max((latest[value] for value in node.all_input_nodes), default=-1)
        index = latest[node] = level_index.get(node, index)
        if index < 0 or not any(member.backward for member in levels[index].members):
            continue
        if node.op == "call_function" and node.target in _WEIGHTED_FUNCTIONS:
            callers = list(node.meta.get("nn_module_stack", {"forward": None}))
            unsplit[str(callers[-1])] = f"calls {node.target.__name__} as a function"
        if node.op != "call_module":
            continue
        path = str(node.target)
        layer = module.get_submodule(path)
        if not is_weighted(layer):
            continue
        reason = why_unsplittable(layer)
        if reason is None and (len(node.args) != 1 or node.kwargs):
            reason = "is not called with exactly one positional argument"
        if reason is None and uses[path] > 2:
            reason = "has a weight used in more than two places, whose gradients would be summed in another order"
        if reason is not None:
            unsplit[path] = reason
        elif _has_parameters(node, module):
            candidates[index].append(SplitCandidate(node, path, uses[path] > 1))
    return candidates, unsplit


def _uses_of_weights(graph: fx.Graph, module: nn.Module) -> Dict[str, int]:
    """Returns for each called module the number of calls in the graph that use its most used parameter."""
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
    """Returns a graph with one call for each level that has several layers or candidates.

    Args:
        graph: a traced forward of ``module``.
        module: the module that contains the paths in ``graph``.
        levels: the levels of ``graph``, in the order in which they run.
        candidates: for each level, the layers whose weight gradients overlap with its backward round.
        call: returns the function that runs a level. The function takes the layers, their inputs and the modules of
            the candidates. It returns the outputs and the :class:`DeferrableLayers` for :func:`apply_split`.
    """
    split_arguments: Dict[fx.Node, Tuple[fx.Node, int]] = {}  # by candidate: the DeferrableLayers and its index
    before = dependencies(graph, module)
    position = {node: index for index, node in enumerate(graph.nodes)}
    emitted: Set[fx.Node] = set()
    copies: Dict[fx.Node, fx.Node] = {}
    regrouped = fx.Graph()

    def copy(node: fx.Node) -> None:
        if node in split_arguments:
            arguments = (regrouped.get_attr(str(node.target)), copies[node.all_input_nodes[0]], *split_arguments[node])
            copies[node] = regrouped.call_function(apply_split, arguments)
        else:
            copies[node] = regrouped.node_copy(node, lambda earlier: copies[earlier])
        emitted.add(node)

    def emit_dependencies(nodes: Sequence[fx.Node]) -> None:
        pending: Set[fx.Node] = set()
        stack = [earlier for node in nodes for earlier in before[node]]
        while stack:
            node = stack.pop()
            if node not in emitted and node not in pending:
                pending.add(node)
                stack.extend(before[node])
        for node in sorted(pending, key=position.__getitem__):
            copy(node)

    for node in graph.nodes:
        if node.op == "placeholder":
            copy(node)
    for level, overlap_with in zip(levels, candidates):
        nodes = [member.node for member in level.members]
        emit_dependencies(nodes)
        if len(nodes) == 1 and not overlap_with:
            copy(nodes[0])
            continue
        layers = tuple(regrouped.get_attr(member.path) for member in level.members)
        inputs = tuple(copies[node.all_input_nodes[-1]] for node in nodes)
        modules = tuple(regrouped.get_attr(candidate.path) for candidate in overlap_with)
        results = regrouped.call_function(call(level), (layers, inputs, modules))
        outputs = regrouped.call_function(_item, (results, 0))
        for index, node in enumerate(nodes):
            copies[node] = regrouped.call_function(_item, (outputs, index))
            emitted.add(node)
        if overlap_with:
            deferrable = regrouped.call_function(_item, (results, 1))
            split_arguments.update(
                (candidate.node, (deferrable, index)) for index, candidate in enumerate(overlap_with)
            )
    for node in graph.nodes:
        if node not in emitted:
            copy(node)
    return regrouped


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]


def _layer_path(node: fx.Node, module: nn.Module) -> Any:
    """Returns the path of the SyncBatchNorm layer that ``node`` calls, or ``None``."""
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
