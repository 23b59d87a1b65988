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
import warnings
import weakref
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..compat import uncompiled
from ..layer import SyncBatchNorm, batch_norm_coalesced
from ..ops.recompute import RecomputeCache, inside_backward
from .guards import Guard, has_global_hooks
from .levels import Level, SplitCandidate, levels_of, regroup, split_candidates_of
from .module_state import UntraceableError
from .ordering import attribute_of
from .plan import PlannedRound, SyncPlan
from .split_backward import DeferrableLayer, DeferrableLayers
from .tracing import CallPattern, Trace, trace
from .verify import FAILED, PASSED, check_equivalence

__all__ = ["CoalescedForward", "Outcome"]

_MAX_VARIANTS = 32  # graphs of one module, by modes and calls; with more, the module runs layer by layer
_MAX_TRIALS = 3  # equivalence checks of a graph that no rank can complete, after which the graph is disabled


class Outcome(NamedTuple):
    """What became of a call: the rounds of the module, and what they do not cover, each with the reason."""

    rounds: Tuple[PlannedRound, ...]
    opaque: Tuple[Tuple[str, str], ...]  # paths of submodules that are one step of the graph
    uncoalesced: Tuple[Tuple[str, str], ...]  # paths of layers that cannot share a round
    unsplit: Tuple[Tuple[str, str], ...]  # paths of layers whose weight gradient cannot be deferred
    failure: Optional[str]  # why the module's own forward runs


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
        self._variants: List[_Variant] = []
        self._warned = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.module.training:
            return type(self.module).forward(self.module, *args, **kwargs)
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

    # -- graphs --------------------------------------------------------------------------------------------------------

    def prepare(self, pattern: CallPattern) -> _Variant:
        """Traces and regroups the forward for calls of ``pattern`` in the current modes of the module's parts."""
        variant = _Variant(Guard(self.module), pattern)
        try:
            traced = trace(self.module, pattern)
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

    def verify(self, variant: _Variant, tensors: Sequence[Tensor]) -> None:
        """Compares the regrouped forward with the original on this process; a difference disables the graph."""
        if variant.run is None:
            return
        verdict, difference = check_equivalence(self.module, variant.run, variant.pattern, tensors, self.name)
        if verdict == FAILED:
            self._disable(variant, f"its regrouped forward differs ({difference})")
        variant.verified = verdict == PASSED

    def agree(self, variant: _Variant, layer: SyncBatchNorm, tensors: Sequence[Tensor]) -> bool:
        """Compares the regrouped forward with the original on the first training batch of every rank.

        Returns:
            Whether the regrouped forward can run: the check passed on at least one rank and failed on none.

        Collectives:
            One all-gather over the ranks of ``layer``; more if the rounds differ. Every rank must call this method.
        """
        assert variant.run is not None
        verdict, difference = check_equivalence(self.module, variant.run, variant.pattern, tensors, self.name)
        rounds = "\n".join(words for words, _ in SyncPlan(self.model, tuple(variant.rounds)).agreement())
        subject = f"the check of {self.name}'s first training batch"
        verdicts = layer._bound_channel().agree(subject, rounds, verdict)
        if FAILED in verdicts:
            what = difference or f"rank {verdicts.index(FAILED)} reports the difference"
            self._disable(variant, f"its regrouped forward differs ({what})")
            return False
        variant.trials += 1
        variant.verified = PASSED in verdicts
        if not variant.verified and variant.trials == _MAX_TRIALS:
            self._disable(variant, f"no rank could run the check in {_MAX_TRIALS} batches")
        return variant.verified

    def variant(self, pattern: CallPattern) -> Optional[_Variant]:
        """Returns the graph for a call, and creates it if necessary; ``None`` if there are too many graphs."""
        for variant in self._variants:
            if variant.pattern == pattern and variant.guard.holds():
                self.outcome = variant.outcome
                return variant
        self._variants = [variant for variant in self._variants if not variant.guard.is_dead]
        if len(self._variants) >= _MAX_VARIANTS:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"expected at most {_MAX_VARIANTS} kinds of training forward of {self.name} (got more: other "
                    "modes, hooks, submodules, attributes or arguments that are not tensors); the module runs layer by "
                    "layer from now on",
                    stacklevel=2,
                )
            return None
        return self.prepare(pattern)

    def _disable(self, variant: _Variant, reason: str) -> None:
        variant.run, variant.failure = None, reason
        self.outcome = variant.outcome
        variant.forget_trace()
        warnings.warn(
            f"expected the regrouped forward of {self.name} to compute what the original computes (got: {reason}); "
            "the module runs layer by layer: exact, but with more rounds",
            stacklevel=2,
        )

    # -- copies, which create their own graphs -------------------------------------------------------------------------

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_variants": [], "_module": self.module}

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
    if layer is None or layer._bound_channel().local or has_global_hooks():
        return original(module, *args, **kwargs)
    forward.calls += 1
    pattern, tensors = CallPattern.of(args, kwargs)
    variant = None if pattern is None else forward.variant(pattern)
    if variant is None or variant.run is None:
        return original(module, *args, **kwargs)
    if not variant.verified and (inside_backward() or not forward.agree(variant, layer, tensors)):
        return original(module, *args, **kwargs)
    run = variant.without_small_candidates(module)
    return original(module, *args, **kwargs) if run is None else run(module, *tensors)


