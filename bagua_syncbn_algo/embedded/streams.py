"""CUDA streams, and their null object for the CPU, so that nothing else asks which device it runs on."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any, ContextManager, Iterable, Iterator

import torch

__all__ = ["CpuStreams", "CudaStreams"]


class CpuStreams:
    """The CPU has one order of execution: the program's."""

    #: Whether work may still be queued on memory that the program has let go.
    is_asynchronous = False

    def new_stream(self) -> Any:
        """Returns a stream for communication."""
        return None

    def record_event(self) -> Any:
        """Returns an event behind all that the current stream has been given so far."""
        return None

    def ordered(self, stream: Any) -> ContextManager[None]:
        """Runs the block on ``stream``, after what the current stream holds and before what it is given next."""
        return nullcontext()

    def after(self, stream: Any, events: Iterable[Any]) -> ContextManager[None]:
        """Runs the block on ``stream``, after ``events``."""
        return nullcontext()

    def event_behind(self, stream: Any) -> Any:
        """Returns an event behind all that ``stream`` has been given so far."""
        return None

    def wait(self, event: Any) -> None:
        """Makes the current stream wait for ``event``."""


class CudaStreams(CpuStreams):
    """The same on CUDA; nothing here makes the host wait."""

    is_asynchronous = True

    def new_stream(self) -> Any:
        return torch.cuda.Stream(priority=-1)

    def record_event(self) -> Any:
        return torch.cuda.current_stream().record_event()

    @contextmanager
    def ordered(self, stream: Any) -> Iterator[None]:
        current = torch.cuda.current_stream()
        stream.wait_event(current.record_event())
        with torch.cuda.stream(stream):
            yield
        current.wait_event(stream.record_event())

    @contextmanager
    def after(self, stream: Any, events: Iterable[Any]) -> Iterator[None]:
        for event in events:
            stream.wait_event(event)
        with torch.cuda.stream(stream):
            yield

    def event_behind(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream().wait_event(event)
