"""The installation of coalesced forwards on a model, and the plan of what runs."""

from __future__ import annotations

import inspect
import logging
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from ..layer import SyncBatchNorm
from .call_pattern import CallPattern
from .forward import CoalescedForward, has_layers
from .module_state import FORWARD, has_own_forward
from .plan import PlannedRound, SyncPlan
from .variant import Outcome

__all__ = ["coalesce", "plan_of", "uncoalesce"]

logger = logging.getLogger(__name__)


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
    name = type(model).__name__
    forwards: Dict[nn.Module, CoalescedForward] = {}
    for path, part in model.named_modules():
        if _can_have_forward(part) and not has_own_forward(part):
            forwards[part] = CoalescedForward(part, path, name, overlap)
    modes = {part: part.training for part in model.modules()}
    if not model.training:
        model.train()  # the plan is for training; other modes get their own graph at the first call
    try:
        _expect(model, forwards, example_inputs, set())
    finally:
        for part, training in modes.items():
            part.training = training
    for part, forward in forwards.items():
        part.__dict__["forward"] = part.__dict__[FORWARD] = forward
    plan = plan_of(model)
    skipped = "; ".join(f"{name}: {reason}" for name, reason in plan.skipped)
    logger.info("coalesced %s: %s%s", name, plan.summary(), f"; not coalesced: {skipped}" if skipped else "")
    return plan


def uncoalesce(model: nn.Module) -> None:
    """Removes the forwards that :func:`coalesce` has added to ``model``."""
    for part in model.modules():
        if isinstance(part.__dict__.get("forward"), CoalescedForward):
            del part.__dict__["forward"]
        part.__dict__.pop(FORWARD, None)


def _can_have_forward(part: nn.Module) -> bool:
    """Returns whether a module has a forward of its own and layers inside."""
    if isinstance(part, (SyncBatchNorm, nn.ModuleList, nn.ModuleDict)) or not has_layers(part):
        return False
    return type(part).forward is not nn.Module.forward


def _expect(
    module: nn.Module,
    forwards: Dict[nn.Module, CoalescedForward],
    example: Optional[Tuple[Any, ...]],
    visited: Set[nn.Module],
) -> None:
    """Traces ``module`` with the expected call, or its largest submodules that can be traced.

    Args:
        module: a module of the model.
        forwards: the forwards of the model's modules.
        example: positional arguments of a training forward of ``module``, if known.
        visited: the modules that have been traced.
    """
    if module in visited or not has_layers(module):
        return
    visited.add(module)
    forward, children = forwards.get(module), list(module.children())
    if forward is not None:
        pattern, tensors = _expected_call(module, example)
        if pattern is None:
            forward.outcome = Outcome((), (), (), (), "takes arguments that are not tensors", False)
        else:
            variant = forward.prepare(pattern, tensors if example is not None else None)
            if example is not None:
                forward.verify(variant, tensors)
            if variant.failure is None:
                children = [module.get_submodule(path) for path in variant.opaque]
    for child in children:
        _expect(child, forwards, None, visited)


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan_of(model: nn.Module) -> SyncPlan:
    """Returns the plan of a training step: the rounds, and the modules and layers that are not coalesced or not split.

    Before the first training step, the plan is that of the expected call of ``model``: its forward with one tensor for
    each argument without a default, or with ``example_inputs``. Afterwards the plan is that of the calls that have run.
    A layer outside of all regrouped modules counts as one round for each of its calls in the latest step.

    Args:
        model: a converted model, also inside a wrapper such as ``DistributedDataParallel``. The plan of a model without
            synchronized layers is empty.

    Collectives:
        None.
    """
    search = _PlanSearch(model)
    search.visit(model, "")
    name = next(
        (layer.tag.name.split(".")[0] for layer in search.layers if layer.tag is not None), type(model).__name__
    )
    rounds = list(search.rounds)
    for layer in search.layers:
        if layer not in search.covered:
            single = PlannedRound("", 0, (search.names[layer],), (layer.num_features,))
            rounds += [single] * max(1, layer.observed_calls)
    return SyncPlan(name, tuple(rounds), tuple(search.skipped.items()), tuple(search.unsplit.items()))


