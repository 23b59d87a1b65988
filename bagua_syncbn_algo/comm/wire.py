"""The message format: what a message begins with, and how ranks compare it.

Every message starts with a header that says where its rank is, so that ranks that have drifted apart get an error that
names their layers instead of a hang or silently wrong statistics.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

__all__ = [
    "BACKWARD",
    "DEFAULT_CAPACITY",
    "FAULT",
    "FORWARD",
    "FRAME_SHIFT",
    "HEADER_BYTES",
    "JOIN",
    "PHASES",
    "Header",
    "HeaderCheck",
    "Roster",
    "SyncBatchNormError",
    "SyncPoint",
    "digest",
    "sync_point",
]

FORWARD, BACKWARD, JOIN = 0, 1, 2
PHASES = ("forward", "backward", "first use")

# Header of every message: sync point, phase, flags and payload length in bytes, int64 each, never converted.
HEADER_BYTES = 32
FAULT = 1  # flag: the payload is the text of an error on the sending rank
FRAME_SHIFT = 8  # flags above this bit: index of the frame, for payloads longer than one

DEFAULT_CAPACITY = 8192  # bytes a message where no roster says what is needed: 1,019 float32 channels
_LONGEST_CAPACITY = 65536  # bytes; statistics of very wide rounds travel in several messages


class SyncBatchNormError(RuntimeError):
    """Ranks could not exchange statistics; the message names the layer and the rank."""


class SyncPoint(NamedTuple):
    """A place in the model where ranks exchange statistics."""

    key: int  # 63 bits derived from the name: equal on all ranks without any registration order
    name: str
    ordinal: int = 0  # of its model in the channel
    layers: Tuple[str, ...] = ()  # that share the message; none for one layer, which gave its name


def digest(text: str) -> int:
    """Returns 63 bits of a hash of ``text``: short enough for an int64 message, and the same on every rank."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@lru_cache(maxsize=4096)
def sync_point(name: str, ordinal: int = 0, layers: Tuple[str, ...] = ()) -> SyncPoint:
    """Returns the sync point of a layer's qualified ``name``, or a round's, in the channel's model ``ordinal``."""
    return SyncPoint(digest(f"{ordinal}/{name}"), name, ordinal, layers)


@dataclass(frozen=True, eq=False)
class Roster:
    """The layers tagged together, that is a model's; two models of one architecture are two rosters."""

    layers: Tuple[Tuple[str, int], ...] = ()  # qualified name, num_features; in the model's order
    rounds: Tuple[Tuple[str, Tuple[int, ...]], ...] = ()  # which layers share a message, in words; their num_features
    itemsize: int = 4  # bytes of one statistic: 8 where any layer has float64

    def capacity(self, itemsize: int) -> int:
        """Returns the bytes of a message for the longest statistics: header, counts, means, variances."""
        if not self.layers:
            return DEFAULT_CAPACITY
        itemsize = max(itemsize, self.itemsize)
        own_size = max(8 + 2 * features * itemsize for _, features in self.layers)
        longest = max([own_size] + [8 * len(each) + 2 * sum(each) * itemsize for _, each in self.rounds])
        # Up to a limit: every message is as long as the longest.
        return -(-(HEADER_BYTES + max(own_size, min(longest, _LONGEST_CAPACITY - HEADER_BYTES))) // 64) * 64

    def text(self) -> bytes:
        """Returns one line a layer and round, for the comparison between ranks."""
        layers = [f"{name} with {features} features" for name, features in self.layers]
        return "\n".join([*layers, *(words for words, _ in self.rounds)]).encode()


class Header(NamedTuple):
    """What each message begins with, on the host and on the device."""

    words: List[int]  # sync point, phase, flags, payload length
    bytes: Tensor


class HeaderCheck:
    """Compares all ranks' headers with this rank's, at once on the CPU, once they have arrived on CUDA."""

    def __init__(self, gathered: Tensor, mine: List[int], point: SyncPoint, phase: int) -> None:
        self._mine, self._point, self._phase, self._event = mine, point, phase, None
        if gathered.is_cuda:
            stream = torch.cuda.current_stream(
                gathered.device
            )  # of the layers' device, which may not be the current one
            gathered = gathered.to("cpu", non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(stream)
        self._gathered = gathered

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def finish(self, own_rank: int, names: Dict[int, str]) -> None:
        """Waits for the headers and compares them.

        Args:
            own_rank: this rank's number in the group.
            names: of the sync points that this rank knows, by key.

        Raises:
            SyncBatchNormError: if another rank failed, is elsewhere, or sent another length.
        """
        if self._event is not None:
            self._event.synchronize()
        mine = self._mine
        rows: List[List[int]] = self._gathered[:, :HEADER_BYTES].view(torch.int64).tolist()
        if all(row == mine for row in rows):
            return
        name, phase = self._point.name, PHASES[self._phase]
        for rank, (_, _, flags, length) in enumerate(rows):
            if flags & FAULT and rank != own_rank:
                text = bytes(self._gathered[rank, HEADER_BYTES : HEADER_BYTES + length].tolist())
                raise SyncBatchNormError(
                    f"expected rank {rank} to send statistics at {name} ({phase}) "
                    f"(got its error: {text.decode(errors='replace')}); mend that rank, the others only waited for it"
                )
        if any(row[:2] != mine[:2] for row in rows):
            places = ", ".join(
                f"rank {rank} at {names.get(key, 'a layer unknown here')} ({PHASES[phase_]})"
                for rank, (key, phase_, _, _) in enumerate(rows)
            )
            raise SyncBatchNormError(
                f"expected every rank to be at the same layer (got {places}); make all ranks run the same "
                "synchronized layers in the same order, and skip a layer on every rank or on none"
            )
        lengths = ", ".join(f"{row[3]} bytes on rank {rank}" for rank, row in enumerate(rows))
        raise SyncBatchNormError(
            f"expected statistics of one length at {name} ({phase}) (got {lengths}); "
            "give every rank the same num_features and input dtype"
        )
