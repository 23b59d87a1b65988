"""One round per dependency level: a module's training forward, reordered so that independent layers meet.

The user's module stays what it is. What is added is a plain object in its ``__dict__`` under ``forward``: in training
it runs the regrouped graph *on the user's module*, so that a replaced head or another weight is used; in evaluation,
and wherever the graph would not be what the forward does, the class's own forward runs.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
import weakref
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..compat import uncompiled
from ..layer import SyncBatchNorm, batch_norm_coalesced
from ..ops.recompute import RecomputeCache, inside_backward
from .guards import Guard, has_global_hooks
from .levels import Level, SplitCandidate, levels_of, regroup, split_candidates_of
from .module_state import UntraceableError, has_own_forward
from .plan import PlannedRound, SyncPlan
from .split_backward import DeferrableLayer, DeferrableLayers
from .tracing import CallPattern, trace
from .verify import FAILED, PASSED, check_equivalence

__all__ = ["CoalescedForward", "coalesce", "plan_of", "uncoalesce"]

logger = logging.getLogger(__name__)

_SKIPPED = "_syncbn_skipped"  # where the model remembers what was left as written, and what runs whole
_MOST_VARIANTS = 32  # graphs of one module, by modes and calls; beyond it runs as written
_MOST_TRIALS = 3  # of a graph, on batches with which no rank can run the forward as written


class CoalescedForward:
    """The training forward of one module, with one round of statistics for each level of its layers.

    Args:
        module: whose forward it is.
        path: of ``module`` in the model; ``""`` for the model itself.
        model: the model's class name, with which layers' names begin.
        overlap: whether backward rounds overlap with weight gradients.
    """

    regroups = True  # tells it from a forward that somebody else has put on a module

    def __init__(self, module: nn.Module, path: str, model: str, overlap: bool = True) -> None:
        # Weakly: the module holds this, and is to be gone when its user lets it go.
        self._module = weakref.ref(module)
        self.path, self.model, self.overlap = path, model, overlap
        self.rounds: Tuple[PlannedRound, ...] = ()
        self._variants: List[_Variant] = []
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.module.training:
            return type(self.module).forward(self.module, *args, **kwargs)
        return _train(self, args, kwargs)

    @property
    def module(self) -> nn.Module:
        """Whose forward this is."""
        module = self._module()
        assert module is not None
        return module

    # What other tools ask of a forward.

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__func__.__get__(self.module))

    @property
    def __func__(self) -> Any:
        return type(self.module).forward

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __code__(self) -> Any:
        return self.__func__.__code__

    @property
    def __name__(self) -> str:
        return "forward"

    def prepare(self, pattern: CallPattern) -> _Variant:
        """Traces and regroups the forward for calls of ``pattern`` in the modes that the module's parts are in."""
        variant = _Variant(Guard(self.module), pattern)
        try:
            traced = trace(self.module, pattern)
            levels = levels_of(traced.graph, self.module, list(traced.uncoalesced))
            candidates: List[List[SplitCandidate]] = [[] for _ in levels]
            if self.overlap:
                candidates, variant.unsplit = split_candidates_of(traced.graph, self.module, levels)
            variant.planned(self, levels, candidates, traced.opaque, traced.uncoalesced)
            if any(len(level.members) > 1 or overlap_with for level, overlap_with in zip(levels, candidates)):
                graph = regroup(traced.graph, self.module, levels, candidates, variant.round_of)
                # On the traced replica: GraphModule looks up the graph's paths, and keeps what it finds.
                variant.run = _Regrouped(type(fx.GraphModule(traced.replica, graph)).forward, traced.outputs)
        except UntraceableError as error:
            variant.opaque[""] = str(error)
        except Exception as error:  # a graph that fx or its order cannot cope with costs rounds, not the training
            variant.opaque[""] = f"cannot be regrouped ({type(error).__name__}: {error})"
        self._variants.append(variant)
        return variant

    def variant(self, pattern: CallPattern) -> Optional[_Variant]:
        """Returns the graph for a call, made now if it is the first of its kind; ``None`` if there are too many."""
        for variant in self._variants:
            if variant.pattern == pattern and variant.guard.holds():
                return variant
        self._variants = [variant for variant in self._variants if not variant.guard.is_dead]
        if len(self._variants) >= _MOST_VARIANTS:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"expected at most {_MOST_VARIANTS} kinds of training forward of {self.name} (got more: other "
                    "modes, hooks, submodules or arguments that are no tensors); it runs layer by layer from now on",
                    stacklevel=2,
                )
            return None
        return self.prepare(pattern)

    @property
    def name(self) -> str:
        """Of the module, as errors call it."""
        return f"{self.model}.{self.path}" if self.path else self.model

    # -- copies: graphs are made again where they are needed ------------------------------------------------------

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_variants": [], "_module": self.module}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state, _module=weakref.ref(state["_module"]))

    def __deepcopy__(self, memo: Dict[int, Any]) -> CoalescedForward:
        replica = CoalescedForward(copy.deepcopy(self.module, memo), self.path, self.model, self.overlap)
        replica.rounds = self.rounds
        return replica


