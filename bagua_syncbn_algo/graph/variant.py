"""A regrouped graph as the training forward of a module, for one kind of call."""

from __future__ import annotations

import itertools
import weakref
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..compat import is_tracing
from ..layer import SyncBatchNorm, batch_norm_coalesced
from ..ops.recompute import RecomputeCache
from .call_pattern import CallPattern
from .guards import Guard
from .levels import Level, SplitCandidate, regroup
from .module_state import attribute_of
from .plan import PlannedRound
from .split_backward import DeferrableLayer, DeferrableLayers
from .tracing import Trace

__all__ = ["Outcome", "Variant"]


_numbers = itertools.count()


class Outcome(NamedTuple):
    """What became of a call: the rounds of the module, and what they do not cover, each with the reason."""

    rounds: Tuple[PlannedRound, ...]
    opaque: Tuple[Tuple[str, str], ...]  # paths of submodules that are one step of the graph
    uncoalesced: Tuple[Tuple[str, str], ...]  # paths of layers that cannot share a round
    unsplit: Tuple[Tuple[str, str], ...]  # paths of layers whose weight gradient cannot be deferred
    failure: Optional[str]  # why the module's own forward runs
    regroups: bool  # whether a regrouped graph runs; not if no layers share a round


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
        self._by_path = graph.python_code("self")  # before the targets are renamed
        for node in graph.nodes:
            if node.op in ("call_module", "get_attr"):
                path = str(node.target)
                is_module = node.op == "call_module" or isinstance(attribute_of(module, path), nn.Module)
                node.target = names.setdefault(path, f"m{len(names)}") if is_module else f"root.{path}"
        self._title = f"<regrouped forward of {type(module).__name__}>"
        self._generated = self._compiled(graph.python_code("self"))
        self._paths, self._names, self.outputs = list(names), list(names.values()), traced.outputs
        # Weak references: a submodule must be freed when the user replaces it.
        self._module = weakref.ref(module)
        self._parts = [weakref.ref(module.get_submodule(path)) for path in names]

    def _compiled(self, code: Any) -> Callable[..., Any]:
        # Not a GraphModule, which would keep the modules that it finds under the targets: those of the replica.
        scope: Dict[str, Any] = dict(code.globals)
        exec(compile(code.src, self._title, "exec"), scope)
        return scope["forward"]  # type: ignore[no-any-return]

    def by_path(self) -> Callable[..., Any]:
        """Returns the graph as a function that finds submodules by their paths, for ``torch.compile``."""
        return self._compiled(self._by_path)

    def __call__(self, module: nn.Module, *values: Any) -> Any:
        if module is self._module():  # whose guard holds: its submodules are those of the trace
            parts: List[Any] = [reference() for reference in self._parts]
        else:
            parts = [module.get_submodule(path) for path in self._paths]
        namespace = SimpleNamespace(root=module, **dict(zip(self._names, parts)))
        return pytree.tree_unflatten(list(self._generated(namespace, *values)), self.outputs)


class Variant:
    """The graph for one combination of modes and one kind of call."""

    def __init__(self, guard: Guard, pattern: CallPattern) -> None:
        self.guard, self.pattern = guard, pattern
        self.run: Optional[_Regrouped] = None  # the regrouped forward; None: the original runs
        self.failure: Optional[str] = None  # why the module cannot be regrouped
        self.shapes: Optional[Tuple[Any, ...]] = None  # of the values, if the graph depends on them
        self.needed_shapes = False  # whether the forward could not be traced without the shapes of a real call
        self.wants_shapes = False  # whether a trace with the shapes of a real call may succeed
        self.number = next(_numbers)
        self.verified = self.verified_here = False  # by the ranks of the channel; by this process during the conversion
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
        forward: Any,
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
            regroups = self.run is not None
            self._outcome = Outcome(tuple(self.rounds), opaque, uncoalesced, unsplit, self.failure, regroups)
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
    ) -> Tuple[Tuple[Tensor, ...], Optional[DeferrableLayers]]:
        if is_tracing():
            outputs = batch_norm_coalesced(layers, inputs, self._name)
            return tuple([_run_hooks(*each) for each in zip(layers, inputs, outputs)]), None
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
