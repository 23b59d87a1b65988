"""The message format: sync points, the header of a message, and the comparison of headers between ranks.

Every message starts with a header that identifies the sync point of its rank. Ranks at different sync points raise an
error that names their layers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Dict, List, NamedTuple, Optional, Tuple, TypeVar

import torch
from torch import Tensor

from .recorder import StepObserver

__all__ = [
    "BACKWARD",
    "DEFAULT_CAPACITY",
    "FAULT",
    "FORWARD",
    "FRAME_SHIFT",
    "FUSED",
    "HEADER_BYTES",
    "JOIN",
    "JOINED",
    "PHASES",
    "Header",
    "Roster",
    "SyncBatchNormError",
    "SyncPoint",
    "SyncTag",
    "TRITON",
    "digest",
    "header_error",
    "is_capturing",
    "put_bounded",
    "sync_point",
]

_K = TypeVar("_K")
_V = TypeVar("_V")
_MOST_ENTRIES = 16384

FORWARD, BACKWARD, JOIN = 0, 1, 2
PHASES = ("forward", "backward", "first use")

# The header of every message: sync point, phase, flags and payload length in bytes. Each is an int64 that is sent as
# bytes, never converted.
HEADER_BYTES = 32
FAULT = 1  # flag: the payload is the text of an error of the sending rank
FUSED = 2  # flag: the payload has the statistics of the fused kernels: 1/√(variance + eps) instead of variances
TRITON = 4  # flag: the payload is for the Triton kernel
JOINED = 8  # flag: an empty shard of any round, from a rank whose data have ended; see `finished`
FRAME_SHIFT = 8  # the bits of the flags from this one on: index of the frame, for payloads of several frames

_KINDS = {FUSED: "fused", TRITON: "fused by Triton"}

DEFAULT_CAPACITY = 8192  # bytes per message for an empty roster: up to 1,019 float32 channels
_LONGEST_CAPACITY = 65536  # bytes per message; larger rounds of several layers are split over several messages


class SyncBatchNormError(RuntimeError):
    """An exchange of statistics failed. The message names the layer and the rank."""


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


@dataclass(frozen=True, eq=False)
class Roster:
    """The layers of a model, which are tagged together. Two models of one architecture have two rosters.

    Attributes:
        layers: the qualified name and ``num_features`` of each layer, in the order of the model.
        rounds: for each round a line of text that names its layers, and their ``num_features``.
        itemsize: the bytes per statistic: 4, or 8 if any layer has float64 parameters.
        observer: records the rounds of these layers on this rank.
    """

    layers: Tuple[Tuple[str, int], ...] = ()
    rounds: Tuple[Tuple[str, Tuple[int, ...]], ...] = ()
    itemsize: int = 4
    observer: StepObserver = field(default_factory=StepObserver, repr=False)

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
        layers = [f"{name} with {features} features" for name, features in self.layers]
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


def is_capturing(tensor: Tensor) -> bool:
    """Returns whether the current CUDA stream captures a graph, in which the host cannot read headers."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def put_bounded(entries: Dict[_K, _V], key: _K, value: _V, keeps_all: bool = False) -> None:
    """Adds an entry; removes the oldest one if there are too many: many models use one channel, one after the other."""
    entries[key] = value
    if len(entries) > _MOST_ENTRIES and not keeps_all:
        del entries[next(iter(entries))]


def header_error(
    rows: List[List[int]],
    words: List[int],
    point: SyncPoint,
    phase: int,
    gathered: Tensor,
    own_rank: int,
    names: Dict[int, str],
) -> SyncBatchNormError:
    """Returns the error for a round whose headers differ.

    Args:
        rows: the headers of all ranks.
        words: the header of this rank.
        point: the sync point of this rank.
        phase: the phase of this rank.
        gathered: the messages of all ranks, ``(W, capacity)``.
        own_rank: the number of this rank in the channel.
        names: the names of this rank's sync points, by key.
    """
    name, phase_name = point.name, PHASES[phase]
    for rank, (_, _, flags, length) in enumerate(rows):
        if flags & FAULT and rank != own_rank:
            text = bytes(gathered[rank, HEADER_BYTES : HEADER_BYTES + length].tolist())
            return SyncBatchNormError(
                f"expected rank {rank} to send statistics at {name} ({phase_name}) "
                f"(got its error: {text.decode(errors='replace')}); fix the error on that rank"
            )
    if any(row[:2] != words[:2] for row in rows):
        places = ", ".join(
            f"rank {rank} at {names.get(key, 'a layer unknown on this rank')} ({PHASES[phase_]})"
            for rank, (key, phase_, _, _) in enumerate(rows)
        )
        return SyncBatchNormError(
            f"expected every rank to be at the same layer (got {places}); make all ranks run the same "
            "synchronized layers in the same order, and skip a layer on all ranks or on none"
        )
    kinds = [_KINDS.get(row[2] & (FUSED | TRITON), "exact") for row in rows]
    if len(set(kinds)) > 1:
        found = ", ".join(f"{kind} on rank {rank}" for rank, kind in enumerate(kinds))
        return SyncBatchNormError(
            f"expected statistics of one kind at {name} ({phase_name}) (got {found}); use the same input dtype, eps, "
            "momentum and dtype of the running statistics on all ranks, and Triton on all ranks or on none "
            "(BAGUA_SYNCBN_TRITON=0)"
        )
    lengths = ", ".join(f"{row[3]} bytes on rank {rank}" for rank, row in enumerate(rows))
    return SyncBatchNormError(
        f"expected statistics of one length at {name} ({phase_name}) (got {lengths}); "
        "use the same num_features and input dtype on all ranks"
    )
