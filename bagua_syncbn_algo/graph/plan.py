"""The plan of a training step: the rounds, their layers and a cost model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

from ..comm.wire import HEADER_BYTES

__all__ = ["PlannedRound", "Prediction", "SyncPlan", "text_table"]


@dataclass(frozen=True)
class PlannedRound:
    """A round of statistics, and the layers whose statistics are sent in one message.

    Attributes:
        region: the path of the regrouped module that runs the round; empty for the model itself or no such module.
        level: the dependency level inside the region, from 1; 0 for a layer outside of all regions.
        layers: the qualified names in program order; a layer that is called twice occurs twice.
        features: the number of channels of each of ``layers``.
        backward: whether any input requires a gradient, so that backward has a round too.
        overlapped_with: the layers whose weight gradients overlap with the backward round.
    """

    region: str
    level: int
    layers: Tuple[str, ...]
    features: Tuple[int, ...]
    backward: bool = True
    overlapped_with: Tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the round in messages."""
        if len(self.layers) == 1:
            return self.layers[0]
        more = f" and {len(self.layers) - 2} more" if len(self.layers) > 2 else ""
        return f"round {self.level} ({', '.join(self.layers[:2])}{more})"

    def payload(self, itemsize: int = 4) -> int:
        """Returns the bytes that a rank sends in forward: a header, and the count, mean and variance of each layer.

        Args:
            itemsize: bytes per element of mean and variance.
        """
        return HEADER_BYTES + 8 * len(self.layers) + 2 * itemsize * sum(self.features)


@dataclass(frozen=True)
class Prediction:
    """Modelled communication time of one training step, in seconds.

    Attributes:
        upstream: upstream Bagua's SyncBatchNorm: 3 all-gathers and 2 all-reduces for each layer.
        per_layer: for each layer, one all-gather in forward and one in backward.
        planned: for each round of the plan, one all-gather in forward and one in backward.
    """

    upstream: float
    per_layer: float
    planned: float


