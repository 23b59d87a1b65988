"""The training forward that :func:`~bagua_syncbn_algo.graph.coalesce.coalesce` installs on a module.

The module keeps its class and its submodules. The module's ``__dict__`` contains the object under ``forward``. In
training, the object runs the regrouped graph on the module itself, so that replaced submodules and parameters are used.
In evaluation, and for calls without a valid graph, the forward of the class runs.

Every module that contains layers has such a forward. The graph of an outer module does not call the forwards of the
modules that it covers. If the outer module is not called, or its call cannot be traced, the inner forwards run.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import warnings
import weakref
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..checks import check_begun, check_join
from ..comm.channel import Channel
from ..comm.report import CHECK
from ..comm.wire import FORWARD, Roster, SyncBatchNormError, digest
from ..compat import inside_transform, is_tracing, saved_tensors_hooks, uncompiled, without_modes
from ..layer import SyncBatchNorm
from ..ops.recompute import inside_backward
from .call_pattern import CallPattern
from .compiled import CHOICE, train_captured
from .guards import Guard, has_global_hooks
from .levels import SplitCandidate, levels_of, split_candidates_of
from .module_state import UntraceableError
from .plan import PlannedRound, SyncPlan
from .replaced import check_replaced
from .shapes import has_fake_tensors, shapes_of
from .tracing import Trace, may_need_shapes, trace
from .variant import Outcome, Variant
from .verify import FAILED, PASSED, check_equivalence

__all__ = ["CoalescedForward", "has_layers"]

_MAX_VARIANTS = 32  # graphs of one module, by modes and calls; with more, the module runs layer by layer
_MAX_SHAPES = 256  # graphs for inputs of certain shapes only; the oldest one is then released
_call_numbers = itertools.count(1)
_MAX_TRIALS = 3  # equivalence checks of a graph that no rank can complete, after which the graph is disabled


class CoalescedForward:
    """The training forward of one module, with one round of statistics for each level of its layers.

    Args:
        module: the module on which this forward is installed.
        path: path of ``module`` in the model; ``""`` for the model itself.
        model: class name of the model, the prefix of layer names.
        overlap: whether backward rounds overlap with weight gradients.
    """

    regroups = True  # distinguishes this forward from one that other code has set on a module

    def __init__(self, module: nn.Module, path: str, model: str, overlap: bool = True) -> None:
        # A weak reference: the module holds this object, and a strong one would be a reference cycle.
        self._module = weakref.ref(module)
        self.path, self.model, self.overlap = path, model, overlap
        self.outcome: Optional[Outcome] = None  # of the latest training call; before the first one, the expected one
        self.calls = 0  # training calls on several ranks
        self.latest = 0  # number of the latest one among those of all modules
        self._variants: List[Variant] = []
        self._channel: Optional[weakref.ref[Channel]] = None  # on which the ranks have agreed on the graphs
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if not module.training:
            return type(module).forward(module, *args, **kwargs)
        if is_tracing():
            return train_captured(self, module, args, kwargs)
        return _train(self, args, kwargs)

    @property
    def module(self) -> nn.Module:
        """The module on which this forward is installed."""
        module = self._module()
        assert module is not None
        return module

    @property
    def name(self) -> str:
        """Qualified name of the module, for errors."""
        return f"{self.model}.{self.path}" if self.path else self.model

    # -- attributes of a bound method, for other tools -----------------------------------------------------------------

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __func__(self) -> Any:
        """The forward as a function of the module. Mixed-precision wrappers of other libraries call it."""
        original = type(self.module).forward

        @functools.wraps(original)
        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            # A copy of the module has the same wrapper, but not this forward.
            run = self if module is self._module() else functools.partial(original, module)
            return run(*args, **kwargs)

        return forward

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __code__(self) -> Any:
        return type(self.module).forward.__code__

    @property
    def __name__(self) -> str:
        return "forward"

    def count_call(self) -> None:
        """Counts a training call; one that is captured in a graph counts once."""
        self.calls += 1
        self.latest = next(_call_numbers)

    # -- graphs --------------------------------------------------------------------------------------------------------

    def prepare(self, pattern: CallPattern, values: Optional[Sequence[Any]] = None) -> Variant:
        """Traces and regroups the forward for calls of ``pattern`` in the current modes of the module's parts.

        Args:
            pattern: the pattern of the call.
            values: the values of a real call. If the forward cannot be traced without their shapes, its graph is for
                these shapes only.
        """
        check_replaced(self.module, self.name)
        variant = Variant(Guard(self.module), pattern)
        try:
            traced = self._trace(variant, values)
            variant.guard.add_attributes(traced.attributes)
            levels = levels_of(traced.graph, self.module, list(traced.uncoalesced))
            candidates: List[List[SplitCandidate]] = [[] for _ in levels]
            if self.overlap:
                candidates, variant.unsplit = split_candidates_of(traced.graph, self.module, levels)
            variant.opaque, variant.uncoalesced = traced.opaque, traced.uncoalesced
            variant.build(self, traced, levels, candidates)
        except UntraceableError as error:
            variant.failure = str(error)
        except Exception as error:  # a graph that fx cannot handle must not end the training
            variant.failure = f"cannot be regrouped ({type(error).__name__}: {error})"
        self._variants.append(variant)
        self.outcome = variant.outcome
        return variant

    def _trace(self, variant: Variant, values: Optional[Sequence[Any]]) -> Trace:
        """Traces the forward, a second time with the shapes of the call if that is necessary."""
        traced, failure = None, ""  # not the exception, whose frames refer to the replica
        try:
            traced = trace(self.module, variant.pattern)
            reasons = [reason for path, reason in traced.opaque.items() if has_layers(self.module, path)]
        except UntraceableError as error:
            failure = str(error)
            reasons = [failure]
        if has_fake_tensors() and any(map(may_need_shapes, reasons)):
            variant.wants_shapes = values is None
            if values is not None:
                variant.needed_shapes = True  # on all ranks, whatever their shapes are
                try:
                    with_shapes = trace(self.module, variant.pattern, values)
                    if traced is None or _uncovered(self.module, with_shapes) < _uncovered(self.module, traced):
                        variant.shapes = shapes_of(values, self.module)
                        return with_shapes
                except UntraceableError as error:
                    failure = failure and str(error)  # the reason with the shapes is the more precise one
        if traced is None:
            raise UntraceableError(failure)
        return traced

    def verify(self, variant: Variant, tensors: Sequence[Tensor]) -> None:
        """Compares the regrouped forward with the original on this process; a difference disables the graph."""
        if variant.run is None:
            return
        verdict, difference = check_equivalence(self.module, variant.run, variant.pattern, tensors, self.name)
        if verdict == FAILED:
            self._disable(variant, f"its regrouped forward differs ({difference})")
        variant.verified = variant.verified_here = verdict == PASSED

    def follow(self, channel: Channel) -> None:
        """Forgets all graphs that the ranks of another channel have agreed on.

        After another ``init_process_group``, some of the ranks may be new processes, which have agreed on nothing.
        """
        former = None if self._channel is None else self._channel()
        if former is channel:
            return
        if self._channel is not None:
            self._variants, self.calls = [each for each in self._variants if each.verified_here], 0
        self._channel = weakref.ref(channel)

    def agree(self, variant: Variant, layer: SyncBatchNorm, tensors: Sequence[Tensor]) -> bool:
        """Compares the regrouped forward with the original on the first training batch of every rank.

        Returns:
            Whether the regrouped forward can run: the check passed on at least one rank and failed on none.

        Collectives:
            One all-gather over the ranks of ``layer``; more if the rounds differ. Every rank must call this method.
        """
        assert variant.run is not None
        verdict, difference = check_equivalence(self.module, variant.run, variant.pattern, tensors, self.name)
        if verdict == PASSED and any(each.verified and each.rounds == variant.rounds for each in self._variants):
            # Another kind of call, such as inputs of another shape, perhaps on this rank only. The ranks have agreed on
            # these rounds before. If they do not compute what the original computes, the other ranks must know.
            variant.verified = True
            return True
        agreement, channel = SyncPlan(self.model, tuple(variant.rounds)).agreement(), layer._bound_channel()
        text = "\n".join(words for words, _ in agreement)
        # A rank without a graph for its shapes has no rounds to compare; see `check_failure`.
        capacity = 0
        if layer.tag is not None:  # the rounds of this graph may be larger than the planned ones
            capacity = Roster(layer.tag.roster.layers, agreement).capacity(layer.tag.roster.itemsize)
        code = 4 * (digest(text) >> 2) + verdict
        codes = channel.agree(self._subject, "", code, capacity, None if self._is_agreed else _roster_of(layer))
        verdicts = [code % 4 for code in codes]
        differs = len({code // 4 for code in codes}) > 1
        if differs and FAILED not in verdicts and not variant.needed_shapes:
            channel.agree(self._subject, text, verdict)  # raises an error that names the first difference
        if FAILED in verdicts or differs:
            what = difference or "the shapes of the ranks' inputs lead to other rounds"
            if FAILED in verdicts and not difference:
                what = f"rank {channel.ranks[verdicts.index(FAILED)]} reports the difference"
            self._disable(variant, f"its regrouped forward differs ({what})")
            return False
        variant.trials += 1
        variant.verified = PASSED in verdicts
        if not variant.verified and variant.trials == _MAX_TRIALS:
            self._disable(variant, f"no rank could run the check in {_MAX_TRIALS} batches")
        return variant.verified

    def check_failure(self, variant: Variant, layer: SyncBatchNorm) -> None:
        """Handles a call without a graph, of a forward for which other shapes may have one.

        Raises:
            SyncBatchNormError: if the other ranks run a regrouped graph.

        Collectives:
            The first call: one all-gather over the ranks of ``layer``. Every rank must call this method or
            :meth:`agree`.
        """
        variant.needed_shapes = False
        # Without layers that can share a round, the forward runs layer by layer, in the order of its own rounds.
        if variant.failure is not None and any(each.verified and each.shapes is not None for each in self._variants):
            reason = variant.failure
            error = SyncBatchNormError(
                f"expected a forward of {self.name} that can be regrouped for every shape of its inputs, as for those "
                f"before (got inputs for which it {reason}); convert the model with coalesce=False, or make "
                "that forward independent of the shape"
            )
            layer._bound_channel().fail(layer._point, FORWARD, error)
            raise error
        if self.calls == 1:
            layer._bound_channel().agree(self._subject, "", FAILED, replays=_roster_of(layer))

    @property
    def _is_agreed(self) -> bool:
        return any(each.verified for each in self._variants)

    @property
    def rounds(self) -> List[Tuple[PlannedRound, List[SyncBatchNorm]]]:
        """The rounds of all graphs, also of those that have not run, with their layers."""
        module, prefix = self.module, len(self.name) + 1
        planned = [each for variant in self._variants for each in variant.rounds]
        return [(each, [module.get_submodule(name[prefix:]) for name in each.layers]) for each in planned]  # type: ignore[misc]

    @property
    def _subject(self) -> str:
        return f"{CHECK}{self.name}'s first training batch"

    def variant(self, pattern: CallPattern, values: Sequence[Any]) -> Optional[Variant]:
        """Returns the graph for a call, and creates it if necessary; ``None`` if there are too many graphs."""
        shapes = None
        for variant in self._variants:
            if variant.pattern != pattern or self._is_outdated(variant):
                continue
            if variant.shapes is not None:  # before the guard, which takes longer: there may be many of these graphs
                shapes = shapes or shapes_of(values, self.module)
                if variant.shapes != shapes:
                    continue
            if variant.guard.holds():
                self.outcome = variant.outcome
                return variant
        self._variants = [each for each in self._variants if not each.guard.is_dead and not self._is_outdated(each)]
        shaped = [variant for variant in self._variants if variant.shapes is not None]
        if len(shaped) >= _MAX_SHAPES:
            self._variants.remove(shaped[0])
        if len(self._variants) - len(shaped) >= _MAX_VARIANTS:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"expected at most {_MAX_VARIANTS} kinds of training forward of {self.name} (got more: other "
                    "modes, hooks, submodules, attributes or arguments that are not tensors); the module runs layer by "
                    "layer from now on",
                    stacklevel=2,
                )
            return None
        return self.prepare(pattern, values)

    def _is_outdated(self, variant: Variant) -> bool:
        """Returns whether another trace may succeed: with the shapes of a call, or after an initialization.

        Some forwards change an attribute in their first call only, such as the kind of loss in a configuration.
        """
        initialized = variant.failure is not None and variant.failure.startswith("changes") and self.calls == 2
        return variant.wants_shapes or initialized

    def _disable(self, variant: Variant, reason: str) -> None:
        variant.run, variant.failure, variant.needed_shapes = None, reason, False  # on all ranks
        self.outcome = variant.outcome
        variant.forget_trace()
        warnings.warn(
            f"expected the regrouped forward of {self.name} to compute what the original computes (got: {reason}); "
            "the module runs layer by layer: exact, but with more rounds",
            stacklevel=2,
        )

    # -- copies, which create their own graphs -------------------------------------------------------------------------

    def __getstate__(self) -> Dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if not name.startswith(CHOICE)}
        return {**kept, "_variants": [], "_channel": None, "_module": self.module}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state, _module=weakref.ref(state["_module"]))

    def __deepcopy__(self, memo: Dict[int, Any]) -> CoalescedForward:
        replica = CoalescedForward(copy.deepcopy(self.module, memo), self.path, self.model, self.overlap)
        replica.outcome = self.outcome
        return replica


@uncompiled
def _train(forward: CoalescedForward, args: Sequence[Any], kwargs: Dict[str, Any]) -> Any:
    module = forward.module
    original = type(module).forward
    layer = next((part for part in module.modules() if isinstance(part, SyncBatchNorm)), None)
    if layer is None:
        check_replaced(module, forward.name)
    if layer is not None:
        check_join(layer._shown_name)  # before a rank without data would have to create the channel, too
    if layer is None or inside_transform() or layer._bound_channel().local or has_global_hooks():
        return original(module, *args, **kwargs)
    check_begun(layer, layer._bound_channel())
    forward.follow(layer._bound_channel())
    forward.count_call()
    if not forward.path and layer.tag is not None:
        layer.tag.roster.observer.start()
    with without_modes():  # a recomputation neither traces nor checks
        pattern, tensors = CallPattern.of(args, kwargs)
        variant = None if pattern is None else forward.variant(pattern, tensors)
        if variant is not None and not inside_backward():
            if variant.run is None and variant.needed_shapes:
                forward.check_failure(variant, layer)
            elif variant.run is not None and not variant.verified:
                forward.agree(variant, layer, tensors)
    if variant is None or variant.run is None or not variant.verified:
        return original(module, *args, **kwargs)
    # Not where activation checkpointing may have saved the tensors of the former graph, or recomputes them.
    may_change = torch.is_grad_enabled() and saved_tensors_hooks() is None and not inside_backward()
    run = variant.without_small_candidates(module) if may_change else variant.run
    return original(module, *args, **kwargs) if run is None else run(module, *tensors)


def _roster_of(layer: SyncBatchNorm) -> Optional[Roster]:
    return None if layer.tag is None else layer.tag.roster


def has_layers(module: nn.Module, path: str = "") -> bool:
    """Returns whether a module, or its submodule at ``path``, contains layers."""
    return any(isinstance(part, SyncBatchNorm) for part in module.get_submodule(path).modules())


def _uncovered(module: nn.Module, traced: Trace) -> int:
    """Returns the number of opaque submodules that contain layers."""
    return sum(has_layers(module, path) for path in traced.opaque)
