"""The message format: its version, sync points, rosters and the header of a message.

Every message starts with a header that identifies the sync point of its rank. Ranks at different sync points raise an
error that names their layers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import torch
from torch import Tensor

from .errors import SyncBatchNormError
from .recorder import StepObserver

__all__ = [
    "BACKWARD",
    "DEFAULT_CAPACITY",
    "FAULT",
    "FORWARD",
    "FRAME_SHIFT",
    "FUSED",
    "HEADER_BYTES",
    "HeaderCache",
    "JOIN",
    "MESSAGE_VERSION",
    "JOINED",
    "PHASES",
    "Header",
    "Roster",
    "SyncBatchNormError",
    "SyncPoint",
    "SyncTag",
    "TRITON",
    "digest",
    "is_capturing",
    "phase_name",
    "put_bounded",
    "sync_point",
]

_K = TypeVar("_K")
_V = TypeVar("_V")
_MOST_ENTRIES = 16384

FORWARD, BACKWARD, JOIN = 0, 1, 2
PHASES = ("forward", "backward", "first use")

# The version of the messages and of their order. Increase it with every change of either: ranks compare it before the
# first message of a channel, because messages of other lengths end the process.
MESSAGE_VERSION = 1

# The header of every message: sync point, phase, flags and payload length in bytes. Each is an int64 that is sent as
# bytes, never converted.
HEADER_BYTES = 32
FAULT = 1  # flag: the payload is the text of an error of the sending rank
FUSED = 2  # flag: the payload has the statistics of the fused kernels: 1/√(variance + eps) instead of variances
TRITON = 4  # flag: the payload is for the Triton kernel
JOINED = 8  # flag: an empty shard of any round, from a rank whose data have ended; see `finished`
FRAME_SHIFT = 8  # the bits of the flags from this one on: index of the frame, for payloads of several frames

DEFAULT_CAPACITY = 8192  # bytes per message for an empty roster: up to 1,019 float32 channels
_LONGEST_CAPACITY = 65536  # bytes per message; larger rounds of several layers are split over several messages


class SyncPoint(NamedTuple):
    """A point in the model at which ranks exchange statistics.

    Attributes:
        key: 63 bits derived from the ordinal and the name, equal on all ranks independent of the order of registration.
        name: the name of the layer or round.
        ordinal: the number of the model's roster in the channel.
        layers: the names of the layers that share the message; empty for a single layer.
    """

    key: int
    name: str
    ordinal: int = 0
    layers: Tuple[str, ...] = ()


def digest(text: str) -> int:
    """Returns a 63-bit hash of ``text``, which fits into an int64 and is equal on all ranks."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=4096)
def sync_point(name: str, ordinal: int = 0, layers: Tuple[str, ...] = ()) -> SyncPoint:
    """Returns the sync point of a layer or round.

    Args:
        name: the qualified name of the layer, or the name of the round.
        ordinal: the number of the model's roster in the channel.
        layers: the names of the layers that share the message; empty for a single layer.
    """
    return SyncPoint(digest(f"{ordinal}/{name}"), name, ordinal, layers)


def _no_state(process_group: Any) -> int:
    return 0


@dataclass(frozen=True, eq=False)
class Roster:
    """The layers of a model, which are tagged together. Two models of one architecture have two rosters.

    Attributes:
        layers: the qualified name and ``num_features`` of each layer, in the order of the model.
        rounds: for each round a line of text that names its layers, and their ``num_features``.
        itemsize: the bytes per statistic: 4, or 8 if any layer has float64 parameters.
        settings: for each layer, a text with its other settings that must be equal on all ranks; empty if unknown.
        observer: records the rounds of these layers on this rank.
        remarks: returns lines about the model on this rank that explain a difference to other ranks.
        state: returns the digest of the running statistics of the layers with a process group; 0 if it is unknown.
    """

    layers: Tuple[Tuple[str, int], ...] = ()
    rounds: Tuple[Tuple[str, Tuple[int, ...]], ...] = ()
    itemsize: int = 4
    settings: Tuple[str, ...] = ()
    observer: StepObserver = field(default_factory=StepObserver, repr=False)
    remarks: Callable[[], Sequence[str]] = field(default=tuple, repr=False)
    state: Callable[[Any], int] = field(default=_no_state, repr=False)

    def capacity(self, itemsize: int) -> int:
        """Returns the bytes of a message for the largest round: header, counts, means and variances.

        Args:
            itemsize: the bytes per statistic, if larger than :attr:`itemsize`.
        """
        if not self.layers:
            return DEFAULT_CAPACITY
        itemsize = max(itemsize, self.itemsize)
        own_size = max(8 + 2 * features * itemsize for _, features in self.layers)
        longest = max([own_size] + [8 * len(each) + 2 * sum(each) * itemsize for _, each in self.rounds])
        # Limited, because every message has the length of the longest one.
        return -(-(HEADER_BYTES + max(own_size, min(longest, _LONGEST_CAPACITY - HEADER_BYTES))) // 64) * 64

    def text(self) -> bytes:
        """Returns one line for each layer and round, for the comparison between ranks."""
        settings = self.settings or ("",) * len(self.layers)
        layers = [f"{name} with {features} features{more}" for (name, features), more in zip(self.layers, settings)]
        return "\n".join([*layers, *(line for line, _ in self.rounds)]).encode()


class SyncTag(NamedTuple):
    """Identification of a layer in errors, tables and messages to the other ranks.

    Attributes:
        name: the qualified name of the layer, with the class name of the model as prefix.
        order: the position of the layer among the synchronized layers of the model.
        group: the global ranks that the layer normalizes over; ``None`` for all ranks.
        roster: all layers that were tagged together.
    """

    name: str
    order: int
    group: Optional[Tuple[int, ...]]
    roster: Roster


class Header(NamedTuple):
    """The header of a message, on the host and on the device."""

    words: List[int]  # sync point, phase, flags, payload length
    bytes: Tensor  # (32,), uint8


class HeaderCache:
    """The headers of the messages of a channel. On CUDA, a new header is a copy from pageable memory."""

    def __init__(self) -> None:
        self._headers: Dict[Tuple[Any, ...], Header] = {}
        self.keeps_all = False  # whether a captured CUDA graph may read any of them

    def get(self, point: SyncPoint, phase: int, flags: int, length: int, device: torch.device) -> Header:
        """Returns the header of a message on ``device``."""
        key = (point.key, phase, flags, length, device)
        header = self._headers.get(key)
        if header is None:
            with torch.inference_mode(False):  # the header outlives an inference_mode block of the caller
                words = [point.key, phase, flags, length]
                header = Header(words, torch.tensor(words, device="cpu").view(torch.uint8).to(device))
            if not flags & FAULT:
                put_bounded(self._headers, key, header, self.keeps_all)
        return header


def phase_name(phase: int) -> str:
    """Returns the phase of a header in words. The header may be corrupt."""
    return PHASES[phase] if 0 <= phase < len(PHASES) else f"no known phase: {phase}"


def is_capturing(tensor: Tensor) -> bool:
    """Returns whether the current CUDA stream captures a graph, in which the host cannot read headers."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def put_bounded(entries: Dict[_K, _V], key: _K, value: _V, keeps_all: bool = False) -> None:
    """Adds an entry; removes the oldest one if there are too many: many models use one channel, one after the other."""
    entries[key] = value
    if len(entries) > _MOST_ENTRIES and not keeps_all:
        del entries[next(iter(entries))]