@uncompiled
def _train(forward: CoalescedForward, args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
    module = forward.module
    original = type(module).forward
    layer = next((part for part in module.modules() if isinstance(part, SyncBatchNorm)), None)
    if layer is None or layer._bound_channel().local or has_global_hooks():
        return original(module, *args, **kwargs)
    pattern, tensors = CallPattern.of(args, kwargs)
    variant = None if pattern is None else forward.variant(pattern)
    if variant is None or variant.run is None:
        return original(module, *args, **kwargs)
    if not variant.verified and (inside_backward() or not _agree(forward, variant, layer, tensors)):
        return original(module, *args, **kwargs)
    return variant.run(module, *tensors)


class _Regrouped:
    """A regrouped graph as a function of the module and the call's values."""

    def __init__(self, generated: Callable[..., Any], outputs: Any) -> None:
        self._generated, self._outputs = generated, outputs

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        return pytree.tree_unflatten(list(self._generated(module, *values)), self._outputs)


class _Variant:
    """The graph for one combination of modes and one kind of call."""

    def __init__(self, guard: Guard, pattern: CallPattern) -> None:
        self.guard, self.pattern = guard, pattern
        self.run: Optional[Callable[..., Any]] = None  # of the module and the call's tensors; None: as written
        self.verified = False
        self.trials = 0
        self.rounds: List[PlannedRound] = []
        self.opaque: Dict[str, str] = {}
        self.uncoalesced: Dict[str, str] = {}
        self.unsplit: Dict[str, str] = {}
        self._calls: Dict[Tuple[str, ...], _LevelCall] = {}  # by the members' paths

    def planned(
        self,
        forward: CoalescedForward,
        levels: Sequence[Level],
        candidates: Sequence[Sequence[SplitCandidate]],
        opaque: Dict[str, str],
        uncoalesced: Dict[str, str],
    ) -> None:
        """Takes what tracing found."""
        self.opaque, self.uncoalesced = opaque, uncoalesced
        for level, overlap_with in zip(levels, candidates):
            names = tuple(f"{forward.name}.{member.path}" for member in level.members)
            features = tuple(member.layer.num_features for member in level.members)
            backward = any(member.backward for member in level.members)
            overlapped_with = tuple(f"{forward.name}.{candidate.path}" for candidate in overlap_with)
            planned = PlannedRound(forward.path, level.number, names, features, backward, overlapped_with)
            self.rounds.append(planned)
            self._calls[_key(level)] = _LevelCall(planned, [candidate.shared for candidate in overlap_with])

    def round_of(self, level: Level) -> _LevelCall:
        """Returns what runs ``level``."""
        return self._calls[_key(level)]


def _key(level: Level) -> Tuple[str, ...]:
    return (str(level.number), *(member.path for member in level.members))


class _LevelCall:
    """Runs the layers of a level together. Generated code calls it."""

    def __init__(self, planned: PlannedRound, shared: Sequence[bool]) -> None:
        self._cache = RecomputeCache()
        self._name = planned.name if len(planned.layers) > 1 else None  # a layer by itself has its own
        self._candidates = [DeferrableLayer(*each) for each in zip(planned.overlapped_with, shared)]
        self.__name__, self.__module__ = "batch_norm_coalesced", __name__

    def __call__(
        self, layers: Sequence[SyncBatchNorm], inputs: Sequence[Tensor], modules: Sequence[nn.Module]
    ) -> Tuple[Any, ...]:
        overlap_with = DeferrableLayers(self._candidates, modules)
        cache = None if self._name is None else self._cache
        outputs = batch_norm_coalesced(layers, inputs, self._name, cache, overlap_with if modules else None)
        if any(layer._forward_hooks for layer in layers):
            outputs = tuple(_hooked(*each) for each in zip(layers, inputs, outputs))
        return (*outputs, overlap_with)


def _hooked(layer: SyncBatchNorm, input: Tensor, output: Tensor) -> Tensor:
    for key, hook in layer._forward_hooks.items():
        with_kwargs = key in getattr(layer, "_forward_hooks_with_kwargs", {})
        replaced = hook(layer, (input,), {}, output) if with_kwargs else hook(layer, (input,), output)
        output = output if replaced is None else replaced
    return output


# -- the first training batch ------------------------------------------------------------------------------------------


def _agree(forward: CoalescedForward, variant: _Variant, layer: SyncBatchNorm, tensors: Sequence[Tensor]) -> bool:
    """Compares the regrouped forward with the original on this batch; goes on only if it passed on all ranks."""
    assert variant.run is not None
    verdict, difference = check_equivalence(forward.module, variant.run, variant.pattern, tensors, forward.name)
    channel = layer._bound_channel()
    text = "\n".join(words for words, _ in SyncPlan(forward.model, tuple(variant.rounds)).agreement())
    verdicts = channel.agree(f"the check of {forward.name}'s first training batch", text, verdict)
    if FAILED in verdicts:
        rank = verdicts.index(FAILED)
        what = difference or f"rank {rank} says what"
        _leave(forward, variant, f"its regrouped forward differs ({what})")
        return False
    variant.trials += 1
    variant.verified = PASSED in verdicts
    if not variant.verified and variant.trials == _MOST_TRIALS:
        _leave(forward, variant, f"no rank could run a copy of it by itself in {_MOST_TRIALS} batches")
    return variant.verified


def _leave(forward: CoalescedForward, variant: _Variant, reason: str) -> None:
    variant.run, variant.opaque[""] = None, reason
    warnings.warn(
        f"expected the regrouped forward of {forward.name} to do what it does as written (got: {reason}); it runs "
        "layer by layer: exact, but with more rounds",
        stacklevel=2,
    )


# -- a model -----------------------------------------------------------------------------------------------------------


class _Found(NamedTuple):
    forwards: List[CoalescedForward]
    skipped: List[Tuple[str, str]]
    unsplit: List[Tuple[str, str]]


def coalesce(model: nn.Module, example_inputs: Optional[Tuple[Any, ...]] = None, overlap: bool = True) -> SyncPlan:
    """Lets the SyncBatchNorm layers of ``model`` share rounds where they do not depend on each other.

    The largest submodules whose forward can be traced faithfully are regrouped, the model itself first.

    Args:
        model: with SyncBatchNorm layers; changed in place.
        example_inputs: arguments of a training forward; with them the regrouped forward is compared with the
            original now, else on the first training batch.
        overlap: whether backward rounds overlap with the weight gradients of the layers that follow.

    Returns:
        The plan.

    Collectives:
        None.
    """
    uncoalesce(model)
    found = _Found([], [], [])
    modes = {part: part.training for part in model.modules()}
    if not model.training:
        model.train()  # the plan is for training; layers frozen later are seen when they are
    try:
        _regions(model, "", type(model).__name__, found, overlap, example_inputs)
    finally:
        for part, training in modes.items():
            part.training = training
    for forward in found.forwards:
        forward.module.__dict__["forward"] = forward
    model.__dict__[_SKIPPED] = tuple(found.skipped), tuple(found.unsplit)
    plan = plan_of(model)
    left = "; ".join(f"{name}: {reason}" for name, reason in found.skipped)
    logger.info(
        "coalesced %s: %s%s", type(model).__name__, plan.summary(), f"; left as written: {left}" if left else ""
    )
    return plan


def uncoalesce(model: nn.Module) -> None:
    """Takes away what :func:`coalesce` has added to ``model``."""
    for part in model.modules():
        if isinstance(part.__dict__.get("forward"), CoalescedForward):
            del part.__dict__["forward"]
        part.__dict__.pop(_SKIPPED, None)


def plan_of(model: nn.Module) -> SyncPlan:
    """Returns the rounds of ``model``'s training step as it was converted, and what was left as written and why.

    Layers that no region covers count one round each.
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


def _regions(
    module: nn.Module, path: str, model: str, found: _Found, overlap: bool, example: Optional[Tuple[Any, ...]] = None
) -> None:
    """Finds the largest submodules that can be regrouped."""
    if isinstance(module, SyncBatchNorm) or not any(isinstance(part, SyncBatchNorm) for part in module.modules()):
        return
    name = f"{model}.{path}" if path else model
    inner = [child for child, _ in module.named_children()]
    reason = ""
    if has_own_forward(module):
        reason = "has a forward of its own making"
    elif type(module).forward is not nn.Module.forward and not _is_container(module):
        forward = CoalescedForward(module, path, model, overlap)
        pattern, tensors = _usual_call(module, example)
        variant = None if pattern is None else forward.prepare(pattern)
        if variant is None:
            reason = "takes arguments that are not tensors"
        elif "" in variant.opaque:
            reason = variant.opaque[""]
        elif variant.run is not None and example is not None:
            verdict, difference = check_equivalence(forward.module, variant.run, variant.pattern, tensors, forward.name)
            if verdict == FAILED:
                _leave(forward, variant, f"its regrouped forward differs ({difference})")
                reason = variant.opaque[""]
            variant.verified = verdict == PASSED
        if variant is not None and not reason:
            forward.rounds = tuple(variant.rounds)
            found.unsplit.extend((f"{name}.{layer}", why) for layer, why in variant.unsplit.items())
            if variant.run is not None:
                found.forwards.append(forward)
            found.skipped.extend((f"{name}.{layer}", why) for layer, why in variant.uncoalesced.items())
            inner = []
            for part, why in variant.opaque.items():
                submodule = module.get_submodule(part) if part else module
                if part and any(isinstance(p, SyncBatchNorm) for p in submodule.modules()):
                    found.skipped.append((f"{name}.{part}", why))
                    inner.append(part)
    if reason and name not in dict(found.skipped):
        found.skipped.append((name, reason))
    for part in inner:
        submodule = module.get_submodule(part)
        if not any(f.module is submodule for f in found.forwards):
            _regions(submodule, f"{path}.{part}" if path else part, model, found, overlap)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.ModuleDict))


def _usual_call(
    module: nn.Module, example: Optional[Tuple[Any, ...]]
) -> Tuple[Optional[CallPattern], Sequence[Tensor]]:
    """Returns how the module is probably called: by one tensor for each argument without a default."""
    if example is not None:
        return CallPattern.of(example, {})
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None, ()
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return CallPattern.of([torch.empty(0)] * len(required), {})
