"""The agreement of all ranks on how a step ended. Not in upstream.

A rank whose backward was interrupted by an exception has sent some of its buckets, and the other ranks wait for the
remaining ones. If that rank began a new step, buckets of different steps would be summed. Therefore every synchronized
backward ends with one small message from each rank. A rank whose step was interrupted sends this message before its
next forward. Every rank then detects the failed step, and which messages the other ranks still wait for.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any, Callable, List, NamedTuple, Sequence, Tuple

import torch

from ..comm.groups import is_destroyed
from ..comm.wire import digest

__all__ = ["Agreement", "Report"]


class Report(NamedTuple):
    """The report of one rank at the end of a step."""

    model: int  # digest of the model's name
    steps: int  # number of reports so far, this one included
    completed: int  # number of earlier steps that ended without an error on this rank
    optimizer_steps: int  # number of steps of the model's optimizers so far
    participates: bool  # whether this rank sends gradients in this step
    interrupted: bool  # whether an exception interrupted this step on this rank
    counts: Tuple[int, ...]  # number of messages sent on each communicator of the algorithm


class Agreement:
    """The exchange of reports between all ranks.

    Args:
        group: a communicator for CPU tensors that carries no other messages.
        model: the name of the model; the same on every rank.
        communicator: that of the same ranks, which explains errors.
    """

    def __init__(self, group: Any, model: str, communicator: Any) -> None:
        # A weak reference: after destroy_process_group, a model would keep the threads and the store of the group.
        self._group, self._size = weakref.ref(group), group.size()
        self._communicator, self._name = communicator, model
        self._model = digest(model)
        self._steps = self._completed = 0

    def report(
        self, optimizer_steps: int, participates: bool, interrupted: bool, counts: Sequence[int]
    ) -> Callable[..., List[Report]]:
        """Starts the exchange of this rank's report.

        Args:
            optimizer_steps: the number of steps of the model's optimizers so far.
            participates: whether this rank sends gradients in this step.
            interrupted: whether an exception interrupted this step on this rank.
            counts: number of messages sent on each communicator of the algorithm; of one length on all ranks.

        Returns:
            A function that waits for the reports of all ranks and returns them in rank order. Its argument is whether
            it describes a failure, which takes seconds; ``True`` by default.

        Raises:
            SyncBatchNormError: from waiting, if a rank terminates or does not arrive. A ``RuntimeError`` of the
                collective if it is not described.

        Collectives:
            One all-gather. Every rank of the group must call.
        """
        self._steps += 1
        numbers = [self._model, self._steps, self._completed, optimizer_steps]
        own = torch.tensor([*numbers, participates, interrupted, *counts], device="cpu")
        rows = own.new_empty((self._size, own.numel()))
        # The place is taken before the wait, on all ranks in the same order.
        explaining = self._communicator.explaining(f"the end of step {self._steps} of {self._name}", "end the step")
        failure = None
        try:
            group: Any = self._group()
            if is_destroyed(group):
                raise RuntimeError(
                    "expected the process group of the model to exist (got a destroyed one); call with_bagua again "
                    "after init_process_group"
                )
            work = group.allgather([list(rows.unbind(0))], [own])
        except RuntimeError as error:
            failure = error

        def wait(describes: bool = True) -> List[Report]:
            with explaining if describes else contextlib.nullcontext():
                if failure is not None:
                    raise failure
                work.wait()
            return [
                Report(model, steps, completed, stepped, bool(participates), bool(interrupted), tuple(counts))
                for model, steps, completed, stepped, participates, interrupted, *counts in rows.tolist()
            ]

        return wait

    def count_completed(self) -> None:
        """Counts the current step as completed without an error on this rank."""
        self._completed += 1
