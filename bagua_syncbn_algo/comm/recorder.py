"""Records of statistics rounds: the times of launch, wait and finish, and the exposed time of each round."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, Optional, Tuple

__all__ = ["RoundRecord", "RoundRecords", "StepObserver", "active", "record_rounds"]

_MOST_ROUNDS = 10000  # of a step that an observer keeps


@dataclass
class RoundRecord:
    """One round of statistics. Times are in seconds of the host's ``time.perf_counter()``.

    Attributes:
        layers: the names of the layers that share the round.
        phase: ``"forward"``, ``"backward"`` or ``"running"``.
        bytes: the number of bytes that this rank sent.
        step: the number of the training step.
        launch: the time at which the round was launched.
        wait: the time at which the host began to wait for the round; ``None`` before.
        finish: the time at which the result was complete; ``None`` before.
    """

    layers: Tuple[str, ...]
    phase: str
    bytes: int
    step: int
    launch: float
    wait: Optional[float] = None
    finish: Optional[float] = None

    @property
    def duration(self) -> float:
        """The seconds from launch to finish; 0 while the round is in flight."""
        return 0.0 if self.finish is None else self.finish - self.launch

    @property
    def exposed(self) -> float:
        """The seconds of the duration during which the host waited; 0 before the host waits."""
        if self.finish is None or self.wait is None:
            return 0.0
        return max(0.0, self.finish - max(self.wait, self.launch))


@dataclass
class RoundRecords:
    """The rounds of a recorded block, in order of launch.

    Attributes:
        rounds: the recorded rounds.
        step: the number of the current training step.
    """

    rounds: List[RoundRecord] = field(default_factory=list)
    step: int = 0

    def next_step(self) -> None:
        """Begins a training step. The algorithm calls this before each training forward; without it, the user may."""
        self.step += 1

    def launch(self, layers: Tuple[str, ...], phase: str, size: int) -> RoundRecord:
        """Records the launch of a round.

        Args:
            layers: the names of the layers that share the round.
            phase: ``"forward"``, ``"backward"`` or ``"running"``.
            size: the number of bytes that this rank sends.

        Returns:
            The record of the round. The caller sets ``wait`` and ``finish``.
        """
        entry = RoundRecord(layers, phase, size, self.step, time.perf_counter())
        self.rounds.append(entry)
        return entry

    def by_step(self) -> Dict[int, List[RoundRecord]]:
        """Returns the rounds of each training step, by step number."""
        steps: Dict[int, List[RoundRecord]] = {}
        for entry in self.rounds:
            steps.setdefault(entry.step, []).append(entry)
        return steps

    def exposed(self) -> Dict[int, float]:
        """Returns the exposed seconds of each training step, by step number."""
        return {step: sum(entry.exposed for entry in entries) for step, entries in self.by_step().items()}

    def __iter__(self) -> Iterator[RoundRecord]:
        return iter(self.rounds)

    def __len__(self) -> int:
        return len(self.rounds)


_active: Optional[RoundRecords] = None


def active() -> Optional[RoundRecords]:
    """Returns the records of the active :func:`record_rounds` block; ``None`` outside of a block."""
    return _active


@contextlib.contextmanager
def record_rounds() -> Iterator[RoundRecords]:
    """Records all statistics rounds of this process while the block runs.

    On CUDA, the host does not wait for rounds. The finish time is then the time at which the round was enqueued.

    Returns:
        A context manager whose value is a :class:`RoundRecords`, to which the block adds rounds.

    Raises:
        RuntimeError: inside another recorded block.

    Example::

        with record_rounds() as rounds:
            train_one_step()
        print(len(rounds), sum(r.exposed for r in rounds))
    """
    global _active
    if _active is not None:
        raise RuntimeError(
            "expected one record_rounds block at a time (got a nested block); use the result of the outer block"
        )
    _active = RoundRecords()
    try:
        yield _active
    finally:
        _active = None


class StepObserver:
    """The forward rounds of the latest training step of a model.

    A step ends where the model's forward is called again, and where a round of another kind has run: of backward, or of
    another model. Until one of these has happened, a round of the same layers as the first round begins a new step.

    Attributes:
        planned: the plan of a step; ``None`` for a model without coalescing.
    """

    def __init__(self) -> None:
        self.planned: Any = None
        self._marked = False  # whether the end of a step is known from a call or another round
        self._last: Optional[int] = None  # the number of rounds of the channel after the latest round
        self._current: List[Tuple[str, ...]] = []
        self._complete: Optional[List[Tuple[str, ...]]] = None
        self._compared = False

    @property
    def rounds(self) -> List[Tuple[str, ...]]:
        """The names of the layers of each round, in the order of the rounds."""
        return list(self._current if self._complete is None else self._complete)

    def start(self) -> None:
        """Notes that the model's forward begins."""
        self._marked, self._last = True, None

    def add(self, layers: Tuple[str, ...], before: int, after: int) -> bool:
        """Adds a round; returns ``True`` once, if a complete step has more different rounds than planned.

        Args:
            layers: the names of the layers of the round.
            before: the number of rounds of the channel before this round.
            after: their number after this round.
        """
        found, others = False, self._last is not None and before != self._last
        self._marked, ends = self._marked or others, others or (self._marked and self._last is None)
        if self._current and (ends or (not self._marked and self._current[0] == layers)):
            self._complete, self._current = self._current, []
            if not self._compared and self.planned is not None:
                # Other rounds than planned; a module that runs twice repeats its rounds.
                found = self._compared = len(set(self._complete)) > self.planned.rounds_forward
        self._last = after
        if len(self._current) < _MOST_ROUNDS:
            self._current.append(layers)
        return found

    def calls_of(self, layer: str) -> int:
        """Returns how often a layer took part in a round of the step."""
        return sum(names.count(layer) for names in self.rounds)
