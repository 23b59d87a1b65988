"""The CUDA API that upstream Bagua's Python layer uses, for machines without CUDA: streams and events that do nothing.

The CPU executes in program order, so an event is always reached and a stream never has pending work. The shim cannot
test real streams, real events or NCCL.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from typing import Any, Iterator, Optional

import torch
import torch._dynamo  # reads torch.cuda at import, so the import comes before the shim


class Event:
    """An event that is reached as soon as it is recorded."""

    cuda_event = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Optional[Any] = None) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: Optional[Any] = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1000 * max(end.time - self.time, 1e-6)


class Stream:
    """A stream that never has pending work."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record_event(self, event: Optional[Event] = None) -> Event:
        event = Event() if event is None else event
        event.record()
        return event

    def wait_event(self, event: Event) -> None:
        pass

    def wait_stream(self, stream: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


_current = Stream()


@contextlib.contextmanager
def stream(which: Any) -> Iterator[None]:
    yield


def current_stream(device: Any = None) -> Stream:
    return _current


def nothing(*args: Any, **kwargs: Any) -> None:
    pass


def current_device() -> str:
    return "cpu"


def long_tensor(*size: Any) -> torch.Tensor:
    return torch.LongTensor(*size)


def byte_tensor(*content: Any) -> torch.Tensor:
    return torch.ByteTensor(*content)


def to_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


class _TorchForCpuChecks:
    """``torch`` with a CPU device that equals no tensor's: upstream asserts that its tensors are not on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def device(*args: Any) -> object:
        return object()


def install() -> None:
    """Installs the shim in ``torch``; then imports upstream and bypasses its checks for CPU tensors."""
    for name, value in {
        "Event": Event,
        "Stream": Stream,
        "stream": stream,
        "current_stream": current_stream,
        "current_device": current_device,
        "synchronize": nothing,
        "empty_cache": nothing,
        "LongTensor": long_tensor,
        "ByteTensor": byte_tensor,
    }.items():
        setattr(torch.cuda, name, value)
    torch.Tensor.cuda = to_cuda  # type: ignore[method-assign,assignment]
    initialize = torch.distributed.init_process_group

    def with_gloo(*args: Any, backend: str = "gloo", **kwargs: Any) -> None:
        initialize(*args, backend="gloo", **kwargs)

    torch.distributed.init_process_group = with_gloo  # upstream asks for NCCL
    communication = importlib.import_module("bagua.torch_api.communication")
    communication.torch = _TorchForCpuChecks()  # type: ignore[attr-defined]
