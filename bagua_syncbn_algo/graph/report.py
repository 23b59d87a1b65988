"""The report of a training step: the rounds that were planned and those that ran, with reasons for the difference."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import List, Optional, Tuple

from torch import nn

from ..layer import SyncBatchNorm
from .coalesce import plan_of
from .plan import SyncPlan
from .replaced import shortened

__all__ = ["StepReport", "report"]


@dataclass(frozen=True)
class StepReport:
    """The forward rounds of the latest training step on this rank, beside the plan.

    Attributes:
        planned: the plan when the layers were tagged: by the conversion, or by ``with_bagua``. ``None`` if the model is
            not coalesced, or not tagged.
        observed: the names of the layers of each round, in order; empty before the first step on several ranks.
        reasons: why they differ, a sentence each; empty if they do not differ.
    """

    planned: Optional[SyncPlan]
    observed: Tuple[Tuple[str, ...], ...]
    reasons: Tuple[str, ...]

    @property
    def as_planned(self) -> bool:
        """Whether exactly the planned rounds ran."""
        return not self.reasons and bool(self.observed)

    def __str__(self) -> str:
        planned = "none planned" if self.planned is None else f"{self.planned.rounds_forward} planned"
        lines = [f"forward rounds of the latest step: {planned}, {len(self.observed)} observed"]
        return "\n".join([*lines, *(f"- {reason}" for reason in self.reasons)])


def report(model: nn.Module) -> StepReport:
    """Returns the rounds that were planned for a training step of ``model`` and those that this rank has run.

    Call it after the first training step on several ranks.

    Args:
        model: a converted model, also inside a wrapper such as ``DistributedDataParallel``.

    Collectives:
        None.

    Example::

        loss_of(model(images)).backward()
        print(report(model))
    """
    layers = [part for part in model.modules() if isinstance(part, SyncBatchNorm)]
    tags = [layer.tag for layer in layers if layer.tag is not None]
    if not tags:
        return StepReport(None, (), ("the model has no layers that the conversion has tagged",))
    observer = tags[0].roster.observer
    observed, planned = tuple(observer.rounds), observer.planned
    if not observed:
        return StepReport(planned, (), ("no training step has run on several ranks since the layers were tagged",))
    if planned is None:
        return StepReport(None, observed, ())
    wanted, found = Counter(each.layers for each in planned.rounds), Counter(observed)
    reasons: List[str] = []
    if wanted != found:
        known = dict(planned.skipped)
        for name, reason in plan_of(model).skipped:
            if known.get(name) != reason:
                reasons.append(f"{name}: {reason}")
        reasons += _differences(planned, Counter(n for names in observed for n in names))
        if not reasons:
            missing = [" and ".join(names) for names in wanted - found]
            reasons.append(f"other rounds than planned: {'; '.join(missing[:5])} did not run together")
    return StepReport(planned, observed, tuple(reasons))


def _differences(planned: SyncPlan, found: Counter[str]) -> List[str]:
    """Returns sentences about layers that ran more or less often than planned."""
    wanted = Counter(name for each in planned.rounds for name in each.layers)
    missing = [name for name in wanted if not found[name]]
    shown = {name: f"{name} ({count} times, planned {wanted[name]})" for name, count in found.items()}
    more = [shown[name] for name in found if found[name] > wanted[name]]
    fewer = [shown[name] for name in found if found[name] < wanted[name]]
    sentences = (("did not run", missing), ("ran more often", more), ("ran less often", fewer))
    return [f"{shortened(names)} {what}" for what, names in sentences if names]
