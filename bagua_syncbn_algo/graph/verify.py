"""The equivalence check of a regrouped forward and the module's own, on copies and on the batch of a single rank."""

from __future__ import annotations

import logging
from typing import Any, Callable, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..comm.local import TWO_RANK_STUB
from ..layer import SyncBatchNorm
from .call_pattern import CallPattern
from .module_state import clean_copy, preserved_random_states

__all__ = ["FAILED", "PASSED", "UNDECIDED", "bind_to_stub", "check_equivalence"]

logger = logging.getLogger(__name__)

PASSED, FAILED, UNDECIDED = 0, 1, 2


def check_equivalence(
    module: nn.Module,
    run: Callable[..., Any],
    pattern: CallPattern,
    values: Sequence[Any],
    name: str,
) -> Tuple[int, str]:
    """Runs both forwards on copies of the module, on this rank's batch, and compares the results.

    Args:
        module: the module whose own forward is the reference.
        run: the regrouped forward, a function of a module and the values of a call.
        pattern: the pattern of the call.
        values: the values of the call.
        name: qualified name of the module, for the log.

    Returns:
        ``PASSED``, ``FAILED`` or ``UNDECIDED``, and the first difference: an output, a buffer, or the gradient of a
        parameter or input. ``UNDECIDED`` if the module cannot be copied, or its own forward or backward raises.

    Collectives:
        None.
    """
    try:
        with preserved_random_states():
            expected = _TrialRun(module, values, lambda replica, inputs: _run_original(replica, pattern, inputs))
    except Exception as error:
        logger.info("%s cannot be checked on this batch (%s: %s)", name, type(error).__name__, error)
        return UNDECIDED, ""
    try:
        with preserved_random_states():
            found = _TrialRun(module, values, lambda replica, inputs: run(replica, *inputs))
        difference = expected.difference(found)
    except Exception as error:
        difference = f"raises {type(error).__name__}: {error}"
    finally:
        if torch.is_autocast_enabled():
            torch.clear_autocast_cache()  # releases the weights of the copies
    return (FAILED, difference) if difference else (PASSED, "")


def _run_original(replica: nn.Module, pattern: CallPattern, inputs: Sequence[Any]) -> Any:
    args, kwargs = pattern.fill(inputs)
    return type(replica).forward(replica, *args, **kwargs)


def bind_to_stub(model: nn.Module) -> None:
    """Lets the layers of ``model`` run in this process as on two ranks. The model cannot be trained afterwards."""
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm):
            layer._bound_channel = lambda *unused: TWO_RANK_STUB  # type: ignore[method-assign]


class _TrialRun:
    """Outputs, buffers and gradients of one forward and backward of a copy."""

    def __init__(
        self, module: nn.Module, tensors: Sequence[Tensor], run: Callable[[nn.Module, Sequence[Tensor]], Any]
    ) -> None:
        replica = clean_copy(module)
        bind_to_stub(replica)
        inputs = [
            value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
            for value in tensors
        ]
        # Overrides saved-tensor hooks of the caller, such as those of activation checkpointing around this module.
        identity_hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with identity_hooks:
            arguments = [i.view_as(i) if isinstance(i, Tensor) else i for i in inputs]
            outputs, self._structure = pytree.tree_flatten(run(replica, arguments))
            parameters = {name: p for name, p in replica.named_parameters() if p.requires_grad}
            sources = [*parameters.values(), *(i for i in inputs if isinstance(i, Tensor) and i.requires_grad)]
            targets = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
            gradients: Sequence[Optional[Tensor]] = []
            if targets and sources:
                weights = [torch.linspace(0.5, 1.5, t.numel(), device=t.device).view_as(t).to(t.dtype) for t in targets]
                gradients = torch.autograd.grad(targets, sources, weights, allow_unused=True)
        self._leaf_properties = [
            (i, leaf.requires_grad if isinstance(leaf, Tensor) else leaf) for i, leaf in enumerate(outputs)
        ]
        names = [*(f"parameter {name}" for name in parameters), *(f"input {i}" for i in range(len(inputs)))]
        self._tensors = {f"output {i}": leaf.detach() for i, leaf in enumerate(outputs) if isinstance(leaf, Tensor)}
        self._tensors.update({f"buffer {name}": value for name, value in replica.named_buffers()})
        self._gradients = {f"the gradient of {name}": value for name, value in zip(names, gradients)}

    def difference(self, other: _TrialRun) -> str:
        """Returns the first difference in words, or ``""``."""
        if self._structure != other._structure or self._leaf_properties != other._leaf_properties:
            return "outputs that differ in structure, requires_grad or non-tensor values"
        for ours, theirs in ((self._tensors, other._tensors), (self._gradients, other._gradients)):
            if ours.keys() != theirs.keys():
                return "different sets of outputs, buffers or gradients"
            largest = max((_largest_magnitude(value) for value in ours.values()), default=0.0)
            for name, value in ours.items():
                reason = _describe_difference(value, theirs[name], largest)
                if reason:
                    return f"{name}: {reason}"
        return ""


def _largest_magnitude(value: Optional[Tensor]) -> float:
    if value is None or value.numel() == 0 or not value.is_floating_point():
        return 0.0
    return float(value.nan_to_num(posinf=0.0, neginf=0.0).abs().max())


def _describe_difference(first: Optional[Tensor], second: Optional[Tensor], largest: float) -> str:
    if first is None or second is None:
        return "" if first is second else "missing in one of the two"
    if first.shape != second.shape or first.dtype != second.dtype:
        return f"{tuple(first.shape)} {first.dtype} and {tuple(second.shape)} {second.dtype}"
    if not first.is_floating_point():
        return "" if torch.equal(first, second) else "different values"
    # The kernels and their inputs are the same; only the order in which gradients are summed may differ.
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(first.dtype, 5e-2)
    distance = _largest_magnitude(first.double().nan_to_num() - second.double().nan_to_num())
    scale = _largest_magnitude(first)
    # Allows for gradients that are zero except for rounding, such as that of a bias before a normalization.
    noise = 32 * torch.finfo(first.dtype).eps * largest
    allowed = tolerance * scale + noise
    return "" if distance <= allowed else f"maximum difference {distance:.3g}, largest value {scale:.3g}"
