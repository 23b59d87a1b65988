"""The conversion and one step in this process: what would fail on every rank fails here first, with one message."""

from __future__ import annotations

from typing import Any, Callable, Optional, Sequence, Tuple

from torch import Tensor, nn

from ..convert import convert_sync_batchnorm, sync_batchnorm_layers, unconverted_layers
from ..graph.coalesce import uncoalesce
from ..graph.verify import bind_to_stub
from .factory import describe_error

__all__ = ["as_on_two_ranks", "check_step", "convert", "has_batch_norms"]


def has_batch_norms(model: nn.Module) -> bool:
    """Returns whether ``model`` has BatchNorm layers, converted or not."""
    return bool(unconverted_layers(model) or sync_batchnorm_layers(model))


def convert(model: nn.Module, example_inputs: Optional[Tuple[Tensor, ...]] = None) -> nn.Module:
    """Returns the model that ``convert_sync_batchnorm`` creates with coalescing and overlap.

    Args:
        model: the model; changed in place.
        example_inputs: the positional arguments of a training forward; ``None`` if they are unknown.

    Raises:
        ValueError: if the model cannot be converted.
    """
    try:
        return convert_sync_batchnorm(model, coalesce=True, overlap=True, example_inputs=example_inputs)
    except (RuntimeError, TypeError) as error:
        raise ValueError(str(error)) from error


def as_on_two_ranks(model: nn.Module) -> nn.Module:
    """Lets a converted model run in this process as on two ranks, layer by layer.

    The layers then accept a batch of one value per channel, which is too small for one rank.

    Args:
        model: the model; changed in place, and afterwards of no use for training.
    """
    uncoalesce(model)
    bind_to_stub(model)
    return model


def check_step(step: Callable[[], Any], model: str, inputs: Sequence[str]) -> None:
    """Runs a step once.

    Args:
        step: the step.
        model: the specification of the model, for the message.
        inputs: the texts of the inputs, for the message.

    Raises:
        ValueError: if the step raises.
    """
    try:
        step()
    except Exception as error:
        raise ValueError(
            f"expected a training step of {model} on the input {' and '.join(inputs)} to run (got "
            f"{describe_error(error)}); pass --input once for each tensor that its forward takes, with a shape and "
            "dtype that the model accepts"
        ) from error
