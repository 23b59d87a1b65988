"""Which layers share a round of statistics, in which order; and what that costs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..comm.wire import HEADER_BYTES

__all__ = ["PlannedRound", "Prediction", "SyncPlan", "text_table"]


@dataclass(frozen=True)
class PlannedRound:
    """Layers that do not depend on each other; their statistics travel in one message."""

    region: str  # the module whose forward runs the round, by qualified name; "" for the model itself
    level: int  # 1 + the most rounds on any way to it inside its region; 0 for a layer outside of every region
    layers: Tuple[str, ...]  # qualified names in the model, in program order; a layer applied twice is there twice
    features: Tuple[int, ...]
    backward: bool = True  # whether any input needs a gradient
    overlapped_with: Tuple[str, ...] = ()  # layers whose weight gradients are computed while the backward round travels

    @property
    def name(self) -> str:
        """How errors and tables call it."""
        if len(self.layers) == 1:
            return self.layers[0]
        more = f" and {len(self.layers) - 2} more" if len(self.layers) > 2 else ""
        return f"round {self.level} ({', '.join(self.layers[:2])}{more})"

    def payload(self, itemsize: int = 4) -> int:
        """Returns the bytes that a rank sends in forward: count, mean and variance of every layer."""
        return HEADER_BYTES + 8 * len(self.layers) + 2 * itemsize * sum(self.features)


@dataclass(frozen=True)
class Prediction:
    """Modelled communication time of one training step, in seconds."""

    upstream: float  # 3 all-gathers and 2 all-reduces a layer, as Bagua's own SyncBatchNorm
    per_layer: float  # one all-gather a layer forward, one backward
    planned: float  # one all-gather a round forward, one backward


@dataclass(frozen=True)
class SyncPlan:
    """The rounds of a model's training step."""

    model: str
    rounds: Tuple[PlannedRound, ...] = ()
    skipped: Tuple[Tuple[str, str], ...] = ()  # modules and layers that are not coalesced, and why
    unsplit: Tuple[Tuple[str, str], ...] = ()  # convolutions and linear layers with which no round overlaps, and why

    @property
    def layers(self) -> int:
        """Applications of layers: as many rounds as it takes without a plan."""
        return sum(len(planned.layers) for planned in self.rounds)

    @property
    def rounds_forward(self) -> int:
        """Messages of a forward."""
        return len(self.rounds)

    @property
    def rounds_backward(self) -> int:
        """Messages of a backward."""
        return sum(planned.backward for planned in self.rounds)

    def predict(
        self,
        world_size: int,
        latency: float,
        bandwidth: float,
        itemsize: int = 4,
        reduce_latency: Optional[float] = None,
        overhead: float = 0.0,
    ) -> Prediction:
        """Models the communication time of a step in which all ranks arrive at every round together.

        With ``p`` ranks, latency ``α`` and bandwidth ``β`` an all-gather of ``m`` bytes a rank takes
        ``⌈log₂ p⌉·α + (p − 1)·m/β`` and an all-reduce ``⌈log₂ p⌉·ρ + 2·(p − 1)/p·m/β``: the recursive-doubling and
        reduce-scatter forms in Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
        MPICH", 2005. A packed and checked round takes the host ``overhead`` beyond its all-gather. What is left out:
        the arithmetic, waiting for slower ranks, and NCCL's launches.

        Args:
            world_size: ranks.
            latency: seconds that the smallest all-gather between two ranks takes.
            bandwidth: bytes a second between two ranks.
            itemsize: bytes of a statistic.
            reduce_latency: ``ρ``, seconds that the smallest all-reduce between two ranks takes; ``None`` for ``2·α``.
            overhead: seconds of packing a round's message and checking what came.

        Raises:
            ValueError: for a world below 1, a negative latency or overhead, or a bandwidth that is not positive.
        """
        if world_size < 1 or latency < 0 or overhead < 0 or bandwidth <= 0:
            raise ValueError(
                "expected world_size of at least 1, latency and overhead of at least 0 and a positive bandwidth (got "
                f"{world_size}, {latency}, {overhead}, {bandwidth}); give seconds and bytes a second"
            )
        rho = 2 * latency if reduce_latency is None else reduce_latency
        hops = math.ceil(math.log2(world_size))

        def gather(size: float) -> float:
            return hops * latency + (world_size - 1) * size / bandwidth if hops else 0.0

        def round_of(size: float) -> float:
            return gather(size) + overhead if hops else 0.0

        def reduce(size: float) -> float:
            return hops * rho + 2 * (world_size - 1) / world_size * size / bandwidth if hops else 0.0

        # One length for all messages: the longest one's.
        longest = max((planned.payload(itemsize) for planned in self.rounds), default=0)
        widest = max((max(planned.features) for planned in self.rounds), default=0)
        single = HEADER_BYTES + 8 + 2 * itemsize * widest
        upstream = per_layer = 0.0
        for planned in self.rounds:
            for features in planned.features:
                upstream += gather(4) + 2 * gather(itemsize * features)
                upstream += 2 * reduce(itemsize * features) * planned.backward
                per_layer += round_of(single) * (1 + planned.backward)
        together = round_of(longest) * (self.rounds_forward + self.rounds_backward)
        return Prediction(upstream, per_layer, together)

    @property
    def rounds_overlapped(self) -> int:
        """Backward rounds that overlap with weight gradients."""
        return sum(planned.backward and bool(planned.overlapped_with) for planned in self.rounds)

    def agreement(self) -> Tuple[Tuple[str, Tuple[int, ...]], ...]:
        """Returns what must be the same on all ranks, in words: the rounds of several layers; and their features.

        The layers that a round overlaps with are included: they decide in which order a backward sends its rounds.
        """
        words = []
        for planned in self.rounds:
            overlap = f" overlapped with {', '.join(planned.overlapped_with)}" if planned.overlapped_with else ""
            if len(planned.layers) > 1:
                words.append((f"round of {', '.join(planned.layers)}{overlap}", planned.features))
        return tuple(words)

    def summary(self) -> str:
        """Returns the plan in one line."""
        return f"layers {self.layers}, rounds forward {self.rounds_forward}, backward {self.rounds_backward}"

    def table(self) -> List[str]:
        """Returns the plan as lines of text: one for each round, then what is not coalesced or not split and why."""
        rows: List[Sequence[Any]] = [("round", "region", "level", "layers", "bytes", "members", "overlapped with")]
        prefix = f"{self.model}."

        def names(layers: Sequence[str]) -> str:
            text = ", ".join(name[len(prefix) :] if name.startswith(prefix) else name for name in layers)
            return text if len(text) <= 60 else f"{text[:57]}..."

        for number, planned in enumerate(self.rounds, start=1):
            cells = (number, planned.region or self.model, planned.level or "-", len(planned.layers), planned.payload())
            rows.append((*cells, names(planned.layers), names(planned.overlapped_with)))
        skipped = [f"not coalesced: {name} {reason}" for name, reason in self.skipped]
        unsplit = [f"not overlapped with: {name} {reason}" for name, reason in self.unsplit]
        return [*text_table(rows, left_aligned=(5, 6)), *skipped, *unsplit]

    def to_json(self) -> str:
        """Returns the plan as text that :meth:`from_json` reads."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> SyncPlan:
        """Reads a plan that :meth:`to_json` wrote.

        Raises:
            ValueError: if the text is no plan.
        """
        try:
            fields: Dict[str, Any] = json.loads(text)
            rounds = tuple(
                PlannedRound(**{key: _frozen(value) for key, value in entry.items()}) for entry in fields["rounds"]
            )
            skipped, unsplit = (
                tuple((name, reason) for name, reason in pairs)
                for pairs in (fields["skipped"], fields.get("unsplit", ()))
            )
            return cls(fields["model"], rounds, skipped, unsplit)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"expected a plan as SyncPlan.to_json writes it (got {text[:60]!r}, {error}); write it again"
            ) from error


def text_table(rows: Sequence[Sequence[Any]], left_aligned: Sequence[int] = ()) -> List[str]:
    """Returns rows of cells as lines of text; columns are right-aligned except for the indices in ``left_aligned``."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(
            cell.ljust(width) if column in left_aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
