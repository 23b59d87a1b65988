"""Checks of the input of a layer, of the code around it, and of the number of rounds."""

from __future__ import annotations

import warnings
from typing import Any, Optional, Sequence, Tuple

from torch import Tensor

from .comm.channel import Channel
from .comm.transport import source_group
from .comm.wire import Roster, SyncPoint
from .compat import inside_transform, later_in_join, lone_join

__all__ = [
    "can_share",
    "check_begun",
    "check_channels",
    "check_dimensions",
    "check_join",
    "check_joined",
    "observe",
    "refuse_transform",
    "scripting_error",
]


def check_dimensions(name: str, input: Tensor, accepted: Optional[Tuple[int, ...]]) -> None:
    """Checks the number of dimensions of an input.

    Args:
        name: the name of the layer.
        input: the input.
        accepted: the numbers of dimensions that the layer accepts; ``None`` for 2 and more.

    Raises:
        ValueError: if the input has another number of dimensions.
    """
    if input.dim() >= 2 if accepted is None else input.dim() in accepted:
        return
    if accepted is None:
        expected, remedy = "at least 2D input (N, C, ...)", "add the missing dimensions"
    else:
        expected = " or ".join(f"{each}D" for each in accepted) + " input"
        remedy = "change the shape of the input, or convert the BatchNorm class for inputs of this shape"
    raise ValueError(
        f"expected {expected} at {name} (got {input.dim()}D input of shape {tuple(input.shape)}); {remedy}"
    )


def check_join(name: str) -> None:
    """Checks that ranks whose data end inside of ``Join`` will take part in the rounds.

    Args:
        name: the name of the layer.

    Raises:
        RuntimeError: inside of ``Join`` without the joinable of the layers: the other ranks would wait for such a rank.
    """
    if lone_join():
        raise RuntimeError(
            f"expected the joinable of the SyncBatchNorm layers as the first one in Join (got {name} with "
            "DistributedDataParallel as the first one); use Join([sync_batch_norm_joinable(model), ddp]), or "
            "throw_on_early_termination=True"
        )


def check_joined(layer: Any, channel: Channel) -> None:
    """Checks that a model in the list of ``Join`` is that of the joinable: other rounds get no answer without data.

    Args:
        layer: the layer, or the first one of a round.
        channel: its channel.

    Raises:
        ValueError: if the layer belongs to another ``DistributedDataParallel`` of the list.
    """
    if channel.joining and layer not in channel.joining and later_in_join():
        raise ValueError(
            f"expected layers of the joinable's model in training inside of Join (got {layer._shown_name} of another "
            "model in the list); put the models in one module, wrap it in one DistributedDataParallel, call it for "
            "every forward, and use its joinable"
        )


def check_begun(layer: Any, channel: Channel) -> None:
    """Checks that ranks whose data have ended know of a forward inside of ``Join``: else they do not answer rounds.

    Args:
        layer: the layer, or the first one of a round.
        channel: its channel.

    Raises:
        RuntimeError: if no forward of ``DistributedDataParallel`` has begun since the context was entered.
    """
    if not getattr(channel.joining, "begun", True) and layer in channel.joining:
        raise RuntimeError(
            "expected the first training forward inside of Join by DistributedDataParallel (got a direct call that "
            f"reaches {layer._shown_name}, which ranks whose data have ended do not know of); call ddp(input)"
        )


def check_channels(name: str, input: Tensor, features: int) -> None:
    """Checks the number of channels and the dtype of an input.

    Args:
        name: the name of the layer.
        input: the input.
        features: the number of channels of the layer.

    Raises:
        ValueError: if the input has another number of channels, or no floating point dtype.
    """
    if input.shape[1] != features:
        raise ValueError(
            f"expected {features} channels in dimension 1 at {name} (got input of shape {tuple(input.shape)}); change "
            "the input or num_features"
        )
    if not input.is_floating_point():
        raise ValueError(
            f"expected a floating point input at {name} (got {input.dtype}); cast the input, e.g. input.float()"
        )


def refuse_transform(name: str, process_group: Optional[Any], channel: Optional[Channel]) -> None:
    """Raises an error in a forward over several ranks inside a transform, which cannot see what other ranks compute.

    The error is not sent to the other ranks: inside a transform, no message can be written.

    Args:
        name: the name of the layer.
        process_group: the process group of the layer.
        channel: the channel that the layer is bound to.

    Raises:
        RuntimeError: inside a transform, if the layer normalizes over several ranks.
    """
    if not inside_transform():
        return
    source = source_group(process_group)
    if source is not None and source.size() > 1 and not (channel is not None and channel.local):
        raise RuntimeError(
            f"expected no torch.func transform around a training forward of {name} over {source.size()} ranks (got "
            "one, such as torch.func.grad or vmap); call eval(), or compute gradients with torch.autograd"
        )


def scripting_error(name: str) -> RuntimeError:
    """Returns the error for ``torch.jit.script``, which would refuse a type annotation of the layer."""
    return RuntimeError(
        f"expected a model without SyncBatchNorm layers in torch.jit.script (got {name}, whose communication cannot be "
        "scripted); script revert_sync_batchnorm(copy.deepcopy(model)), or call torch.jit.trace on the model in eval()"
    )


def observe(roster: Roster, point: SyncPoint, before: int, after: int) -> None:
    """Records a round for the plan and the report; warns if a step has more rounds than planned.

    Args:
        roster: the layers of the model.
        point: the sync point of the round.
        before: the number of rounds of the channel before the round.
        after: their number after the round.
    """
    observer = roster.observer
    if observer.add(point.layers or (point.name,), before, after):
        plan = observer.planned
        warnings.warn(
            f"expected {plan.rounds_forward} forward rounds of statistics in a step of {plan.model}, as planned (got "
            f"{len(observer.rounds)}); print(report(model)) lists the reasons, and example_inputs= of "
            "convert_sync_batchnorm plans for a real call",
            stacklevel=3,
        )


def can_share(layers: Sequence[Any], inputs: Sequence[Tensor], channel: Channel) -> bool:
    """Returns whether all layers are in training mode, on the same channel, with inputs on the same device."""
    same_device = all(input.device == inputs[0].device for input in inputs)
    # A layer that is bound to the channel needs no further look at its process group.
    return same_device and all(
        layer.training and (layer._channel is channel or layer._bound_channel() is channel) for layer in layers
    )
