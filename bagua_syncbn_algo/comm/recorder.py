"""Records of statistics rounds: when each was launched, waited for and finished, and how much of it was exposed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Tuple

__all__ = ["RoundRecord", "RoundRecords", "active", "record_rounds"]


@dataclass
class RoundRecord:
    """One round of statistics. Times are ``time.perf_counter()`` seconds of the host."""

    layers: Tuple[str, ...]
    phase: str  # forward, backward or running
    bytes: int  # sent by this rank
    step: int  # training forwards of the wrapped model before it
    launch: float
    wait: Optional[float] = None  # when the host or stream began to wait for it
    finish: Optional[float] = None  # when its result was there

    @property
    def duration(self) -> float:
        """Seconds from launch to finish; 0 while it is in flight."""
        return 0.0 if self.finish is None else self.finish - self.launch

    @property
    def exposed(self) -> float:
        """Seconds of its duration for which something waited; 0 if nothing has waited yet."""
        if self.finish is None or self.wait is None:
            return 0.0
        return max(0.0, self.finish - max(self.wait, self.launch))


@dataclass
class RoundRecords:
    """The rounds of a recorded block, in order of launch."""

    rounds: List[RoundRecord] = field(default_factory=list)
    step: int = 0

    def next_step(self) -> None:
        """Begins a step; the algorithm calls it before each training forward, elsewhere the user may."""
        self.step += 1

    def launch(self, layers: Tuple[str, ...], phase: str, size: int) -> RoundRecord:
        """Notes that a round of ``size`` bytes starts now."""
        entry = RoundRecord(layers, phase, size, self.step, time.perf_counter())
        self.rounds.append(entry)
        return entry

    def by_step(self) -> Dict[int, List[RoundRecord]]:
        """Returns the rounds of each step."""
        steps: Dict[int, List[RoundRecord]] = {}
        for entry in self.rounds:
            steps.setdefault(entry.step, []).append(entry)
        return steps

    def exposed(self) -> Dict[int, float]:
        """Returns the exposed seconds of each step."""
        return {step: sum(entry.exposed for entry in entries) for step, entries in self.by_step().items()}

    def __iter__(self) -> Iterator[RoundRecord]:
        return iter(self.rounds)

    def __len__(self) -> int:
        return len(self.rounds)


_active: Optional[RoundRecords] = None


def active() -> Optional[RoundRecords]:
    """Returns the record that is being written, or ``None``: then a round costs this one call."""
    return _active


@contextlib.contextmanager
def record_rounds() -> Iterator[RoundRecords]:
    """Records all statistics rounds of this process while the block runs.

    On CUDA the times are the host's, which does not wait for rounds; there a round's finish is when it was enqueued.

    Returns:
        A :class:`RoundRecords`, filled as the block runs.

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
            "expected one record_rounds block at a time (got a second one inside); use the first one's result"
        )
    _active = RoundRecords()
    try:
        yield _active
    finally:
        _active = None