@dataclass(frozen=True)
class SyncPlan:
    """The rounds of a model's training step.

    Attributes:
        model: the class name of the model.
        rounds: the rounds; those of layers outside of all regrouped modules come last.
        skipped: the modules and layers that are not coalesced, with the reason.
        unsplit: the layers and modules whose weight gradients cannot overlap with rounds, with the reason.
    """

    model: str
    rounds: Tuple[PlannedRound, ...] = ()
    skipped: Tuple[Tuple[str, str], ...] = ()
    unsplit: Tuple[Tuple[str, str], ...] = ()

    @property
    def layers(self) -> int:
        """The number of layer calls, which is the number of forward rounds without coalescing."""
        return sum(len(planned.layers) for planned in self.rounds)

    @property
    def rounds_forward(self) -> int:
        """Number of forward rounds in one step."""
        return len(self.rounds)

    @property
    def rounds_backward(self) -> int:
        """Number of backward rounds in one step."""
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
        """Returns the modelled communication time of a step in which all ranks reach each round at the same time.

        With ``p`` ranks, latency ``α`` and bandwidth ``β`` an all-gather of ``m`` bytes a rank takes
        ``⌈log₂ p⌉·α + (p − 1)·m/β`` and an all-reduce ``⌈log₂ p⌉·ρ + 2·(p − 1)/p·m/β``: the recursive-doubling and
        reduce-scatter forms in Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
        MPICH", 2005. Each round of this package takes ``overhead`` in addition to its all-gather. The model does not
        include arithmetic, waiting for slower ranks, or kernel launches of NCCL.

        Args:
            world_size: the number of ranks, ``p``.
            latency: ``α``, the time of the smallest all-gather between two ranks, in seconds.
            bandwidth: ``β``, the bandwidth between two ranks, in bytes per second.
            itemsize: bytes per element of mean and variance.
            reduce_latency: ``ρ``, the time of the smallest all-reduce between two ranks, in seconds; ``None``: ``2·α``.
            overhead: the time to pack and check the message of a round, in seconds.

        Returns:
            The communication times of three schemes.

        Raises:
            ValueError: if ``world_size`` is less than 1, ``latency`` or ``overhead`` is negative, or ``bandwidth`` is
                not positive.
        """
        if world_size < 1 or latency < 0 or overhead < 0 or bandwidth <= 0:
            raise ValueError(
                "expected world_size of at least 1, latency and overhead of at least 0 and a positive bandwidth (got "
                f"{world_size}, {latency}, {overhead}, {bandwidth}); give seconds and bytes a second"
            )
        rho = 2 * latency if reduce_latency is None else reduce_latency
        hops = math.ceil(math.log2(world_size))

        def all_gather(size: float) -> float:
            return hops * latency + (world_size - 1) * size / bandwidth if hops else 0.0

        def round_time(size: float) -> float:
            return all_gather(size) + overhead if hops else 0.0

        def all_reduce(size: float) -> float:
            return hops * rho + 2 * (world_size - 1) / world_size * size / bandwidth if hops else 0.0

        # All messages have the length of the longest one.
        longest = max((planned.payload(itemsize) for planned in self.rounds), default=0)
        widest = max((max(planned.features) for planned in self.rounds), default=0)
        single = HEADER_BYTES + 8 + 2 * itemsize * widest
        upstream = per_layer = 0.0
        for planned in self.rounds:
            for features in planned.features:
                upstream += all_gather(4) + 2 * all_gather(itemsize * features)
                upstream += 2 * all_reduce(itemsize * features) * planned.backward
                per_layer += round_time(single) * (1 + planned.backward)
        coalesced = round_time(longest) * (self.rounds_forward + self.rounds_backward)
        return Prediction(upstream, per_layer, coalesced)

    @property
    def rounds_overlapped(self) -> int:
        """Number of backward rounds that overlap with weight gradients; layers too small to overlap count too."""
        return sum(planned.backward and bool(planned.overlapped_with) for planned in self.rounds)

    def agreement(self) -> Tuple[Tuple[str, Tuple[int, ...]], ...]:
        """Returns a description and the features of each round of several layers, for comparison between ranks.

        The description includes the layers that the round overlaps with, because they determine the order of the
        backward rounds.
        """
        descriptions = []
        for planned in self.rounds:
            overlap = f" overlapped with {', '.join(planned.overlapped_with)}" if planned.overlapped_with else ""
            if len(planned.layers) > 1:
                descriptions.append((f"round of {', '.join(planned.layers)}{overlap}", planned.features))
        return tuple(descriptions)

    def summary(self) -> str:
        """Returns the plan in one line."""
        return f"layers {self.layers}, rounds forward {self.rounds_forward}, backward {self.rounds_backward}"

    def table(self) -> List[str]:
        """Returns the plan as lines of text: the rounds, then the entries of ``skipped`` and ``unsplit``."""
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
        """Returns the plan as JSON text for :meth:`from_json`."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> SyncPlan:
        """Returns the plan that :meth:`to_json` wrote.

        Args:
            text: the JSON text.

        Raises:
            ValueError: if ``text`` is not a plan.
        """
        if not isinstance(text, str) or len(text) > _MOST_CHARACTERS:
            found = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
            raise ValueError(
                f"expected the text of a plan, of at most {_MOST_CHARACTERS} characters (got {found}); pass what "
                "SyncPlan.to_json returns"
            )
        try:
            fields = _object(json.loads(text, parse_constant=_refuse_constant), "the plan")
            rounds = tuple(_round(number, entry) for number, entry in enumerate(_list(fields["rounds"], "rounds")))
            skipped, unsplit = (_pairs(fields.get(name, ()), name) for name in ("skipped", "unsplit"))
            return cls(_text(fields["model"], "model"), rounds, skipped, unsplit)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            found = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(
                f"expected a plan as SyncPlan.to_json writes it (got {text[:60]!r}, {found[:200]}); write it again"
            ) from error


# -- reading a plan ----------------------------------------------------------------------------------------------------

_MOST_CHARACTERS = 100_000_000
_MOST_FEATURES = 2**31  # more than any layer has; products of larger numbers overflow elsewhere


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of a plan")


def _object(value: Any, name: str) -> Dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is of type {type(value).__name__}, not an object")
    return value


def _list(value: Any, name: str) -> List[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} is of type {type(value).__name__}, not a list")
    return list(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} is of type {type(value).__name__}, not a text")
    return value


def _number(value: Any, name: str, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST_FEATURES:
        is_small = isinstance(value, (int, float)) and -1e9 < value < 1e9
        shown = repr(value) if is_small else f"a larger number or of type {type(value).__name__}"
        raise ValueError(f"{name} is {shown}, not an integer from {least} to {_MOST_FEATURES}")
    return value


def _round(number: int, value: Any) -> PlannedRound:
    name = f"rounds[{number}]"
    entry = dict(_object(value, name))
    layers = tuple(_text(each, f"a layer of {name}") for each in _list(entry.pop("layers"), f"layers of {name}"))
    features = _list(entry.pop("features"), f"features of {name}")
    if not layers or len(features) != len(layers):
        raise ValueError(f"{name} has {len(layers)} layers and features of {len(features)}")
    backward = entry.pop("backward", True)
    if not isinstance(backward, bool):
        raise ValueError(f"backward of {name} is of type {type(backward).__name__}, not true or false")
    overlapped = _list(entry.pop("overlapped_with", ()), f"overlapped_with of {name}")
    found = PlannedRound(
        _text(entry.pop("region"), f"region of {name}"),
        _number(entry.pop("level"), f"level of {name}", 0),
        layers,
        tuple(_number(each, f"a number of features of {name}", 1) for each in features),
        backward,
        tuple(_text(each, f"a layer of overlapped_with of {name}") for each in overlapped),
    )
    if entry:
        raise ValueError(f"{name} has the unknown fields {', '.join(sorted(entry))}")
    return found


def _pairs(value: Any, name: str) -> Tuple[Tuple[str, str], ...]:
    pairs = [tuple(_text(each, f"an entry of {name}") for each in _list(pair, name)) for pair in _list(value, name)]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{name} has an entry that is not a name with a reason")
    return tuple((pair[0], pair[1]) for pair in pairs)


def text_table(rows: Sequence[Sequence[Any]], left_aligned: Sequence[int] = ()) -> List[str]:
    """Returns rows of cells as lines of text, with right-aligned columns except for the indices in ``left_aligned``."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  ".join(
            cell.ljust(width) if column in left_aligned else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in cells
    ]
