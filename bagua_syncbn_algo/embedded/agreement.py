"""The agreement of all ranks on how a step ended; not in upstream.

A rank whose backward is broken off by an exception has sent some of its buckets, and the other ranks wait for the rest.
If it began a new step, buckets of different steps would be summed. So every synchronized backward ends with one small
message from each rank, and a rank whose step was broken off sends that message before its next forward. Then every
rank knows that the step is lost, and what the others still wait for.
"""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Sequence, Tuple

import torch

from ..comm.wire import digest

__all__ = ["Agreement", "Report"]


class Report(NamedTuple):
    """What one rank says at the end of a step."""

    model: int  # whose step it is
    steps: int  # reported so far, this one among them
    ended: int  # of them that ended without an error on this rank
    took_part: bool  # whether this rank has begun to send gradients
    broken_off: bool  # whether an exception broke off this step
    counts: Tuple[int, ...]  # of the algorithm's own messages


class Agreement:
    """Exchanges the reports of all ranks.

    Args:
        group: a communicator for CPU tensors that carries nothing else.
        model: name of the model; the same on every rank.
    """

    def __init__(self, group: Any, model: str) -> None:
        self._group = group
        self._model = digest(model)
        self._steps = self._ended = 0

    def report(self, took_part: bool, broken_off: bool, counts: Sequence[int]) -> Callable[[], List[Report]]:
        """Sends this rank's report.

        Args:
            took_part: see :class:`Report`.
            broken_off: see :class:`Report`.
            counts: see :class:`Report`; as many on every rank.

        Returns:
            What waits for the reports of all ranks, and returns them in rank order.

        Collectives:
            One all-gather. Every rank of the group must call.
        """
        self._steps += 1
        mine = torch.tensor([self._model, self._steps, self._ended, took_part, broken_off, *counts])
        rows = mine.new_empty((self._group.size(), mine.numel()))
        work = self._group.allgather([list(rows.unbind(0))], [mine])

        def wait() -> List[Report]:
            work.wait()
            return [
                Report(model, steps, ended, bool(part), bool(broken), tuple(counts))
                for model, steps, ended, part, broken, *counts in rows.tolist()
            ]

        return wait

    def end_well(self) -> None:
        """Counts the step as one that ended without an error on this rank."""
        self._ended += 1
