"""Stream operations for CUDA, and a null object with the same interface for the CPU."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import Any, ContextManager, Iterable, Iterator

import torch

__all__ = ["CpuStreams", "CudaStreams"]


class CpuStreams:
    """Stream operations of the CPU, which executes in program order. They do nothing."""

    #: Whether queued work may still use memory that the program has released.
    is_asynchronous = False

    def new_stream(self) -> Any:
        """Returns a stream for communication."""
        return None

    def record_event(self) -> Any:
        """Returns an event that follows all work queued on the current stream so far."""
        return None

    def ordered(self, stream: Any) -> ContextManager[None]:
        """Runs the block on ``stream``, after earlier work of the current stream and before its later work."""
        return nullcontext()

    def after(self, stream: Any, events: Iterable[Any]) -> ContextManager[None]:
        """Runs the block on ``stream``, after ``events``."""
        return nullcontext()

    def record_event_on(self, stream: Any) -> Any:
        """Returns an event that follows all work queued on ``stream`` so far."""
        return None

    def wait(self, event: Any) -> None:
        """Makes the current stream wait for ``event``."""


class CudaStreams(CpuStreams):
    """Stream operations of CUDA. None of them blocks the host."""

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

    def record_event_on(self, stream: Any) -> Any:
        return stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream().wait_event(event)