class _PlanSearch:
    """Collects the rounds of the forwards that run: the outermost ones that are called and regrouped.

    Attributes:
        rounds: their rounds.
        covered: the layers of these rounds.
        layers: all layers, in the order of the model.
        names: the name of each layer.
        skipped: qualified names of modules and layers that are not coalesced, with the reason.
        unsplit: qualified names of layers whose weight gradient cannot be deferred, with the reason.
    """

    def __init__(self, model: nn.Module) -> None:
        self.rounds: List[PlannedRound] = []
        self.covered: Set[nn.Module] = set()
        named = [(path, part) for path, part in model.named_modules() if isinstance(part, SyncBatchNorm)]
        self.layers: List[SyncBatchNorm] = [layer for _, layer in named]
        self.names: Dict[nn.Module, str] = {
            layer: path if layer.tag is None else layer.tag.name for path, layer in named
        }
        self.skipped: Dict[str, str] = {}
        self.unsplit: Dict[str, str] = {}
        self._visited: Set[nn.Module] = set()

    def visit(self, module: nn.Module, path: str) -> None:
        """Adds a module: its own rounds, or those of its submodules."""
        if module in self._visited:
            return
        self._visited.add(module)
        forward = module.__dict__.get(FORWARD)
        outcome = None if forward is None else forward.outcome
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        if forward is None:
            if _can_have_forward(module) and has_own_forward(module):
                self.skipped[_qualified(module, path)] = "has a forward set on the instance"
        elif _is_displaced(module, forward):
            self.skipped[forward.name] = "its forward is not called; the forwards of its submodules are"
        elif outcome is not None and outcome.failure is not None:
            self.skipped[forward.name] = outcome.failure
        elif outcome is not None:
            children = self._add(module, path, forward, outcome)
        for child_path, child in children:
            self.visit(child, child_path)

    def _add(self, module: nn.Module, path: str, forward: CoalescedForward, outcome: Outcome) -> List[Any]:
        """Adds the rounds of a module; returns the submodules that they do not cover, with their paths."""
        self.rounds += outcome.rounds
        prefix = len(forward.name) + 1
        for planned in outcome.rounds:
            self.covered.update(module.get_submodule(name[prefix:]) for name in planned.layers)
        self.unsplit.update((f"{forward.name}.{layer}", reason) for layer, reason in outcome.unsplit)
        self.skipped.update((f"{forward.name}.{layer}", reason) for layer, reason in outcome.uncoalesced)
        opaque = [(name, reason) for name, reason in outcome.opaque if has_layers(module, name)]
        self.skipped.update((f"{forward.name}.{name}", reason) for name, reason in opaque)
        return [(f"{path}.{name}" if path else name, module.get_submodule(name)) for name, _ in opaque]


def _is_displaced(module: nn.Module, forward: CoalescedForward) -> bool:
    """Returns whether forwards of submodules have run since the latest call of ``module``, and without it."""
    outcome = forward.outcome
    if forward.calls and (outcome is None or outcome.failure is not None or not outcome.regroups):
        return False  # its own forward ran, and called them
    steps = {} if outcome is None else dict(outcome.opaque)
    called = {part for path in steps for part in module.get_submodule(path).modules()}
    inner = [part.__dict__.get(FORWARD) for part in module.modules() if part is not module and part not in called]
    return any(each is not None and each.latest > forward.latest for each in inner)


def _qualified(module: nn.Module, path: str) -> str:
    """Returns the name of a module without a coalesced forward, by the tag of a layer inside."""
    layer_path, layer = next((p, m) for p, m in module.named_modules() if isinstance(m, SyncBatchNorm))
    if layer.tag is None:
        return path or type(module).__name__
    return layer.tag.name[: -len(layer_path) - 1]


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
    return CallPattern.of([torch.empty(0, device="cpu") for _ in required], {})
