"""The training forward of a round as ``torch.compile`` captures it, and a layer as ``torch.fx`` does.

Dynamo follows :func:`normalize_captured`. What an eager forward decides in each call, :func:`_prepare` decides once,
while the graph is traced: it binds the layers to their channel and checks that the round can be part of a graph.
"""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from typing import Any, Callable, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks
from .comm.wire import SyncPoint, sync_point
from .compat import CAPTURES_ROUNDS, current_trace, number_of_groups, traced_as_constant
from .config import SyncBatchNormConfig

if CAPTURES_ROUNDS:
    from .ops.in_graph import in_graph_round, move_running_statistics_in_graph
    from .ops.operators import Site

__all__ = ["fx_node", "normalize_captured"]


def normalize_captured(
    layers: Sequence[Any], inputs: Sequence[Tensor], name: Optional[str], eager: Callable[[], Any]
) -> Any:
    """Returns the outputs of the layers of a round, inside of a graph.

    Args:
        layers: the layers.
        inputs: the input of each layer.
        name: the name of the round; ``None`` for a single layer.
        eager: runs the round outside of the graph.
    """
    found = []
    for layer, input in zip(layers, inputs):
        is_valid = False
        # A branch, which Dynamo guards: the number of channels may be symbolic.
        if input.is_floating_point() and input.dim() >= 2 and input.shape[1] == layer.num_features:
            is_valid = True
        found.append((input.dim(), is_valid, str(input.device)))
    key, ranks, local, fits = _prepare(name, str(inputs[0].device), tuple(found), *layers)
    if not fits:
        return eager()
    if local:
        number_of_groups()  # a guard: the layers synchronize as soon as there is a process group of several ranks
        return tuple([_normalize_local(layer, input) for layer, input in zip(layers, inputs)])
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    outputs, means, variances, counted = in_graph_round(
        key, ranks, list(inputs), weights, biases, [layer.eps for layer in layers]
    )
    for layer, mean, variance in zip(layers, means, variances):
        move_running_statistics_in_graph(layer, mean, variance, counted)
    return outputs