class _Regrouped:
    """A regrouped graph as a function of the module and the values of a call.

    The generated code finds each submodule in one namespace: a path of several attributes would call
    ``Module.__getattr__`` for each of them.

    Args:
        module: the module of the graph.
        graph: the regrouped graph; its targets are renamed.
        traced: the trace that the graph comes from.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph, traced: Trace) -> None:
        names: Dict[str, str] = {}
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                path = str(node.target)
                is_module = node.op == "call_module" or isinstance(attribute_of(module, path), nn.Module)
                node.target = names.setdefault(path, f"m{len(names)}") if is_module else f"root.{path}"
        # Not a GraphModule, which would keep the modules that it finds under the targets: those of the replica.
        code = graph.python_code("self")
        scope: Dict[str, Any] = dict(code.globals)
        exec(compile(code.src, f"<regrouped forward of {type(module).__name__}>", "exec"), scope)
        self._generated: Callable[..., Any] = scope["forward"]
        self._paths, self._names, self._outputs = list(names), list(names.values()), traced.outputs
        # Weak references: a submodule must be freed when the user replaces it.
        self._module = weakref.ref(module)
        self._parts = [weakref.ref(module.get_submodule(path)) for path in names]

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        if module is self._module():  # whose guard holds: its submodules are those of the trace
            parts: List[Any] = [reference() for reference in self._parts]
        else:
            parts = [module.get_submodule(path) for path in self._paths]
        namespace = SimpleNamespace(root=module, **dict(zip(self._names, parts)))
        return pytree.tree_unflatten(list(self._generated(namespace, *values)), self._outputs)


class _Variant:
    """The graph for one combination of modes and one kind of call."""

    def __init__(self, guard: Guard, pattern: CallPattern) -> None:
        self.guard, self.pattern = guard, pattern
        self.run: Optional[Callable[..., Any]] = None  # the regrouped forward; None: the original runs
        self.failure: Optional[str] = None  # why the module cannot be regrouped
        self.verified = False
        self.trials = 0
        self.rounds: List[PlannedRound] = []
        self.opaque: Dict[str, str] = {}  # paths of submodules that are one step in the graph, with the reason
        self.uncoalesced: Dict[str, str] = {}
        self.unsplit: Dict[str, str] = {}
        self._calls: Dict[Tuple[str, ...], _LevelCall] = {}  # by the members' paths
        self._outcome: Optional[Outcome] = None
        self._traced: Optional[Trace] = None  # until the sizes of all candidates are known
        self._levels: Sequence[Level] = ()
        self._candidates: Sequence[Sequence[SplitCandidate]] = ()

    def build(
        self,
        forward: CoalescedForward,
        traced: Trace,
        levels: Sequence[Level],
        candidates: Sequence[Sequence[SplitCandidate]],
    ) -> None:
        """Adds one planned round, and the function that runs it, for each of ``levels``; builds the graph."""
        for level, overlap_with in zip(levels, candidates):
            names = tuple(f"{forward.name}.{member.path}" for member in level.members)
            features = tuple(member.layer.num_features for member in level.members)
            backward = any(member.backward for member in level.members)
            overlapped_with = tuple(f"{forward.name}.{candidate.path}" for candidate in overlap_with)
            planned = PlannedRound(forward.path, level.number, names, features, backward, overlapped_with)
            self.rounds.append(planned)
            self._calls[_key(level)] = _LevelCall(planned, [candidate.shared for candidate in overlap_with])
        self._traced, self._levels, self._candidates = traced, levels, candidates
        self._regroup(forward.module)

    @property
    def outcome(self) -> Outcome:
        """The result for the plan."""
        if self._outcome is None or self._outcome.failure != self.failure:
            opaque, uncoalesced, unsplit = map(
                tuple, (d.items() for d in (self.opaque, self.uncoalesced, self.unsplit))
            )
            self._outcome = Outcome(tuple(self.rounds), opaque, uncoalesced, unsplit, self.failure)
        return self._outcome

    def _regroup(self, module: nn.Module) -> None:
        traced, levels, candidates = self._traced, self._levels, self._candidates
        assert traced is not None
        # A graph stays one also if the removal of candidates leaves levels of one layer: the removal depends on this
        # rank's batch, and all ranks must run the levels in one order.
        shared = any(len(level.members) > 1 or overlap_with for level, overlap_with in zip(levels, candidates))
        if shared or self.run is not None:
            graph = regroup(traced.graph, module, levels, candidates, lambda level: self._calls[_key(level)])
            self.run = _Regrouped(module, graph, traced)

    def forget_trace(self) -> None:
        """Releases what a second graph would need."""
        self._traced = None

    def without_small_candidates(self, module: nn.Module) -> Optional[Callable[..., Any]]:
        """Returns the regrouped forward; builds it again without the candidates that are too small to be split.

        The first forward of a candidate decides about that, once: a recomputation by activation checkpointing must be
        split like its forward.
        """
        if self._traced is None or not all(self._calls[_key(level)].sizes_are_known for level in self._levels):
            return self.run
        kept = [self._calls[_key(level)].keep_large() for level in self._levels]
        if not all(map(all, kept)):
            rows = zip(self._candidates, kept)
            self._candidates = [[each for each, keep in zip(*row) if keep] for row in rows]
            self._regroup(module)
        self._traced = None
        return self.run


def _key(level: Level) -> Tuple[str, ...]:
    return (str(level.number), *(member.path for member in level.members))


class _LevelCall:
    """Runs the layers of one level in one round; generated code calls it."""

    def __init__(self, planned: PlannedRound, shared: Sequence[bool]) -> None:
        self._cache = RecomputeCache()
        self._name = planned.name if len(planned.layers) > 1 else None  # a single layer uses its own name
        self._candidates = [DeferrableLayer(*each) for each in zip(planned.overlapped_with, shared)]
        self.__name__, self.__module__ = "batch_norm_coalesced", __name__

    @property
    def sizes_are_known(self) -> bool:
        """Whether each candidate has run once."""
        return all(candidate.is_measured for candidate in self._candidates)

    def keep_large(self) -> List[bool]:
        """Removes the candidates that are too small to be split; returns for each of them whether it stays."""
        kept = [candidate.is_large for candidate in self._candidates]
        self._candidates = [candidate for candidate, keep in zip(self._candidates, kept) if keep]
        return kept

    def __call__(
        self, layers: Sequence[SyncBatchNorm], inputs: Sequence[Tensor], modules: Sequence[nn.Module]
    ) -> Tuple[Tuple[Tensor, ...], DeferrableLayers]:
        deferrable = DeferrableLayers(self._candidates, modules)
        cache = None if self._name is None else self._cache
        outputs = batch_norm_coalesced(layers, inputs, self._name, cache, deferrable if modules else None)
        if any(layer._forward_hooks for layer in layers):
            outputs = tuple(_run_hooks(*each) for each in zip(layers, inputs, outputs))
        return outputs, deferrable


def _run_hooks(layer: SyncBatchNorm, input: Tensor, output: Tensor) -> Tensor:
    for key, hook in layer._forward_hooks.items():
        with_kwargs = key in getattr(layer, "_forward_hooks_with_kwargs", {})
        replaced = hook(layer, (input,), {}, output) if with_kwargs else hook(layer, (input,), output)
        output = output if replaced is None else replaced
    return output
