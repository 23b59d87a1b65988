"""The search for submodules whose forward can be regrouped into one round per dependency level."""

from __future__ import annotations

import inspect
import logging
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..layer import SyncBatchNorm
from .forward import CoalescedForward
from .module_state import has_own_forward
from .plan import PlannedRound, SyncPlan
from .tracing import CallPattern

__all__ = ["coalesce", "plan_of", "uncoalesce"]

logger = logging.getLogger(__name__)

_SKIPPED = "_syncbn_skipped"  # attribute of the model: `skipped` and `unsplit` of its plan


def coalesce(model: nn.Module, example_inputs: Optional[Tuple[Any, ...]] = None, overlap: bool = True) -> SyncPlan:
    """Regroups the forward of ``model``, so that SyncBatchNorm layers of one dependency level share a round.

    If the forward of the model cannot be traced faithfully, the largest submodules that can be traced are regrouped.

    Args:
        model: a model with SyncBatchNorm layers; modified in place.
        example_inputs: positional arguments of a training forward. With them, the regrouped forward is compared with
            the original now; without them, on the first training batch.
        overlap: whether backward rounds overlap with weight gradients of the following convolutions and linear layers.

    Returns:
        The plan of a training step.

    Collectives:
        None.
    """
    uncoalesce(model)
    search = _RegionSearch(type(model).__name__, overlap)
    modes = {part: part.training for part in model.modules()}
    if not model.training:
        model.train()  # the plan is for training; other modes get their own graph at the first call
    try:
        search.visit(model, "", example_inputs)
    finally:
        for part, training in modes.items():
            part.training = training
    for forward in search.forwards:
        forward.module.__dict__["forward"] = forward
    model.__dict__[_SKIPPED] = tuple(search.skipped), tuple(search.unsplit)
    plan = plan_of(model)
    skipped = "; ".join(f"{name}: {reason}" for name, reason in search.skipped)
    logger.info(
        "coalesced %s: %s%s", type(model).__name__, plan.summary(), f"; not coalesced: {skipped}" if skipped else ""
    )
    return plan


def uncoalesce(model: nn.Module) -> None:
    """Removes the forwards and the attribute that :func:`coalesce` has added to ``model``."""
    for part in model.modules():
        if isinstance(part.__dict__.get("forward"), CoalescedForward):
            del part.__dict__["forward"]
        part.__dict__.pop(_SKIPPED, None)


def plan_of(model: nn.Module) -> SyncPlan:
    """Returns the plan of a training step: the rounds, and the modules and layers that are not coalesced or not split.

    A layer outside of all regrouped modules counts as one round.

    Args:
        model: a converted model.
    """
    name = type(model).__name__
    rounds: List[PlannedRound] = []
    for part in model.modules():
        forward = part.__dict__.get("forward")
        if isinstance(forward, CoalescedForward):
            rounds += forward.rounds
    covered = {layer for planned in rounds for layer in planned.layers}
    for path, layer in model.named_modules():
        full = f"{name}.{path}" if path else name
        if isinstance(layer, SyncBatchNorm) and full not in covered:
            rounds.append(PlannedRound("", 0, (full,), (layer.num_features,)))
    return SyncPlan(name, tuple(rounds), *model.__dict__.get(_SKIPPED, ()))


class _RegionSearch:
    """Finds the largest submodules whose forward can be regrouped.

    Args:
        model: class name of the model.
        overlap: whether backward rounds overlap with weight gradients.

    Attributes:
        forwards: the forwards to install.
        skipped: qualified names of modules and layers that are not coalesced, with the reason.
        unsplit: qualified names of layers whose weight gradient cannot be deferred, with the reason.
    """

    def __init__(self, model: str, overlap: bool) -> None:
        self._model, self._overlap = model, overlap
        self.forwards: List[CoalescedForward] = []
        self.skipped: List[Tuple[str, str]] = []
        self.unsplit: List[Tuple[str, str]] = []

    def visit(self, module: nn.Module, path: str, example: Optional[Tuple[Any, ...]] = None) -> None:
        """Regroups ``module``, or its largest submodules that can be regrouped.

        Args:
            module: a module of the model.
            path: path of ``module`` in the model.
            example: positional arguments of a training forward of ``module``, if known.
        """
        if isinstance(module, SyncBatchNorm) or not _has_layers(module):
            return
        if any(forward.module is module for forward in self.forwards):
            return
        children = [child for child, _ in module.named_children()]
        failure: Optional[str] = None
        if has_own_forward(module):
            failure = "has a forward set on the instance"
        elif type(module).forward is not nn.Module.forward and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            forward = CoalescedForward(module, path, self._model, self._overlap)
            pattern, tensors = _expected_call(module, example)
            if pattern is None:
                failure = "takes arguments that are not tensors"
            else:
                variant = forward.prepare(pattern)
                if example is not None:
                    forward.verify(variant, tensors)
                failure = variant.failure
                if failure is None:
                    children = self._accept(forward, variant)
        name = f"{self._model}.{path}" if path else self._model
        if failure is not None and name not in dict(self.skipped):
            self.skipped.append((name, failure))
        for child in children:
            self.visit(module.get_submodule(child), f"{path}.{child}" if path else child)

    def _accept(self, forward: CoalescedForward, variant: Any) -> List[str]:
        """Records a forward that can be regrouped; returns the paths of submodules that its graph does not cover."""
        forward.rounds = tuple(variant.rounds)
        if variant.run is not None:
            self.forwards.append(forward)
        self.unsplit.extend((f"{forward.name}.{layer}", reason) for layer, reason in variant.unsplit.items())
        self.skipped.extend((f"{forward.name}.{layer}", reason) for layer, reason in variant.uncoalesced.items())
        opaque = [part for part in variant.opaque if _has_layers(forward.module.get_submodule(part))]
        self.skipped.extend((f"{forward.name}.{part}", variant.opaque[part]) for part in opaque)
        return opaque


def _has_layers(module: nn.Module) -> bool:
    return any(isinstance(part, SyncBatchNorm) for part in module.modules())


def _expected_call(
    module: nn.Module, example: Optional[Tuple[Any, ...]]
) -> Tuple[Optional[CallPattern], Sequence[Tensor]]:
    """Returns the call to trace: ``example``, else one tensor for each argument without a default.

    Returns:
        The pattern and its values; the pattern is ``None`` if the arguments are unknown or of unsupported types.
    """
    if example is not None:
        return CallPattern.of(example, {})
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None, ()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    # A tensor for each: two arguments that are one tensor make another kind of call.
    return CallPattern.of([torch.empty(0) for _ in required], {})