def _normalize_local(layer: Any, input: Tensor) -> Tensor:
    """Returns the output of a layer that normalizes over this rank only."""
    momentum, mean, variance = layer.momentum, layer.running_mean, layer.running_var
    if not layer.track_running_stats or mean is None:
        return F.batch_norm(input, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
    with torch.no_grad():
        layer.num_batches_tracked.add_(1)
    if momentum is not None:
        return F.batch_norm(input, mean, variance, layer.weight, layer.bias, True, momentum, layer.eps)
    # The cumulative average: its momentum is a tensor. With a momentum of 1, the kernel returns the batch's statistics.
    batch_mean, batch_variance = torch.zeros_like(mean), torch.zeros_like(variance)
    output = F.batch_norm(input, batch_mean, batch_variance, layer.weight, layer.bias, True, 1.0, layer.eps)
    with torch.no_grad():
        weight = layer.num_batches_tracked.to(mean.dtype).reciprocal()
        mean.lerp_(batch_mean, weight)
        variance.lerp_(batch_variance, weight)
    return output


class _Prepared(NamedTuple):
    key: str  # of the site
    ranks: int
    local: bool  # whether there is one rank only
    fits: bool  # whether the round can be part of a graph


@traced_as_constant
def _prepare(
    name: Optional[str], device_name: str, found: Tuple[Tuple[int, bool, str], ...], *layers: Any
) -> Tuple[str, int, bool, bool]:
    """Binds the layers, and registers the round. Runs once for a graph, while Dynamo traces.

    Args:
        name: the name of the round; ``None`` for a single layer.
        device_name: the device of the first input.
        found: dimensions, whether channels and dtype are valid, and the device of each input.
        layers: the layers.

    Collectives:
        Those of an eager round that binds its layers.
    """
    trace = current_trace()
    if trace is None:  # the code after a graph break, which Dynamo no longer compiles
        return _Prepared("", 1, False, False)
    first = layers[0]
    device = torch.device(device_name)
    checks.refuse_transform(first._shown_name, first.process_group, first._channel)
    channel = first._bound_channel(device)
    reason = _why_not(layers, found, channel)
    if reason is not None:
        _warn(first._shown_name, reason)
        return _Prepared("", 1, False, False)
    if channel.local:
        return _Prepared("", 1, True, True)
    from .graph.inductor import install  # not above: the import takes seconds, which only torch.compile should cost

    install()
    kept = first._sites
    settings = {layer._overlap for layer in layers}
    overlap = SyncBatchNormConfig.from_env().overlap if None in settings else False not in settings
    identity = (name, overlap, tuple(map(id, layers)))
    names = [layer._shown_name for layer in layers]
    if identity not in kept:
        references = [weakref.ref(layer) for layer in layers]
        kept[identity] = Site(names, partial(_bind, references, name), partial(_observe, references[0]), overlap)
    key = kept[identity].next_key(names[0] if name is None else name, trace)
    return _Prepared(key, channel.world_size, False, True)


def _why_not(layers: Sequence[Any], found: Sequence[Tuple[int, bool, str]], channel: Any) -> Optional[str]:
    """Returns the reason why a round cannot be part of a graph, or ``None``."""
    if channel.checks_finite:
        return "statistics are checked for finite values (BAGUA_SYNCBN_CHECK=nonfinite)"
    for layer, (dimensions, is_valid, device) in zip(layers, found):
        accepted = layer._dimensions
        if not is_valid or (accepted is not None and dimensions not in accepted):
            return "the input is invalid"
        if layer._running is not None:
            return "its running statistics are pooled over more ranks than it normalizes over (normalize_over)"
        if layer._empty_shards and channel.local:
            return "it accepts an empty batch on one rank"
        if device != found[0][2] or not layer.training or layer._bound_channel(torch.device(device)) is not channel:
            return "its layers cannot share a round"
    return None


def _bind(references: Sequence[Any], name: Optional[str], device: torch.device) -> Tuple[Any, SyncPoint]:
    layers = [reference() for reference in references]
    if any(layer is None for layer in layers):
        raise RuntimeError(
            f"expected the layers of a compiled graph to exist (got none for {name or 'a layer'}, which has been "
            "freed); compile the model again"
        )
    channel = layers[0]._bound_channel(device)
    checks.check_join(layers[0]._shown_name)
    checks.check_begun(layers[0], channel)
    checks.check_joined(layers[0], channel)
    point: SyncPoint = layers[0]._point
    if name is not None:
        point = sync_point(name, point.ordinal, tuple(layer.sync_name for layer in layers))
        channel.register(point)
    return channel, point


def _observe(reference: Any, channel: Any, point: SyncPoint, before: int) -> None:
    layer = reference()
    if layer is not None and layer.tag is not None:
        checks.observe(layer.tag.roster, point, before, channel.rounds)


def _warn(name: str, reason: str) -> None:
    warnings.warn(
        f"expected a training forward of {name} that torch.compile can capture (got one in which {reason}); the layer "
        "runs eagerly, with a graph break",
        stacklevel=2,
    )


def fx_node(layer: Any, input: Any, plain: Callable[..., Tensor]) -> Any:
    """Returns a layer as one node of a graph of ``torch.fx``, which takes only layers of ``torch.nn`` as leaves.

    Args:
        layer: the layer.
        input: the proxy of its input.
        plain: the forward of the class without the operations of a subclass.
    """
    tracer = input.tracer
    path = tracer.path_of_module(layer)
    if type(layer).forward is plain:
        return tracer.create_proxy("call_module", path, (input,), {})
    # A subclass adds operations, which the tracer follows.
    itself = tracer.create_proxy("get_attr", path, (), {})
    return tracer.create_proxy("call_function", plain, (itself, input), {})
